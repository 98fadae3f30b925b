# SPDX-License-Identifier: Apache-2.0
"""Views around the face, with insightface's real detector on models built here."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from face_models import SIDE, TILE, write_pack
from peft_metalora.data import read_subjects
from peft_metalora.errors import ConfigError, EmbedderUnavailableError, NoFaceError, NoImagesError
from peft_metalora.metrics import Face, InsightFaceDetector, face_crop
from peft_metalora.metrics.face_crop import FaceCrop, Region
from peft_metalora.training.examples.encoding import encode_subjects
from training_tiny import personal_config, tiny_base

WHITE = (255, 255, 255)


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    folder = write_pack(tmp_path_factory.mktemp("faces") / "pack")
    return InsightFaceDetector(str(folder), providers=["CPUExecutionProvider"], det_size=(SIDE, SIDE))


class Told:
    """Finds the face that it is told."""

    def __init__(self, face):
        self.face = face

    def detect(self, image):
        return self.face


def crop_with(monkeypatch, detector, margin=0.0, align=False):
    monkeypatch.setattr(face_crop, "load_detector", lambda name: detector)
    return FaceCrop("told", margin, align)


def scene(row, column, colour=WHITE, background=(0, 60, 0)):
    pixels = np.zeros((SIDE, SIDE, 3), dtype=np.uint8)
    pixels[:] = background
    pixels[row * TILE : (row + 1) * TILE, column * TILE : (column + 1) * TILE] = colour
    return Image.fromarray(pixels)


def test_the_detector_finds_box_and_eyes(detector):
    face = detector.detect(scene(1, 2))
    assert face.box == pytest.approx((2 * TILE - 8, TILE - 8, 3 * TILE - 8 + 16, 2 * TILE - 8 + 16), abs=20)
    centre = (face.box[0] + face.box[2]) / 2, (face.box[1] + face.box[3]) / 2
    assert 2 * TILE <= centre[0] <= 3 * TILE and TILE <= centre[1] <= 2 * TILE
    (x1, y1), (x2, y2) = face.eyes
    assert x1 < x2 and abs(y1 - y2) < 1
    assert detector.detect(Image.new("RGB", (SIDE, SIDE))) is None


def test_the_face_fills_the_crop_and_a_margin_gives_room(monkeypatch, detector):
    image = scene(1, 2)
    near = crop_with(monkeypatch, detector).region(image)
    far = crop_with(monkeypatch, detector, margin=0.5).region(image)
    assert far.width == pytest.approx(2 * near.width, abs=2)
    share = [np.asarray(region.cut(image))[..., 0].mean() / 255 for region in (near, far)]
    assert share[0] > 0.6 > share[1] > 0.15


def test_a_crop_ends_at_the_border_of_the_image(monkeypatch):
    region = crop_with(monkeypatch, Told(Face((80, 10, 120, 50))), margin=1.0).region(Image.new("RGB", (100, 200)))
    assert (region.width, region.height) == (60, 90)
    assert region.cut(Image.new("RGB", (100, 200))).size == (60, 90)


@pytest.mark.parametrize("tilt", [-25, 10, 40])
def test_aligned_eyes_are_level(monkeypatch, tilt):
    """Two white eyes on a tilted line come out on one row, at the distance that they have."""
    image, turn = Image.new("RGB", (200, 200)), math.radians(tilt)
    eyes = [(100 + side * 20 * math.cos(turn), 95 + side * 20 * math.sin(turn)) for side in (-1, 1)]
    draw = ImageDraw.Draw(image)
    for x, y in eyes:
        draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill="white")
    region = crop_with(monkeypatch, Told(Face((70, 60, 130, 120), tuple(eyes))), 0.2, align=True).region(image)
    pixels = np.asarray(region.cut(image))[..., 0]
    assert region.angle == pytest.approx(turn) and pixels.shape == (84, 84)
    rows, columns = np.nonzero(pixels > 128)
    left, right = columns < 42, columns >= 42
    assert abs(rows[left].mean() - rows[right].mean()) < 1
    assert columns[right].mean() - columns[left].mean() == pytest.approx(40, abs=1)


def test_a_tilted_face_at_the_border_is_not_turned(monkeypatch):
    told = Told(Face((0, 60, 60, 120), ((10, 70), (40, 90))))
    region = crop_with(monkeypatch, told, 0.5, align=True).region(Image.new("RGB", (200, 200)))
    assert region.angle == 0 and region.cut(Image.new("RGB", (200, 200))).size == (90, 120)
    unknown = crop_with(monkeypatch, Told(Face((70, 60, 130, 120))), align=True).region(Image.new("RGB", (200, 200)))
    assert unknown.angle == 0


def test_turning_needs_no_pixel_from_outside(monkeypatch):
    told = Told(Face((70, 60, 130, 120), ((85, 70), (115, 100))))
    white = Image.new("RGB", (200, 200), "white")
    region = crop_with(monkeypatch, told, 3.0, align=True).region(white)
    assert region.angle == pytest.approx(math.pi / 4) and region.width < 7 * 60
    assert np.asarray(region.cut(white))[1:-1, 1:-1].min() >= 254


@pytest.fixture
def people(tmp_path):
    """Ann has a photo with a face, white on its left side of the mask, and one without; Bob one with."""
    for name, pictures in {"ann": [scene(1, 2), Image.new("RGB", (SIDE, SIDE))], "bob": [scene(2, 1)]}.items():
        (tmp_path / "people" / name).mkdir(parents=True)
        for number, picture in enumerate(pictures):
            picture.save(tmp_path / "people" / name / f"{number}.png")
    return tmp_path / "people"


def test_what_an_edited_detector_finds_is_encoded_anew(people, monkeypatch, tmp_path):
    """Bug: after an edit of a detector of one's own, a run with a cache trained on the crops of before."""
    monkeypatch.syspath_prepend(tmp_path)
    settings = {"face_crop": "own_detector:find", "instance_prompt": "a photo"}
    base, bob = tiny_base(), read_subjects(people)[1:]

    def encoded(side, **changes):
        text = f"from training_tiny import Corner\n\n\ndef find():\n    return Corner({side})\n"
        (tmp_path / "own_detector.py").write_text(text)
        sys.modules.pop("own_detector", None)
        return encode_subjects(base, bob, personal_config(**settings, **changes), 1, progress=False).latents

    cached = {"cache_dir": str(tmp_path / "cache")}
    first = encoded(40, **cached)
    second = encoded(80, **cached)
    assert torch.equal(first, encoded(40)) and torch.equal(second, encoded(80)) and not torch.equal(first, second)
    written = set((tmp_path / "cache").rglob("*"))
    assert torch.equal(encoded(40, **cached), first)
    assert set((tmp_path / "cache").rglob("*")) == written


def test_photos_without_a_face_are_left_out_and_counted(people, monkeypatch, detector, tmp_path):
    monkeypatch.setattr(face_crop, "load_detector", lambda name: detector)
    config = personal_config(face_crop="told", instance_prompt="a photo", cache_dir=str(tmp_path / "cache"))
    base, subjects = tiny_base(), read_subjects(people)
    with pytest.warns(match=r"skipped 1 of 3 images: expected a face in .*ann/1\.png, found none"):
        examples = encode_subjects(base, subjects, config, 2, progress=False, skip_unreadable=True)
    assert examples.subject.tolist() == [0, 0, 1, 1]
    plain = encode_subjects(base, subjects, personal_config(instance_prompt="a photo"), 2, progress=False)
    assert not torch.equal(examples.latents[:2], plain.latents[:2])
    # In memory and on disk alike; what is on disk needs no detector.
    with pytest.raises(NoFaceError, match=r"ann/1\.png"):
        encode_subjects(base, subjects, config, 2, progress=False)
    bob = subjects[1:]
    first = encode_subjects(base, bob, config, 2, progress=False)
    monkeypatch.setattr(face_crop, "load_detector", lambda name: Told(None))
    assert torch.equal(encode_subjects(base, bob, config, 2, progress=False).latents, first.latents)
    for change in ({"face_margin": 0.1}, {"face_align": True}, {"face_crop": "other"}):
        with pytest.raises(NoFaceError):
            encode_subjects(
                base,
                bob,
                personal_config(
                    **{"face_crop": "told", "instance_prompt": "a photo", "cache_dir": config.cache_dir, **change}
                ),
                2,
                progress=False,
            )
    with pytest.warns(match="skipped 3 of 3"), pytest.raises(NoImagesError, match="found none of ann, bob"):
        encode_subjects(
            base,
            subjects,
            personal_config(face_crop="told", instance_prompt="a photo"),
            2,
            progress=False,
            skip_unreadable=True,
        )


def test_masks_and_fresh_views_follow_the_crop(people, monkeypatch, detector):
    """The face as its own mask: the crop's mask is as white as the crop."""
    monkeypatch.setattr(face_crop, "load_detector", lambda name: detector)
    scene(2, 1, background=(0, 0, 0)).save(people / "bob" / "0.mask.png")
    base, bob = tiny_base(), read_subjects(people)[1:]
    config = personal_config(face_crop="told", face_margin=0.0, instance_prompt="a photo", random_flip=False)
    cached = encode_subjects(base, bob, config, 4, progress=False)
    whole = encode_subjects(base, bob, personal_config(instance_prompt="a photo"), 4, progress=False)
    assert cached.mask.mean() > 0.6 > 0.2 > whole.mask.mean()
    fresh = encode_subjects(base, bob, config, 0, progress=False)
    monkeypatch.setattr(fresh.cutter, "_faces", None)  # the face was looked for once, when the run began
    assert fresh.batch(torch.zeros(4, dtype=torch.int64), [1, 2, 3, 4]).mask.mean() > 0.6


def test_regions_of_grey_images():
    grey = Image.new("L", (8, 8), 7)
    assert Region((4, 4), 4, 2).cut(grey).size == (4, 2)
    assert Region((4, 4), 2, 2, 0.3).cut(grey).getpixel((0, 0)) == 7


def test_detectors_that_are_not_there(monkeypatch):
    with pytest.raises(ConfigError, match="'insightface' or module:function, found 'no_such_module:f'"):
        FaceCrop("no_such_module:f", 0.5, False)
    with pytest.raises(ConfigError, match="face_align needs face_crop"):
        personal_config(face_align=True)
    monkeypatch.setitem(sys.modules, "insightface.app", None)
    with pytest.raises(EmbedderUnavailableError, match=r"pip install 'peft-metalora\[face\]'"):
        FaceCrop("insightface", 0.5, False)
