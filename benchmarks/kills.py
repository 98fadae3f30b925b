# SPDX-License-Identifier: Apache-2.0
"""Runs killed (kill -9) at random moments: what is there afterwards is the older or the newer, whole.

    python benchmarks/kills.py                   60 kills, ten of each job; writes results/kills.json
    python benchmarks/kills.py --replay 17       one kill again, by its number

A kill is its number: job and moment are drawn from it (tests/fuzz/killing.py). A third of them come at a share of the
job's time, from outside; the others before its n-th change of the file system, by its own hand, the same moment
everywhere. Half of these are among its last changes, when a result is put in its place."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from origin import origin, write
from tqdm import tqdm

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "fuzz")]


_killer: Any = None


def start(folder: str) -> None:
    """Make what is killed in this process."""
    global _killer
    from killing import Killer

    _killer = Killer(Path(tempfile.mkdtemp(dir=folder))).__enter__()


def kill(seed: int) -> Any:
    """A kill, and what came of it."""
    return _killer.kill(seed)


def main() -> None:
    """Kill, look, and write what was found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=60, help="How many kills.")
    parser.add_argument("--processes", type=int, default=1, help="How many at a time.")
    parser.add_argument("--replay", type=int, help="Do this one kill and print what comes of it.")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "kills.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.replay is not None:
            start(folder)
            print(kill(options.replay))
            return
        found = []
        with ProcessPoolExecutor(options.processes, get_context("spawn"), start, (folder,)) as pool:
            for one in tqdm(pool.map(kill, range(options.kills)), total=options.kills, unit="kill"):
                found.append(one)
                write(options.output, report(found))


def report(found: list[Any]) -> dict[str, object]:
    """The figures, and each kill with its moment and what was there afterwards."""
    return {
        **origin("cpu", "safetensors"),
        "figures": {
            "kills": sum(one.killed for one in found),
            "lost_or_mixed": sum(bool(one.harm) for one in found),
        },
        "by_job": {
            job: dict(Counter(one.harm or one.left for one in found if one.job == job))
            for job in sorted({one.job for one in found})
        },
        "kills": [vars(one) for one in found],
    }


if __name__ == "__main__":
    main()
