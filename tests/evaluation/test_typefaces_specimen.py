# SPDX-License-Identifier: Apache-2.0
"""The specimen sheet of typefaces."""

import sys
from pathlib import Path

import torch
from PIL import Image

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from typefaces.specimen import Specimen, of_specimens, on_white, tiles


def of_ink(shade: torch.Tensor) -> torch.Tensor:
    """Three pictures of a black bar on paper of that shade."""
    letters = shade.expand(3, 3, 64, 64).clone()
    letters[..., 20:44, 28:36] = 0.1
    return letters


def sheet_of(name: str) -> Image.Image:
    letters = tiles(of_ink(torch.ones(1)))
    rows = {"the font itself": letters, "read,\nno training": letters}
    return of_specimens([Specimen(name, Image.new("RGB", (64, 64), "#ddaa00"), rows)]).convert("L")


def pixels(page: Image.Image) -> torch.Tensor:
    return torch.frombuffer(bytearray(page.tobytes()), dtype=torch.uint8).view(page.height, page.width)


def test_letters_of_all_rows_stand_below_each_other():
    """Bug: the true letters began beside the reference, the drawn ones a picture further to the left."""
    page = sheet_of("A Font")
    dark = pixels(page) < 64
    bars = [tuple(line.nonzero().flatten().tolist()) for line in dark[:, page.width // 2 :] if line.any()]
    assert bars and len(set(bars)) == 1, "one set of columns"


def test_paper_is_white_whatever_light_falls_on_it_and_ink_stays():
    shade = torch.linspace(0.65, 1.0, 64).expand(64, 64)
    clean = on_white(of_ink(shade))
    assert clean[..., :10, :].min() > 0.97
    assert clean[..., 24:40, 30:34].max() < 0.25


def test_a_long_name_stays_below_its_reference():
    """Bug: "Classic Trash 1 BRK Regular" ran into the label of the row beside it."""
    name = "Classic Trash 1 BRK Regular"
    plain, named, cut = (pixels(sheet_of(one)) for one in ("", name, "W" * 40))
    for page in (named, cut):
        rows, columns = (page[: plain.shape[0]] != plain[: page.shape[0]]).nonzero().unbind(1)
        assert columns.min() >= 22 and columns.max() < 22 + 150, "as wide as the reference"
        assert rows.min() > 22 + 150, "below it"
