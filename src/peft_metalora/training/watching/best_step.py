# SPDX-License-Identifier: Apache-2.0
"""The best of the steps that were looked at."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class BestStep:
    """Keeps what was trained as it was at the best score, in host memory, and says when that has not risen for long.

    Args:
        parameters: what is trained.
        keeps: whether this process needs what it was; others know the step and the score.
        patience: scores without a rise after which to stop; None: never.
        rise: share of the score that counts as a rise.
    """

    def __init__(
        self, parameters: Sequence[Tensor], patience: int | None = None, rise: float = 0.0, *, keeps: bool = True
    ) -> None:
        self._parameters, self.patience, self.rise = parameters if keeps else [], patience, rise
        self.step, self.score, self.waited = 0, float("-inf"), 0
        self._best: list[Tensor] = []

    def offer(self, step: int, score: float) -> None:
        """Take in the score of a step; one that is no number is the worst there is."""
        score = score if math.isfinite(score) else -math.inf
        least = self.score + self.rise * abs(self.score) if math.isfinite(self.score) else self.score
        if self.step and score <= least:
            self.waited += 1
            return
        self.step, self.score, self.waited = step, score, 0
        self._keep(self._parameters)

    def _keep(self, values: Sequence[Tensor]) -> None:
        if not self._best:
            self._best = [torch.empty_like(value, device="cpu") for value in self._parameters]
        with torch.no_grad():
            for best, value in zip(self._best, values, strict=True):
                best.copy_(value)

    @property
    def finished(self) -> bool:
        """Whether the score has stopped rising."""
        return self.patience is not None and self.waited >= self.patience

    @torch.no_grad()
    def restore(self) -> None:
        """Put the best parameters back, where they were kept."""
        for parameter, best in zip(self._parameters, self._best, strict=True):
            parameter.copy_(best)

    def state_dict(self) -> dict[str, Any]:
        """For a resumed run."""
        return {"step": self.step, "score": self.score, "waited": self.waited, "best": self._best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a `state_dict`."""
        self.step, self.score, self.waited = state["step"], state["score"], state["waited"]
        if self.step and self._parameters:
            self._keep(state["best"])
