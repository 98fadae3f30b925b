# SPDX-License-Identifier: Apache-2.0
"""Stage 2: learn a subject from one image or a few, on a frozen Down (arXiv 2503.22352), or a plain LoRA to compare.

The image is cut and mirrored into a number of views, which are encoded once; a step then costs the denoiser alone.
Many subjects can be learned in one run: each has a slot, its own random stream, its own optimiser state and its own
gradient clipping, so that it becomes what it would have become alone (up to the order of floating-point sums).

A subject may start as an encoder read it. The photo then has little to add and much to take: from the read start a
subject stops when its numbers have moved by `max_drift`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict
from torch import Tensor, nn

from .. import checkpoint
from ..bases import Base, send
from ..bases.generic import named_class
from ..bases.precision import autocast
from ..checkpoint.base_model import check_fits
from ..checkpoint.space import CodeSource
from ..data import TRIGGER_MARK
from ..errors import ConfigError, TooFewImagesError
from ..files import staged_folder
from ..tuner import DownSource, write_subject
from ..tuner.down import given, subject_config
from ..tuner.on_model import meta_lora_layers
from ..tuner.subject_index import SubjectIndex
from .engine.loop import LossScale, Step, training_steps
from .engine.optimizers import make_scheduler, optimizer_class, optimizer_options, restore_scheduler
from .engine.processes import ALONE, Processes
from .engine.replay import ReplayedLoss, named, text_in, why_not_recorded
from .engine.slot_optimizer import SlotOptimizer
from .engine.state import check_steps, started
from .examples.batches import Examples
from .injecting import inject, sanity_of, take_off
from .prior import distance_from_base
from .stage_settings import PersonalizeConfig

_ADAPTER = "default"


def check_rank(config: PersonalizeConfig, down: DownSource) -> None:
    """Raise ConfigError for another rank than the Down's, but in a control."""
    own = down.config.r
    if config.rank is not None and config.rank != own and config.start != "fresh":
        raise ConfigError(
            f"rank must be the Down's, {own}, for start={config.start!r}, found {config.rank}: leave `rank` out, or "
            "use start='fresh' (the control)"
        )


class Personalization:
    """One run of stage 2 on examples in memory: `steps()` trains, `save()` writes, `remove()` undoes the adapter.

    Between two steps the pipeline of `base` generates with the adapter as it is by then (choose a subject with
    `set_slots`; the random streams of the run are its own).

    Args:
        base: its denoiser gets the adapter 'default'; everything stays on the denoiser's device.
        examples: views of one subject, or of several with method 'meta-lora'; subject s is trained in slot s.
        config: folders and `views_per_image` are not looked at.
        down: needed with method 'meta-lora'.
        read: with start 'encoder', the subjects as they were read.
        processes: those that share the run. Each takes its share of every batch, and gradients are summed over all,
            so that all hold the same factors, those that one process would have (up to the order of sums).

    Raises:
        ConfigError: no Down, several subjects with method 'lora', more processes than samples in a batch, or not one
            subject that was read for each to be learned.
        BaseModelMismatchError: the Down belongs to another base model; the denoiser is as it was.
    """

    def __init__(
        self,
        base: Base,
        examples: Examples,
        config: PersonalizeConfig,
        down: DownSource | None = None,
        processes: Processes = ALONE,
        read: Sequence[CodeSource] = (),
    ) -> None:
        self.config = config = config.settled(bool(read))
        self.base, self.down, self.processes = base, down, processes
        self.examples = examples.to(base.device)
        self.num_subjects = examples.num_subjects
        self._positions = [positions.cpu() for positions in examples.by_subject()]
        self._shapes = torch.tensor(examples.shapes())
        self._many_shapes = len(self._shapes.unique()) > 1
        if self._many_shapes and self.num_subjects > 1:
            raise ConfigError(
                f"expected views of one shape for {self.num_subjects} subjects that share batches, found several: "
                "leave aspect_ratio_buckets out, or learn the subjects one by one"
            )
        if config.prior_loss_weight and examples.prior is None:
            raise ConfigError(
                "prior_loss_weight needs examples with the embedding of the class prompt, found none: encode them with "
                "these settings"
            )
        empty = [subject for subject, positions in enumerate(self._positions) if not len(positions)]
        if empty:
            raise TooFewImagesError(f"expected an example of every subject, found none of subject(s) {empty[:5]}")
        samples = self.num_subjects * config.train_batch_size
        if samples < processes.count:
            raise ConfigError(
                f"expected a sample for each of the {processes.count} processes in a batch, found {samples}: raise "
                "train_batch_size, or start fewer processes"
            )
        cls = optimizer_class(config.optimizer)
        options = optimizer_options(cls, config, base.device)
        self._index = SubjectIndex()
        self.parameters = parameters = self._inject()
        self._drift = self._start_as(read) if config.start == "encoder" else None
        self.trainable_parameters = sum(parameter.numel() for parameter in parameters) // self.num_subjects
        self.optimizer = SlotOptimizer(cls, parameters, **options) if self.uses_slots else cls(parameters, **options)
        asks = "prior preservation asks the base in between" if config.prior_loss_weight else None
        self._replayed = ReplayedLoss(
            self._loss_of,
            base.denoiser,
            parameters,
            accumulation=config.gradient_accumulation_steps,
            why_not=why_not_recorded(base, config, processes, asks),
        )
        self.scheduler = make_scheduler(self.optimizer, config, config.max_train_steps)
        self.scale = LossScale.of(config.mixed_precision)
        # Every subject has the stream that it would have alone.
        self._generators = [torch.Generator().manual_seed(config.seed) for _ in range(self.num_subjects)]
        self.steps_done = 0
        self._learning = list(range(self.num_subjects))  # the others have moved as far as they may
        self._stopped: dict[int, int] = {}  # after which step
        self._start = time.perf_counter()

    @property
    def uses_slots(self) -> bool:
        """Whether the adapter has slots: with method 'meta-lora'."""
        return self.config.method == "meta-lora"

    def _inject(self) -> list[nn.Parameter]:
        config = self.config
        if not self.uses_slots:
            if self.num_subjects > 1:
                raise ConfigError(f"method 'lora' learns one subject a run, found {self.num_subjects}: run it for each")
            rank = config.rank or 1
            alpha: Any = config.lora_alpha or rank  # PEFT says int and takes any number
            lora = LoraConfig(r=rank, lora_alpha=alpha, target_modules=self._targets())
            return inject(self.base, lora, _ADAPTER, config)
        if self.down is None:
            raise ConfigError("method 'meta-lora' needs a Down, found none: give down=, or method 'lora'")
        check_fits(self.base.denoiser, self.down, name=config.down or "this Down")
        check_rank(config, self.down)
        reads = config.start == "encoder"
        adapter = subject_config(
            self.down,
            r=config.rank,
            num_slots=self.num_subjects,
            start="mean" if reads else config.start,
            down=config.down or "in memory",
            down_revision=config.down_revision,
            base_model_name_or_path=config.pretrained_model_name_or_path,
            revision=config.revision,
            inference_mode=False,
        )
        with given(self.down):
            parameters = inject(self.base, adapter, _ADAPTER, config)
        self.base.denoiser.peft_config[_ADAPTER].down = config.down
        self._index = next(layer for _, layer in meta_lora_layers(self.base.denoiser)).subject_index
        return parameters

    def _start_as(self, read: Sequence[CodeSource]) -> _Drift | None:
        """Write the subjects that were read into their slots; returns what measures `max_drift`, if that is asked."""
        try:
            if len(read) != self.num_subjects:
                raise ConfigError(
                    f"start 'encoder' needs each of {self.num_subjects} subjects as the Down's encoder reads them, "
                    f"found {len(read)}: give read=, or another start"
                )
            distances = [_distance_from_mean(subject) for subject in read]
            if self.config.max_drift and 0 in distances:
                raise ConfigError(
                    f"max_drift is a share of the way from the mean subject to the one that was read, found subject "
                    f"{distances.index(0)} read as the mean: train the encoder again, or give max_drift 0"
                )
            for slot, subject in enumerate(read):
                write_subject(self.base.denoiser, _ADAPTER, subject.tensors, slot)
        except BaseException:
            take_off(self.base, self.config)  # nothing is recorded yet
            raise
        return _Drift(self.parameters, distances) if self.config.max_drift else None

    def _targets(self) -> list[str] | str:
        own = None if self.down is None else self.down.config.target_modules
        return self.config.modules or own or self.base.target_modules

    def steps(self) -> Iterator[Step]:
        """Train; yields each step when it is finished. With several subjects `loss` is their mean.

        From a read start it ends when all have moved by `max_drift`.
        """
        config = self.config
        self._leave_out_those_who_moved()
        if not self._learning:
            return
        sanity = sanity_of(self.base, self.examples, done=self.steps_done, prior_loss_weight=config.prior_loss_weight)
        for step in training_steps(
            self._loss,
            self.optimizer,
            steps=config.max_train_steps,
            scheduler=self.scheduler,
            accumulation=config.gradient_accumulation_steps,
            clip=self._finish_gradients,
            read=self.processes.later,
            share=self.processes.sum_,
            scale=self.scale,
            done=self.steps_done,
        ):
            self.steps_done = step.number
            step = replace(step, loss=step.loss / len(self._learning))
            sanity.see(step)
            self._leave_out_those_who_moved()
            yield step
            if not self._learning:
                return

    def _leave_out_those_who_moved(self) -> None:
        if self._drift is None:
            return
        assert self.config.max_drift
        moved = self._drift.of_all()
        for subject in [one for one in self._learning if moved[one] >= self.config.max_drift]:
            self._learning.remove(subject)
            self._stopped[subject] = self.steps_done

    def _finish_gradients(self) -> None:
        """Sum the gradients over the processes, then clip."""
        self.processes.sum_([parameter.grad for parameter in self.parameters if parameter.grad is not None])
        limit = self.config.max_grad_norm
        if limit and isinstance(self.optimizer, SlotOptimizer):
            self.optimizer.clip_grad_norm_(limit)
        elif limit:
            nn.utils.clip_grad_norm_(self.parameters, limit)

    def _loss(self) -> Tensor:
        """Sum over subjects of the mean over each one's samples, so that no subject feels the others' number.

        All processes draw the whole batch, on the CPU, and compute their part of it.
        """
        base, size = self.base, self.config.train_batch_size
        index, noise, times = [], [], []
        seeds: list[int] = []
        for subject in self._learning:
            positions, generator = self._positions[subject], self._generators[subject]
            if self._many_shapes:  # those of one view, so that each view is seen equally often
                first = positions[torch.randint(len(positions), (), generator=generator)]
                positions = positions[self._shapes[positions] == self._shapes[first]]
            index.append(positions[torch.randint(len(positions), (size,), generator=generator)])
            like = self.examples.like(int(index[-1][0]), size, device="cpu")
            noise.append(torch.randn(like.shape, generator=generator))
            times.append(base.sample_times(like, generator))
            if self.examples.fresh:
                seeds += torch.randint(1 << 62, (size,), generator=generator).tolist()
        own = slice(self.processes.rank, None, self.processes.count)
        picks, spread, levels = (send(torch.cat(drawn)[own], base.device) for drawn in (index, noise, times))
        latents, text, mask = self.examples.batch(picks, seeds[own] or None)
        slots = None
        if isinstance(self.optimizer, SlotOptimizer):
            self.optimizer.see(self._learning)
            wanted = [slot for slot in self._learning for _ in range(size)][own] if self.num_subjects > 1 else None
            if wanted is not None and self._replayed.why_not is None:
                slots = send(torch.tensor(wanted), base.device)
            else:
                self._index.write(None if wanted is None else tuple(wanted), base.device, each=True)
        return self._replayed(named(text, latents=latents, noise=spread, times=levels, mask=mask, slots=slots))

    def _loss_of(self, inputs: dict[str, Tensor], _: Any) -> Tensor:
        base, config, prior = self.base, self.config, None
        latents, noise, times = inputs["latents"], inputs["noise"], inputs["times"]
        cast = partial(autocast, config.mixed_precision, base.device, adapter_casts=self.uses_slots)
        if config.prior_loss_weight and self.examples.prior is not None:
            with cast():
                prior = distance_from_base(base, self.examples.prior, latents, noise, times)
        if "slots" in inputs:
            self._index.read_from(inputs["slots"])
        with cast():
            losses = base.loss(latents, text_in(inputs), noise, times, inputs.get("mask"))
            if prior is not None:
                losses = losses + config.prior_loss_weight * prior()
        return losses.sum() / config.train_batch_size

    def forget_recordings(self) -> None:
        """Free the memory of recorded steps; those that follow record anew."""
        self._replayed.forget()

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs beside the base, the Down, the examples and the settings."""
        return {
            "parameters": [parameter.detach() for parameter in self.parameters],
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            **({} if self.scale is None else {"scale": asdict(self.scale)}),
            "generators": [generator.get_state() for generator in self._generators],
            "steps": self.steps_done,
            "seconds": time.perf_counter() - self._start,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a `state_dict` that was made between two steps.

        Raises:
            ConfigError: the run is to end before them. What Python and torch raise of a state that makes no sense.
        """
        check_steps(state["steps"], self.config.max_train_steps)
        with torch.no_grad():
            for parameter, value in zip(self.parameters, state["parameters"], strict=True):
                parameter.copy_(value)
        self.optimizer.load_state_dict(state["optimizer"])
        restore_scheduler(self.scheduler, state["scheduler"])
        if self.scale is not None:
            self.scale.load_state_dict(state["scale"])
        for generator, value in zip(self._generators, state["generators"], strict=True):
            generator.set_state(value)
        self.steps_done = state["steps"]
        self._start = started(state.get("seconds", 0))

    def facts(self, slot: int = 0) -> dict[str, Any]:
        """What is written beside a subject, and from there into a model card: how it was learned and is called."""
        kept = "start", "learning_rate", "train_batch_size", "resolution", "seed"
        return {
            **called(self.config),
            **named_class(self.base),
            "steps": min(self.steps_done, self._stopped.get(slot, self.steps_done)),
            "recipe": {
                "trainable_parameters": self.trainable_parameters,
                "seconds": round(time.perf_counter() - self._start, 1),
                **{name: getattr(self.config, name) for name in kept},
                **self.config.noise_levels,
            },
        }

    def save(self, folder: str | Path, slot: int = 0, *, subject_name: str | None = None) -> Path:
        """Write the subject of a slot, or the plain LoRA in diffusers' format, all at once.

        Args:
            subject_name: who the subject is, if that is known.

        Raises:
            NonFiniteError, WriteFailedError: nothing is written.
            OutputExistsError: something else, or somebody else, lies there, and `overwrite` is not set.
        """
        base, config = self.base, self.config
        if self.uses_slots:
            return checkpoint.save_subject(
                folder,
                base.denoiser,
                _ADAPTER,
                slot=slot,
                down=config.down,
                down_revision=config.down_revision,
                facts=self.facts(slot),
                base_model=config.pretrained_model_name_or_path,
                base_revision=config.revision,
                subject_name=subject_name,
                overwrite=config.overwrite,
            )
        checkpoint.require_replaceable(folder, None, overwrite=config.overwrite)
        weights = get_peft_model_state_dict(base.denoiser, adapter_name=_ADAPTER)
        adapter = base.denoiser.peft_config[_ADAPTER].to_dict()
        with staged_folder(folder) as stage:
            base.pipeline.save_lora_weights(
                stage,
                **{f"{base.denoiser_name}_lora_layers": weights},
                **{f"{base.denoiser_name}_lora_adapter_metadata": _plain(adapter)},
            )
        return Path(folder)

    def remove(self) -> None:
        """Take the adapter off; the denoiser is the one it was before."""
        self.forget_recordings()
        take_off(self.base, self.config)


def called(config: PersonalizeConfig) -> dict[str, str]:
    """The words that call a subject, for its facts; none where only captions know them."""
    prompt = (config.instance_prompt or "").replace(TRIGGER_MARK, config.trigger or TRIGGER_MARK)
    return {"trigger": prompt} if prompt else {}


def _distance_from_mean(subject: CodeSource) -> float:
    means = subject.space.split(subject.space.mean.detach().cpu()[None])
    return math.sqrt(sum(float((factor - means[name]).square().sum()) for name, factor in subject.tensors.items()))


class _Drift:
    """How far subjects have moved from where they are now, as a share of how far that is from the mean subject.

    Args:
        parameters: each (subjects, ...). distances: of each subject from the mean one, over all parameters.
    """

    def __init__(self, parameters: Sequence[Tensor], distances: Sequence[float]) -> None:
        self._parameters, self._distances = list(parameters), list(distances)
        self._starts = [parameter.detach().clone() for parameter in parameters]

    @torch.no_grad()
    def of_all(self) -> list[float]:
        """The share of each subject."""
        pairs = zip(self._parameters, self._starts, strict=True)
        squares = torch.stack([(now - then).flatten(1).square().sum(1) for now, then in pairs]).sum(0)
        return [move / distance for move, distance in zip(squares.sqrt().tolist(), self._distances, strict=True)]


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    """A PEFT configuration as JSON can hold it."""
    return {
        name: sorted(value) if isinstance(value, set) else getattr(value, "value", value)
        for name, value in config.items()
    }
