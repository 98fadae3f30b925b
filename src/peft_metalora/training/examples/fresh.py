# SPDX-License-Identifier: Apache-2.0
"""Examples whose views are cut and encoded anew in every batch: no two steps see the same crop, and the VAE stays."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor

from ...bases import Base
from ...data import Photo
from .batches import Batch, Examples
from .views import Opened, Plan, ViewCutter, latent_mask

_KEPT_PIXELS = 750_000_000  # of decoded photos in memory, at 4 bytes each: 64 photos of a phone


@dataclass(frozen=True, kw_only=True)
class FreshExamples(Examples):
    """One example a photo.

    Attributes:
        latents: of each photo one on the meta device, which has only a shape.
        caption: (n, 2) int64, the rows of a photo's caption and of that of its mirror image.
        base: encodes the views.
        cutter: cuts them.
        opened: gives a photo, decoded.
        masked: whether any photo has a mask.
    """

    base: Base
    cutter: ViewCutter
    opened: Callable[[int], Opened]
    masked: bool

    fresh: ClassVar[bool] = True

    @classmethod
    def of(
        cls, examples: Examples, base: Base, cutter: ViewCutter, photos: Sequence[tuple[Photo, Plan]]
    ) -> FreshExamples:
        """Make them from text, subjects and tags (`examples`; its captions are pairs) and from the photos."""
        shapes = {plan.shape for _, plan in photos}
        sizes = {shape: base.encode_images(torch.zeros(1, 3, *shape)).shape[1:] for shape in shapes}
        given = {one.name: getattr(examples, one.name) for one in fields(examples)}
        given["latents"] = [torch.empty(sizes[plan.shape], device="meta") for _, plan in photos]
        given["caption"] = examples.caption.view(-1, 2)

        kept: dict[int, Opened] = {}  # the one that was used last is the last

        def opened(position: int) -> Opened:
            photo, plan = photos[position]
            kept[position] = kept.pop(position) if position in kept else cutter.open(photo, plan=plan)
            while len(kept) > 1 and sum(math.prod(one.image.size) for one in kept.values()) > _KEPT_PIXELS:
                del kept[next(iter(kept))]
            return kept[position]

        masked = any(photo.mask is not None for photo, _ in photos)
        return cls(**given, base=base, cutter=cutter, opened=opened, masked=masked)

    def batch(self, index: Tensor, seeds: Sequence[int] | None = None) -> Batch:
        """New views of the photos `index` (b,), all of one shape.

        Args:
            seeds: a number for each; the same gives the same view. None: 0 for all.

        Raises:
            NoImagesError, UnreadableImageError: a photo is no longer there.
        """
        views = [
            self.cutter.cut(self.opened(position), torch.Generator().manual_seed(seed))
            for position, seed in zip(index.tolist(), seeds or [0] * len(index), strict=True)
        ]
        latents = self.base.encode_images(torch.stack([view.pixels for view in views]))
        flips = torch.tensor([int(view.flip) for view in views], device=self.caption.device)
        rows = self.caption[index, flips]
        device = self.subject.device
        mask = latent_mask(views, latents).to(device) if self.masked else None
        return Batch(latents.to(device), {name: tensor[rows] for name, tensor in self.text.items()}, mask)
