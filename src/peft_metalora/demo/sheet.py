# SPDX-License-Identifier: Apache-2.0
"""Sheets of the domain's small pictures for a reader: a label above each row, and what was asked for.

Text grows with the sheet: on a phone, where the whole of it is 360 px wide, it can still be read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from PIL import Image, ImageDraw, ImageFont

SCALE = 3
"""Of the domain's pictures, 64 px high."""
MARGIN, GAP = 24, 10

_PAPER, _INK, _GREY = "#fbfaf7", "#1f2328", "#57606a"
_LINES = 33  # of text in the width of a sheet
_SMALLEST = 12

Line = tuple[float, float, str, str]  # x, y, text, colour
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclass(frozen=True)
class Row:
    """Pictures of one size below a label.

    Attributes:
        label: the first line is dark. heads: above the pictures, from the left, each as wide as until the next; lines
            are parted by newlines and wrapped.
    """

    label: str
    images: Sequence[Image.Image]
    heads: Sequence[str] = ()


def sheet(rows: Sequence[Row]) -> Image.Image:
    """Draw rows of pictures, each enlarged smoothly by `SCALE`."""
    width = max(sum(image.width * SCALE + GAP for image in row.images) for row in rows) - GAP
    size = max(_SMALLEST, (width + 2 * MARGIN) // _LINES)
    font = ImageFont.load_default(size)
    texts = [_texts(row, width, font, round(1.3 * size)) for row in rows]
    heights = [
        above + SCALE * max(image.height for image in row.images) for row, (_, above) in zip(rows, texts, strict=True)
    ]
    page = Image.new("RGB", (2 * MARGIN + width, 2 * MARGIN + sum(heights) + GAP * (len(rows) - 1)), _PAPER)
    draw = ImageDraw.Draw(page)
    top = MARGIN
    for row, (lines, above), height in zip(rows, texts, heights, strict=True):
        for left, down, words, colour in lines:
            draw.text((MARGIN + left, top + down), words, colour, font)
        x = MARGIN
        for image in row.images:
            shown = image.resize((image.width * SCALE, image.height * SCALE), Image.Resampling.LANCZOS)
            page.paste(shown, (x, top + above))
            x += shown.width + GAP
        top += height + GAP
    return page


def _texts(row: Row, width: int, font: Font, step: int) -> tuple[list[Line], int]:
    """Lines of text of a row, placed from its upper left corner, and their height."""
    name, _, notes = row.label.partition("\n")
    lines: list[Line] = [(0, 0, name, _INK)] if name else []
    beside = font.getlength(f"{name}   ")
    notes = notes.replace("\n", ", ")
    below = step if name else 0
    if notes and beside + font.getlength(notes) <= width:
        lines.append((beside, 0, notes, _GREY))
    elif notes:
        lines += [(0, below + step * number, words, _GREY) for number, words in enumerate(wrapped(notes, width, font))]
        below = step * len(lines)
    starts = [0]
    for image in row.images[: len(row.heads)]:
        starts.append(starts[-1] + image.width * SCALE + GAP)
    starts[-1] = width + GAP
    columns = [
        (left, wrapped(head, right - left - GAP, font))
        for head, (left, right) in zip(row.heads, pairwise(starts), strict=True)
    ]
    tallest = max((len(words) for _, words in columns), default=0)
    for left, words in columns:
        first = tallest - len(words)
        lines += [(left, below + step * (first + number), one, _GREY) for number, one in enumerate(words)]
    above = below + step * tallest
    return lines, above + 6 if above else 0


def wrapped(text: str, width: float, font: Font) -> list[str]:
    """Lines that are as wide as they may be."""
    lines: list[str] = []
    for part in text.split("\n"):
        line = ""
        for word in part.split(" "):
            longer = f"{line} {word}".strip()
            if line and font.getlength(longer) > width:
                lines.append(line)
                longer = word
            line = longer
        lines.append(line)
    return lines
