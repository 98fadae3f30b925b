# SPDX-License-Identifier: Apache-2.0
"""A face recogniser whose weights are free: dlib's, from the package index.

The package face-recognition-models holds four files, of which two are read here: the recogniser and the five landmarks,
both in the public domain (CC0). The detector is part of dlib itself. Of the others, 68 landmarks were trained on data
that forbid commercial use: that file is never opened.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import EmbedderUnavailableError
from .embedders import Comparison, Embeddings, Images, as_pil

SAME = 0.6  # distance below which dlib takes two photos for one person: 99.4 % right on LFW (dlib's own figure)
_MODELS = "face_recognition_models"
_RECOGNISER, _LANDMARKS = "dlib_face_recognition_resnet_model_v1.dat", "shape_predictor_5_face_landmarks.dat"
_LEAST = 150  # side in pixels from which dlib's detector, which sees faces of 80 pixels, is given an image as it is


def _similarity(first: Tensor, second: Tensor) -> Tensor:
    return 1 - torch.cdist(first, second) / (2 * SAME)


class DlibEmbedder:
    """dlib's ResNet (https://github.com/davisking/dlib-models) on the largest face of an image.

    Needs the extra `[dlib]`. Its vectors are not centred, so that cosines are high between strangers too (about 0.85).
    They are compared by Euclidean distance d, and the similarity is `1 - d / 1.2`: 1 for the same photo, 0.5 at the
    distance of 0.6 at which dlib draws the line between people, about 0.3 for strangers.

    Attributes:
        match_threshold: that line, 0.5.

    Raises:
        EmbedderUnavailableError: dlib or the package of its weights is not installed.
    """

    dim = 128
    match_threshold = 0.5

    def __init__(self) -> None:
        self._detect, self._landmarks, self._recognise = _networks()

    def embed(self, images: Images) -> Embeddings:
        """Vectors (n, 128) of the largest face of each image, how large it is, and its eyes and nose.

        The five landmarks are the corners of the eyes and the foot of the nose: `landmarks` has no mouth (nan).

        Raises:
            MetricInputError: no images, or a tensor of another shape than (n, 3, h, w) in [0, 1].
        """
        pictures = as_pil(images)
        vectors = torch.zeros(len(pictures), self.dim, dtype=torch.float32, device="cpu")
        sizes, landmarks = vectors.new_zeros(len(pictures)), vectors.new_full((len(pictures), 5, 2), torch.nan)
        for row, picture in enumerate(pictures):
            pixels = np.ascontiguousarray(picture)
            faces = self._detect(pixels, int(min(picture.size) < _LEAST))
            if faces:
                face = max(faces, key=lambda one: one.area())
                marks = self._landmarks(pixels, face)
                seen = self._recognise.compute_face_descriptor(pixels, marks)
                vectors[row], sizes[row] = vectors.new_tensor(list(seen)), face.height() / picture.height
                # The eye on the right comes first, each by its two corners.
                corners = vectors.new_tensor([[float(mark.x), float(mark.y)] for mark in marks.parts()])
                landmarks[row, :3] = torch.stack([corners[2:4].mean(0), corners[:2].mean(0), corners[4]])
        return Embeddings(vectors, sizes > 0, landmarks, sizes, Comparison(_similarity, torch.cdist))


@cache
def _networks() -> tuple[Any, Any, Any]:
    """Detector, landmarks and recogniser, read once: they are the same for all."""
    try:
        import dlib
    except ImportError as error:
        raise EmbedderUnavailableError(
            f"expected dlib, found none ({error}): pip install 'peft-metalora[dlib]'"
        ) from error
    # Importing the package would need pkg_resources, which setuptools no longer has.
    spec = find_spec(_MODELS)
    folder = Path(next(iter(spec.submodule_search_locations or [""]))) / "models" if spec else Path()
    missing = [name for name in (_RECOGNISER, _LANDMARKS) if not (folder / name).is_file()]
    if missing:
        raise EmbedderUnavailableError(
            f"expected {', '.join(missing)} of the package face-recognition-models, found none: pip install "
            "'peft-metalora[dlib]'"
        )
    landmarks, recogniser = dlib.shape_predictor, dlib.face_recognition_model_v1
    return dlib.get_frontal_face_detector(), landmarks(str(folder / _LANDMARKS)), recogniser(str(folder / _RECOGNISER))
