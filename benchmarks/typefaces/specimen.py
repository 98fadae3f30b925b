# SPDX-License-Identifier: Apache-2.0
"""Sheets to look at: photos of fonts, and the specimen of read ones."""

from __future__ import annotations

import json
from dataclasses import replace
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import torch
from convergence import parse
from domains import DOMAINS
from encoder_world import Recipe, World
from PIL import Image
from torch import Tensor

from peft_metalora.checkpoint.reader_files import ENCODER_CONFIG_FILE, ENCODER_FILE
from peft_metalora.checkpoint.space import load_space
from peft_metalora.checkpoint.untrusted import read_tensors
from peft_metalora.demo.scoring import to_pil
from peft_metalora.demo.sheet import Row, sheet
from peft_metalora.encoder import EncoderConfig, make_encoder
from peft_metalora.evaluation.rivals import RIVALS, put_on, take_off, vmap_ready
from peft_metalora.training.engine.stacked import train_stack

from .domain import Typefaces
from .glyphs import CHARACTERS
from .scene import captions

SHOWN = "ABEGMQRSabcdefghikmnpqrsty2345"
_RATE, _TUNED, _WARM_UP = 3e-4, 25, 10


def photos(assets: Path, output: Path, fonts: int = 14, count: int = 12) -> None:
    """Some fonts of each split, a row each: photos as networks see them, the reference first."""
    domain, rows = Typefaces(assets, most=fonts), []
    for split in ("held-out", "meta", "base", "tune"):
        for number in range(min(fonts, len(domain.glyphs.splits[split]))):
            images, _ = domain.photos(split, number, count)
            name = domain.glyphs.names[domain.glyphs.splits[split][number]]
            rows.append(Row(f"{name[:18]}\n{split}", [to_pil(image) for image in images]))
    generator = torch.Generator().manual_seed(0)
    identities = domain.sample_identities(fonts, generator, "base")
    for one in identities:
        each = one.expand(count, -1)
        images = domain.render(each, domain.sample_scenes(each, generator))
        rows.append(Row(f"multiplied\n{[round(x, 2) for x in one[1:].tolist()]}", [to_pil(image) for image in images]))
    sheet(rows).save(output)


def specimen(assets: Path, output: Path, fonts: int = 6, lora_steps: int = 100) -> None:
    """`specimen.png`: of held-out fonts the reference, the true alphabet, ours at 0 and 25 steps, and LoRA's."""
    args = parse(["--domain", "typefaces", "--assets", str(assets), "--output", str(output), "--split", "held-out"])
    args.people = fonts
    setting = DOMAINS["typefaces"](assets, torch.device(args.device))
    domain: Any = setting.domain
    world = World(args, ThreadPool(1), domain, setting.down)
    people = world.known()
    recipe = Recipe(**json.loads((output / "main-0.json").read_text())["recipe"])
    with vmap_ready():
        space = load_space(output / "main-0").to(world.device)
        facts = json.loads((output / "main-0" / ENCODER_CONFIG_FILE).read_text())
        kept = {name: facts[name] for name in EncoderConfig.__dataclass_fields__ if name in facts}
        encoder = make_encoder(EncoderConfig(**kept), world.base.encode_images)
        encoder.load_state_dict(read_tensors(output / "main-0" / ENCODER_FILE))
        encoder = encoder.to(world.device).float().eval()
        with torch.no_grad():
            subjects = space(encoder(world.seen(people.photos[:, 0], recipe)))
        count = len(people.names)
        of_alphabet(world, domain)
        drawn = {}
        stack = world.put(world.base, recipe, count)
        stack.values.copy_(subjects)
        drawn["read, 0 steps"] = world.draw(stack, count, [0])
        options = {"batch_size": 4, "seed": 0, "graph": args.graph}
        warm = train_stack(
            world.base,
            stack,
            people.examples,
            steps=_TUNED,
            lr=_RATE,
            schedule=lambda number: min(1.0, (number + 1) / _WARM_UP),
            **options,
        )
        for _ in warm:
            pass
        drawn[f"{_TUNED} steps more"] = world.draw(stack, count, [0])
        world.take_off(world.base)
        rate = best_rate(output / "rivals-lora_r1.json")
        stack = put_on(world.base, RIVALS["lora_r1"], world.down, world.config, count, [0])
        for _ in train_stack(world.base, stack, people.examples, steps=lora_steps, lr=rate, **options):
            pass
        drawn[f"LoRA, {lora_steps} steps"] = world.draw(stack, count, [0])
        take_off(world.base)
    true = true_alphabet(domain, people.identity)
    rows = []
    for number in range(count):
        reference = Image.fromarray(people.photos[number, 0])
        font = domain.glyphs.names[int(people.identity[number, 0])]
        for label, images in {f"{font[:20]}\nthe font": true, **drawn}.items():
            own = images.unflatten(0, (count, -1))[number].cpu()
            shown = [reference if label.endswith("font") else Image.new("RGB", reference.size, "#fbfaf7")]
            rows.append(Row(label, [*shown, *(to_pil(image) for image in own)]))
    whole = sheet(rows)
    whole.resize((whole.width // 2, whole.height // 2), Image.Resampling.LANCZOS).save(output / "specimen.png")


def of_alphabet(world: World, domain: Typefaces) -> None:
    """Have a world draw `SHOWN`, each letter in black on white paper, instead of its prompts."""
    world.prompts = captions(_plain_scenes(domain, torch.device("cpu")))
    world.text = {name: one.to(world.device) for name, one in world.base.encode_text(world.prompts).items()}


def true_alphabet(domain: Typefaces, identity: Tensor) -> Tensor:
    """Renders (fonts * letters, 3, 64, 64) of what was asked for."""
    scenes = _plain_scenes(domain, torch.device("cpu"))
    return torch.cat([domain.render(one.expand(len(scenes), -1), scenes) for one in identity])


def _plain_scenes(domain: Typefaces, device: torch.device) -> Any:
    generator = torch.Generator(device).manual_seed(0)
    any_font = torch.tensor(domain.glyphs.splits["held-out"][:1], device=device).float()
    identity = torch.nn.functional.pad(any_font[:, None], (0, 4)).expand(len(SHOWN), -1)
    scenes = domain.sample_scenes(identity, generator)
    zero = torch.zeros_like(scenes.turn)
    first = torch.zeros_like(scenes.ink)
    names = ("turn", "shift_x", "shift_y", "light_x", "light_y", "strength", "ink_tone", "paper_tone", "blur")
    return replace(
        scenes,
        glyph=torch.tensor([CHARACTERS.index(character) for character in SHOWN], device=device),
        **dict.fromkeys(("ink", "paper", "pattern"), first),
        light=first + 1,
        scale=zero + 1,
        **dict.fromkeys(names, zero),
    )


def best_rate(path: Path) -> float:
    """The rate of LoRA, rank 1, that tune people chose."""
    methods = json.loads(path.read_text())["methods"] if path.exists() else {}
    return float(methods["lora_r1"]["learning_rate"]) if "lora_r1" in methods else 1e-2
