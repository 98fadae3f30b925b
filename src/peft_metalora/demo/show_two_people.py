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
from PIL import Image, ImageDraw, ImageFont
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

_SCALE = 2  # of a 64 px image in the picture
_LABELS, _LINE = 150, 15  # px


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
    if weight is None:
        pipe.set_adapters(ADAPTER)
        return generate(pipe, prompts, seeds, 2 * RESOLUTION, regions=[(left, LEFT), (right, RIGHT)])
    pipe.set_adapters([ADAPTER, left, right], [1.0, weight, weight])
    return generate(pipe, prompts, seeds, 2 * RESOLUTION)


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


def sheet_of_two(rows: Sequence[tuple[str, Sequence[Image.Image]]], heads: Sequence[str] = ()) -> Image.Image:
    """A row of two-person pictures beside each label, under headings where there are any; labels may have lines."""
    width, height = 2 * RESOLUTION * _SCALE, RESOLUTION * _SCALE
    top = 8 + _LINE * max((head.count("\n") + 1 for head in heads), default=0)
    count = max(len(images) for _, images in rows)
    sheet = Image.new("RGB", (_LABELS + width * count + 4, top + height * len(rows)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for number, head in enumerate(heads):
        draw.multiline_text((_LABELS + width * number, 4), head, "black", font)
    for row, (label, images) in enumerate(rows):
        y = top + height * row
        draw.multiline_text((8, y + 8), label, "black", font)
        for number, image in enumerate(images):
            shown = image.resize((width - 4, height - 4), Image.Resampling.NEAREST)
            sheet.paste(shown, (_LABELS + width * number, y))
    return sheet


def side_by_side(left: Image.Image, right: Image.Image) -> Image.Image:
    """Two photos as one picture of both people."""
    both = Image.new("RGB", (left.width + right.width, left.height))
    both.paste(left, (0, 0))
    both.paste(right, (left.width, 0))
    return both
