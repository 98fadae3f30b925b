# SPDX-License-Identifier: Apache-2.0
"""Looking at a Down while it is learned: a short stage 2 of held-out subjects on the Down as it is by then.

Each held-out subject is learned from its reference alone, as `personalize` would. The score is R-FaceSim of what is
then drawn, against the subject's other photos (arXiv 2503.22352), or minus the loss on those photos; for a subject of
one photo, on other crops of it. Stage 1 does not notice: its adapter is set aside meanwhile, and so are the random
numbers that all share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

import torch

from ...bases import Base
from ...bases.precision import autocast
from ...data import Subject
from ...errors import TrainingError
from ...tuner import set_slots
from ...tuner.placing import set_aside
from ..engine.compiling import eagerly
from ..examples.batches import Examples
from ..examples.encoding import encode_subjects
from ..personalize import personalize_many
from ..stage_1 import MetaTraining
from ..stage_settings import MetaTrainConfig, PersonalizeConfig, StageConfig
from .held_out import VIEWS, HeldOut, Watch, as_squares, hold_out
from .tracking import Trackers


def encode_held_out(
    base: Base, subjects: Sequence[Subject], config: MetaTrainConfig, *, progress: bool = True
) -> tuple[HeldOut, Examples]:
    """Held-out subjects, and views of their references to learn them from; raises as `encode_subjects`."""
    held = hold_out(base, subjects, config)
    return held, encode_subjects(base, held.alone(), as_squares(config), VIEWS, progress=progress)


class DownValidation:
    """Scores and draws held-out subjects every `validation_steps`, into `output_dir/validation`.

    With several processes each computes all of it, because a base that is divided over them needs them all, and the
    main one writes.

    Args:
        learned: views of the references of `held`.
        done: steps of a resumed run so far.
    """

    def __init__(self, run: MetaTraining, held: HeldOut, learned: Examples, trackers: Trackers, done: int) -> None:
        self.run, self.held, self.learned = run, held, learned
        self.watch = Watch(run.base, held, run.config, run.processes, trackers, done)
        self.stage_2 = _stage_2(run.config, len(held.names), run.processes.count)

    def look(self, step: int) -> float | None:
        """Look, if this is a step to look at; returns the mean score of the subjects, the higher the better."""
        base, config = self.run.base, self.run.config
        if config.validation_steps is None or step % config.validation_steps:
            return None
        down = self.run.down()
        self.run.forget_recordings()
        devices = [base.device] if base.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), set_aside(base.denoiser), eagerly(config):
            try:
                learning = personalize_many(base, self.learned, self.stage_2, down, progress=False)
            except TrainingError as error:
                raise TrainingError(f"validation, which learns held-out subjects: {error}", step) from error
            with autocast(config.mixed_precision, base.device, adapter_casts=True):
                for slot in range(len(self.held.names)):
                    set_slots(base.denoiser, [slot])
                    self.watch.see(slot)
            learning.remove()
        return self.watch.finish(step)


def _stage_2(config: MetaTrainConfig, subjects: int, processes: int) -> PersonalizeConfig:
    """Stage 2 as it is run on held-out subjects: stage 1's settings where both have them, no larger batch."""
    shared = {one.name: getattr(config, one.name) for one in fields(StageConfig)}
    shared |= {"gradient_accumulation_steps": 1, "lr_scheduler": "constant", "lr_warmup_steps": 0}
    shared |= {"checkpointing_steps": None, "resume_from_checkpoint": None, "dynamo_backend": "no"}
    shared |= {"target_modules": None}  # the Down has them
    samples = config.subjects_per_batch * config.images_per_subject // processes
    return PersonalizeConfig(
        **shared,
        max_train_steps=config.validation_train_steps,
        train_batch_size=max(1, min(4, samples // subjects)),
    )
