# SPDX-License-Identifier: Apache-2.0
"""Examples in memory, as batches take them: latents of one shape or of several, text, and the weights of the loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from ...bases import Text
from ...errors import ConfigError


class Batch(NamedTuple):
    """Examples of one shape: latents (b, c, h, w), text of b rows, and weights of the loss (b, 1, h, w) or None."""

    latents: Tensor
    text: Text
    mask: Tensor | None


@dataclass(frozen=True)
class Examples:
    """Encoded images of some subjects; equal captions are stored once.

    Attributes:
        latents: n latents (c, h, w) as `Base.encode_images` gives them: one tensor (n, c, h, w), or a list where their
            shapes differ.
        text: embeddings of m captions, m rows in each tensor.
        caption: (n,) int64, the row of `text` that belongs to each latent.
        subject: (n,) int64, 0 to the number of subjects - 1.
        mask: n weights (1, h, w) in [0, 1] of the loss, as `latents`; None: 1 everywhere.
        prior: embedding of the class prompt, one row in each tensor, for prior preservation.
        tags: of each subject, what is said of it.
        photo: (n,) int64, which of all subjects' photos each latent is a view of; None: not known.
    """

    latents: Tensor | list[Tensor]
    text: Text
    caption: Tensor
    subject: Tensor
    mask: Tensor | list[Tensor] | None = None
    prior: Text | None = None
    tags: list[dict[str, str]] | None = None
    photo: Tensor | None = None

    fresh: ClassVar[bool] = False
    """Whether `batch` needs seeds."""

    def __len__(self) -> int:
        return len(self.subject)

    @property
    def num_subjects(self) -> int:
        """Number of subjects."""
        return int(self.subject.max()) + 1

    def photos(self) -> list[int]:
        """Which of all subjects' photos there are views of."""
        assert self.photo is not None
        return sorted(set(self.photo.tolist()))

    def by_subject(self) -> list[Tensor]:
        """For each subject, the positions (k,) of its latents."""
        return [(self.subject == subject).nonzero().flatten() for subject in range(self.num_subjects)]

    def groups(self, tag: str) -> list[str]:
        """The value of a tag, for each subject.

        Raises:
            ConfigError: a subject has none.
        """
        tags = self.tags or [{} for _ in range(self.num_subjects)]
        missing = [number for number, one in enumerate(tags) if tag not in one]
        if missing:
            raise ConfigError(f"expected the tag {tag!r} of every subject, found none of subject(s) {missing[:5]}")
        return [one[tag] for one in tags]

    def shapes(self) -> list[int]:
        """For each example the number of its shape, 0 upwards: a batch holds one."""
        if isinstance(self.latents, Tensor):
            return [0] * len(self.latents)
        found = sorted({tuple(latent.shape) for latent in self.latents})
        return [found.index(tuple(latent.shape)) for latent in self.latents]

    def like(self, position: int, count: int, device: torch.device | str | None = None) -> Tensor:
        """A stand-in for `count` latents of the shape of the one at `position`: (count, c, h, w) without content.

        Args:
            device: None: that of the examples.
        """
        return torch.empty((), device=device or self.subject.device).expand(count, *self.latents[position].shape)

    def pick(self, index: Tensor) -> tuple[Tensor, Text]:
        """Latents and text of the examples `index` (b,), all of one shape."""
        return self.batch(index)[:2]

    def batch(self, index: Tensor, seeds: Sequence[int] | None = None) -> Batch:
        """The examples `index` (b,), all of one shape.

        Args:
            seeds: of fresh examples, what each view is drawn from.
        """
        rows = self.caption[index]
        mask = None if self.mask is None else _rows(self.mask, index)
        return Batch(_rows(self.latents, index), {name: tensor[rows] for name, tensor in self.text.items()}, mask)

    def to(self, device: torch.device | str) -> Examples:
        """The same examples on a device."""
        return replace(
            self,
            latents=_moved(self.latents, device),
            text=_moved_text(self.text, device),
            caption=self.caption.to(device),
            subject=self.subject.to(device),
            mask=None if self.mask is None else _moved(self.mask, device),
            prior=None if self.prior is None else _moved_text(self.prior, device),
        )


def _rows(tensors: Tensor | list[Tensor], index: Tensor) -> Tensor:
    if isinstance(tensors, Tensor):
        return tensors[index]
    return torch.stack([tensors[position] for position in index.tolist()])


def _moved(tensors: Tensor | list[Tensor], device: torch.device | str) -> Tensor | list[Tensor]:
    if isinstance(tensors, Tensor):
        return tensors.to(device)
    return [tensor if tensor.is_meta else tensor.to(device) for tensor in tensors]


def _moved_text(text: Text, device: torch.device | str) -> Text:
    return {name: tensor.to(device) for name, tensor in text.items()}
