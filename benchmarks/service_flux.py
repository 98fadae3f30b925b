# SPDX-License-Identifier: Apache-2.0
"""One copy of a service on FLUX.1-dev's shapes: people of one batch against the same people one by one.

    python benchmarks/service_flux.py            one GPU with 80 GB, 3 min; writes benchmarks/results/service_flux.json
    python benchmarks/service_flux.py --small    a toy on a CPU, to check the script

Random weights, bf16, 512 x 512 px, four steps; the text encoders are small and have the true ones' outputs, so that the
denoiser is nearly all there is to do, as it is with 28 steps and the true encoders. Everybody is a code, and each
request is another person's: every image brings somebody into a slot.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from flux_dev import ATTENTION, SHAPES, SMALL, with_random_weights
from origin import origin, write
from reading import CODE_SIZE, make_vae
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from peft_metalora import MetaLoraConfig, load_down, save_down
from peft_metalora.bases import base_for
from peft_metalora.demo.embedded import build_tokenizer
from peft_metalora.encoder import EncoderConfig, SubjectSpace, make_encoder, save_reader
from peft_metalora.service.artist import Artist
from peft_metalora.service.people import Person, Place
from peft_metalora.service.serve_settings import ServeConfig
from peft_metalora.service.tasks import Task

STEPS = 4


def make_pipeline(small: bool, device: torch.device) -> FluxPipeline:
    """All of FLUX.1-dev but its text encoders, which are of one layer here."""
    dtype, shapes = (torch.float32, SMALL) if small else (torch.bfloat16, SHAPES)
    tokenizer = build_tokenizer()
    texts = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    pooled, width = shapes["pooled_projection_dim"], shapes["joint_attention_dim"]
    clip = CLIPTextConfig(**texts, hidden_size=pooled, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)
    t5 = T5Config(**texts, d_model=width, d_kv=16, d_ff=64, num_layers=1, num_heads=2)
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=make_vae(small, dtype, device),
        text_encoder=CLIPTextModel(clip).to(device, dtype).eval(),
        tokenizer=tokenizer,
        text_encoder_2=T5EncoderModel(t5).to(device, dtype).eval(),
        tokenizer_2=build_tokenizer(),
        transformer=with_random_weights(partial(FluxTransformer2DModel, **shapes), dtype, device).eval(),
    )


def make_reading_down(pipe: FluxPipeline, folder: Path, small: bool) -> SubjectSpace:
    """A Down of random numbers with a random space and encoder; returns the space."""
    config = {"r": 1, "lora_alpha": 1, "meta_r": 8 if small else 128, "target_modules": ATTENTION}
    pipe.transformer.add_adapter(MetaLoraConfig(**config, init_weights=False), "faces")
    save_down(folder, pipe.transformer, "faces", base_model="random")
    pipe.transformer.delete_adapters("faces")
    space = SubjectSpace.around(load_down(folder), CODE_SIZE)
    with torch.no_grad():
        space.basis.normal_(std=0.001)
    settings = {"resolution": 16, "width": 8, "hidden": 16} if small else {}
    save_reader(
        folder,
        space.rounded(),
        make_encoder(EncoderConfig(code_size=CODE_SIZE, **settings), base_for(pipe).encode_images),
    )
    return space.rounded()


async def images_a_second(artist: Artist, tasks: list[Task]) -> float:
    """Of tasks that all wait at once, each drawn."""
    await asyncio.gather(*map(artist.draw, tasks[: len(tasks) // 4]))
    start = time.perf_counter()
    await asyncio.gather(*map(artist.draw, tasks))
    return len(tasks) / (time.perf_counter() - start)


async def measure(small: bool, count: int) -> dict[str, Any]:
    """The figures: by size of the batch, and their ratio to one by one."""
    device, side = torch.device("cpu" if small else "cuda"), 32 if small else 512
    with tempfile.TemporaryDirectory() as scratch:
        home, place = Path(scratch) / "faces", Path(scratch) / "people"
        place.mkdir()
        pipe = make_pipeline(small, device)
        space = make_reading_down(pipe, home, small)
        codes = torch.randn(count, CODE_SIZE, generator=torch.Generator().manual_seed(0)).numpy()
        people = [
            Person(
                "acme",
                f"p{n}",
                f"{n:032}",
                1,
                "made up",
                0.0,
                space.down_fingerprint,
                space.fingerprint,
                code.tobytes(),
            )
            for n, code in enumerate(codes)
        ]
        tasks = [
            Task((one,), (), "a photo of a person, smiling", None, side, side, STEPS, None, n, "jpeg")
            for n, one in enumerate(people)
        ]
        base = base_for(pipe, max_sequence_length=16 if small else 512)
        config = ServeConfig(people=str(place), down=str(home), batch_size=8, slots=8)
        artist = Artist(base, Place(str(place)), config)
        figures: dict[str, Any] = {"people": count}
        found = {}
        for batch in (1, 2, 4, 8):
            config.batch_size = batch
            found[batch] = await images_a_second(artist, tasks)
            print(f"batches of {batch}: {found[batch]:.3f} images a second", flush=True)
        figures |= {f"images_per_s_b{batch}": round(value, 3) for batch, value in found.items()}
        figures |= {f"mixed_b{batch}_over_one_by_one": round(found[batch] / found[1], 3) for batch in (2, 4, 8)}
        return figures


def main() -> None:
    """Run it and write the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--small", action="store_true", help="A toy on a CPU; writes nothing.")
    parser.add_argument("--count", type=int, default=32, help="Images of each run.")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "service_flux.json")
    options = parser.parse_args()
    with torch.no_grad():
        figures = asyncio.run(measure(options.small, options.count))
    result = {**origin("cpu" if options.small else "cuda"), "figures": figures}
    print(json.dumps(result, indent=2))
    if not options.small:
        write(options.output, result)


if __name__ == "__main__":
    main()
