# SPDX-License-Identifier: Apache-2.0
"""The second phase of meta-training: a subject space and the encoder that reads it, on a frozen Down.

A code is read from one photo of a person, and the loss is that of denoising OTHER photos of the person: what two
photos share is the person, what they do not share (pose, clothes, wall) does not help. Photos that are read may be
made worse, the others stay as they are, so that the encoder learns to see through bad photos. The loss reaches the
code through a subject's numbers alone: their gradient comes from the stacked step, for many people at once.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..encoder import SubjectEncoder, SubjectSpace
from ..errors import ConfigError, TooFewImagesError, TrainingError
from .engine.slot_gradients import SlotGradients
from .engine.stacked import Recorded, RowGradients, denoising_inputs
from .examples.batches import Examples

_CHECK_EVERY = 50  # steps between two looks at the loss, each of which waits for the device


@dataclass(frozen=True)
class EncoderTrainingConfig:
    """How a space and its encoder are trained.

    Attributes:
        steps: of the optimiser. targets: photos of a person in a step, beside the one that is read.
        learning_rate: of the encoder (AdamW). space_learning_rate: of mean and basis (Adam).
        warmup_steps: over which the rates rise from 0. decay: share of the steps, the last, over which they fall to 0.
        weight_decay: of the encoder. seed: of everything that is drawn.

    Raises:
        ConfigError: a value that cannot be.
    """

    steps: int = 10_000
    targets: int = 4
    learning_rate: float = 1e-3
    space_learning_rate: float = 3e-4
    warmup_steps: int = 100
    decay: float = 0.6
    weight_decay: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "targets"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, found {getattr(self, name)}")
        if not 0 <= self.decay <= 1:
            raise ConfigError(f"decay must be a share of the steps from 0 to 1, found {self.decay}")

    def factor(self, number: int) -> float:
        """What the rates are multiplied with in step `number`, from 0."""
        rise = min(1.0, (number + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        fall = (self.steps - number) / (self.decay * self.steps) if self.decay else 1.0
        return min(rise, fall)


@dataclass(frozen=True)
class Reads:
    """Photos as the encoder sees them, some of them made worse.

    Attributes:
        features: (m, ...) of the encoder's source. person: (m,) int64, as `Examples.subject`.
        photo: (m,) int64: equal for what was made of one photo.
    """

    features: Tensor
    person: Tensor
    photo: Tensor

    def to(self, device: torch.device | str) -> Reads:
        """The same on a device."""
        return Reads(self.features.to(device), self.person.to(device), self.photo.to(device))


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
        gradients: of rows that are the people of a step and whose numbers are those of `space`, in the same order:
            stacked for a small base, by slots for one of any size.
        pairs: who is read and judged, on the device of the base. reads, examples: what `pairs` was made from.
        record: replay the gradients of a step as a CUDA graph (stacked ones).

    Raises:
        ConfigError: a space that does not fit the stack, or codes of another size than the encoder's.
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
    ) -> None:
        self.gradients, self.base = gradients, gradients.base
        self.space, self.encoder, self.config = space, encoder, config
        self.pairs, self.reads, self.examples = pairs, reads, examples
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
        self._gradients = Recorded(gradients, record and device.type == "cuda")
        self.steps_done = 0
        self.loss = torch.zeros((), device=device)

    def steps(self) -> Iterator[int]:
        """Train; yields the number of steps done after each. `loss` is that of the last one, on the device.

        Raises:
            TrainingError: the loss is not finite.
        """
        config, cuda = self.config, [self.base.device] if self.base.device.type == "cuda" else []
        while self.steps_done < config.steps:
            index, targets = self.pairs.draw(len(self.gradients.values), config.targets, self._generator)
            # Dropout draws from the global state: here from one of this step, so that a resumed run goes on alike.
            with torch.random.fork_rng(devices=cuda):
                torch.manual_seed(config.seed + self.steps_done)
                subjects = self.space(self.encoder(self.reads.features[index].float()))
            self.gradients.values.copy_(subjects.detach())
            inputs = denoising_inputs(self.base, self.examples, targets.flatten(), self._generator)
            losses, gradient = self._gradients(inputs)
            self.optimizer.zero_grad()
            subjects.backward(gradient / len(self.gradients.values))
            self.optimizer.step()
            self.scheduler.step()
            self.loss = losses.mean()
            self.steps_done += 1
            looked_at = self.steps_done % _CHECK_EVERY == 0 or self.steps_done == config.steps
            if looked_at and not torch.isfinite(self.loss):
                raise TrainingError(
                    f"expected a finite loss, found {self.loss.item()} by step {self.steps_done}: lower the learning "
                    "rates"
                )
            yield self.steps_done
        self.space.requires_grad_(False)
        self.encoder.requires_grad_(False).eval()

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs beside the base, the photos and the settings."""
        return {
            "space": self.space.state_dict(),
            "encoder": self.encoder.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "generator": self._generator.get_state(),
            "steps_done": self.steps_done,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a `state_dict` that was made between two steps."""
        self.space.load_state_dict(state["space"])
        self.encoder.load_state_dict(state["encoder"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self._generator.set_state(state["generator"].cpu())
        self.steps_done = state["steps_done"]


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
