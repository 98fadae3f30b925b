# SPDX-License-Identifier: Apache-2.0
"""A training loop as a generator of steps.

It knows optimisers, accumulation, clipping and learning-rate schedules, and nothing of Meta-LoRA or diffusion: what a
loss is comes in as a function. Each step is yielded once; logging, saving and stopping live in the caller's `for`.

No step moves the weights by a gradient that is not finite. A fused optimiser is told on the device, as PyTorch's
gradient scaler tells it, and the host, which need not wait, hears of it in the next step; any other waits. In float16
gradients that are not finite are no error but a scale that was too large: the step is done again with half of it.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ...errors import TrainingError
from .processes import ALONE


@dataclass(frozen=True)
class Step:
    """One finished optimiser step.

    Attributes:
        number: 1 for the first step.
        loss: mean over the step's micro-batches.
        lr: learning rate of the first parameter group in this step.
        seconds: time the step took.
    """

    number: int
    loss: float
    lr: float
    seconds: float


@dataclass
class LossScale:
    """What a loss is multiplied with before the backward pass, and gradients are divided by after it, in float16.

    Without it most gradients there are smaller than the smallest number. As PyTorch's gradient scaler has it, which
    knows one process and one optimiser at a time: half after a step that overflowed, twice after many that did not.

    Attributes:
        value: the factor. good: steps since it last changed.
    """

    value: float = 2.0**16
    good: int = 0

    @classmethod
    def of(cls, mixed_precision: str) -> LossScale | None:
        """The one of a run that starts; None: its precision needs none."""
        return cls() if mixed_precision == "fp16" else None

    def see(self, overflowed: bool) -> None:
        """Take in whether a step did."""
        self.good = 0 if overflowed else self.good + 1
        if overflowed:
            self.value /= 2
        elif self.good == _GROWTH:
            self.value, self.good = 2 * self.value, 0

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `dataclasses.asdict` gave."""
        self.value, self.good = float(state["value"]), int(state["good"])


_GROWTH = 2000


def training_steps(
    compute_loss: Callable[[], torch.Tensor],
    optimizer: Optimizer,
    *,
    steps: int,
    scheduler: LRScheduler | None = None,
    accumulation: int = 1,
    clip: Callable[[], Any] | None = None,
    read: Callable[[torch.Tensor], Callable[[], float]] = ALONE.later,
    share: Callable[[Sequence[torch.Tensor]], Any] = ALONE.sum_,
    scale: LossScale | None = None,
    done: int = 0,
) -> Iterator[Step]:
    """Run steps `done + 1` to `steps` and yield each when it is finished.

    Args:
        compute_loss: draws a micro-batch and returns its scalar loss; called `accumulation` times a step.
        scheduler: advanced once a step, after the optimiser.
        clip: called when the gradients of a step are complete, before the optimiser uses them.
        read: starts to read a loss and returns what waits for its value (`Processes.later`); asked for before the
            optimiser moves, when a GPU still has the backward pass to do.
        share: sums tensors over the processes in place, so that all of them stop at what one of them finds.
        scale: of the loss, for a base in float16.
        done: steps that were finished before (resume).

    Raises:
        TrainingError: a loss or a gradient is not finite (with `scale`, at any); the weights are those of the last
            good step.
    """
    on_device = bool(optimizer.defaults.get("fused"))
    is_bad: Callable[[], float] = float  # of the step before: 0.0
    for number in range(done + 1, steps + 1):
        start = time.perf_counter()
        while True:
            factor = 1.0 if scale is None else scale.value
            parts = []
            optimizer.zero_grad(set_to_none=True)
            with without_cudnn_attention():
                for _ in range(accumulation):
                    loss = compute_loss() / accumulation
                    parts.append(read(loss))
                    (loss * factor if scale is not None else loss).backward()
            bad = _not_finite(optimizer, 1 / factor)
            share([bad])
            if clip is not None:
                clip()
            total = sum(part() for part in parts)
            if is_bad():
                raise _bad_gradient(number - 1)
            if not math.isfinite(total):
                raise TrainingError(
                    f"expected a finite loss, found {total} in step {number}: lower the learning rate, or train in "
                    "float32. The weights are those of the step before.",
                    number - 1,
                )
            if scale is None:
                break
            overflowed = bool(bad.item())
            scale.see(overflowed)
            if not overflowed:
                break
            if scale.value < 1:
                raise _bad_gradient(number)
        if on_device:
            optimizer.found_inf = bad.clamp(max=1)  # type: ignore[attr-defined]
            is_bad = ALONE.later(bad)
        elif bad.item():
            raise _bad_gradient(number)
        lr = optimizer.param_groups[0]["lr"]
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        yield Step(number, total, float(lr), time.perf_counter() - start)
    if is_bad():
        raise _bad_gradient(steps)


@contextmanager
def without_cudnn_attention() -> Iterator[None]:
    """Leave attention to torch's other kernels.

    The backward pass of cuDNN's, which torch prefers on Hopper GPUs, crashed on FLUX.1's shapes with torch 2.11, and
    gives NaN on others (pytorch/pytorch#196678).
    """
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def _not_finite(optimizer: Optimizer, factor: float) -> torch.Tensor:
    """1.0 if any gradient is not, else 0.0, on the device; all are multiplied by a factor.

    It is the kernel of PyTorch's gradient scaler. A norm of them all would take the host ten times as long.
    """
    parameters = [one for group in optimizer.param_groups for one in group["params"]]
    found = torch.zeros((), device=parameters[0].device)
    grads: dict[torch.dtype, list[torch.Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            grads.setdefault(parameter.grad.dtype, []).append(parameter.grad)
    for alike in grads.values():
        torch._amp_foreach_non_finite_check_and_unscale_(alike, found, torch.full_like(found, factor))
    return found


def _bad_gradient(number: int) -> TrainingError:
    return TrainingError(
        f"expected finite gradients, found NaN or infinity in step {number}: lower the learning rate, or train in "
        "float32. The weights are those of the step before.",
        number - 1,
    )


class Sanity:
    """Says when a run has destroyed what it learns: the loss is finite, and worse than that of knowing nothing.

    A learning rate that is far too high rarely ends in NaN: the denoiser's layers normalise whatever comes, and the
    loss settles where a constant prediction has it. A run is over when its median loss of the last steps is above that,
    and far above the best that the run has seen (a base of random weights is no better from the start).

    Args:
        nothing: the loss of a model that predicts 0.
        losses: of the run so far, if it goes on and they are known. done: its steps so far.
    """

    _LEAST, _STEPS, _FAR = 3, 5, 3.0

    def __init__(self, nothing: float, losses: Sequence[float] = (), done: int = 0) -> None:
        self.nothing = nothing
        self._best, self._sane = math.inf, done
        self._last: deque[float] = deque(maxlen=self._STEPS)
        for number, loss in enumerate(losses, start=1):
            self._take(number, loss)

    def see(self, step: Step) -> None:
        """Take in the loss of a step.

        Raises:
            TrainingError: the run is lost.
        """
        self._take(step.number, step.loss)
        median = statistics.median(self._last)
        if len(self._last) >= self._LEAST and median > max(self.nothing, self._FAR * self._best):
            raise TrainingError(
                f"expected a loss below {self.nothing:.3g}, which a model has that predicts nothing, found a median of "
                f"{median:.3g} in the {len(self._last)} steps up to {step.number}, after {self._best:.3g} at best: the "
                "run has destroyed what it learns, so lower the learning rate.",
                self._sane,
            )

    def _take(self, number: int, loss: float) -> None:
        self._last.append(loss)
        self._best = min(self._best, loss)
        if loss <= max(self.nothing, self._FAR * self._best):
            self._sane = number - 1  # the loss of a step is of the weights before it
