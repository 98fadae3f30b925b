# SPDX-License-Identifier: Apache-2.0
"""Two learned people in one picture, by regions or as a plain sum of their adapters, and how well they keep apart.

The embedded base draws single portraits; the LoRA in `assets/two_people` (`make_two_people.py`) has it draw two people
side by side. Whose face each half shows is asked of the domain's face embedder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..metrics import Embeddings
from .embedded import ASSETS, RESOLUTION
from .judges import FaceEmbedder
from .scoring import generate
from .two_people import LEFT, RIGHT, halves

TWO_PEOPLE = ASSETS / "two_people"
ADAPTER = "two_people"
"""Name of that LoRA on the pipeline."""

ASKED = (
    ("facing right, smiling", "facing left, laughing", "on a plain blue wall"),
    ("in a red shirt", "in a green shirt", "on a plain yellow wall"),
    ("facing forward, sad", "facing left, surprised", "on a plain grey wall"),
    ("neutral, in a blue shirt", "smiling, in an orange shirt", "on a teal striped wall"),
)
"""What the prompts say of the left person, of the right one, and of the wall."""
PROMPTS = tuple(f"a photo of a person, {left}, a person, {right}, {wall}" for left, right, wall in ASKED)


@dataclass(frozen=True)
class Apart:
    """Whose face each half of n pictures shows.

    Attributes:
        right: (n, 2) mean cosine of the left and of the right half to the other photos of the person who belongs there.
        wrong: (n, 2) the same to those of the other person.
    """

    right: Tensor
    wrong: Tensor

    @property
    def swapped(self) -> Tensor:
        """(n, 2), 1 where a half is nearer to the wrong person, else 0."""
        return (self.wrong > self.right).float()

    @property
    def better(self) -> Tensor:
        """(n,) `right` if it may choose for each picture who belongs where."""
        return torch.maximum(self.right.mean(1), self.wrong.mean(1))


def draw_two(
    pipe: Any, left: str, right: str, prompts: Sequence[str], seeds: Sequence[int], weight: float | None = None
) -> Tensor:
    """Draw two subjects in every picture: n prompts, n seeds -> (n, 3, 64, 128) in [0, 1] on the CPU.

    Args:
        pipe: has the LoRA `ADAPTER` and both subjects, by these names.
        weight: None for a region each; else the sum of both adapters, each with this weight.
    """
    share = 1.0 if weight is None else weight
    pipe.set_adapters([ADAPTER, left, right], [1.0, share, share])
    places = {"regions": [(left, LEFT), (right, RIGHT)]} if weight is None else {}
    return generate(pipe, prompts, seeds, 2 * RESOLUTION, **places)


def keep_apart(embedder: FaceEmbedder, images: Tensor, photos: tuple[Embeddings, Embeddings]) -> Apart:
    """Compare the halves of n pictures with photos that nobody learned from.

    Args:
        images: (n, 3, 64, 128) in [0, 1].
        photos: of the person on the left and of the one on the right.
    """
    cosines = torch.stack(
        [
            torch.stack([(embedder.embed(half).vectors @ own.vectors.T).mean(1) for own in photos], 1)
            for half in halves(images)
        ],
        1,
    )  # (n, half, person)
    return Apart(right=cosines.diagonal(dim1=1, dim2=2), wrong=cosines.flip(2).diagonal(dim1=1, dim2=2))


def side_by_side(left: Image.Image, right: Image.Image) -> Image.Image:
    """Two photos as one picture of both people."""
    both = Image.new("RGB", (left.width + right.width, left.height))
    both.paste(left, (0, 0))
    both.paste(right, (left.width, 0))
    return both
