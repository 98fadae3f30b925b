# SPDX-License-Identifier: Apache-2.0
"""Scores of a run and the pictures it draws: a loss on held-out views, R-FaceSim, the validation prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from ...bases import Base
from ...data import Photo
from ...errors import NoFaceError
from ...metrics import Embedder, r_facesim
from ..examples.batches import Examples


class HeldOutLoss:
    """Minus the mean loss on held-out examples at `draws` fixed noises and noise levels each.

    Args:
        examples: of one subject, none of them trained on.
    """

    def __init__(self, base: Base, examples: Examples, *, seed: int, draws: int = 8) -> None:
        self.base, self._count = base, len(examples) * draws
        generator = torch.Generator().manual_seed(seed)
        shapes = torch.tensor(examples.shapes())
        self._parts = []
        for shape in shapes.unique():
            index = (shapes == shape).nonzero().flatten().repeat_interleave(draws)
            latents, text, mask = examples.batch(index)
            noise = torch.randn(latents.shape, generator=generator).to(base.device)
            times = base.sample_times(latents, generator).to(base.device)
            moved = {name: tensor.to(base.device) for name, tensor in text.items()}
            weights = None if mask is None else mask.to(base.device)
            self._parts.append((latents.to(base.device), moved, noise, times, weights))

    @torch.no_grad()
    def __call__(self) -> float:
        total, size = 0.0, 8
        for latents, text, noise, times, mask in self._parts:
            for start in range(0, len(latents), size):
                part = slice(start, start + size)
                some = {name: tensor[part] for name, tensor in text.items()}
                weights = None if mask is None else mask[part]
                total += self.base.loss(latents[part], some, noise[part], times[part], weights).sum().item()
        return -total / self._count


class FaceScore:
    """R-FaceSim of the validation prompts' images against held-out photos; images without a face count as 0.

    Raises:
        NoFaceError: no photo shows one.
    """

    def __init__(self, photos: Sequence[Photo], embedder: Embedder) -> None:
        self.embedder = embedder
        self._others = embedder.embed([photo.load() for photo in photos])
        if not self._others.found.any():  # else the first score would end the run
            names = ", ".join(str(photo.path) for photo in photos[:5])
            raise NoFaceError(
                f"expected a face in one of the {len(photos)} photo(s) that validation compares with, found none in "
                f"{names}: add a photo that shows it, or leave validation_embedder out"
            )

    def __call__(self, images: list[Image.Image]) -> float:
        return r_facesim(self.embedder.embed(images), self._others).mean


class Painter:
    """Draws the validation prompts with the adapter as it is, always from the same noise.

    The pipeline's text encoders and VAE must be on its device.
    """

    def __init__(self, base: Base, prompts: Sequence[str], *, resolution: int, seed: int) -> None:
        self.base, self.prompts, self.seed = base, list(prompts), seed
        self._options: dict[str, Any] = {"height": resolution, "width": resolution, "num_inference_steps": 20}
        if base.takes_sequence_length:
            self._options["max_sequence_length"] = base.max_sequence_length

    def images(self) -> list[Image.Image]:
        """One image of each prompt."""
        images = []
        for prompt in self.prompts:
            generator = torch.Generator().manual_seed(self.seed)
            images += self.base.draw(prompt=prompt, generator=generator, **self._options)
        return images
