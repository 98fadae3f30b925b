# SPDX-License-Identifier: Apache-2.0
"""insightface, whose packs hold a face detector and a recogniser, ArcFace.

Its weights are licensed for non-commercial research only. They are loaded when an embedder or a detector is made.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..errors import EmbedderUnavailableError
from .embedders import Embeddings, Images, as_pil


class InsightFaceEmbedder:
    """ArcFace embedding (https://arxiv.org/abs/1801.07698) of the largest face of an image, through insightface.

    The code needs the extra `[face]`. The weights of its packs are licensed for non-commercial research only; they
    are looked for in `root/models/<pack>` and insightface offers to fetch them there.

    Args:
        pack: "antelopev2" (as Meta-LoRA's field uses), "buffalo_l", another pack, or a folder of ONNX files.
        providers: of onnxruntime, e.g. ["CUDAExecutionProvider"]; None takes what insightface finds best.
        root: where packs are kept.
        det_size: width and height that images are fitted into for detection, in pixels.
        det_threshold: detections below this score are no faces, in [0, 1].
        batch_size: aligned faces in one pass of the recogniser, where its file allows more than one; it does not change
            the vectors. The detector takes one image at a time.

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
        batch_size: int = 32,
    ) -> None:
        self._app = open_pack(pack, ["detection", "recognition"], providers, root, det_size, det_threshold)
        if "recognition" not in self._app.models:
            raise EmbedderUnavailableError(_pack_problem(pack, os.fspath(root), "no recognition model"))
        from insightface.utils.face_align import norm_crop

        self._recogniser, self._align = self._app.models["recognition"], norm_crop
        self.dim = int(self._recogniser.output_shape[-1])
        # A file that was exported for one image names the number 1, any other a symbol.
        self._batch_size = 1 if self._recogniser.input_shape[0] == 1 else batch_size

    def embed(self, images: Images) -> Embeddings:
        """Vectors (n, 512 for the usual packs) and landmarks of the largest face of each image, where there is one.

        Raises:
            MetricInputError: no images, or a tensor of another shape than (n, 3, h, w) in [0, 1].
        """
        pictures = as_pil(images)
        vectors = torch.zeros(len(pictures), self.dim, dtype=torch.float32, device="cpu")
        sizes, landmarks = vectors.new_zeros(len(pictures)), vectors.new_full((len(pictures), 5, 2), torch.nan)
        faces, rows = [], []
        for row, picture in enumerate(pictures):
            bgr = np.ascontiguousarray(np.asarray(picture)[:, :, ::-1])
            boxes, points = self._app.det_model.detect(bgr, max_num=1, metric="max")
            if len(boxes):
                landmarks[row] = torch.from_numpy(np.asarray(points[0], dtype=np.float32))
                sizes[row] = float(boxes[0][3] - boxes[0][1]) / picture.height
                faces.append(self._align(bgr, points[0], image_size=self._recogniser.input_size[0]))
                rows.append(row)
        for start in range(0, len(rows), self._batch_size):
            part = slice(start, start + self._batch_size)
            seen = torch.from_numpy(np.asarray(self._recogniser.get_feat(faces[part]), dtype=np.float32))
            vectors[rows[part]] = torch.nn.functional.normalize(seen, dim=-1)
        found = torch.zeros(len(pictures), dtype=torch.bool, device="cpu")
        found[rows] = True
        return Embeddings(vectors, found, landmarks, sizes)


def open_pack(
    pack: str,
    modules: list[str],
    providers: Sequence[str] | None,
    root: str | os.PathLike[str],
    det_size: tuple[int, int],
    det_threshold: float,
) -> Any:
    """insightface's `FaceAnalysis` with some modules of a pack, ready; the arguments are `InsightFaceEmbedder`'s.

    Raises:
        EmbedderUnavailableError: insightface is not installed, or the pack is missing or incomplete.
    """
    try:
        from insightface.app import FaceAnalysis
    except ImportError as error:
        raise EmbedderUnavailableError(
            f"expected insightface, found none ({error}): pip install 'peft-metalora[face]'"
        ) from error
    given = {} if providers is None else {"providers": list(providers)}
    try:
        app = FaceAnalysis(name=pack, root=os.fspath(root), allowed_modules=modules, **given)
    except Exception as error:  # insightface raises whatever its downloader, assertions or onnxruntime raise
        raise EmbedderUnavailableError(_pack_problem(pack, os.fspath(root), repr(error))) from error
    cpu_only = providers is not None and list(providers) == ["CPUExecutionProvider"]
    app.prepare(ctx_id=-1 if cpu_only else 0, det_thresh=det_threshold, det_size=det_size)
    return app


def _pack_problem(pack: str, root: str, found: str) -> str:
    return (
        f"expected the detection and recognition models of the insightface pack {pack!r}, found {found}: put its .onnx "
        f"files directly into {os.path.join(root, 'models', pack)} (not into a folder of the same name inside it), or "
        "give a folder of .onnx files"
    )
