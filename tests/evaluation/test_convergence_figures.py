# SPDX-License-Identifier: Apache-2.0
"""The figures of the convergence benchmark are means over people, and differences over the same people."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def figures() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "convergence_figures.py"
    spec = importlib.util.spec_from_file_location("convergence_figures", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["convergence_figures"] = module
    spec.loader.exec_module(module)
    return module


ORIGIN = {"machine": "m", "date": "d", "command": "c", "split": "held-out"}


def scores(*values: float) -> dict[str, list[float]]:
    return {
        "r_facesim": list(values),
        "prompt_adherence": [1.0] * len(values),
        "copied_background": [0.1] * len(values),
    }


def recipe_file(folder: Path, name: str, clean: list[float], noise: list[float] | None = None, **more: object) -> None:
    zero = {"clean": scores(*clean), **({"clean, noise 1": scores(*noise)} if noise else {})}
    zero |= more.pop("zero", {})  # type: ignore[arg-type]
    data = {
        **ORIGIN,
        "recipe": {"k": 128, "people": 64, "seed": 0},
        "images": 10,
        "numbers": 16_704,
        "zero_steps": zero,
    }
    data |= {"ceiling": [0.8, 0.8], "code_file_bytes": 800, **more}
    (folder / f"{name}.json").write_text(json.dumps(data))


def test_seeds_and_noises_are_averaged_before_people(figures: ModuleType, tmp_path: Path) -> None:
    recipe_file(tmp_path, "main-0", [0.4, 0.8], [0.6, 1.0])
    recipe_file(tmp_path, "main-1", [0.5, 0.9], [0.5, 0.9])
    recipe_file(tmp_path, "small-0", [0.5, 0.7])
    recipe_file(tmp_path, "lora-0", [0.6, 0.8])
    found = figures.summarise(tmp_path)["figures"]
    assert found["zero_step_r_facesim"]["value"] == pytest.approx(0.7)
    assert found["zero_step_over_real_ceiling"]["value"] == pytest.approx(0.875)
    difference = found["encoder_meta_minus_encoder_lora"]
    assert difference["value"] == pytest.approx(-0.1) and difference["low"] == difference["high"] == pytest.approx(-0.1)
    assert found["small_params_over_lora_r1"] == 0.5 and found["code_bytes"] == 512
    assert "best_rival_name" not in found and "low_light_unseen" not in found
    assert json.loads((tmp_path / "convergence.json").read_text())["origins"]["main-0"] == ORIGIN
    assert figures.summarise(tmp_path)["figures"] == found


def test_tuning_is_measured_from_each_persons_own_start(figures: ModuleType, tmp_path: Path) -> None:
    tuning = {
        "0.0003": {"0": scores(0.4, 0.8), "10": scores(0.3, 0.8), "25": scores(0.5, 0.9), "100": scores(0.1, 0.1)}
    }
    recipe_file(tmp_path, "main-0", [0.4, 0.8], tuning=tuning)
    found = figures.summarise(tmp_path)["figures"]
    assert found["gain_25_steps"]["low"] == pytest.approx(0.1)
    # What comes after the stop does not count.
    assert found["lowest_before_stop"]["value"] == pytest.approx(-0.05)


def test_rivals_count_at_their_best_step(figures: ModuleType, tmp_path: Path) -> None:
    recipe_file(tmp_path, "main-0", [0.7, 0.9])
    curve = {"25": scores(0.1, 0.1, 0.3, 0.3), "50": scores(0.56, 0.6, 0.6, 0.6), "100": scores(0.6, 0.6, 0.6, 0.6)}
    methods = {
        "lora_r1": {"curve": curve},
        "full": {"curve": {"25": scores(0.7, 0.7, 0.6, 0.6), "50": scores(0.2, 0.2, 0.2, 0.2)}},
    }
    for name, method in methods.items():
        data = {**ORIGIN, "noises": 2, "methods": {name: method}}
        (tmp_path / f"rivals-{name}.json").write_text(json.dumps(data))
    found = figures.summarise(tmp_path)["figures"]
    assert found["best_rival_name"] == "full, 25 steps" and found["best_rival_r_facesim"]["value"] == 0.65
    assert found["encoder_minus_best_rival"]["value"] == pytest.approx(0.15)
    assert found["lora_r1_best_r_facesim"]["value"] == 0.6 and found["lora_r1_steps_to_95_percent"] == 50


def test_rivals_that_get_no_nearer_than_a_stranger_have_a_best_step_too(figures: ModuleType, tmp_path: Path) -> None:
    """Bug: no figures at all where the best score was below 0."""
    curve = {"25": scores(-0.1, -0.1), "50": scores(-0.2, -0.2)}
    data = {**ORIGIN, "noises": 1, "methods": {"lora_r1": {"curve": curve}}}
    (tmp_path / "rivals-lora_r1.json").write_text(json.dumps(data))
    assert figures.summarise(tmp_path)["figures"]["lora_r1_steps_to_95_percent"] == 25


def test_curves_are_of_runs_that_ended(figures: ModuleType, tmp_path: Path) -> None:
    recipe = {"k": 128, "people": 4096, "seed": 0}
    recipe_file(tmp_path, "people-64", [0.2, 0.4], images=1_152_000)
    recipe_file(tmp_path, "people-4096", [0.7, 0.8], images=1_152_000, recipe=recipe)
    recipe_file(tmp_path, "steps-1000", [0.5, 0.7], images=384_000, recipe=recipe)
    recipe_file(tmp_path, "steps-2000", [0.6, 0.8], images=768_000, recipe=recipe)
    found = figures.summarise(tmp_path)["figures"]
    assert found["by_people"][64]["value"] == pytest.approx(0.3)
    assert found["images_to_0_65"] == 768_000
    assert {count: score["value"] for count, score in found["by_images"].items()} == pytest.approx(
        {384_000: 0.6, 768_000: 0.7, 1_152_000: 0.75}
    )


def test_a_random_down_is_compared_person_by_person(figures: ModuleType, tmp_path: Path) -> None:
    recipe_file(tmp_path, "main-0", [0.7, 0.9])
    recipe_file(tmp_path, "main-1", [0.5, 0.9])
    recipe_file(tmp_path, "random-0", [0.5, 0.8])
    found = figures.summarise(tmp_path)["figures"]
    assert found["random_down_encoder_zero_step"]["value"] == pytest.approx(0.65)
    assert found["main_minus_random_down"]["value"] == pytest.approx(0.1) and "small_minus_random_down" not in found


def test_an_encoder_is_compared_with_rivals_that_keep_the_prompt_too(figures: ModuleType, tmp_path: Path) -> None:
    recipe_file(tmp_path, "main-0", [0.7, 0.9])
    curve = {"25": scores(0.3, 0.5), "50": scores(0.6, 0.8)}
    curve["50"]["prompt_adherence"] = [0.9, 0.9]
    method = {"curve": curve, "learning_rate": 0.1, "marked": {"25": {"mark": [0.25, 0.75]}}}
    data = {**ORIGIN, "noises": 1, "methods": {"full": method}}
    (tmp_path / "rivals-full.json").write_text(json.dumps(data))
    whole = figures.summarise(tmp_path)
    assert whole["figures"]["best_rival_name"] == "full, 50 steps"
    assert whole["figures"]["best_rival_at_adherence_0_97_name"] == "full, 25 steps"
    assert whole["figures"]["encoder_minus_best_rival_at_adherence_0_97"]["value"] == pytest.approx(0.4)
    assert whole["rivals"]["full"]["marked"]["25"]["mark"]["value"] == 0.5
    assert whole["recipes"]["main-0"]["zero_steps"]["clean"]["r_facesim"]["value"] == pytest.approx(0.8)


def test_a_rival_is_added_to_an_earlier_run(figures: ModuleType, tmp_path: Path) -> None:
    def rivals(folder: Path, name: str, *values: float) -> None:
        folder.mkdir(exist_ok=True)
        methods = {name: {"learning_rate": 0.1, "curve": {"25": scores(*values)}}}
        (folder / f"rivals-{name}.json").write_text(json.dumps({**ORIGIN, "noises": 1, "methods": methods}))

    rivals(tmp_path / "all", "lora", 0.4, 0.6)
    rivals(tmp_path / "all", "full", 0.5, 0.7)
    recipe_file(tmp_path / "all", "main-0", [0.7, 0.9])
    earlier = figures.summarise(tmp_path / "all")
    path = tmp_path / "all" / "convergence.json"

    rivals(tmp_path / "more", "words", 0.1, 0.3)
    rivals(tmp_path / "more", "lora", 0.0, 0.0)
    figures.add(figures.summarise(tmp_path / "more"), path)
    found = json.loads(path.read_text())
    assert found["figures"] == earlier["figures"] and found["recipes"] == earlier["recipes"]
    assert list(found["rivals"]) == ["full", "lora", "words"] and found["rivals"]["lora"] == earlier["rivals"]["lora"]
    assert found["rivals"]["words"]["curve"]["25"]["r_facesim"]["value"] == pytest.approx(0.2)
    assert found["origins"]["rivals-words"] == ORIGIN

    rivals(tmp_path / "best", "better", 0.9, 0.9)
    with pytest.raises(SystemExit, match="better is nearer than full, 25 steps"):
        figures.add(figures.summarise(tmp_path / "best"), path)
    assert json.loads(path.read_text()) == found
