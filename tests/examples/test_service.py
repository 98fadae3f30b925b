# SPDX-License-Identifier: Apache-2.0
"""The example service: every request answered with the right person, whatever dies."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[2]


def script(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"{Path(path).stem}_script", ROOT / path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look for it there
    spec.loader.exec_module(module)
    return module


def test_no_request_fails_while_a_replica_is_killed() -> None:
    """36 subjects, each asked for five times, and two replicas of which one gets SIGKILL midway."""
    figures = {"subjects": 36, "requests": 180, "clients": 48, "replicas": 2, "sample": 12}
    found = script("benchmarks/service.py").measure(**figures, wait=False)
    assert found["failed"] == 0
    assert found["repeated"] >= 1, "what the dead replica was drawing was asked again"
    assert found["refused"] == [404, 422, 422]
    # Alone in a batch and among others, rounded to the 256 levels of a PNG.
    assert found["difference_levels"] <= 1
    assert found["difference_to_base_levels"] > 10
    assert 2 < found["subjects_per_batch"] <= found["mean_batch"] <= 16, "a batch mixes subjects"
    # Two in three stay with one replica, the third has to move; by chance five requests would reach 2.5 replicas.
    assert found["replicas_per_subject"] < 1.8
    assert found["processes_left"] == 0


def test_in_a_batch_that_fails_each_stands_for_itself() -> None:
    artist = object.__new__(script("examples/serve.py").Artist.func_or_class)
    drawn = []

    def draw_batch(jobs: list[tuple[str, str, int]]) -> list[bytes]:
        if any(subject == "gone" for subject, _, _ in jobs):
            raise FileNotFoundError("gone")
        drawn.append(len(jobs))
        return [subject.encode() for subject, _, _ in jobs]

    artist._draw_batch = draw_batch
    assert artist._draw([("ann", "", 0), ("bob", "", 1)]) == [b"ann", b"bob"]
    first, failed, last = artist._draw([("ann", "", 0), ("gone", "", 1), ("bob", "", 2)])
    assert (first, last) == (b"ann", b"bob") and isinstance(failed, FileNotFoundError)
    assert drawn == [2, 1, 1]
