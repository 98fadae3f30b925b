# SPDX-License-Identifier: Apache-2.0
"""What the tests of both stages share: a tiny base on disk, people of noise, examples in memory, short settings."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import FluxPipeline
from PIL import Image

from peft_metalora import MetaLoraConfig, load_down, save_down
from peft_metalora.bases import Base, base_for
from peft_metalora.encoder import EncoderConfig, SubjectSpace, make_encoder, save_reader
from peft_metalora.metrics import Embeddings, Face
from peft_metalora.training.examples.batches import Examples
from peft_metalora.training.examples.encoding import encode_captions
from peft_metalora.training.stage_settings import MetaTrainConfig, PersonalizeConfig
from pipelines_tiny import save_tiny_flux, tiny_flux_pipeline

CAPTIONS = ["a photo of a person , facing left", "a red shirt"]


def tiny_base() -> Base:
    return base_for(tiny_flux_pipeline())


def tiny_examples(base: Base, subjects: int = 3, each: int = 2, seed: int = 0) -> Examples:
    count = subjects * each
    latents = torch.randn(count, 4, 4, 4, generator=torch.Generator().manual_seed(seed))
    owners = torch.arange(subjects).repeat_interleave(each)
    return Examples(latents, encode_captions(base, CAPTIONS), torch.arange(count) % len(CAPTIONS), owners)


def write_people(
    folder: Path, subjects: int = 3, each: int = 2, sizes: Sequence[tuple[int, int]] = ((20, 24),)
) -> Path:
    """Noise images in the layout of real data; their sizes (width, height) come in turn."""
    generator = torch.Generator().manual_seed(0)
    for subject in range(subjects):
        place = folder / f"person-{subject}"
        place.mkdir(parents=True)
        lines = []
        for number in range(each):
            width, height = sizes[(subject * each + number) % len(sizes)]
            pixels = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(place / f"{number}.png")
            lines.append(json.dumps({"file_name": f"{number}.png", "text": CAPTIONS[number % 2]}))
        (place / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def save_tiny_down(home: Path, *names: str) -> FluxPipeline:
    """Write a tiny base to `home/base` and a Down of seed 0 on it to `home/down`, or under each of `names`.

    Returns:
        The pipeline that holds the Down.
    """
    save_tiny_flux(home / "base")
    pipe = with_tiny_down(0)
    for name in names or ("down",):
        save_down(home / name, pipe.transformer, "faces", base_model=str(home / "base"))
    return pipe


def with_tiny_down(seed: int) -> FluxPipeline:
    """A tiny pipeline with a Down of random weights, "faces"."""
    pipe = tiny_flux_pipeline()
    torch.manual_seed(seed)
    config = MetaLoraConfig(r=2, meta_r=4, lora_alpha=2, target_modules=["to_q", "to_v"], init_weights=False)
    pipe.transformer.add_adapter(config, "faces")
    return pipe


def teach_to_read(down: Path, size: int = 6, base: Base | None = None, spread: float = 0.1, **config: Any) -> Path:
    """Lay a random subject space, whose people lie `spread` apart, and a random encoder beside a Down."""
    source = load_down(down)
    space = SubjectSpace.around(source, size)
    with torch.no_grad():
        space.basis.normal_(std=spread, generator=torch.Generator().manual_seed(0))
    of_encoder = EncoderConfig(**{"resolution": 16, "code_size": size, "width": 8, "hidden": 16, **config})
    return save_reader(down, space.rounded(), make_encoder(of_encoder, (base or tiny_base()).encode_images))


class Brightness:
    """Stands in for a face model."""

    def embed(self, images):
        vectors = torch.tensor([[image.convert("L").getextrema()[1] + 1.0, 1.0] for image in images])
        return Embeddings(torch.nn.functional.normalize(vectors, dim=-1), torch.ones(len(images), dtype=torch.bool))


class Bright:
    """Finds a face of 8 x 8 pixels where the brightest one is, in photos with one that is white."""

    def detect(self, image):
        grey = np.asarray(image.convert("L"))
        if grey.max() < 255:
            return None
        row, column = np.unravel_index(grey.argmax(), grey.shape)
        return Face((column - 4, row - 4, column + 4, row + 4))


class Corner:
    """Finds a face in the corner of every photo, of so many pixels a side."""

    def __init__(self, side: int) -> None:
        self.side = side

    def detect(self, image: Image.Image) -> Face:
        return Face((0, 0, self.side, self.side))


SHORT = {
    "pretrained_model_name_or_path": "tiny",
    "output_dir": "unused",
    "resolution": 16,
    "learning_rate": 0.01,
}


def meta_config(**changes: Any) -> MetaTrainConfig:
    own = {"rank": 2, "meta_rank": 4, "max_train_steps": 4, "warmup_steps": 1, "subjects_per_batch": 2}
    return MetaTrainConfig(**{**SHORT, **own, **changes})


def personal_config(**changes: Any) -> PersonalizeConfig:
    own = {"max_train_steps": 3, "train_batch_size": 2, "views_per_image": 2}
    return PersonalizeConfig(**{**SHORT, **own, **changes})
