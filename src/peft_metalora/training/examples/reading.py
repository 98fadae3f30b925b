# SPDX-License-Identifier: Apache-2.0
"""What an encoder sees of photos in training: each as it is, and made worse in several ways."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from ...data import Photo, Subject
from ...data.degrade import make_worse
from ...encoder import SubjectEncoder
from ...errors import NoFaceError
from ...metrics.by_name import code_of
from ..encoder_training import Reads
from ..stage_settings import TrainEncoderConfig
from .batches import Examples
from .cache import Cache, content_hash
from .encoding import see
from .views import mask_content

# R-FaceSim of tune people of the embedded domain with 1, 3 and 7 (benchmarks/results/encoder_choices.json): read from
# clean photos 0.656, 0.673 and 0.689, from strongly blurred ones 0.598, 0.580 and 0.564.
_GOOD = 3


def read_photos(
    subjects: Sequence[Subject],
    examples: Examples,
    encoder: SubjectEncoder,
    config: TrainEncoderConfig,
    *,
    progress: bool = True,
) -> Reads:
    """What an encoder sees of every photo that is an example: as it is, and `bad_versions` worse ones.

    The good one is drawn `_GOOD` times as often as all of them. How a photo is made worse depends on its bytes and the
    seed, not on other photos. With `cache_dir` what is seen is kept on disk, and looked up there.

    Photos without the face that the source needs are left out, with a warning that names them; so are bad versions on
    which it can no longer be found.
    """
    photos = [photo for subject in subjects for photo in subject.photos]
    owners = [number for number, subject in enumerate(subjects) for _ in subject.photos]
    usable = examples.photos()
    look = _Looker(encoder, config)
    found = see(tqdm([photos[n] for n in usable], desc="reading", unit="image", disable=not progress), look, True)
    features = torch.cat([seen for _, seen in found])
    number = torch.tensor([usable[place] for place, _ in found])
    rows, photo = [], []
    first = 0
    for place, (_, seen) in enumerate(found):
        bad = len(seen) - 1
        good = max(1, _GOOD * bad)
        rows += [first] * good + list(range(first + 1, first + 1 + bad))
        photo += [int(number[place])] * (good + bad)
        first += len(seen)
    return Reads(features, torch.tensor([owners[n] for n in photo]), torch.tensor(photo), torch.tensor(rows))


class _Looker:
    """Features (1 + bad versions, ...) of one photo after another, the good one first."""

    def __init__(self, encoder: SubjectEncoder, config: TrainEncoderConfig) -> None:
        self._source, self._sight, self._config = encoder.source, encoder.sight(config.face_crop), config
        # A face model tells nothing of itself without a face, so that another one could not be told from it.
        cached = config.cache_dir is not None and config.encoder.partition(":")[0] != "face"
        self._cache = Cache(config.cache_dir if cached else None)
        self._made_by = content_hash(self._probe()) if cached else ""

    def __call__(self, photo: Photo) -> Tensor:
        """Raises NoFaceError; and what reading a photo raises."""
        content, mask = photo.read(), mask_content(photo)
        digest = content_hash(content)
        sees = "encoder", "resolution", "face_crop", "face_margin", "face_align", "bad_versions", "seed"
        made_from = {
            "made_by": self._made_by,
            "photo": digest,
            "mask": None if mask is None else content_hash(mask),
            "format": 2,
            **{name: getattr(self._config, name) for name in sees},
            **({"code": code} if (code := code_of(self._config.face_crop)) else {}),
        }
        return self._cache.get(made_from, lambda: {"features": self._look(photo, content, digest)})["features"]

    def _look(self, photo: Photo, content: bytes, digest: str) -> Tensor:
        image, source = self._sight(photo, content=content), random.Random(self._config.seed + int(digest[:12], 16))
        worse = [make_worse(image, source) for _ in range(self._config.bad_versions)]
        try:
            return self._source.features([image, *worse]).cpu()
        except NoFaceError:
            return torch.cat([self._alone(image, photo), *self._with_faces(worse)])

    def _alone(self, image: Image.Image, photo: Photo) -> Tensor:
        try:
            return self._source.features([image]).cpu()
        except NoFaceError as error:
            raise NoFaceError(f"expected a face in {photo.path}, found none: remove the photo") from error

    def _with_faces(self, images: Sequence[Image.Image]) -> list[Tensor]:
        seen = []
        for image in images:
            try:
                seen.append(self._source.features([image]).cpu())
            except NoFaceError:
                continue
        return seen

    def _probe(self) -> bytes:
        """What the source makes of a picture of noise: sources that differ anywhere differ there."""
        pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        return self._source.features([Image.fromarray(pixels)]).cpu().numpy().tobytes()
