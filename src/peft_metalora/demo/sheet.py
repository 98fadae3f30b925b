# SPDX-License-Identifier: Apache-2.0
"""Sheets of the domain's small pictures for a reader: a label beside each row, what was asked for above it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

SCALE = 3
"""Of the domain's pictures, 64 px high."""
LABELS = 196
"""Width of the column of labels, in px."""
MARGIN, GAP = 24, 10

_PAPER, _INK, _GREY = "#fbfaf7", "#1f2328", "#57606a"
_LARGE, _SMALL, _LINE = 19, 16, 22


@dataclass(frozen=True)
class Row:
    """Pictures of one size beside a label.

    Attributes:
        label: the first line is large. heads: above the pictures, from the left; lines are parted by newlines.
    """

    label: str
    images: Sequence[Image.Image]
    heads: Sequence[str] = ()


def sheet(rows: Sequence[Row]) -> Image.Image:
    """Draw rows of pictures, each enlarged smoothly by `SCALE`."""
    width = max(sum(image.width * SCALE + GAP for image in row.images) for row in rows) - GAP
    heights = [_above(row) + SCALE * max(image.height for image in row.images) for row in rows]
    size = 2 * MARGIN + LABELS + width, 2 * MARGIN + sum(heights) + GAP * (len(rows) - 1)
    page = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(page)
    large, small = ImageFont.load_default(_LARGE), ImageFont.load_default(_SMALL)
    top = MARGIN
    for row, height in zip(rows, heights, strict=True):
        y, x = top + _above(row), MARGIN + LABELS
        name, *notes = row.label.split("\n")
        draw.text((MARGIN, y + 4), name, _INK, large)
        for number, note in enumerate(notes):
            draw.text((MARGIN, y + 34 + _LINE * number), note, _GREY, small)
        for number, image in enumerate(row.images):
            if number < len(row.heads):
                lines = row.heads[number].split("\n")
                for line, words in enumerate(lines):
                    draw.text((x, y - 8 - _LINE * (len(lines) - line)), words, _GREY, small)
            shown = image.resize((image.width * SCALE, image.height * SCALE), Image.Resampling.LANCZOS)
            page.paste(shown, (x, y))
            x += shown.width + GAP
        top += height + GAP
    return page


def _above(row: Row) -> int:
    """Height of a row's headings."""
    lines = max((head.count("\n") + 1 for head in row.heads), default=0)
    return 12 + _LINE * lines if lines else 0
