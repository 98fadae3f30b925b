# SPDX-License-Identifier: Apache-2.0
"""A training loop as a generator of steps.

It knows optimisers, accumulation, clipping and learning-rate schedules, and nothing of Meta-LoRA or diffusion: what a
loss is comes in as a function. Each step is yielded once; logging, saving and stopping live in the caller's `for`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
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


def training_steps(
    compute_loss: Callable[[], torch.Tensor],
    optimizer: Optimizer,
    *,
    steps: int,
    scheduler: LRScheduler | None = None,
    accumulation: int = 1,
    clip: Callable[[], Any] | None = None,
    read: Callable[[torch.Tensor], Callable[[], float]] = ALONE.later,
    done: int = 0,
) -> Iterator[Step]:
    """Run steps `done + 1` to `steps` and yield each when it is finished.

    Args:
        compute_loss: draws a micro-batch and returns its scalar loss; called `accumulation` times a step.
        scheduler: advanced once a step, after the optimiser.
        clip: called when the gradients of a step are complete, before the optimiser uses them.
        read: starts to read a loss and returns what waits for its value (`Processes.later`); asked for before the
            optimiser moves, when a GPU still has the backward pass to do.
        done: steps that were finished before (resume).

    Raises:
        TrainingError: the loss is not finite; the weights are those of the last good step.
    """
    for number in range(done + 1, steps + 1):
        start = time.perf_counter()
        parts = []
        optimizer.zero_grad(set_to_none=True)
        for _ in range(accumulation):
            loss = compute_loss() / accumulation
            parts.append(read(loss))
            loss.backward()
        if clip is not None:
            clip()
        total = sum(part() for part in parts)
        if not math.isfinite(total):
            raise TrainingError(
                f"expected a finite loss, found {total} in step {number}: lower the learning rate, or train in "
                "float32. The weights are those of the step before."
            )
        lr = optimizer.param_groups[0]["lr"]
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        yield Step(number, total, float(lr), time.perf_counter() - start)
