# SPDX-License-Identifier: Apache-2.0
"""What `metalora likeness` does: score a folder of pictures against photos of the person, whatever made them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError
from ..settings import setting
from . import Done


@dataclass(kw_only=True)
class LikenessConfig:
    """Score pictures of a person, made by anything, against photos of the person.

    Raises:
        ConfigError: one of the two folders is missing.
    """

    photos: str = setting(
        "A photo, or a folder of photos, of the person; not what was learned from.", positional="PHOTOS"
    )
    images: str = setting("A picture, or a folder of pictures, to be scored.", positional="IMAGES")
    reference: str | None = setting(
        "The photo that was learned from: also say how much of the likeness is a copy of it.", None
    )
    embedder: str = setting("Face model: 'insightface', 'dlib', or module:function.", "insightface")
    face_pack: str = setting("Models of insightface: antelopev2, buffalo_l, or a folder of ONNX files.", "antelopev2")
    match_threshold: float | None = setting(
        "Likeness from which on a picture counts as a match. Default: the face model's, if it has one.", None
    )

    def __post_init__(self) -> None:
        if not (self.photos and self.images):
            raise ConfigError("expected photos of the person and pictures to score, found one of them or none")


def run_likeness(config: LikenessConfig) -> Done:
    """Score each picture, and all of them.

    Raises:
        NoImagesError, UnreadableImageError: photos or pictures that cannot be used.
        MetricInputError: no photo of the person has a face.
        ConfigError, EmbedderUnavailableError: the face model is not there.
    """
    from ..data import read_photos
    from ..metrics import Interval, bootstrap, copy_paste, face_embedder, r_facesim, real_ceiling

    faces = face_embedder(config.embedder, pack=config.face_pack)
    photos, images = read_photos(config.photos), read_photos(config.images)
    made = faces.embed([photo.load() for photo in images])
    others = faces.embed([photo.load() for photo in photos])
    scores, ceiling = r_facesim(made, others), real_ceiling(others)
    threshold = getattr(faces, "match_threshold", None) if config.match_threshold is None else config.match_threshold
    rows: list[dict[str, Any]] = [
        {"file": photo.path, "found": found, "likeness": round(score, 4)}
        for photo, found, score in zip(images, made.found.tolist(), scores.per_image.tolist(), strict=True)
    ]
    every: dict[str, Any] = {
        "likeness": bootstrap(scores.per_image),
        "real_photos": None if math.isnan(ceiling) else round(ceiling, 4),
        "no_face": int((~made.found).sum()),
    }
    if threshold is not None:
        for row, score in zip(rows, scores.per_image.tolist(), strict=True):
            row["match"] = row["found"] and score >= threshold
        every["match_rate"] = sum(row["match"] for row in rows) / len(rows)
    if config.reference is not None:
        copied = copy_paste(made, faces.embed([photo.load() for photo in read_photos(config.reference)]), others)
        for row, one in zip(rows, copied.tolist(), strict=True):
            row["copy_paste"] = round(one, 4)
        every["copy_paste"] = bootstrap(copied)
    values = {name: vars(value) if isinstance(value, Interval) else value for name, value in every.items()}
    return Done("\n".join([*map(_line, rows), "", _summary(len(rows), every)]), {**values, "images": rows})


def _line(row: dict[str, Any]) -> str:
    if not row["found"]:
        return f"no face  {row['file']}"
    told = f"{row['likeness']:7.3f}  {row['file']}"
    if "match" in row:
        told += "" if row["match"] else "  (not a match)"
    return told + (f"  copy-paste {row['copy_paste']:.2f}" if "copy_paste" in row else "")


def _summary(count: int, every: dict[str, Any]) -> str:
    told = [f"likeness {every['likeness']} over {count} pictures"]
    if every["real_photos"] is not None:
        told.append(f"{every['real_photos']:.3f} among the person's photos")
    if "match_rate" in every:
        told.append(f"{every['match_rate']:.0%} match")
    if "copy_paste" in every:
        told.append(f"copy-paste {every['copy_paste']}")
    if every["no_face"]:
        told.append(f"no face in {every['no_face']}, which count as 0")
    return "; ".join(told)
