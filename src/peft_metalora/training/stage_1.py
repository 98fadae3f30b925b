# SPDX-License-Identifier: Apache-2.0
"""Stage 1: learn a Down from many subjects (arXiv 2503.22352).

Subjects come in buckets. A bucket fills the slots of one adapter: all start from the one Mid that belongs to the Down
and Up = 0, train alone while Down is frozen (warm-up), then together with it, in batches that mix subjects. What is
kept is Down, that first Mid, and the mean of all subjects' last Mid and Up: the mean subject, from which stage 2 may
start.
"""

from __future__ import annotations

import time
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .. import checkpoint
from ..bases import Base, send
from ..bases.generic import named_class
from ..bases.precision import autocast
from ..checkpoint.base_model import with_twins
from ..errors import ConfigError, TooFewImagesError
from ..tuner import DownSource, MetaLoraConfig, fingerprint, placing, reset_slots, set_slots, set_warmup
from ..tuner.down import DOWN, DOWN_PARTS, MID, MID_INIT, UP
from ..tuner.on_model import meta_lora_layers
from .engine.compiling import uncompile
from .engine.loop import LossScale, Step, training_steps
from .engine.optimizers import make_scheduler, optimizer_class, optimizer_options, restore_scheduler
from .engine.processes import ALONE, Processes
from .engine.replay import ReplayedLoss, named, text_in, why_not_recorded
from .engine.sampler import SubjectSampler, balanced_buckets
from .engine.slot_optimizer import SlotOptimizer
from .engine.state import check_steps, restore_generator, started
from .examples.batches import Examples
from .injecting import inject, sanity_of
from .stage_settings import MetaTrainConfig

_TRAINING, PUBLISHED = "stage_1", "default"


@dataclass(frozen=True)
class DownResult:
    """A finished stage 1.

    Attributes:
        denoiser: holds the Down as adapter `adapter_name`, one slot: the mean subject.
        facts: what is written into the configuration, and from there into a model card: domain, steps, subjects,
            images, recipe.
        losses: of every step.
    """

    denoiser: nn.Module
    adapter_name: str
    facts: dict[str, Any]
    losses: list[float]

    @classmethod
    def of(cls, denoiser: nn.Module, down: DownSource) -> DownResult:
        """The result of an earlier run, put on a denoiser without adapters; its losses are not known."""
        _publish(denoiser, down.config, down.tensors)
        return cls(denoiser, PUBLISHED, dict(down.config.facts or {}), [])

    def save(
        self, folder: str, base_model: str | None = None, base_revision: str | None = None, *, overwrite: bool = False
    ) -> None:
        """Write the Down; raises as `checkpoint.save_down`."""
        checkpoint.save_down(
            folder,
            self.denoiser,
            self.adapter_name,
            facts=self.facts,
            base_model=base_model,
            base_revision=base_revision,
            overwrite=overwrite,
        )


def plan(
    config: MetaTrainConfig, subjects: int, processes: Processes = ALONE, groups: Sequence[Hashable] | None = None
) -> tuple[list[Sequence[int]], list[int], int]:
    """The buckets of a run over so many subjects, the steps of each, and the number of shards.

    Args:
        groups: of each subject, where they are balanced.

    Raises:
        ConfigError: more buckets than steps, a warm-up that leaves Down no step, or shards that do not work out.
    """
    slots = min(config.bucket_size or subjects, subjects)
    shards = config.shards or processes.count
    buckets: list[Sequence[int]] = (
        [range(start, min(start + slots, subjects)) for start in range(0, subjects, slots)]
        if groups is None
        else list(balanced_buckets(groups, slots, shards))
    )
    # The first buckets get the odd steps, so that the sum is what was asked for.
    share, rest = divmod(config.max_train_steps, len(buckets))
    if share <= config.warmup_steps:
        raise ConfigError(
            f"expected more steps in each bucket than the {config.warmup_steps} of its warm-up, found {share} "
            f"({config.max_train_steps} steps, {len(buckets)} buckets): raise max_train_steps or bucket_size, "
            "or lower warmup_steps"
        )
    if shards % processes.count:
        raise ConfigError(f"shards must be a multiple of the {processes.count} processes, found {shards}")
    sampler = SubjectSampler([[0]] * subjects, config.subjects_per_batch, 1, shards, config.seed, groups=groups)
    sampler.start(buckets[-1])  # the smallest: fails here or never
    return buckets, [share + (number < rest) for number in range(len(buckets))], shards


class MetaTraining:
    """One run of stage 1 on examples in memory; `steps()` trains, `finish()` publishes.

    Args:
        base: its denoiser gets an adapter; everything stays on the denoiser's device.
        examples: any number of subjects, each with at least one example.
        config: folders and views are not looked at.
        processes: those that share the run. Each trains the subjects of its shards, Down's gradient is summed over all
            of them, and all draw the same batches and noises: the result does not depend on their number (up to the
            order of sums) as long as `shards` is the same.

    Raises:
        ConfigError: as `plan`.
        TooFewImagesError: a subject without an example.
    """

    def __init__(self, base: Base, examples: Examples, config: MetaTrainConfig, processes: Processes = ALONE) -> None:
        self.base, self.config, self.processes = base, config, processes
        self.examples = examples.to(base.device)
        all_positions = [positions.tolist() for positions in examples.by_subject()]
        empty = [subject for subject, positions in enumerate(all_positions) if not positions]
        if empty:
            raise TooFewImagesError(f"expected an example of every subject, found none of subject(s) {empty[:5]}")
        groups = None if config.balance_by is None else examples.groups(config.balance_by)
        self.buckets, self.bucket_steps, shards = plan(config, len(all_positions), processes, groups)
        shapes = examples.shapes()
        self._many_shapes = len(set(shapes)) > 1
        self.sampler = SubjectSampler(
            all_positions,
            config.subjects_per_batch,
            config.images_per_subject,
            shards,
            config.seed,
            shapes=shapes if self._many_shapes else None,
            groups=groups,
        )
        # Shapes differ between shards, not within one: then each shard of this process is a pass of its own.
        self._passes = shards // processes.count if self._many_shapes else 1
        self._parts: list[_Part] = []
        self.sampler.start(self.buckets[0])
        cls = optimizer_class(config.optimizer)
        options = optimizer_options(cls, config, base.device)
        self.adapter_config = MetaLoraConfig(
            r=config.rank,
            meta_r=config.meta_rank,
            lora_alpha=config.lora_alpha or config.rank,
            target_modules=config.modules or base.target_modules,
            num_slots=len(self.buckets[0]),
            base_model_name_or_path=config.pretrained_model_name_or_path,
        )
        inject(base, self.adapter_config, _TRAINING, config)
        self._layers = [layer for _, layer in meta_lora_layers(base.denoiser)]
        slotted = [
            part for layer in self._layers for part in (layer.metalora_mid[_TRAINING], layer.metalora_up[_TRAINING])
        ]
        downs = [layer.metalora_down[_TRAINING] for layer in self._layers]
        self.optimizer = SlotOptimizer(
            cls,
            slotted,
            shared=downs,
            shared_options={"lr": config.down_learning_rate or config.learning_rate},
            **options,
        )
        self.scheduler = make_scheduler(self.optimizer, config, config.max_train_steps)
        self.scale = LossScale.of(config.mixed_precision)
        self._index = self._layers[0].subject_index  # of all layers
        self._replayed = ReplayedLoss(
            self._loss_of,
            base.denoiser,
            [*slotted, *downs],
            accumulation=config.gradient_accumulation_steps * self._passes,
            why_not=why_not_recorded(base, config, processes),
        )
        self._generator = torch.Generator(base.device).manual_seed(config.seed)
        self._sums: list[Tensor] = [torch.zeros_like(part[0]) for part in slotted]
        self._slotted, self._counted = slotted, 0
        # The bucket in training, and whether its subjects are still to be added to the mean.
        self._number, self._open = 0, False
        self._bucket: Sequence[int] = range(0)
        self.losses: list[float] = []
        self._start = time.perf_counter()

    @property
    def extendable(self) -> bool:
        """Whether another `max_train_steps` would have left the steps so far as they are."""
        return self.config.has_constant_rate and len(self.buckets) == 1

    def steps(self) -> Iterator[Step]:
        """Train, bucket after bucket; yields each step when it is finished."""
        denoiser, config = self.base.denoiser, self.config
        self._parts = []  # of a batch whose step was interrupted
        sanity = sanity_of(self.base, self.examples, losses=self.losses)
        for number in range(self._number, len(self.buckets)):
            first = sum(self.bucket_steps[:number])
            if not self._open:  # else the run goes on in the middle of this bucket
                self._number, self._bucket, self._open = number, self.buckets[number], True
                reset_slots(denoiser, _TRAINING)
                self.optimizer.reset()
                self.sampler.start(self._bucket)
            run = training_steps(
                self._loss,
                self.optimizer,
                steps=first + self.bucket_steps[number],
                scheduler=self.scheduler,
                accumulation=config.gradient_accumulation_steps * self._passes,
                clip=self._finish_gradients,
                read=self.processes.later,
                share=self.processes.sum_,
                scale=self.scale,
                done=len(self.losses),
            )
            set_warmup(denoiser, len(self.losses) - first < config.warmup_steps, _TRAINING)
            for step in run:
                self.losses.append(step.loss)
                sanity.see(step)
                if step.number - first == config.warmup_steps:
                    set_warmup(denoiser, False, _TRAINING)
                yield step
            self._add_to_mean()

    def finish(self) -> DownResult:
        """Put the published Down on the denoiser, as adapter 'default', in place of the one that was trained."""
        if self._open:
            self._add_to_mean()
        self.forget_recordings()
        self.processes.sum_(self._sums)
        denoiser, config = self.base.denoiser, self.config
        means = iter(total / max(self._counted, 1) for total in self._sums)
        tensors = {}
        for path, layer in meta_lora_layers(denoiser):
            tensors[f"{path}.{DOWN}"] = layer.metalora_down[_TRAINING].detach()
            tensors[f"{path}.{MID_INIT}"] = layer.metalora_mid_init[_TRAINING]
            tensors[f"{path}.{MID}"], tensors[f"{path}.{UP}"] = next(means)[None], next(means)[None]
        set_slots(denoiser, None)
        _publish(denoiser, replace(self.adapter_config, num_slots=1), tensors)
        placing.remove_adapters(denoiser, [_TRAINING], [PUBLISHED])
        uncompile(denoiser, config)
        kept = "learning_rate", "warmup_steps", "subjects_per_batch", "images_per_subject", "resolution", "seed"
        facts = {
            **({"domain": config.domain} if config.domain else {}),
            **named_class(self.base),
            **({"fits": fits} if (fits := with_twins(config.pretrained_model_name_or_path, config.fits)) else {}),
            "steps": len(self.losses),
            "subjects": self._counted,
            "images": len(self.examples),
            "recipe": {
                "buckets": len(self.buckets),
                "down_learning_rate": config.down_learning_rate or config.learning_rate,
                "seconds": round(time.perf_counter() - self._start, 1),
                **{name: getattr(config, name) for name in kept},
                **config.noise_levels,
            },
        }
        return DownResult(denoiser, PUBLISHED, facts, self.losses)

    def forget_recordings(self) -> None:
        """Free the memory of recorded steps; those that follow record anew."""
        self._replayed.forget()

    def down(self) -> DownSource:
        """The Down as it is by now, a copy; its mean subject is where all start."""
        tensors: dict[str, Tensor] = {}
        for path, layer in meta_lora_layers(self.base.denoiser):
            tensors[f"{path}.{DOWN}"] = layer.metalora_down[_TRAINING].detach().clone()
            tensors[f"{path}.{MID_INIT}"] = layer.metalora_mid_init[_TRAINING]
            tensors[f"{path}.{MID}"] = layer.metalora_mid_init[_TRAINING][None]
            tensors[f"{path}.{UP}"] = torch.zeros_like(layer.metalora_up[_TRAINING][:1])
        return DownSource(replace(self.adapter_config, num_slots=1), tensors, fingerprint(tensors))

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs beside the base, the examples and the settings."""
        return {
            "factors": self._factors(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            **({} if self.scale is None else {"scale": asdict(self.scale)}),
            "generator": self._generator.get_state(),
            "sampler": self.sampler.state_dict(),
            "bucket": self._number,
            "sums": self._sums,
            "counted": self._counted,
            "losses": self.losses,
            "seconds": time.perf_counter() - self._start,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a `state_dict` that was made between two steps.

        Raises:
            ConfigError: the run is to end before them. What Python and torch raise of a state that makes no sense.
        """
        check_steps(len(state["losses"]), self.config.max_train_steps)
        with torch.no_grad():
            for factor, value in zip(self._factors(), state["factors"], strict=True):
                factor.copy_(value)
            for total, value in zip(self._sums, state["sums"], strict=True):
                total.copy_(value)
        self.optimizer.load_state_dict(state["optimizer"])
        restore_scheduler(self.scheduler, state["scheduler"])
        if self.scale is not None:
            self.scale.load_state_dict(state["scale"])
        restore_generator(self._generator, state["generator"])
        self._number, self._open = range(len(self.buckets))[state["bucket"]], True
        self._bucket = self.buckets[self._number]
        self.sampler.start(self._bucket)
        self.sampler.load_state_dict(state["sampler"])
        self._counted, self.losses = int(state["counted"]), [float(loss) for loss in state["losses"]]
        self._start = started(state.get("seconds", 0))

    def _factors(self) -> list[Tensor]:
        return [getattr(layer, part)[_TRAINING].detach() for layer in self._layers for part in DOWN_PARTS]

    def _owns(self, slot: int) -> bool:
        return slot % self.sampler.shards % self.processes.count == self.processes.rank

    def _draw(self) -> list[_Part]:
        """The next batch, in as many parts as it takes passes; all processes draw all of it."""
        rows, index = self.sampler.draw()
        shards, device = self.sampler.shards, self.base.device
        batch = list(range(len(rows)))
        alike = [[n for n in batch if rows[n] % shards == shard] for shard in range(shards)]
        parts = []
        for members in alike if self._many_shapes else [batch]:
            like = self.examples.like(index[members[0]], len(members))
            noise = torch.randn(like.shape, generator=self._generator, device=device)
            times = self.base.sample_times(like, self._generator)
            seeds = None
            if self.examples.fresh:
                drawn = torch.randint(1 << 62, (len(members),), generator=self._generator, device=device)
                seeds = drawn.tolist()
            own = [place for place, n in enumerate(members) if self._owns(rows[n])]
            if own:
                slots, picks = [rows[members[place]] for place in own], [index[members[place]] for place in own]
                own_seeds = seeds and [seeds[place] for place in own]
                if len(own) < len(members):
                    where = send(torch.tensor(own), device)
                    noise, times = noise[where], times[where]
                parts.append(_Part(slots, picks, own_seeds, noise, times, len(rows) / self._passes))
        return parts

    def _loss(self) -> Tensor:
        """This process's part of the mean over the whole batch."""
        if not self._parts:
            self._parts = self._draw()
        part, device = self._parts.pop(0), self.base.device
        latents, text, mask = self.examples.batch(send(torch.tensor(part.index), device), part.seeds)
        slots = None
        if self._replayed.why_not is None:
            slots = send(torch.tensor(part.slots), device)
        else:
            self._index.write(tuple(part.slots), device, each=True)
        self.optimizer.see(part.slots)
        inputs = named(text, latents=latents, noise=part.noise, times=part.times, mask=mask, slots=slots)
        return self._replayed(inputs, (part.divisor, self._layers[0].warmup[_TRAINING]))

    def _loss_of(self, inputs: dict[str, Tensor], phase: tuple[float, bool]) -> Tensor:
        if "slots" in inputs:
            self._index.read_from(inputs["slots"])
        with autocast(self.config.mixed_precision, self.base.device, adapter_casts=True):
            losses = self.base.loss(
                inputs["latents"], text_in(inputs), inputs["noise"], inputs["times"], inputs.get("mask")
            )
        return losses.sum() / phase[0]

    def _finish_gradients(self) -> None:
        """Sum Down's gradient over the processes, then clip."""
        downs = self.optimizer.param_groups[1]["params"]
        self.processes.sum_([down.grad for down in downs if down.grad is not None])
        if self.config.max_grad_norm:
            self.optimizer.clip_grad_norm_(self.config.max_grad_norm)

    @torch.no_grad()
    def _add_to_mean(self) -> None:
        own = [slot for slot in range(len(self._bucket)) if self._owns(slot)]
        for total, part in zip(self._sums, self._slotted, strict=True):
            total += part[own].sum(0)
        self._counted += len(self._bucket)
        self._open = False


def _publish(denoiser: nn.Module, config: MetaLoraConfig, tensors: Mapping[str, Tensor]) -> None:
    """Put a Down on the denoiser, its factors in float32."""
    placing.inject(denoiser, config, PUBLISHED)
    for _, layer in meta_lora_layers(denoiser):
        layer.metalora_down[PUBLISHED].data = layer.metalora_down[PUBLISHED].data.float()
    placing.copy_factors(denoiser, tensors, PUBLISHED)
    denoiser.eval()


@dataclass(frozen=True)
class _Part:
    """What one pass of this process sees of a batch; the sum of its losses over `divisor` is its part of the mean."""

    slots: list[int]
    index: list[int]
    seeds: list[int] | None
    noise: Tensor
    times: Tensor
    divisor: float
