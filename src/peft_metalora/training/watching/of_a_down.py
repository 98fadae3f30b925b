# SPDX-License-Identifier: Apache-2.0
"""Looking at a Down while it is learned: a short stage 2 of held-out subjects on the Down as it is by then.

Each held-out subject is learned from its reference alone, as `personalize` would. The score is R-FaceSim of what is
then drawn, against the subject's other photos (arXiv 2503.22352), or minus the loss on those photos; for a subject of
one photo, on other crops of it. Stage 1 does not notice: its adapter is set aside meanwhile, and so are the random
numbers that all share.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps

from ...bases import Base
from ...bases.precision import autocast
from ...data import Photo, Subject, read_subjects
from ...data.images import png
from ...errors import ConfigError, CorruptFileError, TrainingError
from ...files import write_bytes
from ...tuner import set_slots
from ...tuner.placing import set_aside
from ..engine.compiling import eagerly
from ..examples.batches import Examples
from ..examples.encoding import encode_subjects
from ..personalize import personalize_many
from ..stage_1 import MetaTraining
from ..stage_settings import VALIDATION_FOLDER, MetaTrainConfig, PersonalizeConfig, TrainingConfig
from .tracking import Trackers
from .validation_scores import FaceScore, HeldOutLoss, Painter, load_embedder

SCORES_FILE = "scores.jsonl"
_VIEWS = 8  # of a reference to learn from, and of each subject's other photos in all to score on


def split_subjects(subjects: list[Subject], config: MetaTrainConfig) -> tuple[list[Subject], list[Subject]]:
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
    """Held-out subjects, encoded.

    Attributes:
        names: of the subjects.
        references: the photo that each is learned from.
        others: the photos that each is scored on.
        learned: views of the references. scored: of each subject, what no step sees.
    """

    names: list[str]
    references: list[Photo]
    others: list[list[Photo]]
    learned: Examples
    scored: list[Examples]


def encode_held_out(
    base: Base, subjects: Sequence[Subject], config: MetaTrainConfig, *, progress: bool = True
) -> HeldOut:
    """Encode held-out subjects; raises as `encode_subjects`."""
    references, others = [], []
    for subject in subjects:
        reference, rest = subject.split() if len(subject.photos) > 1 else (subject.photos[0], subject.photos)
        references.append(reference)
        others.append(rest)
    alone = [Subject(one.name, [photo]) for one, photo in zip(subjects, references, strict=True)]
    # They are learned side by side, in slots, which takes views of one shape.
    config = replace(config, aspect_ratio_buckets=None)
    learned = encode_subjects(base, alone, config, _VIEWS, progress=progress)
    # Another seed gives other crops.
    other = replace(config, seed=config.seed + 1)
    scored = [
        encode_subjects(base, [Subject(one.name, photos)], other, max(1, _VIEWS // len(photos)), progress=False)
        for one, photos in zip(subjects, others, strict=True)
    ]
    return HeldOut([one.name for one in subjects], references, others, learned, scored)


class DownValidation:
    """Scores and draws held-out subjects every `validation_steps`, into `output_dir/validation`.

    With several processes each computes all of it, because a base that is divided over them needs them all, and the
    main one writes.

    Args:
        done: steps of a resumed run so far; scores of later steps, which it will compute again, are forgotten.
    """

    def __init__(self, run: MetaTraining, held: HeldOut, trackers: Trackers, done: int = 0) -> None:
        self.run, self.held, self.trackers = run, held, trackers
        self.folder = Path(run.config.output_dir, VALIDATION_FOLDER)
        base, config = run.base, run.config
        self.stage_2 = _stage_2(config, len(held.names), run.processes.count)
        self.painter = Painter(base, config.validation_prompt, resolution=config.resolution, seed=config.seed)
        self.losses = [HeldOutLoss(base, examples, seed=config.seed) for examples in held.scored]
        self.faces: list[FaceScore] = []
        if config.validation_embedder is not None:
            embedder = load_embedder(config.validation_embedder)
            self.faces = [FaceScore(photos, embedder) for photos in held.others]
        self.records = _records(self.folder / SCORES_FILE, done) if done else []

    def look(self, step: int) -> float | None:
        """Look, if this is a step to look at; returns the mean score of the subjects, the higher the better.

        Raises:
            WriteFailedError: the disk refuses.
        """
        base, config, held = self.run.base, self.run.config, self.held
        if config.validation_steps is None or step % config.validation_steps:
            return None
        down, scores, pictures = self.run.down(), [], []
        devices = [base.device] if base.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), set_aside(base.denoiser), eagerly(config):
            try:
                learning = personalize_many(base, held.learned, self.stage_2, down, progress=False)
            except TrainingError as error:
                raise TrainingError(f"validation, which learns held-out subjects: {error}", step) from error
            with autocast(config.mixed_precision, base.device, adapter_casts=True):
                for slot in range(len(held.names)):
                    set_slots(base.denoiser, [slot])
                    pictures.append(self.painter.images())
                    scores.append(self.faces[slot](pictures[-1]) if self.faces else self.losses[slot]())
            learning.remove()
        score = sum(scores) / len(scores)
        if self.run.processes.is_main:
            self._write(step, score, dict(zip(held.names, scores, strict=True)), pictures)
        return score

    def _write(self, step: int, score: float, scores: dict[str, float], pictures: list[list[Image.Image]]) -> None:
        self.records.append({"step": step, "score": score, "subjects": scores})
        text = "".join(json.dumps(record) + "\n" for record in self.records)
        write_bytes(self.folder / SCORES_FILE, text.encode())
        self.trackers.log(step, {"validation_score": score})
        if self.painter.prompts:
            sheet = contact_sheet([photo.load() for photo in self.held.references], pictures)
            write_bytes(self.folder / f"{step:05d}.png", png(sheet))
            self.trackers.images(step, [sheet])


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


def _stage_2(config: MetaTrainConfig, subjects: int, processes: int) -> PersonalizeConfig:
    """Stage 2 as it is run on held-out subjects: stage 1's settings where both have them, no larger batch."""
    shared = {one.name: getattr(config, one.name) for one in fields(TrainingConfig)}
    shared |= {"gradient_accumulation_steps": 1, "lr_scheduler": "constant", "lr_warmup_steps": 0}
    shared |= {"checkpointing_steps": None, "resume_from_checkpoint": None, "dynamo_backend": "no"}
    samples = config.subjects_per_batch * config.images_per_subject // processes
    return PersonalizeConfig(
        **shared,
        max_train_steps=config.validation_train_steps,
        train_batch_size=max(1, min(4, samples // subjects)),
    )
