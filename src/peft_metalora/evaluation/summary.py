# SPDX-License-Identifier: Apache-2.0
"""From scores of single rows to what is reported: means with intervals over people, and how fast a method is.

A row is one person learned with one seed; rows are ordered by person, then seed. Seeds of a person are averaged
first, people are resampled: see `metrics.bootstrap`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..metrics import bootstrap

METRICS = ("r_facesim", "face_sim", "prompt_adherence", "copied_background")
_SHARE = 0.95
_RESAMPLES = 1000


def interval(values: Sequence[float], seeds: int = 1) -> dict[str, float]:
    """Mean of rows and its 95 % interval over people: `value`, `low`, `high`."""
    found = bootstrap(torch.tensor(values), [row // seeds for row in range(len(values))])
    return {"value": round(found.value, 4), "low": round(found.low, 4), "high": round(found.high, 4)}


def summarise(data: dict[str, Any]) -> None:
    """Fill `figures`: of each method its headline scores, parameters and seconds; and its speed beside LoRA of rank 1.

    Every figure has `value`, `low` and `high`: of scores over people, of seconds (of a person, in a stack of all) over
    blocks of timed steps; the number of parameters is exact.
    """
    seeds, steps = data["seeds"], str(data["headline_steps"])
    figures = data["figures"] = {}
    for name, result in {**data.get("methods", {}), **data.get("variants", {})}.items():
        headline = result["curve"].get(steps)
        if headline is None:
            continue
        figures[name] = {
            **{metric: interval(headline[metric], seeds) for metric in METRICS},
            "parameters": dict.fromkeys(("value", "low", "high"), result["parameters"]),
            "seconds": _seconds(result["step_seconds"], int(steps)),
        }
    if "lora_r1" in data.get("methods", {}):
        _speed(data, seeds)


def _seconds(per_step: Sequence[float], steps: int) -> dict[str, float]:
    """The interval of the seconds of some steps; one step's seconds are too small for four digits."""
    scaled = interval([1e6 * value for value in per_step])
    return {name: round(value * steps / 1e6, 6) for name, value in scaled.items()}


def _speed(data: dict[str, Any], seeds: int) -> None:
    """`steps_to_target`: steps to 95 % of the best R-FaceSim of LoRA, rank 1, and `speed_up`, with intervals."""
    methods = data["methods"]
    zero = _people(data["base"]["r_facesim"], seeds)
    curves = {}
    for name, result in methods.items():
        steps = [int(step) for step in result["curve"]]
        points = [_people(one["r_facesim"], seeds) for one in result["curve"].values()]
        if 0 not in steps:
            steps, points = [0, *steps], [zero, *points]
        curves[name] = (torch.tensor(steps, dtype=torch.float64), torch.stack(points))
    people = len(zero)
    generator = torch.Generator().manual_seed(0)
    picks = torch.cat([torch.arange(people)[None], torch.randint(people, (_RESAMPLES, people), generator=generator)])
    target = _SHARE * _means(curves["lora_r1"][1], picks).amax(0)
    of_lora = _crossing(curves["lora_r1"][0], _means(curves["lora_r1"][1], picks), target)
    for name, (at, people_at) in curves.items():
        reached = _crossing(at, _means(people_at, picks), target)
        methods[name]["steps_to_target"] = _bounds(reached)
        methods[name]["speed_up"] = _bounds(of_lora / reached)
        methods[name]["target"] = round(float(target[0]), 4)


def _people(values: Sequence[float], seeds: int) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).view(-1, seeds).mean(1)


def _means(points: Tensor, picks: Tensor) -> Tensor:
    """Curves (k, people) and resamples (b, people) -> means (k, b)."""
    return points[:, picks].mean(-1)


def _crossing(steps: Tensor, means: Tensor, target: Tensor) -> Tensor:
    """First step at which each curve reaches its target, between two points on a straight line; nan where never."""
    found = torch.full_like(target, float("nan"))
    for left in range(len(steps) - 1):
        low, high = means[left], means[left + 1]
        share = ((target - low) / (high - low)).clamp(0, 1)
        here = found.isnan() & ((low >= target) | (high >= target))
        found = torch.where(
            here,
            steps[left] + share.where(low < target, torch.zeros_like(share)) * (steps[left + 1] - steps[left]),
            found,
        )
    return found


def _bounds(values: Tensor) -> dict[str, float | None]:
    """The first value and the 95 % interval of the others; None where the target is not reached."""
    rest = values[1:].nan_to_num(float("inf")).sort().values
    low, high = rest[int(0.025 * len(rest))], rest[int(0.975 * len(rest)) - 1]
    numbers = {"value": values[0], "low": low, "high": high}
    return {name: round(float(x), 2) if bool(x.isfinite()) else None for name, x in numbers.items()}
