# SPDX-License-Identifier: Apache-2.0
"""The figures of `convergence.py`: from the files of its recipes and rivals to `convergence.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft_metalora.evaluation.summary import interval
from peft_metalora.files import write_bytes

LORA_R1 = 33_408  # numbers of a LoRA of rank 1 on the modules of the demo's base
RATE = "0.0003"  # of stage 2 from the read start
STOP = 50  # steps of stage 2 before the automatic stop

Scores = Mapping[str, Sequence[float]]
Figure = dict[str, float]


def summarise(folder: Path) -> dict[str, Any]:
    """Write `convergence.json` from what is there; a figure whose files are missing is left out."""
    files = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    files.pop("convergence", None)
    rivals = files.pop("rivals", None)
    figures = {**_of_encoders(files), **_of_curves(files), **(_of_rivals(files, rivals) if rivals else {})}
    origins = {
        name: {key: data[key] for key in ("machine", "date", "command", "split")}
        for name, data in {**files, **({"rivals": rivals} if rivals else {})}.items()
    }
    whole = {"figures": figures, "origins": origins}
    write_bytes(folder / "convergence.json", (json.dumps(whole, indent=1) + "\n").encode())
    return whole


def of_seeds(files: Mapping[str, Any], name: str, variant: str = "clean") -> dict[str, list[float]]:
    """Scores by person, each the mean over training seeds and over the noises that the variant was drawn with."""
    found: dict[str, list[list[float]]] = {}
    for stem, data in files.items():
        if stem.rpartition("-")[0] != name:
            continue
        for label, scores in data["zero_steps"].items():
            if label == variant or label.startswith(f"{variant}, noise"):
                for metric, values in scores.items():
                    found.setdefault(metric, []).append(values)
    return {metric: _mean(rows) for metric, rows in found.items()}


def _of_encoders(files: Mapping[str, Any]) -> dict[str, Any]:
    main, figures = of_seeds(files, "main"), {}
    if main:
        first = files[next(name for name in files if name.startswith("main-"))]
        over = [score / top for score, top in zip(main["r_facesim"], first["ceiling"], strict=True)]
        figures |= {
            "zero_step_r_facesim": interval(main["r_facesim"]),
            "zero_step_over_real_ceiling": interval(over),
            "zero_step_adherence": interval(main["prompt_adherence"]),
            "zero_step_copied_background": interval(main["copied_background"]),
            "code_bytes": 4 * first["recipe"]["k"],
            "subject_folder_bytes": first["code_file_bytes"],
        }
        if "second_r_facesim" in main:
            figures["zero_step_second_judge"] = interval(main["second_r_facesim"])
        for key, variant in (
            ("nearest_training_person", "nearest training person"),
            ("other_persons_photo", "another person's photo"),
            ("fitted_code", "code fitted to other photos"),
        ):
            scores = of_seeds(files, "main", variant)
            if scores:
                figures[key] = interval(scores["r_facesim"])
        figures |= _tuned([data["tuning"][RATE] for name, data in files.items() if _tunes(name, data)])
    small = of_seeds(files, "small")
    if small:
        figures["small_zero_step_r_facesim"] = interval(small["r_facesim"])
        numbers = next(data["numbers"] for name, data in files.items() if name.startswith("small-"))
        figures["small_params_over_lora_r1"] = round(numbers / LORA_R1, 3)
    lora = of_seeds(files, "lora")
    if small and lora:
        figures["encoder_meta_minus_encoder_lora"] = paired(small["r_facesim"], lora["r_facesim"])
    for key, name, variant in (
        ("image_prompt_adapter_zero_step", "tokens", "clean"),
        ("random_down_encoder_zero_step", "random", "clean"),
        ("low_light_unseen", "unseen", "low_light 0.5"),
        ("sunglasses_unseen", "unseen", "sunglasses 0.5"),
        ("blur_unseen", "unseen", "blur 1.0"),
    ):
        scores = of_seeds(files, name, variant)
        if scores:
            figures[key] = interval(scores["r_facesim"])
    return figures


def _tunes(name: str, data: Mapping[str, Any]) -> bool:
    return name.startswith("main-") and RATE in data.get("tuning", {})


def _tuned(curves: Sequence[Mapping[str, Scores]]) -> dict[str, Any]:
    """What stage 2 adds to the read start, by person."""
    if not curves:
        return {}
    at = {step: _mean([curve[step]["r_facesim"] for curve in curves]) for step in curves[0]}
    figures: dict[str, Any] = {}
    if "25" in at:
        figures["gain_25_steps"] = paired(at["25"], at["0"])
    gains = {int(step): paired(values, at["0"]) for step, values in at.items() if 0 < int(step) <= STOP}
    figures["lowest_before_stop"] = min(gains.values(), key=lambda gain: gain["value"])
    return figures


def _of_curves(files: Mapping[str, Any]) -> dict[str, Any]:
    """Zero-step scores by people in training and by target images seen, and the images that 0.65 takes."""
    figures: dict[str, Any] = {}
    people = {
        data["recipe"]["people"]: interval(data["zero_steps"]["clean"]["r_facesim"])
        for name, data in files.items()
        if name.startswith("people-")
    }
    # A run that ends has decayed its rate: looks on the way of a longer one are below it.
    images = {
        data["images"]: interval(data["zero_steps"]["clean"]["r_facesim"])
        for name, data in files.items()
        if name.rpartition("-")[0] in ("steps", "main") and data["recipe"]["seed"] == 0
    }
    if people:
        figures["by_people"] = dict(sorted(people.items()))
    if images:
        figures["by_images"] = dict(sorted(images.items()))
        enough = [count for count, score in images.items() if score["value"] >= 0.65]
        figures["images_to_0_65"] = min(enough) if enough else None
    return figures


def _of_rivals(files: Mapping[str, Any], rivals: Mapping[str, Any]) -> dict[str, Any]:
    """The best that fine-tuned methods reach at any number of steps, and the encoder beside it."""
    seeds = rivals["noises"]
    best: dict[str, tuple[float, str, list[float]]] = {}
    for name, method in rivals["methods"].items():
        for step, scores in method["curve"].items():
            people = _people(scores["r_facesim"], seeds)
            value = sum(people) / len(people)
            if name not in best or value > best[name][0]:
                best[name] = value, step, people
    name = max(best, key=lambda one: best[one][0])
    figures: dict[str, Any] = {
        "best_rival_name": f"{name}, {best[name][1]} steps",
        "best_rival_r_facesim": interval(best[name][2]),
    }
    loras = [one for one in best if one.partition(",")[0] == "lora_r1"]
    if loras:
        top = max(loras, key=lambda one: best[one][0])
        figures["lora_r1_best_r_facesim"] = interval(best[top][2])
        curve = {
            int(step): sum(scores["r_facesim"]) / len(scores["r_facesim"])
            for one in loras
            for step, scores in rivals["methods"][one]["curve"].items()
        }
        reached = [step for step, value in curve.items() if value >= 0.95 * best[top][0]]
        figures["lora_r1_steps_to_95_percent"] = min(reached)
    main = of_seeds(files, "main")
    if main:
        figures["encoder_minus_best_rival"] = paired(main["r_facesim"], best[name][2])
    return figures


def paired(ours: Sequence[float], theirs: Sequence[float]) -> Figure:
    """Mean difference over the same people and its 95 % interval."""
    return interval([a - b for a, b in zip(ours, theirs, strict=True)])


def _mean(rows: Sequence[Sequence[float]]) -> list[float]:
    return [sum(values) / len(values) for values in zip(*rows, strict=True)]


def _people(values: Sequence[float], seeds: int) -> list[float]:
    """Rows are ordered by person, then seed."""
    return [sum(values[start : start + seeds]) / seeds for start in range(0, len(values), seeds)]
