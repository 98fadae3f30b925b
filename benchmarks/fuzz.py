# SPDX-License-Identifier: Apache-2.0
"""Many thousands of corrupted Downs and subjects against the loader: what they raise, take, and leave behind.

    python benchmarks/fuzz.py                    24,000 cases, about 3 minutes on one core; writes results/fuzz.json
    python benchmarks/fuzz.py --replay 1742      one case again, by its number

A case is its number: the damage is drawn from it (tests/fuzz/mutations.py), so any of them can be replayed anywhere.
The slowest cases are timed three times more and the least time counts: a busy machine measures the others."""

from __future__ import annotations

import argparse
import os
import resource
import sys
import tempfile
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path

from origin import origin, write
from tqdm import tqdm

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "fuzz")]

from mutations import Lab, Outcome, run_case  # noqa: E402

RETIMED = 200


def rss_mb() -> float:
    """Resident memory of this process now, in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def peak_mb() -> float:
    """The most resident memory this process ever had, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def main() -> None:
    """Run the cases and write what came of them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--cases", type=int, default=24_000, help="How many cases.")
    parser.add_argument("--first", type=int, default=0, help="Number of the first case.")
    parser.add_argument("--replay", type=int, help="Run this one case and print what comes of it.")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "fuzz.json")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        lab = Lab(Path(folder))
        if options.replay is not None:
            print(run_case(options.replay, lab))
            return
        before = rss_mb()
        seeds = range(options.first, options.first + options.cases)
        outcomes = [run_case(seed, lab) for seed in tqdm(seeds, unit="case")]
        peak = peak_mb() - before
        wall = max(outcome.seconds for outcome in outcomes)
        for outcome in sorted(outcomes, key=lambda outcome: -outcome.seconds)[:RETIMED]:
            again = min(run_case(outcome.seed, lab).seconds for _ in range(3))
            outcomes[outcome.seed - options.first] = replace(outcome, seconds=min(again, outcome.seconds))
    write(options.output, report(outcomes, peak, wall))
    print(options.output.read_text())


def report(outcomes: list[Outcome], peak: float, wall: float) -> dict[str, object]:
    """The figures, and what stands behind them; the numbers of all cases that went wrong are named."""
    untyped = [outcome.seed for outcome in outcomes if outcome.result not in ("refused", "loaded")]
    harmed = [outcome.seed for outcome in outcomes if outcome.harmed]
    slowest = max(outcomes, key=lambda outcome: outcome.seconds)
    return {
        **origin("cpu", "safetensors"),
        "cores": 1,
        "figures": {
            "cases": len(outcomes),
            "models_harmed": len(harmed),
            "untyped_errors": len(untyped),
            "slowest_s": round(slowest.seconds, 3),
            "peak_mb": round(peak, 1),
        },
        "slowest_first_run_s": round(wall, 3),
        "seeds": {
            "first": outcomes[0].seed,
            "last": outcomes[-1].seed,
            "slowest": slowest.seed,
            "harmed": harmed,
            "untyped": untyped,
        },
        "by_outcome": dict(Counter(outcome.error or outcome.result for outcome in outcomes).most_common()),
        "by_damage": {
            mutation: dict(Counter(outcome.result for outcome in outcomes if outcome.mutation == mutation))
            for mutation in sorted({outcome.mutation for outcome in outcomes})
        },
    }


if __name__ == "__main__":
    main()
