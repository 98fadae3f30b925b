# SPDX-License-Identifier: Apache-2.0
"""Views of a photo: random crops of one of the run's shapes, mirrored or not, with the photo's mask cut alike."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ...bases import Base
from ...data import Photo, cut, cut_mask, random_box, read_file
from ...encoder.sight import face_region, open_photo
from ...metrics.by_name import code_of
from ...metrics.face_crop import FaceCrop, Region
from ..stage_settings import StageConfig, TrainingConfig
from .shapes import Shape, crop_shapes, nearest_shape

_NARROW = 0.7  # of a photo of 3 : 2, a square shows two thirds


@dataclass(frozen=True)
class Plan:
    """What is known of a photo once it was looked at: the part that is used (None: all), and its views' shape."""

    region: Region | None
    shape: Shape


@dataclass(frozen=True)
class Opened:
    """A photo in memory, cut to the part that is used: RGB, and its mask in grey if it has one."""

    image: Image.Image
    mask: Image.Image | None
    plan: Plan


@dataclass(frozen=True)
class View:
    """(3, h, w) in [-1, 1], whether it is mirrored, and (1, h, w) in [0, 1], white where the subject is."""

    pixels: Tensor
    flip: bool
    mask: Tensor | None


def shapes_of(base: Base, config: TrainingConfig) -> list[Shape]:
    """The shapes of views that settings ask for; raises ConfigError as `crop_shapes`."""
    buckets = config.aspect_ratio_buckets if isinstance(config, StageConfig) else None
    return crop_shapes(buckets, config.resolution, base.pixel_multiple)


class ViewCutter:
    """Opens photos and cuts views as the settings say.

    Raises:
        ConfigError: shapes that do not fit the base, or a face detector that is not there.
        EmbedderUnavailableError: insightface or its weights are missing.
    """

    def __init__(self, base: Base, config: TrainingConfig) -> None:
        self.shapes = shapes_of(base, config)
        self._flips = config.random_flip
        self._narrow: dict[Path, float] = {}
        self._faces: FaceCrop | None = None
        self.settings: dict[str, Any] = {"shapes": self.shapes, "random_flip": config.random_flip}
        if config.face_crop is not None:
            self._faces = FaceCrop(config.face_crop, config.face_margin, config.face_align)
            code = code_of(config.face_crop).values()
            self.settings["face"] = [config.face_crop, config.face_margin, config.face_align, *code]

    def open(self, photo: Photo, content: bytes | None = None, plan: Plan | None = None) -> Opened:
        """Decode a photo and its mask.

        Args:
            content: the photo's bytes, if they have been read.
            plan: of an earlier `open`: the face is not looked for again.

        Raises:
            NoImagesError, UnreadableImageError: it, or its mask, is not there or cannot be decoded.
            NoFaceError: it is to be cut around a face, and shows none.
        """
        seen = open_photo(photo, lambda image: self._region(photo, image) if plan is None else plan.region, content)
        shape = nearest_shape(self.shapes, *seen.image.size) if plan is None else plan.shape
        share = _share(seen.image.size, shape)
        if self._faces is None and share < _NARROW:
            self._narrow[photo.path] = share
        return Opened(seen.image, seen.mask, Plan(seen.region, shape))

    def warn_of_narrow_views(self) -> None:
        """Hint, once, at what helps where views show so little of opened photos that they may miss a person."""
        if self._narrow:
            path, share = min(self._narrow.items(), key=lambda item: item[1])
            warnings.warn(
                f"views show at most {share:.0%} of {path} ({len(self._narrow)} photo(s) are so far from the views' "
                "shape): where somebody stands at the side, or several people are in the photo, some views miss the "
                "person. Give face_crop, which cuts around the face, or aspect_ratio_buckets='auto'.",
                stacklevel=3,
            )
            self._narrow.clear()

    def _region(self, photo: Photo, image: Image.Image) -> Region | None:
        return None if self._faces is None else face_region(self._faces, image, photo.path)

    def cut(self, opened: Opened, generator: torch.Generator) -> View:
        """The next random view."""
        flip = self._flips and bool(torch.rand((), generator=generator) < 0.5)
        box = random_box(opened.image.size, opened.plan.shape, generator)
        pixels = cut(opened.image, box, opened.plan.shape, flip=flip)
        mask = None if opened.mask is None else cut_mask(opened.mask, box, opened.plan.shape, flip=flip)
        return View(pixels, flip, mask)


def _share(size: tuple[int, int], shape: Shape) -> float:
    """The part of a photo (width, height) that the largest view of a shape (height, width) shows."""
    ratio = size[0] / size[1] * shape[0] / shape[1]
    return min(ratio, 1 / ratio)


def mask_content(photo: Photo) -> bytes | None:
    """The bytes of a photo's mask; None if it has none. Raises as `ViewCutter.open`."""
    return None if photo.mask is None else read_file(photo.mask)


def latent_mask(views: Sequence[View], latents: Tensor) -> Tensor:
    """Masks of views at the size of their latents (n, c, h, w), the mean of what a place covers: (n, 1, h, w).

    A view without a mask is white.
    """
    masks = [torch.ones(1, *view.pixels.shape[-2:]) if view.mask is None else view.mask for view in views]
    height, width = latents.shape[-2:]
    return F.adaptive_avg_pool2d(torch.stack(masks), (height, width))
