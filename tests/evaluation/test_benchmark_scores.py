# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks score beside R-FaceSim: how much is copied, and what real photos reach."""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from peft_metalora.metrics import Embeddings, real_ceiling

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def evaluation() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        spec = importlib.util.spec_from_file_location("benchmark_of_rivals", BENCHMARKS / "evaluation.py")
        module = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        yield module


def at(*degrees: float) -> torch.Tensor:
    """Unit vectors at these angles."""
    radians = [math.radians(one) for one in degrees]
    return torch.tensor([[math.cos(one), math.sin(one)] for one in radians])


def test_a_benchmark_says_how_much_is_copied(evaluation: ModuleType) -> None:
    """Bug: no table of results had the copy-paste score, only what a user evaluates."""
    # One person, two seeds, two prompts: the reference twice, then halfway and another photo.
    drawn = at(0, 0, 20, 40)
    bench = SimpleNamespace(
        draw=lambda stack, rows, seeds: drawn,
        embedder=SimpleNamespace(embed=lambda images: SimpleNamespace(vectors=images)),
        judge=SimpleNamespace(read=lambda images: [{"background": "red", "shirt": "blue"}] * len(images)),
        prompts=["a", "b"], asked=[{"shirt": "blue"}] * 2, domain=SimpleNamespace(backdrop="background"),
    )  # fmt: skip
    people = SimpleNamespace(references=at(0), others=at(40)[None], walls=["red"])
    scores = evaluation.Bench.score(bench, None, people, 2, [0, 1])
    assert scores["copy_paste"] == pytest.approx([1, (0 - 1) / 2], abs=1e-3)
    assert scores["face_sim"][0] == 1 and scores["copied_background"] == [1, 1]


def test_what_real_photos_reach_is_the_ceiling_of_the_metrics(evaluation: ModuleType) -> None:
    photos = torch.stack([at(0, 60, 90), at(0, 0, 0)])
    found = evaluation.among_themselves(photos)
    expected = [real_ceiling(Embeddings(one, torch.ones(3, dtype=torch.bool))) for one in photos]
    assert found == pytest.approx(expected, abs=1e-4)
