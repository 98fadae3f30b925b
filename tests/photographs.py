# SPDX-License-Identifier: Apache-2.0
"""Real photographs for tests: the sample that insightface's package carries.

It shows one photo of each of six people, five of whom are used. So tests on it prove the road and not a likeness:
another photo of somebody is the same one mirrored and made smaller.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from PIL import Image, ImageOps

SAMPLE = Path(next(iter(find_spec("insightface").submodule_search_locations))) / "data" / "images" / "t1.jpg"
FACES = [(13, 232, 221, 440), (682, 313, 888, 520), (1062, 232, 1268, 440), (390, 238, 639, 486), (232, 136, 405, 309)]


def real_photos() -> list[Image.Image]:
    """A photo of each of five people, some 200 pixels wide."""
    with Image.open(SAMPLE) as image:
        return [image.convert("RGB").crop(face) for face in FACES]


def another(photo: Image.Image) -> Image.Image:
    """What counts as another photo of the same person."""
    small = ImageOps.mirror(photo)
    return small.resize((small.width * 3 // 4, small.height * 3 // 4))
