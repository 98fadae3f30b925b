# SPDX-License-Identifier: Apache-2.0
"""Many thousands of damaged files down every road by which files are read: what comes of them, and what they harm.

    python benchmarks/fuzz.py                    40,000 cases in two processes; writes results/fuzz.json
    python benchmarks/fuzz.py --replay 1742      one case again, by its number

A case is its number: road and damage are drawn from it (tests/fuzz), so that any of them can be replayed anywhere.
Memory is limited as by `ulimit -v 8000000`. Seconds are those of the process, so that a busy machine does not count;
what has no end is stopped by the clock. On a file system in memory (TMPDIR=/dev/shm) it takes a quarter of an hour."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from origin import origin, write
from tqdm import tqdm

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "fuzz")]

MEMORY_KB = 8_000_000
EACH = 50
"""Cases that a process does before it tells what came of them."""

_lab: Any = None


def rss_mb() -> float:
    """Resident memory of this process now, in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def peak_mb() -> float:
    """The most resident memory this process ever had, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def start(folder: str) -> None:
    """Make a lab in this process, its memory limited."""
    global _lab
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_KB * 1024, MEMORY_KB * 1024))
    warnings.simplefilter("ignore")
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    import torch

    torch.set_num_threads(1)
    from roads import Lab

    _lab = Lab(Path(tempfile.mkdtemp(dir=folder)))
    _lab.began_mb = rss_mb()


def run(seeds: range) -> tuple[list[Any], float]:
    """Outcomes of some cases, and by how much the memory of this process ever rose above what it began with, in MB."""
    from roads import run_case

    return [run_case(seed, _lab) for seed in seeds], peak_mb() - _lab.began_mb


def main() -> None:
    """Run the cases and write what came of them, again and again: what is there is true whenever it is stopped."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--cases", type=int, default=40_000, help="How many cases.")
    parser.add_argument("--first", type=int, default=0, help="Number of the first case.")
    parser.add_argument("--processes", type=int, default=2, help="How many at a time.")
    parser.add_argument("--replay", type=int, help="Run this one case and print what comes of it.")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "fuzz.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.replay is not None:
            start(folder)
            print(*run(range(options.replay, options.replay + 1))[0])
            return
        last = options.first + options.cases
        parts = [range(one, min(one + EACH, last)) for one in range(options.first, last, EACH)]
        outcomes: list[Any] = []
        peak, began = 0.0, time.monotonic()
        with tqdm(total=options.cases, unit="case") as bar:
            for done, used in _results(parts, options.processes, folder):
                outcomes += done
                peak = max(peak, used)
                bar.update(len(done))
                if len(outcomes) % (20 * EACH) == 0 or len(outcomes) == options.cases:
                    write(options.output, report(outcomes, peak, options.processes, time.monotonic() - began))


def _results(parts: list[range], processes: int, folder: str) -> Iterator[tuple[list[Any], float]]:
    context = multiprocessing.get_context("spawn")
    with context.Pool(processes, start, (folder,)) as pool:
        yield from pool.imap_unordered(run, parts)


def report(outcomes: list[Any], peak: float, processes: int, wall: float) -> dict[str, object]:
    """The figures, and what stands behind them; the numbers of all cases that went wrong are named."""
    typed = ("refused", "done", "refused by PEFT")
    untyped = sorted(outcome.seed for outcome in outcomes if outcome.result not in typed)
    harmed = sorted(outcome.seed for outcome in outcomes if outcome.harm)
    slowest = max(outcomes, key=lambda outcome: outcome.seconds)
    return {
        **origin("cpu", "safetensors"),
        "processes": processes,
        "memory_limit_kb": MEMORY_KB,
        "figures": {
            "cases": len(outcomes),
            "harmed": len(harmed),
            "untyped_errors": len(untyped),
            "slowest_s": round(slowest.seconds, 3),
            "peak_mb": round(peak, 1),
        },
        "wall_s": round(wall),
        "seeds": {
            "first": min(outcome.seed for outcome in outcomes),
            "last": max(outcome.seed for outcome in outcomes),
            "slowest": slowest.seed,
            "harmed": harmed,
            "untyped": untyped,
        },
        "by_outcome": dict(
            Counter(
                outcome.error if outcome.result == "refused" else outcome.result for outcome in outcomes
            ).most_common()
        ),
        "by_road": _counted(outcomes, "road"),
        "by_damage": _counted(outcomes, "damage"),
    }


def _counted(outcomes: list[Any], name: str) -> dict[str, dict[str, int]]:
    kinds = sorted({getattr(outcome, name) for outcome in outcomes})
    return {kind: dict(Counter(one.result for one in outcomes if getattr(one, name) == kind)) for kind in kinds}


if __name__ == "__main__":
    main()
