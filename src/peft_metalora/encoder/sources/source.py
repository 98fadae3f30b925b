# SPDX-License-Identifier: Apache-2.0
"""What a source is: photos to features, and the trunk that reads such features."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

EncodeImages = Callable[[Tensor], Tensor]
"""The base's VAE: images (n, 3, h, w) in [-1, 1] to latents (n, c, h / f, w / f)."""


class Source(Protocol):
    """Photos to features, without anything that trains.

    Attributes:
        name: as `make_source` takes it. feature_shape: of one photo's features.
    """

    name: str
    feature_shape: tuple[int, ...]

    def features(self, photos: Sequence[Image.Image]) -> Tensor:
        """Features (n, *feature_shape) of n RGB photos, float32."""
        ...

    def trunk(self, width: int) -> nn.Module:
        """A new network from features (n, *feature_shape) to (n, m), with random weights."""
        ...


class Still:
    """A source whose features are vectors: its trunk is a normalisation."""

    feature_shape: tuple[int, ...]

    def trunk(self, width: int) -> nn.Module:
        """Layer norm alone; see `Source.trunk`."""
        return nn.LayerNorm(self.feature_shape[-1])


def middle_square(photo: Image.Image, side: int) -> Image.Image:
    """The largest square in the middle of a photo, `side` pixels wide."""
    edge = min(photo.size)
    left, top = (photo.width - edge) / 2, (photo.height - edge) / 2
    box = (left, top, left + edge, top + edge)
    return photo.convert("RGB").resize((side, side), Image.Resampling.LANCZOS, box=box)


def to_pixels(photos: Sequence[Image.Image], side: int) -> Tensor:
    """The middle square of each photo: (n, 3, side, side) float32 in [0, 1]."""
    squares = [np.array(middle_square(photo, side)) for photo in photos]
    return torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2).float() / 255
