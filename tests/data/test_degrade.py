# SPDX-License-Identifier: Apache-2.0
"""Degradations with known answers on flat and checkered images."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from peft_metalora.data.degrade import DEGRADATIONS, degrade
from peft_metalora.errors import ConfigError

SIZE = 64
FLAT = Image.new("RGB", (SIZE, SIZE), (200, 100, 40))
CHECKERS = Image.fromarray(np.kron([[0, 255] * 32, [255, 0] * 32] * 32, np.ones((1, 1))).astype(np.uint8)).convert(
    "RGB"
)


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(float)


@pytest.mark.parametrize("name", DEGRADATIONS)
@pytest.mark.parametrize("size", [(64, 64), (40, 72)])
def test_size_and_mode_stay_and_a_stronger_one_is_farther_away(name: str, size: tuple[int, int]) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    weak, strong = degrade(image, name, 0.3), degrade(image, name, 1.0)
    assert weak.size == strong.size == size and weak.mode == strong.mode == "RGB"
    far, near = (np.abs(pixels(one) - pixels(image)).mean() for one in (strong, weak))
    assert far > near > 0
    assert degrade(image, name, 1.0).tobytes() == strong.tobytes()


@pytest.mark.parametrize("name", ["blur", "low_resolution"])
def test_what_takes_detail_leaves_a_flat_image_and_levels_checkers(name: str) -> None:
    assert degrade(FLAT, name, 1.0).tobytes() == FLAT.tobytes()
    inside = pixels(degrade(CHECKERS, name, 1.0))[8:-8, 8:-8]
    assert np.abs(inside - 127.5).max() < 3


def test_noise_has_the_deviation_it_names() -> None:
    grey = Image.new("RGB", (256, 256), (128, 128, 128))
    added = pixels(degrade(grey, "noise", 0.25)) - 128
    assert added.std() == pytest.approx(0.1 * 255, rel=0.02) and abs(added.mean()) < 0.5


def test_low_light_leaves_a_tenth() -> None:
    assert np.abs(pixels(degrade(FLAT, "low_light", 1.0)) - [20, 10, 4]).max() <= 1


def test_grey_takes_the_colour_and_keeps_the_luma() -> None:
    seen = pixels(degrade(FLAT, "grey", 1.0))
    assert np.ptp(seen, axis=-1).max() == 0
    assert seen[0, 0, 0] == pytest.approx(0.299 * 200 + 0.587 * 100 + 0.114 * 40, abs=1)


def test_occlusion_covers_the_lower_half_of_the_face_alone() -> None:
    seen = pixels(degrade(FLAT, "occlusion", 1.0))
    covered = (seen == 128).all(-1)
    rows, columns = np.where(covered)
    # The face is 0.2 to 0.8 of the width and 0.25 to 0.8 of the height: its lower half starts at 0.525.
    assert (rows.min(), rows.max()) == (33, 51) and (columns.min(), columns.max()) == (12, 51)
    assert covered.sum() == 19 * 40 and (seen[~covered] == [200, 100, 40]).all()


def test_sunglasses_are_two_black_lenses() -> None:
    seen = pixels(degrade(FLAT, "sunglasses", 1.0))
    black = (seen == 0).all(-1)
    eyes = int((0.25 + 0.55 * 0.29) * SIZE)
    left, nose, right = (int((0.2 + 0.6 * x) * SIZE) for x in (0.27, 0.5, 0.73))
    assert black[eyes, left] and black[eyes, right] and not black[eyes, nose]
    # 0.12 to 0.46 of the face's height, which is 0.25 to 0.8 of the image's.
    assert not black[:20].any() and not black[33:].any()
    half = pixels(degrade(FLAT, "sunglasses", 0.5))[eyes, left]
    assert np.abs(half - [100, 50, 20]).max() <= 1


@pytest.mark.parametrize(
    ("name", "strength", "message"),
    [("rain", 1.0, "expected one of blur"), ("blur", 0.0, "above 0 and up to 1"), ("blur", 1.1, "found 1.1")],
)
def test_unknown_ones_and_bad_strengths_are_refused(name: str, strength: float, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        degrade(FLAT, name, strength)
