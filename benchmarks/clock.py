# SPDX-License-Identifier: Apache-2.0
"""Time and memory of a device that computes behind the host's back: what benchmarks measure with."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch


def now(device: torch.device) -> float:
    """Seconds, once the device has finished what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def once(work: Callable[[], object], device: torch.device) -> float:
    """Wall time of one call in seconds, all of its kernels included."""
    start = now(device)
    work()
    return now(device) - start


def median_of(work: Callable[[], object], device: torch.device, repeats: int, warm_up: int = 3) -> float:
    """Median wall time of one call in seconds, after a few that are not counted."""
    for _ in range(warm_up):
        work()
    return statistics.median(once(work, device) for _ in range(repeats))


def forget_peak(device: torch.device) -> None:
    """Let the next `peak_gib` be that of what follows."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_gib(device: torch.device) -> float | None:
    """The most memory that tensors took since `forget_peak`; None on a CPU."""
    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
