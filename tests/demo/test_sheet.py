# SPDX-License-Identifier: Apache-2.0
"""Sheets of pictures: what lies where, whole and enlarged smoothly."""

from PIL import Image, ImageChops

from peft_metalora.demo.sheet import GAP, LABELS, MARGIN, SCALE, Row, sheet

SIDE = 8 * SCALE


def tile(colour: str, width: int = 8) -> Image.Image:
    return Image.new("RGB", (width, 8), colour)


def test_pictures_lie_beside_their_label_and_below_their_headings():
    plain = sheet([Row("one", [tile("red"), tile("blue")])])
    assert plain.size == (2 * MARGIN + LABELS + 2 * SIDE + GAP, 2 * MARGIN + SIDE)
    x, y = MARGIN + LABELS, MARGIN
    assert plain.crop((x, y, x + SIDE, y + SIDE)).getcolors() == [(SIDE * SIDE, (255, 0, 0))]
    x += SIDE + GAP
    assert plain.crop((x, y, x + SIDE, y + SIDE)).getcolors() == [(SIDE * SIDE, (0, 0, 255))]

    rows = [Row("one\nnote", [tile("red"), tile("blue")]), Row("two", [tile("green", 16)], ["above\nit"])]
    both = sheet(rows)
    added = both.height - plain.height
    assert added > SIDE + GAP, "headings have room of their own"
    x, y = MARGIN + LABELS, both.height - MARGIN - SIDE
    assert both.crop((x, y, x + 2 * SIDE, y + SIDE)).getcolors() == [(2 * SIDE * SIDE, (0, 128, 0))]


def test_every_word_of_labels_and_headings_is_drawn():
    images, heads = [Image.new("RGB", (64, 64), "red")] * 2, ["a\nb", "c"]
    whole = sheet([Row("one\nnote\nmore", images, heads)])
    for less in (Row("one\nnote", images, heads), Row("one\nnote\nmore", images, heads[:1])):
        assert ImageChops.difference(whole, sheet([less])).getbbox() is not None


def test_small_pictures_are_enlarged_without_blocks():
    edge = Image.new("RGB", (8, 8), "white")
    edge.paste("black", (0, 0, 4, 8))
    x, y = MARGIN + LABELS, MARGIN + SIDE // 2
    row = sheet([Row("", [edge])]).crop((x, y, x + SIDE, y + 1))
    assert len(row.convert("L").getcolors()) > 2, "the step has become a slope"
