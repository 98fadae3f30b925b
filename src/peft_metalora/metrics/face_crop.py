# SPDX-License-Identifier: Apache-2.0
"""The part of a photo around its largest face, with room around it and, if asked for, the eyes level."""

from __future__ import annotations

import math
from dataclasses import dataclass

from PIL import Image

from ..errors import ConfigError
from .by_name import load_detector
from .detectors import Face


@dataclass(frozen=True)
class Region:
    """A rectangle of an image, in pixels, turned about its centre by `angle` (radians, clockwise)."""

    centre: tuple[float, float]
    width: float
    height: float
    angle: float = 0.0

    def cut(self, image: Image.Image) -> Image.Image:
        """That part of an RGB or grey image, upright."""
        size = max(1, round(self.width)), max(1, round(self.height))
        x, y = self.centre
        if not self.angle:
            left, top = round(x - self.width / 2), round(y - self.height / 2)
            return image.crop((left, top, left + size[0], top + size[1]))
        cosine, sine = math.cos(self.angle), math.sin(self.angle)
        # Where each pixel of the result comes from.
        matrix = (
            cosine,
            -sine,
            x - (cosine * size[0] - sine * size[1]) / 2,
            sine,
            cosine,
            y - (sine * size[0] + cosine * size[1]) / 2,
        )
        return image.transform(size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC)


class FaceCrop:
    """Finds the part of a photo to train on or to read.

    Args:
        detector: 'insightface', or `module:function` that returns a `FaceDetector`.
        margin: room on every side of the face's box, as a share of the box's longer side.
        align: turn the photo so that the eyes are level.

    Raises:
        ConfigError: there is no such function, or less than no room.
        EmbedderUnavailableError: insightface or its weights are missing.
    """

    def __init__(self, detector: str, margin: float, align: bool) -> None:
        if not margin >= 0:
            raise ConfigError(f"face_margin must be 0 or more, found {margin}")
        self._detector, self._margin, self._align = load_detector(detector), margin, align

    def region(self, image: Image.Image) -> Region | None:
        """A square around the largest face, as far as the image reaches; None without a face.

        A face so near to the border that a turned square with the face in it would leave the image is not turned.
        """
        face = self._detector.detect(image)
        if face is None:
            return None
        turned = _turned(face, image, self._margin) if self._align else None
        return turned or _upright(face, image, self._margin)


def _upright(face: Face, image: Image.Image, margin: float) -> Region:
    left, top, right, bottom = face.box
    half = (0.5 + margin) * max(right - left, bottom - top)
    x, y = (left + right) / 2, (top + bottom) / 2
    left, right = max(0, round(x - half)), min(image.width, round(x + half))
    top, bottom = max(0, round(y - half)), min(image.height, round(y + half))
    return Region(((left + right) / 2, (top + bottom) / 2), right - left, bottom - top)


def _turned(face: Face, image: Image.Image, margin: float) -> Region | None:
    if face.eyes is None:
        return None
    (x1, y1), (x2, y2) = face.eyes
    angle = math.atan2(y2 - y1, x2 - x1)
    left, top, right, bottom = face.box
    side = max(right - left, bottom - top)
    x, y = (left + right) / 2, (top + bottom) / 2
    # Of a square of half side h, turned, the corners reach this far along x and along y.
    reach = abs(math.cos(angle)) + abs(math.sin(angle))
    half = min((0.5 + margin) * side, min(x, image.width - x, y, image.height - y) / reach)
    return Region((x, y), 2 * half, 2 * half, angle) if 2 * half >= side else None
