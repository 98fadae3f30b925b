# SPDX-License-Identifier: Apache-2.0
"""Sheets to look at: photos of fonts, and the specimen of read ones."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from convergence import parse
from domains import DOMAINS
from encoder_world import Recipe, World
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from peft_metalora.checkpoint.reader_files import ENCODER_CONFIG_FILE, ENCODER_FILE
from peft_metalora.checkpoint.space import load_space
from peft_metalora.checkpoint.untrusted import read_tensors
from peft_metalora.demo.embedded import RESOLUTION
from peft_metalora.demo.scoring import to_pil
from peft_metalora.demo.sheet import Font, Row, sheet, wrapped
from peft_metalora.encoder import EncoderConfig, make_encoder
from peft_metalora.evaluation.rivals import RIVALS, put_on, take_off, vmap_ready
from peft_metalora.training.engine.stacked import train_stack

from .domain import Typefaces
from .glyphs import CHARACTERS
from .scene import captions

SHOWN = "AEGMQRaegmqr25"
"""Letters of the specimen: some that no reference shows, in both cases."""
_RATE, _TUNED, _WARM_UP = 3e-4, 25, 10

_PAPER, _INK, _GREY = "#fbfaf7", "#1f2328", "#57606a"
_CUT = 6, 2  # pixels that are left out at the sides of a letter's picture, and above and below
_LETTER, _REFERENCE = 58, 150  # width of a letter and of the reference on the sheet
_MARGIN, _LABEL, _GAP, _BETWEEN = 22, 196, 4, 30
_TEXT, _SMALL = 17, 15
_GREYS = 17  # between two that letters are drawn in: the file is half as large
_AROUND, _WHITE = 9, 0.94  # pixels; the share of a paper's brightness that counts as white


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


@dataclass(frozen=True)
class Specimen:
    """One font: its name, the photo that is read, and `tiles` of letters by what drew them, in that order."""

    name: str
    reference: Image.Image
    letters: Mapping[str, Sequence[Image.Image]]


def specimen(assets: Path, output: Path, fonts: int = 3, lora_steps: int = 100) -> None:
    """`specimen.png`: of the first held-out fonts the reference, the true letters, and those of ours and of LoRA."""
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
        drawn = {"the font itself": true_alphabet(domain, people.identity)}
        stack = world.put(world.base, recipe, count)
        stack.values.copy_(subjects)
        drawn["read from the one glyph,\nno training"] = world.draw(stack, count, [0])
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
        drawn[f"the same, tuned on it\nfor {_TUNED} steps"] = world.draw(stack, count, [0])
        world.take_off(world.base)
        rate = best_rate(output / "rivals-lora_r1.json")
        stack = put_on(world.base, RIVALS["lora_r1"], world.down, world.config, count, [0])
        for _ in train_stack(world.base, stack, people.examples, steps=lora_steps, lr=rate, **options):
            pass
        drawn[f"LoRA of rank 1, trained\non it for {lora_steps} steps"] = world.draw(stack, count, [0])
        take_off(world.base)
    found = []
    for number in range(count):
        name = domain.glyphs.names[int(people.identity[number, 0])]
        own = {label: tiles(images.unflatten(0, (count, -1))[number].cpu()) for label, images in drawn.items()}
        found.append(Specimen(name, Image.fromarray(people.photos[number, 0]), own))
    of_specimens(found).save(output / "specimen.png", optimize=True)


def of_specimens(fonts: Sequence[Specimen]) -> Image.Image:
    """The sheet: a block for each font, the reference at the left, a row for each way, letters in columns."""
    font, small = ImageFont.load_default(_TEXT), ImageFont.load_default(_SMALL)
    first = next(iter(fonts[0].letters.values()))
    ways, count, height = len(fonts[0].letters), len(first), first[0].height + _GAP
    left = _MARGIN + _REFERENCE + _MARGIN + _LABEL
    names = [wrapped(_cut_to(_REFERENCE, one.name, small), _REFERENCE, small) for one in fonts]
    most = max(len(lines) for lines in names)
    block = max(ways * height, _REFERENCE + (3 + most) * _TEXT) + _BETWEEN
    size = left + count * (_LETTER + _GAP) + _MARGIN, _MARGIN + len(fonts) * block
    page = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(page)
    for number, one in enumerate(fonts):
        top = _MARGIN + number * block
        draw.text((_MARGIN, top), "The glyph that is read", _GREY, small)
        side = _REFERENCE, _REFERENCE
        page.paste(one.reference.resize(side, Image.Resampling.LANCZOS), (_MARGIN, top + _TEXT + 6))
        draw.multiline_text((_MARGIN, top + _TEXT + _REFERENCE + 12), "\n".join(names[number]), _INK, small)
        for row, (label, letters) in enumerate(one.letters.items()):
            above = top + row * height
            text = left - _LABEL, above + height // 2
            draw.multiline_text(text, label, _INK, font, anchor="lm", spacing=5)
            for column, shown in enumerate(letters):
                page.paste(shown, (left + column * (_LETTER + _GAP), above))
    return page


def tiles(letters: Tensor) -> list[Image.Image]:
    """Pictures (n, 3, 64, 64) of letters as the sheet shows them: ink on white, in few greys."""
    across, down = _CUT
    size = _LETTER, round(_LETTER * (RESOLUTION - 2 * down) / (RESOLUTION - 2 * across))
    found = []
    for image in on_white(letters):
        picture = to_pil(image[:, down : RESOLUTION - down, across : RESOLUTION - across]).convert("L")
        shown = picture.resize(size, Image.Resampling.LANCZOS)
        found.append(shown.point([round(level / _GREYS) * _GREYS for level in range(256)]))
    return found


def _cut_to(width: int, name: str, font: Font) -> str:
    """A name of which no word is wider than that many pixels."""
    words = name.split()
    for number, word in enumerate(words):
        while font.getlength(word) > width:
            word = word[:-2] + "-"
        words[number] = word
    return " ".join(words)


def on_white(images: Tensor) -> Tensor:
    """Pictures (n, 3, h, w) of black ink on white paper as ink alone: the light that falls on paper, and tints, go."""
    grey = images.mean(1, keepdim=True)
    reach = 2 * _AROUND + 1  # wider than strokes are
    paper = -F.max_pool2d(-F.max_pool2d(grey, reach, 1, _AROUND), reach, 1, _AROUND)
    paper = F.avg_pool2d(paper, reach, 1, _AROUND, count_include_pad=False)
    return (grey / (_WHITE * paper).clamp(min=0.2)).clamp(0, 1).expand(-1, 3, -1, -1)


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
