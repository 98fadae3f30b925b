# SPDX-License-Identifier: Apache-2.0
"""Subjects that a run does not train on: who they are, their scores so far, and the sheet of what was drawn of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from ...bases import Base
from ...data import Photo, Subject, read_subjects
from ...data.images import png
from ...errors import ConfigError, CorruptFileError, TooFewImagesError
from ...files import going_on, write_bytes
from ...metrics import face_embedder
from ..engine.processes import Processes
from ..examples.batches import Examples
from ..examples.encoding import encode_subjects, usable
from ..stage_settings import VALIDATION_FOLDER, HeldOutConfig, MetaTrainConfig
from .tracking import Trackers
from .validation_scores import FaceScore, HeldOutLoss, Painter

SCORES_FILE = "scores.jsonl"
VIEWS = 8  # of a reference to learn from, and of each subject's other photos in all to score on


def split_subjects(subjects: list[Subject], config: HeldOutConfig) -> tuple[list[Subject], list[Subject]]:
    """The subjects to train on, and those to validate on: none without `validation_steps`.

    Raises:
        ConfigError: nobody would be left to train on.
        NoImagesError, MetadataError: validation_data_dir cannot be used.
    """
    if config.validation_steps is None:
        return subjects, []
    if config.validation_data_dir is not None:
        return subjects, read_subjects(config.validation_data_dir)[: config.validation_subjects]
    count = config.validation_subjects or 4
    if count >= len(subjects):
        raise ConfigError(
            f"expected more subjects than the {count} that are held out for validation, found {len(subjects)}: lower "
            "validation_subjects, or give validation_data_dir"
        )
    return subjects[:-count], subjects[-count:]


@dataclass(frozen=True)
class HeldOut:
    """Held-out subjects.

    Attributes:
        names: of the subjects.
        references: the photo that each is learned or read from.
        others: the photos that each is scored on: without others the reference, too.
        scored: of each subject, what no step sees.
    """

    names: list[str]
    references: list[Photo]
    others: list[list[Photo]]
    scored: list[Examples]

    def alone(self) -> list[Subject]:
        """The subjects with their references alone."""
        return [Subject(name, [photo]) for name, photo in zip(self.names, self.references, strict=True)]


def hold_out(base: Base, subjects: Sequence[Subject], config: HeldOutConfig) -> HeldOut:
    """Split the photos of held-out subjects and encode those that score; raises as `encode_subjects`.

    Those that cannot be used are left out, as photos to train on are, and a warning names them.
    """
    # Another seed gives other crops.
    config = as_squares(replace(config, seed=config.seed + 1))
    parts = [_parts(subject) for subject in usable(base, subjects, config)]
    scored = [
        encode_subjects(base, [Subject(one.name, photos)], config, max(1, VIEWS // len(photos)), progress=False)
        for one, (_, photos) in zip(subjects, parts, strict=True)
    ]
    return HeldOut([one.name for one in subjects], [part[0] for part in parts], [part[1] for part in parts], scored)


def _parts(subject: Subject) -> tuple[Photo, list[Photo]]:
    try:
        return subject.split()
    except TooFewImagesError:
        return subject.photos[0], subject.photos


def as_squares(config: HeldOutConfig) -> HeldOutConfig:
    """The same settings for views of one shape, which subjects that are learned side by side must have."""
    return replace(config, aspect_ratio_buckets=None) if isinstance(config, MetaTrainConfig) else config


class Watch:
    """Scores held-out subjects, draws them and keeps what it saw in `output_dir/validation`.

    Args:
        base: its denoiser shows whoever is looked at.
        done: steps of a resumed run so far; scores of later steps, which it will compute again, are forgotten.
    """

    def __init__(
        self, base: Base, held: HeldOut, config: HeldOutConfig, processes: Processes, trackers: Trackers, done: int
    ) -> None:
        self.held, self.is_main, self.trackers = held, processes.is_main, trackers
        self.folder = Path(config.output_dir, VALIDATION_FOLDER)
        self.painter = Painter(base, config.validation_prompt, resolution=config.resolution, seed=config.seed)
        # Read now: in hours they may have gone.
        size = config.resolution, config.resolution
        shown = held.references if self.painter.prompts and processes.is_main else []
        self._references = [ImageOps.fit(photo.load(), size) for photo in shown]
        self._losses = [HeldOutLoss(base, examples, seed=config.seed) for examples in held.scored]
        self._faces: list[FaceScore] = []
        if config.validation_embedder is not None:
            embedder = face_embedder(config.validation_embedder, "validation_embedder")
            self._faces = [FaceScore(photos, embedder) for photos in held.others]
        self._records = _records(self.folder / SCORES_FILE, done) if done else []
        self._scores: list[float] = []
        self._pictures: list[list[Image.Image]] = []

    def see(self, number: int) -> None:
        """Draw and score subject `number`, whom the denoiser shows now."""
        self._pictures.append(self.painter.images())
        faces = self._faces
        self._scores.append(faces[number](self._pictures[-1]) if faces else self._losses[number]())

    def finish(self, step: int) -> float:
        """Write what was seen of all subjects at a step; returns their mean score, the higher the better."""
        scores, pictures = self._scores, self._pictures
        self._scores, self._pictures = [], []
        score = sum(scores) / len(scores)
        if self.is_main:
            subjects = dict(zip(self.held.names, scores, strict=True))
            self._records.append({"step": step, "score": score, "subjects": subjects})
            text = "".join(json.dumps(record) + "\n" for record in self._records)
            with going_on():
                write_bytes(self.folder / SCORES_FILE, text.encode())
            self.trackers.log(step, {"validation_score": score})
            if self.painter.prompts:
                sheet = contact_sheet(self._references, pictures)
                with going_on():
                    write_bytes(self.folder / f"{step:05d}.png", png(sheet))
                self.trackers.images(step, [sheet])
        return score


def _records(path: Path, done: int) -> list[dict[str, Any]]:
    """The lines of a file of scores, if there is one, up to step `done`."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n") if path.is_file() else []
        return [record for record in map(json.loads, filter(None, lines)) if record["step"] <= done]
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise CorruptFileError(f"expected lines of scores in {path}, found: {error}. Remove it and resume.") from error


def contact_sheet(references: Sequence[Image.Image], pictures: Sequence[Sequence[Image.Image]]) -> Image.Image:
    """A row for each subject: its reference, cut to the size of the pictures, and what was drawn of it."""
    width, height = pictures[0][0].size
    sheet = Image.new("RGB", ((1 + len(pictures[0])) * width, len(references) * height))
    for row, (reference, drawn) in enumerate(zip(references, pictures, strict=True)):
        for column, image in enumerate([ImageOps.fit(reference, (width, height)), *drawn]):
            sheet.paste(image, (column * width, row * height))
    return sheet
