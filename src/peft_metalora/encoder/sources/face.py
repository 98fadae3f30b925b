# SPDX-License-Identifier: Apache-2.0
"""The source `face`: the vector of a face embedder of `metrics`.

insightface's packs are licensed for non-commercial research only, and a Down whose encoder reads them is bound by that
too. Results must not be scored by the embedder that was read, nor by a relative of it.
"""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image
from torch import Tensor

from ...errors import NoFaceError
from ...metrics import face_embedder
from .source import EncodeImages, Still


class FaceSource(Still):
    """The vector of the largest face.

    Args:
        detail: as `face_embedder` takes it; none: insightface's antelopev2.
        resolution, encode_images: not needed.

    Raises:
        ConfigError: no such function. EmbedderUnavailableError: insightface or its weights are not there.
    """

    def __init__(self, detail: str, *, resolution: int = 0, encode_images: EncodeImages | None = None) -> None:
        self.name = f"face:{detail}" if detail else "face"
        self._embedder = face_embedder(detail or "insightface", "what follows face:")
        blank = Image.new("RGB", (64, 64))
        self.feature_shape: tuple[int, ...] = tuple(self._embedder.embed([blank]).vectors.shape[1:])

    def features(self, photos: Sequence[Image.Image]) -> Tensor:
        """(n, d) float32; see `Source`.

        Raises:
            NoFaceError: a photo without a face.
        """
        seen = self._embedder.embed(photos)
        missing = (~seen.found).nonzero().flatten().tolist()
        if missing:
            raise NoFaceError(
                f"expected a face in each of {len(photos)} photos, found none in number {missing[0] + 1}: give a photo "
                "that shows the face"
            )
        return seen.vectors
