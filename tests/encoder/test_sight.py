# SPDX-License-Identifier: Apache-2.0
"""What an encoder sees of a photo: all of it or the part around the face, and nothing that a mask hides."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from peft_metalora.data import Photo
from peft_metalora.encoder import EncoderConfig, make_encoder
from peft_metalora.encoder.sight import Sight
from peft_metalora.errors import ConfigError, NoFaceError, UnreadableImageError
from peft_metalora.metrics import Face

CONFIG = EncoderConfig(resolution=32, code_size=4, width=8, hidden=16)


class Bright:
    """Finds a face of 8 x 8 pixels where the brightest one is."""

    def detect(self, image):
        grey = np.asarray(image.convert("L"))
        if not grey.any():
            return None
        row, column = np.unravel_index(grey.argmax(), grey.shape)
        return Face((column - 4, row - 4, column + 4, row + 4))


def bright():
    return Bright()


def dotted(path=None):
    image = Image.new("RGB", (40, 20), (10, 10, 10))
    image.putpixel((30, 10), (250, 250, 250))
    if path is not None:
        image.save(path)
    return image


def test_without_a_face_crop_all_is_seen():
    assert Sight()(dotted()).tobytes() == dotted().tobytes()


def test_the_part_around_the_face_is_seen(tmp_path):
    sight = Sight(f"{__name__}:bright", face_margin=0.25)
    dotted(tmp_path / "a.png")
    assert sight(Photo(tmp_path / "a.png")).tobytes() == sight(dotted()).tobytes()
    assert sight(dotted()).size == (12, 12) and sight(dotted()).getpixel((6, 6)) == (250, 250, 250)
    with pytest.raises(NoFaceError, match=r"expected a face in .*b\.png, found none"):
        Image.new("RGB", (8, 8)).save(tmp_path / "b.png")
        sight(Photo(tmp_path / "b.png"))
    with pytest.raises(NoFaceError, match="expected a face in photo 2"):
        sight(Image.new("RGB", (8, 8)), "photo 2")


def test_what_a_mask_hides_is_grey_also_where_the_photo_is_cut(tmp_path):
    dotted(tmp_path / "a.png")
    mask = Image.new("L", (40, 20))
    mask.paste(255, (30, 0, 40, 20))
    mask.save(tmp_path / "a.mask.png")
    photo = Photo(tmp_path / "a.png", mask=tmp_path / "a.mask.png")
    seen = np.asarray(Sight()(photo))
    assert (seen[:, :30] == 127).all() and (seen[:, 30:] == np.asarray(dotted())[:, 30:]).all()
    cut = np.asarray(Sight(f"{__name__}:bright", 0.25)(photo))
    assert (cut[:, :6] == 127).all() and cut[6, 6, 0] == 250
    (tmp_path / "a.mask.png").write_bytes(b"no image")
    with pytest.raises(UnreadableImageError, match=r"a\.mask\.png"):
        Sight()(photo)


def test_an_encoder_sees_as_it_was_trained_to_unless_told_otherwise():
    def shrink(pixels):
        return torch.nn.functional.avg_pool2d(pixels, 4)

    assert make_encoder(CONFIG, shrink).sight()(dotted()).size == (40, 20)
    assert make_encoder(CONFIG, shrink).sight(f"{__name__}:bright", 0.25)(dotted()).size == (12, 12)
    cropping = make_encoder(dataclasses.replace(CONFIG, face_crop=f"{__name__}:bright", face_margin=0.0), shrink)
    with pytest.raises(ConfigError, match=r"face_crop='.*:bright' if you trust it"):
        cropping.sight()
    with pytest.raises(ConfigError, match="face_margin needs face_crop"):
        make_encoder(CONFIG, shrink).sight(face_margin=0.25)
    assert cropping.sight(f"{__name__}:bright")(dotted()).size == (8, 8)
    assert cropping.sight(f"{__name__}:bright", 0.5)(dotted()).size == (16, 16)
