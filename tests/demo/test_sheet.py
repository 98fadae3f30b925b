# SPDX-License-Identifier: Apache-2.0
"""Sheets of pictures: what lies where, whole and enlarged smoothly, and text that a phone shows."""

from PIL import Image, ImageChops

from peft_metalora.demo.sheet import GAP, MARGIN, SCALE, Row, sheet

SIDE = 8 * SCALE


def tile(colour: str, width: int = 8) -> Image.Image:
    return Image.new("RGB", (width, 8), colour)


def test_pictures_lie_below_their_label_and_their_headings():
    plain = sheet([Row("", [tile("red"), tile("blue")])])
    assert plain.size == (2 * MARGIN + 2 * SIDE + GAP, 2 * MARGIN + SIDE)
    x, y = MARGIN, MARGIN
    assert plain.crop((x, y, x + SIDE, y + SIDE)).getcolors() == [(SIDE * SIDE, (255, 0, 0))]
    x += SIDE + GAP
    assert plain.crop((x, y, x + SIDE, y + SIDE)).getcolors() == [(SIDE * SIDE, (0, 0, 255))]

    rows = [Row("one\nnote", [tile("red"), tile("blue")]), Row("two", [tile("green", 16)], ["above\nit"])]
    both = sheet(rows)
    assert both.height - plain.height > SIDE + GAP, "text has room of its own"
    y = both.height - MARGIN - SIDE
    assert both.crop((MARGIN, y, MARGIN + 2 * SIDE, y + SIDE)).getcolors() == [(2 * SIDE * SIDE, (0, 128, 0))]


def test_every_word_of_labels_and_headings_is_drawn():
    images, heads = [Image.new("RGB", (64, 64), "red")] * 2, ["a\nb", "c"]
    whole = sheet([Row("one\nnote\nmore", images, heads)])
    for less in (Row("one\nnote", images, heads), Row("one\nnote\nmore", images, heads[:1])):
        assert ImageChops.difference(whole, sheet([less])).getbbox() is not None


def test_long_headings_stay_above_their_picture_and_the_last_one_has_the_rest_of_the_row():
    """Bug: headings of 16 px on a sheet of 1244: a phone showed them 5 px high."""
    images = [Image.new("RGB", (64, 64), "red")] * 4
    page = sheet([Row("", images, ["words and words and words and words", "and more of them, in one line"])])
    text = page.crop((0, 0, page.width, page.height - MARGIN - 64 * SCALE))
    dark = text.point(lambda value: 255 * (value < 128)).convert("L")
    second = MARGIN + 64 * SCALE + GAP
    assert dark.crop((0, 0, second, dark.height)).getbbox()[2] <= MARGIN + 64 * SCALE
    _, top, right, bottom = dark.crop((second, 0, dark.width, dark.height)).getbbox()
    assert right > 64 * SCALE, "wider than one picture"
    assert (bottom - top) * 360 / page.width > 8, "pixels of a line on a phone"


def test_small_pictures_are_enlarged_without_blocks():
    edge = Image.new("RGB", (8, 8), "white")
    edge.paste("black", (0, 0, 4, 8))
    x, y = MARGIN, MARGIN + SIDE // 2
    row = sheet([Row("", [edge])]).crop((x, y, x + SIDE, y + 1))
    assert len(row.convert("L").getcolors()) > 2, "the step has become a slope"
