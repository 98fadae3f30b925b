# SPDX-License-Identifier: Apache-2.0
"""What the tests of both stages share: a tiny base on disk, people of noise, examples in memory, short settings."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from peft_metalora import load_down
from peft_metalora.bases import Base, base_for
from peft_metalora.encoder import EncoderConfig, SubjectSpace, make_encoder, save_reader
from peft_metalora.metrics import Embeddings
from peft_metalora.training.examples.batches import Examples
from peft_metalora.training.examples.encoding import encode_captions
from peft_metalora.training.stage_settings import MetaTrainConfig, PersonalizeConfig
from pipelines_tiny import tiny_flux_pipeline

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


def teach_to_read(down: Path, size: int = 6, base: Base | None = None, **config: Any) -> Path:
    """Lay a random subject space and a random encoder beside a Down."""
    source = load_down(down)
    space = SubjectSpace.around(source, size)
    with torch.no_grad():
        space.basis.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    of_encoder = EncoderConfig(**{"resolution": 16, "code_size": size, "width": 8, "hidden": 16, **config})
    return save_reader(down, space.rounded(), make_encoder(of_encoder, (base or tiny_base()).encode_images))


class Brightness:
    """Stands in for a face model."""

    def embed(self, images):
        vectors = torch.tensor([[image.convert("L").getextrema()[1] + 1.0, 1.0] for image in images])
        return Embeddings(torch.nn.functional.normalize(vectors, dim=-1), torch.ones(len(images), dtype=torch.bool))


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
