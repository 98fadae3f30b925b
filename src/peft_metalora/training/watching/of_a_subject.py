# SPDX-License-Identifier: Apache-2.0
"""Looking at a subject while it is learned: a score, pictures, and when to stop.

Two scores, the higher the better. `HeldOutLoss` needs no other model: minus the denoising loss on views that are not
trained on, at noises and noise levels drawn once, so that a difference between two steps is not chance. `FaceScore`
is R-FaceSim (arXiv 2503.22352): images of the validation prompts, compared with photos that are not trained on.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ...bases import Base
from ...bases.precision import autocast
from ...data import Photo, Subject, not_among, read_photos
from ...data.images import png
from ...errors import ConfigError
from ...files import going_on, write_bytes
from ...metrics import face_embedder
from ...tuner import set_slots
from ..engine.compiling import eagerly
from ..examples.batches import Examples
from ..examples.encoding import encode_subjects
from ..stage_2 import Personalization
from ..stage_settings import VALIDATION_FOLDER, PersonalizeConfig
from .best_step import BestStep
from .tracking import Trackers
from .validation_scores import FaceScore, HeldOutLoss, Painter

# Relative rise that counts as one, so that a plateau ends the run.
_MIN_RISE = 1e-3


class Validation:
    """Scores a run and draws its validation prompts every `validation_steps`; `best` knows the best step so far."""

    def __init__(self, run: Personalization, photos: list[Photo], examples: Examples, trackers: Trackers) -> None:
        self.run, self.trackers, config = run, trackers, run.config
        self.painter = Painter(run.base, config.validation_prompt, resolution=config.resolution, seed=config.seed)
        self.loss = HeldOutLoss(run.base, examples, seed=config.seed)
        self.faces = None
        if config.validation_embedder is not None:
            self.faces = FaceScore(photos, face_embedder(config.validation_embedder, "validation_embedder"))
        self.best = BestStep(run.parameters, config.patience, rise=_MIN_RISE)

    def look(self, step: int) -> bool:
        """Whether this was a step to look at."""
        config, denoiser = self.run.config, self.run.base.denoiser
        if config.validation_steps is None or step % config.validation_steps:
            return False
        self.run.forget_recordings()
        denoiser.eval()
        if self.run.uses_slots:
            set_slots(denoiser, None)
        with autocast(config.mixed_precision, self.run.base.device), eagerly(config):
            images = self.painter.images()
            # All processes look, because a base that is divided needs them all; what counts is what one of them sees.
            score = self.run.processes.of_main(self.loss() if self.faces is None else self.faces(images))
        self.best.offer(step, score)
        self.trackers.log(step, {"validation_score": score})
        self.trackers.images(step, images)
        for number, image in enumerate(images if self.run.processes.is_main else []):
            with going_on():
                write_bytes(Path(config.output_dir) / VALIDATION_FOLDER / f"{step:05d}-{number:02d}.png", png(image))
        denoiser.train()
        return True

    def use_best(self) -> None:
        """Make the best step the run's result."""
        if self.best.step:
            self.best.restore()
            self.run.steps_done = self.best.step


def looked_at(subject: Subject, config: PersonalizeConfig) -> Subject:
    """The subject with photos that are not trained on, or, where no others are given, the trained photos.

    Raises:
        ConfigError: all that are given are trained on. As `read_photos`.
    """
    if config.validation_data_dir is None:
        return Subject("held out", subject.photos)
    others = not_among(read_photos(config.validation_data_dir), subject.photos)
    if not others:
        raise ConfigError(
            f"expected a photo that is not trained on in validation_data_dir, found none in "
            f"{config.validation_data_dir}: add one, or leave it out and other crops are looked at"
        )
    return Subject("held out", others)


def held_out(base: Base, held: Subject, config: PersonalizeConfig) -> tuple[list[Photo], Examples]:
    """The photos of `looked_at` that can be used, and views that no step sees; raises as `encode_subjects`."""
    # Another seed gives other crops.
    other = replace(config, seed=config.seed + 1)
    views = max(1, 8 // len(held.photos))
    examples = encode_subjects(base, [held], other, views, progress=False, skip_unreadable=True)
    return [held.photos[number] for number in examples.photos()], examples
