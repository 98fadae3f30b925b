# SPDX-License-Identifier: Apache-2.0
"""Looking at an encoder while it is taught: held-out subjects are read from their references, in zero steps.

The score is R-FaceSim of what is then drawn, against the subject's other photos (arXiv 2503.22352), or minus the loss
on those photos. Training does not notice; the encoder of the best score is what is written, because one that learns
its people by heart reads others ever worse.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...bases.precision import autocast
from ...data import Subject
from ...tuner import set_slots
from ..encoder_training import EncoderTraining
from ..engine.compiling import eagerly
from ..engine.origin import photos_of
from ..stage_settings import TrainEncoderConfig
from .best_step import BestStep
from .held_out import HeldOut, Watch
from .tracking import Trackers


class EncoderValidation:
    """Reads, scores and draws held-out subjects every `validation_steps`, into `output_dir/validation`; `best` is kept.

    With several processes each computes all of it, because a base that is divided over them needs them all, and the
    main one writes.

    Args:
        features: (subjects, ...), of the references of `held`.
        done: steps of a resumed run so far.
    """

    def __init__(
        self,
        run: EncoderTraining,
        held: HeldOut,
        features: Tensor,
        config: TrainEncoderConfig,
        trackers: Trackers,
        done: int = 0,
    ) -> None:
        self.run, self.features, self.config = run, features, config
        self.watch = Watch(run.base, held, config, run.processes, trackers, done)
        trained = [*run.encoder.state_dict().values(), *run.space.state_dict().values()]
        self.best = BestStep(trained, keeps=run.processes.is_main)
        people = zip(held.names, held.references, held.others, strict=True)
        seen = photos_of([Subject(name, [reference, *others]) for name, reference, others in people])
        self._measure = [config.validation_embedder, list(config.validation_prompt), list(seen.values())]

    def state_dict(self) -> dict[str, Any]:
        """For a resumed run."""
        return {"best": self.best.state_dict(), "measure": self._measure}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` gave, if scores to come can be compared with those; else the best is yet to be."""
        if state.get("measure") == self._measure:
            self.best.load_state_dict(state["best"])

    def look(self, step: int) -> float | None:
        """Look, if this is a step to look at; returns the mean score of the subjects, the higher the better."""
        run, config = self.run, self.config
        denoiser, device = run.base.denoiser, run.base.device
        if config.validation_steps is None or step % config.validation_steps:
            return None
        run.encoder.eval()
        denoiser.eval()
        devices = [device] if device.type == "cuda" else []
        with torch.no_grad(), torch.random.fork_rng(devices=devices), eagerly(config):
            subjects = run.space(run.encoder(self.features.to(device)))
            with autocast(config.mixed_precision, device, adapter_casts=True):
                for number, subject in enumerate(subjects):
                    run.gradients.show(subject)
                    self.watch.see(number)
        set_slots(denoiser, None)
        run.encoder.train()
        denoiser.train()
        score = self.watch.finish(step)
        self.best.offer(step, score)
        return score
