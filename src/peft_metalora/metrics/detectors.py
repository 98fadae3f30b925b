# SPDX-License-Identifier: Apache-2.0
"""Where the face of an image is, behind one small interface; insightface's detectors are one implementation."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from PIL import Image

from .insight_faces import open_pack

Point = tuple[float, float]


@dataclass(frozen=True)
class Face:
    """A face in an image.

    Attributes:
        box: left, top, right, bottom, in pixels; it may reach beyond the image.
        eyes: the eye on the image's left and the one on its right, (x, y) in pixels; None if they are not known.
    """

    box: tuple[float, float, float, float]
    eyes: tuple[Point, Point] | None = None


class FaceDetector(Protocol):
    """Anything that finds faces."""

    def detect(self, image: Image.Image) -> Face | None:
        """The largest face of an RGB image; None if there is none."""
        ...


class InsightFaceDetector:
    """The detector of a pack of insightface (SCRFD, https://arxiv.org/abs/2105.04714).

    The code needs the extra `[face]`; where packs are looked for and their licence are as `InsightFaceEmbedder` says.

    Args:
        pack: "antelopev2", "buffalo_l", another pack, or a folder of ONNX files.
        providers: of onnxruntime; None takes what insightface finds best.
        root: where packs are kept.
        det_size: width and height that images are fitted into, in pixels.
        det_threshold: detections below this score are no faces, in [0, 1].

    Raises:
        EmbedderUnavailableError: insightface is not installed, or the pack is missing or incomplete.
    """

    def __init__(
        self,
        pack: str = "antelopev2",
        *,
        providers: Sequence[str] | None = None,
        root: str | os.PathLike[str] = "~/.insightface",
        det_size: tuple[int, int] = (640, 640),
        det_threshold: float = 0.5,
    ) -> None:
        self._app = open_pack(pack, ["detection"], providers, root, det_size, det_threshold)

    def detect(self, image: Image.Image) -> Face | None:
        """The largest face of an RGB image; None if there is none."""
        bgr = np.ascontiguousarray(np.asarray(image.convert("RGB"))[:, :, ::-1])
        faces = self._app.get(bgr)
        if not faces:
            return None
        largest = max(faces, key=lambda face: float((face.bbox[2] - face.bbox[0]) * (face.bbox[3] - face.bbox[1])))
        left, top, right, bottom = (float(number) for number in largest.bbox)
        (x1, y1), (x2, y2) = ((float(x), float(y)) for x, y in largest.kps[:2])
        return Face((left, top, right, bottom), ((x1, y1), (x2, y2)))
