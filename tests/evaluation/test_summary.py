# SPDX-License-Identifier: Apache-2.0
"""Headline figures, intervals and speed-ups of curves whose answers are known."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from peft_metalora.evaluation.rivals import RIVALS, VARIANTS
from peft_metalora.evaluation.summary import METRICS, interval, summarise

PEOPLE, SEEDS = 4, 2


def method(curve: dict[int, float], step_seconds: float = 2e-6) -> dict[str, Any]:
    """Every person and seed alike."""
    rows = PEOPLE * SEEDS
    points = {str(step): {name: [value] * rows for name in METRICS} for step, value in curve.items()}
    return {"curve": points, "step_seconds": [step_seconds] * 3, "parameters": 7}


def evaluation(**methods: dict[str, Any]) -> dict[str, Any]:
    base = {name: [0.0] * (PEOPLE * SEEDS) for name in METRICS}
    data = {"seeds": SEEDS, "headline_steps": 100, "base": base, "methods": methods}
    summarise(data)
    return {name: {**one, **data["figures"].get(name, {})} for name, one in data["methods"].items()}


def test_an_interval_is_over_people_not_over_seeds() -> None:
    # Seeds differ wildly, people do not: nothing to be uncertain of.
    assert interval([0.0, 1.0] * 8, seeds=2) == {"value": 0.5, "low": 0.5, "high": 0.5}
    between = interval([0.0, 0.0, 1.0, 1.0] * 4, seeds=2)
    assert between["value"] == 0.5 and 0 <= between["low"] < 0.4 < 0.6 < between["high"] <= 1


def test_headline_figures_are_those_of_the_headline_steps() -> None:
    found = evaluation(lora_r1=method({50: 0.2, 100: 0.4, 200: 0.8}))["lora_r1"]
    for metric in METRICS:
        assert found[metric] == {"value": 0.4, "low": 0.4, "high": 0.4}
    assert found["seconds"] == {"value": 2e-4, "low": 2e-4, "high": 2e-4}
    assert found["parameters"] == {"value": 7, "low": 7, "high": 7}


def test_speed_is_steps_to_95_percent_of_the_best_of_lora() -> None:
    found = evaluation(
        lora_r1=method({100: 0.5, 200: 1.0}),
        twice=method({50: 0.5, 100: 1.0}),
        ahead=method({0: 0.96, 100: 1.0}),
        never=method({100: 0.9, 200: 0.94}),
    )
    assert found["lora_r1"]["target"] == 0.95
    assert found["lora_r1"]["steps_to_target"] == {"value": 190.0, "low": 190.0, "high": 190.0}
    assert found["lora_r1"]["speed_up"]["value"] == 1
    assert found["twice"]["steps_to_target"]["value"] == 95 and found["twice"]["speed_up"]["value"] == 2
    assert found["ahead"]["steps_to_target"]["value"] == 0
    assert found["never"]["speed_up"] == {"value": None, "low": None, "high": None}


def test_a_peak_that_falls_again_counts() -> None:
    found = evaluation(lora_r1=method({100: 1.0, 200: 0.5}))["lora_r1"]
    assert found["target"] == 0.95 and found["steps_to_target"]["value"] == 95


def test_variants_have_headlines_and_no_speed() -> None:
    data = {"seeds": SEEDS, "headline_steps": 100, "variants": {"dora": method({100: 0.3}), "cut": method({50: 0.1})}}
    summarise(data)
    assert data["figures"]["dora"]["r_facesim"]["value"] == 0.3 and "speed_up" not in data["variants"]["dora"]
    assert "cut" not in data["figures"]


@pytest.mark.parametrize(("file", "names"), [("evaluation", set(RIVALS)), ("variants", set(VARIANTS))])
def test_committed_figures_are_complete_and_those_of_the_committed_curves(file: str, names: set[str]) -> None:
    path = Path(__file__).parents[2] / "benchmarks" / "results" / f"{file}.json"
    data = json.loads(path.read_text())
    assert data["subjects"] >= 32 and data["seeds"] >= 3 and set(data["figures"]) == names
    for one in data["figures"].values():
        assert set(one) == {*METRICS, "parameters", "seconds"}
        assert all(figure["low"] <= figure["value"] <= figure["high"] for figure in one.values())
    again = copy.deepcopy(data)
    summarise(again)
    assert again == data
