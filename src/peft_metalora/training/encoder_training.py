# SPDX-License-Identifier: Apache-2.0
"""The second phase of meta-training: a subject space and the encoder that reads it, on a frozen Down.

A code is read from one photo of a person, and the loss is that of denoising OTHER photos of the person: what two
photos share is the person, what they do not share (pose, clothes, wall) does not help. Photos that are read may be
made worse, the others stay as they are, so that the encoder learns to see through bad photos. The loss reaches the
code through a subject's numbers alone: their gradient comes from the stacked step, for many people at once.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..bases import send
from ..encoder import SubjectEncoder, SubjectSpace
from ..errors import ConfigError, TooFewImagesError
from .engine.loop import Step, training_steps
from .engine.optimizers import restore_scheduler
from .engine.processes import ALONE, Processes
from .engine.slot_gradients import SlotGradients
from .engine.stacked import Recorded, RowGradients, denoising_inputs
from .engine.state import check_steps, restore_generator
from .examples.batches import Examples
from .injecting import sanity_of
from .stage_settings import EncoderTrainingConfig

__all__ = ["EncoderTraining", "EncoderTrainingConfig", "PhotoPairs", "Reads"]


@dataclass(frozen=True)
class Reads:
    """Photos as the encoder sees them, some of them made worse.

    Attributes:
        features: of the encoder's source, (m, ...), or, with `row`, (rows, ...).
        person: (m,) int64, as `Examples.subject`. photo: (m,) int64: equal for what was made of one photo.
        row: (m,) int64, the row of `features` that each shows; None: its own.
    """

    features: Tensor
    person: Tensor
    photo: Tensor
    row: Tensor | None = None

    def of(self, index: Tensor, device: torch.device) -> Tensor:
        """Features of the reads `index` (b,), float32 on a device."""
        rows = index if self.row is None else self.row[index]
        return send(self.features[rows.to(self.features.device)], device).float()

    def to(self, device: torch.device | str, features: bool = True) -> Reads:
        """The same on a device; without `features` these stay where they are."""
        seen = self.features.to(device) if features else self.features
        row = None if self.row is None else self.row.to(device)
        return Reads(seen, self.person.to(device), self.photo.to(device), row)


class PhotoPairs:
    """Draws a photo to read, and other photos of the person to be judged by.

    Args:
        reads: what can be read. examples: what can be a target. photo: (n,) int64, the photo of each example.
        names: of the people, for messages.

    Raises:
        TooFewImagesError: nobody has two photos, or a person of `reads` none to read. People with one are left out,
            with a warning that names them.
    """

    def __init__(self, reads: Reads, examples: Examples, photo: Tensor, names: Sequence[str] | None = None) -> None:
        device, people = reads.person.device, examples.num_subjects
        own_reads, own_targets = _positions(reads.person, people), _positions(examples.subject, people)
        read_photo, target_photo = reads.photo.cpu(), photo.cpu()
        alone = []
        for person in range(people):
            # Each photo that can be read needs another one.
            can_be_read = set(read_photo[own_reads[person]].tolist())
            targets = set(target_photo[own_targets[person]].tolist())
            if not can_be_read or any(targets <= {one} for one in can_be_read):
                alone.append(person)
        left_out = set(alone)
        self.people = torch.tensor([person for person in range(people) if person not in left_out], device=device)
        self.reads_of, self.targets_of = _table(own_reads).to(device), _table(own_targets).to(device)
        self.read_photo, self.target_photo = read_photo.to(device), target_photo.to(device)
        if not left_out < set(range(people)):
            raise TooFewImagesError(
                f"expected two photos of a person, found one of each of {people}: the encoder is judged by other photos"
                " than the one it reads, so give more photos"
            )
        if alone:
            called = ", ".join(names[person] if names else str(person) for person in alone[:5])
            warnings.warn(
                f"left out {len(alone)} of {people} people, who have one photo: {called}"
                f"{' ...' if len(alone) > 5 else ''}",
                stacklevel=2,
            )

    def to(self, device: torch.device | str) -> PhotoPairs:
        """The same, to be drawn on a device."""
        moved = copy.copy(self)
        for name, tensor in vars(self).items():
            setattr(moved, name, tensor.to(device))
        return moved

    def draw(self, count: int, targets: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """A read for each of `count` people, (count,), and targets of other photos, (count, targets).

        People differ as long as there are enough; so do the targets of a person.
        """
        device = self.people.device
        order = torch.rand(len(self.people), generator=generator, device=device).argsort()
        people = self.people[order[torch.arange(count, device=device) % len(order)]]
        reads = _pick(self.reads_of[people], self.reads_of[people] >= 0, 1, generator)[:, 0]
        candidates = self.targets_of[people]
        other = self.target_photo[candidates] != self.read_photo[reads][:, None]
        return reads, _pick(candidates, (candidates >= 0) & other, targets, generator)


class EncoderTraining:
    """One run: `steps()` trains `space` and `encoder` in place.

    Args:
        gradients: of rows that are people of a step and whose numbers are those of `space`, in the same order: stacked
            for a small base, by slots for one of any size.
        pairs: who is read and judged, on the device of the base. reads, examples: what `pairs` was made from.
        record: replay the gradients of a step as a CUDA graph (stacked ones). The host then never waits for a step:
            the loss that a step tells is that of the one before.
        processes: those that share the run. Each has its rows of a step's people, gradients are summed, and all draw
            the same people, photos and noises: the result depends on the sum of their rows, not on their number (up to
            the order of sums).

    Raises:
        ConfigError: a space that does not fit the rows, or codes of another size than the encoder's.
    """

    def __init__(
        self,
        gradients: RowGradients | SlotGradients,
        space: SubjectSpace,
        encoder: SubjectEncoder,
        pairs: PhotoPairs,
        reads: Reads,
        examples: Examples,
        config: EncoderTrainingConfig,
        record: bool = False,
        processes: Processes = ALONE,
    ) -> None:
        self.gradients, self.base, self.processes = gradients, gradients.base, processes
        self.space, self.encoder, self.config = space, encoder, config
        self.pairs, self.reads, self.examples = pairs, reads, examples
        rows = len(gradients.values)
        self.people = rows * processes.count
        self._first = rows * processes.rank
        if space.mean.numel() != gradients.values.shape[1] or space.code_size != encoder.config.code_size:
            raise ConfigError(
                f"expected a space of {gradients.values.shape[1]} numbers a subject and codes of "
                f"{encoder.config.code_size}, as these rows and this encoder have, found {space.mean.numel()} and "
                f"{space.code_size}"
            )
        device = self.base.device
        space.requires_grad_(True)
        encoder.requires_grad_(True).train()
        groups = [
            {"params": list(encoder.parameters()), "lr": config.learning_rate, "weight_decay": config.weight_decay},
            {"params": list(space.parameters()), "lr": config.space_learning_rate, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, fused=device.type == "cuda")
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, config.factor)
        self._generator = torch.Generator(device).manual_seed(config.seed)
        recorded = record and device.type == "cuda"
        self._gradients = Recorded(gradients, recorded)
        self._read = _OneLate(processes.later) if recorded else processes.later
        self.scale = gradients.scale if isinstance(gradients, SlotGradients) else None
        self._batches = self._batches_of_steps = 0
        self.losses: list[float] = []

    def steps(self) -> Iterator[Step]:
        """Train; yields each step when it is finished.

        Raises:
            TrainingError: a loss or a gradient is not finite, or the run has destroyed what it learns.
        """
        sanity = sanity_of(self.base, self.examples, losses=self.losses)
        self._batches = self._batches_of_steps  # without those of a step that was interrupted
        for step in training_steps(
            self._loss,
            self.optimizer,
            steps=self.config.steps,
            scheduler=self.scheduler,
            accumulation=self.config.accumulation,
            clip=self._sum_gradients,
            read=self._read,
            share=self.processes.sum_,
            scale=self.scale,
            done=len(self.losses),
        ):
            self.losses.append(step.loss)
            self._batches_of_steps = self._batches
            sanity.see(step)
            yield step
        self.space.requires_grad_(False)
        self.encoder.requires_grad_(False).eval()

    def _loss(self) -> Tensor:
        """This process's part of the mean over the people of a batch."""
        config, cuda = self.config, [self.base.device] if self.base.device.type == "cuda" else []
        index, targets = self.pairs.draw(self.people, config.targets, self._generator)
        first, rows = self._first, len(self.gradients.values)
        features = self.reads.of(index[first : first + rows], self.base.device)
        # Dropout draws from the global state: here from one of this batch, so that a resumed run goes on alike.
        with torch.random.fork_rng(devices=cuda):
            torch.manual_seed(config.seed + self._batches)
            subjects = self.space(self.encoder(features, (first, self.people)))
        self._batches += 1
        self.gradients.values.copy_(subjects.detach())
        own = slice(first * config.targets, (first + rows) * config.targets)
        inputs = denoising_inputs(self.base, self.examples, targets.flatten(), self._generator, own)
        losses, gradient = self._gradients(inputs)
        return _Known.apply(subjects, losses.sum() / self.people, gradient / self.people)

    def _sum_gradients(self) -> None:
        """Sum all gradients over the processes."""
        if self.processes.count > 1:
            # By itself it need not be copied to be sent, and it is by far the largest.
            for alike in ([self.space.basis], [self.space.mean, *self.encoder.parameters()]):
                self.processes.sum_([one.grad for one in alike if one.grad is not None])

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs beside the base, the photos and the settings; the same on all processes."""
        return {
            "space": dict(self.space.state_dict()),
            "encoder": dict(self.encoder.state_dict()),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            **({} if self.scale is None else {"scale": asdict(self.scale)}),
            "batches": self._batches_of_steps,
            "generator": self._generator.get_state(),
            "losses": self.losses,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a `state_dict` that was made between two steps.

        Raises:
            ConfigError: the run is to end before them. What Python and torch raise of a state that makes no sense.
        """
        check_steps(len(state["losses"]), self.config.steps)
        self.space.load_state_dict(state["space"])
        self.encoder.load_state_dict(state["encoder"])
        self.optimizer.load_state_dict(state["optimizer"])
        restore_scheduler(self.scheduler, state["scheduler"])
        if self.scale is not None:
            self.scale.load_state_dict(state["scale"])
        restore_generator(self._generator, state["generator"])
        self.losses = [float(loss) for loss in state["losses"]]
        self._batches_of_steps = int(state.get("batches", len(self.losses) * self.config.accumulation))


class _Known(torch.autograd.Function):
    """A loss whose gradient with respect to `subjects` has been computed already."""

    @staticmethod
    def forward(ctx: Any, subjects: Tensor, loss: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return ctx.saved_tensors[0] * grads[0], None, None


class _OneLate:
    """Reads numbers as `read` does, and gives the one before: the host is a step ahead and never waits."""

    def __init__(self, read: Callable[[Tensor], Callable[[], float]]) -> None:
        self._read = read
        self._before: Callable[[], float] | None = None

    def __call__(self, part: Tensor) -> Callable[[], float]:
        now = self._read(part)
        before, self._before = self._before or now, now
        return before


def _positions(owner: Tensor, count: int) -> list[Tensor]:
    """For each owner the positions of what is its own, on the CPU."""
    order = owner.cpu().argsort(stable=True)
    return list(order.split(owner.cpu().bincount(minlength=count).tolist()))


def _table(positions: list[Tensor]) -> Tensor:
    """(count, most) positions of each owner, filled up with -1."""
    return torch.nn.utils.rnn.pad_sequence(positions, batch_first=True, padding_value=-1)


def _pick(candidates: Tensor, allowed: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` random allowed candidates of each row, different ones as long as there are enough: (n, count)."""
    keys = torch.rand(candidates.shape, generator=generator, device=candidates.device).masked_fill(~allowed, 2.0)
    turn = torch.arange(count, device=candidates.device)[None] % allowed.sum(1, keepdim=True)
    return candidates.gather(1, keys.argsort(1).gather(1, turn))
