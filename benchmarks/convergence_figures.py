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
STOP = 25  # about where stage 2 from a read start stops by itself (benchmarks/results/stopping.json)
EVERYBODY = 4096  # people in training, where their number is not what is measured
KEPT = 0.97  # adherence of a method that keeps the prompt

RESULTS = Path(__file__).parent / "results"
# What other benchmarks say of reading on the shapes of FLUX.1-dev: file and figures.
ON_FLUX = {
    "reading": ("read_ms_flux", "expand_ms_flux"),
    "training": ("encoder_train_people_per_second_flux", "encoder_train_peak_gib_flux"),
}

Scores = Mapping[str, Sequence[float]]
Figure = dict[str, float]


def summarise(folder: Path, domain: str = "faces") -> dict[str, Any]:
    """Write `convergence.json`, of another domain `<domain>.json`, from what is there; what is missing is left out."""
    output = folder / ("convergence.json" if domain == "faces" else f"{domain}.json")
    files = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    files.pop(output.stem, None)
    origins = {
        name: {key: data[key] for key in ("machine", "date", "command", "split", "versions") if key in data}
        for name, data in files.items()
    }
    rivals = [files.pop(name) for name in list(files) if name.startswith("rivals-")]
    figures = {**_of_encoders(files), **_of_curves(files), **(_of_rivals(files, rivals) if rivals else {})}
    for name, keys in ON_FLUX.items() if domain == "faces" else ():
        path = RESULTS / f"{name}.json"
        measured = json.loads(path.read_text())["figures"] if path.exists() else {}
        figures |= {key: measured[key] for key in keys if key in measured}
    whole = {
        "figures": figures,
        "origins": origins,
        "recipes": {name: {**_condensed(data), "clean": _clean_scores(data)} for name, data in files.items()},
        "rivals": {
            label: _condensed(method, data["noises"]) for data in rivals for label, method in data["methods"].items()
        },
    }
    write_bytes(output, (json.dumps(whole, indent=1) + "\n").encode())
    return whole


def add(whole: Mapping[str, Any], path: Path) -> None:
    """Add the rows of a run to the file of an earlier one, of which the scores by person are gone.

    Figures that compare rows stay as they are, and so does a row that is there.

    Raises:
        SystemExit: a rival that is nearer than the best of the file; all has to be run together then.
    """
    earlier = json.loads(path.read_text())
    most = earlier["figures"]["best_rival_r_facesim"]["value"]
    for name, method in whole["rivals"].items():
        if name not in earlier["rivals"] and any(row["r_facesim"]["value"] > most for row in method["curve"].values()):
            raise SystemExit(f"{name} is nearer than {earlier['figures']['best_rival_name']}: run both with --plan")
    for kind in ("origins", "recipes", "rivals"):
        earlier[kind] = dict(sorted({**whole[kind], **earlier[kind]}.items()))
    write_bytes(path, (json.dumps(earlier, indent=1) + "\n").encode())


def _condensed(data: Any, seeds: int = 1) -> Any:
    """Everything of a file but its origin, means with intervals for the scores of people."""
    if isinstance(data, Mapping):
        left_out = "machine", "date", "command", "versions", "split", "losses"
        # Marked people are learned with one noise.
        return {
            key: _condensed(value, 1 if key == "marked" else seeds)
            for key, value in data.items()
            if key not in left_out
        }
    return interval(data, seeds) if isinstance(data, list) else data


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
            "real_ceiling": interval(first["ceiling"]),
            "zero_step_over_real_ceiling": interval(over),
            "zero_step_adherence": interval(main["prompt_adherence"]),
            "zero_step_copied_background": interval(main["copied_background"]),
            "code_bytes": 4 * first["recipe"]["k"],
            "subject_folder_bytes": first["code_file_bytes"],
        }
        if "copied_by_chance" in main:
            chance = main["copied_by_chance"]
            figures["copied_background_by_chance"] = interval(chance)
            figures["copied_background_over_chance"] = paired(main["copied_background"], chance)
        if "content_right" in main:
            figures["zero_step_content_right"] = interval(main["content_right"])
            figures["zero_step_copied_content"] = interval(main["copied_content"])
        if "second_r_facesim" in main:
            figures["zero_step_second_judge"] = interval(main["second_r_facesim"])
            figures["second_judge_ceiling"] = interval(first["second_ceiling"])
        for key, variant in (
            ("nearest_training_person", "nearest training person"),
            ("other_persons_photo", "another person's photo"),
            ("fitted_code", "code fitted to other photos"),
        ):
            scores = of_seeds(files, "main", variant)
            if scores:
                figures[key] = interval(scores["r_facesim"])
        figures |= _tuned([data["tuning"][RATE] for name, data in files.items() if _tunes(name, data)])
        figures |= _of_truth(files, main)
    small = of_seeds(files, "small")
    if small:
        figures["small_zero_step_r_facesim"] = interval(small["r_facesim"])
        numbers = next(data["numbers"] for name, data in files.items() if name.startswith("small-"))
        figures["small_params_over_lora_r1"] = round(numbers / LORA_R1, 3)
    for key, name, variant in (
        ("encoder_lora_zero_step", "lora", "clean"),
        ("image_prompt_adapter_zero_step", "image_prompt", "clean"),
        ("random_down_encoder_zero_step", "random", "clean"),
        ("low_light_unseen", "unseen", "low_light 0.5"),
        ("sunglasses_unseen", "unseen", "sunglasses 0.5"),
        ("blur_unseen", "unseen", "blur 1.0"),
        ("low_light_seen", "main", "low_light 0.5"),
        ("sunglasses_seen", "main", "sunglasses 0.5"),
        ("blur_seen", "main", "blur 1.0"),
    ):
        scores = of_seeds(files, name, variant)
        if scores:
            figures[key] = interval(scores["r_facesim"])
    for key, ours, theirs in (
        ("encoder_meta_minus_encoder_lora", "small", "lora"),
        ("main_minus_encoder_lora", "main", "lora"),
        ("main_minus_image_prompt_adapter", "main", "image_prompt"),
        ("main_minus_random_down", "main", "random"),
        ("small_minus_random_down", "small", "small_random"),
    ):
        first_scores, second_scores = of_seeds(files, ours), of_seeds(files, theirs)
        if first_scores and second_scores:
            figures[key] = paired(first_scores["r_facesim"], second_scores["r_facesim"])
    return figures


def _of_truth(files: Mapping[str, Any], main: Scores) -> dict[str, Any]:
    """What the renderer says of the encoder."""
    figures: dict[str, Any] = {}
    if "factor_distance" in main:
        other = of_seeds(files, "main", "another person's photo")
        figures["factor_distance"] = interval(main["factor_distance"])
        figures["factor_distance_other_persons_photo"] = interval(other["factor_distance"])
    truth = next((data["truth"] for name, data in files.items() if name.startswith("main-") and "truth" in data), None)
    if truth:
        for label, key in (("own", ""), ("another's", "_of_another"), ("photos", "_of_real_photos")):
            figures[f"distance_to_render{key}"] = interval(truth["render"][label])
        outside, marked = truth["outside"], truth["marked"][RATE]
        over = [a / b for a, b in zip(outside["clean"]["r_facesim"], outside["ceiling"], strict=True)]
        figures["outside_zero_step_r_facesim"] = interval(outside["clean"]["r_facesim"])
        figures["outside_over_real_ceiling"] = interval(over)
        figures["mark_shown_unmarked"] = interval(truth["unmarked"]["clean"]["mark"])
        for step, scores in marked.items():
            if step in ("0", "25", "100"):
                figures[f"mark_shown_{step}_steps"] = interval(scores["mark"])
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
        figures["r_facesim_25_steps"] = interval(at["25"])
    gains = {int(step): paired(values, at["0"]) for step, values in at.items() if 0 < int(step) <= STOP}
    figures["lowest_before_stop"] = min(gains.values(), key=lambda gain: gain["value"])
    return figures


def _of_curves(files: Mapping[str, Any]) -> dict[str, Any]:
    """Zero-step scores by people in training and by target images seen, and the images that 0.65 takes."""
    figures: dict[str, Any] = {}
    people = {
        data["recipe"]["people"]: interval(clean(data)) for name, data in files.items() if name.startswith("people-")
    }
    # A run that ends has decayed its rate: looks on the way of a longer one are below it.
    images = {
        data["images"]: interval(clean(data))
        for name, data in files.items()
        if name.rpartition("-")[0] in ("steps", "main", "people")
        and data["recipe"]["seed"] == 0
        and data["recipe"]["people"] == EVERYBODY
    }
    if people:
        figures["by_people"] = dict(sorted(people.items()))
    if images:
        figures["by_images"] = dict(sorted(images.items()))
        enough = [count for count, score in images.items() if score["value"] >= 0.65]
        figures["images_to_0_65"] = min(enough) if enough else None
    return figures


def clean(data: Mapping[str, Any], metric: str = "r_facesim") -> list[float]:
    """A score by person of clean photos, the mean over the noises that they were judged with."""
    labels = [label for label in data["zero_steps"] if label == "clean" or label.startswith("clean, noise")]
    return _mean([data["zero_steps"][label][metric] for label in labels if metric in data["zero_steps"][label]])


def _clean_scores(data: Mapping[str, Any]) -> dict[str, Figure]:
    return {metric: interval(clean(data, metric)) for metric in data["zero_steps"]["clean"]}


def _of_rivals(files: Mapping[str, Any], rivals: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The best that fine-tuned methods reach at any number of steps, and the encoder beside it."""
    seeds = rivals[0]["noises"]
    methods = {name: method for data in rivals for name, method in data["methods"].items()}
    cells = {
        (name, step): {metric: people_of(values, seeds) for metric, values in scores.items()}
        for name, method in methods.items()
        for step, scores in method["curve"].items()
    }

    def value(cell: tuple[str, str], metric: str = "r_facesim") -> float:
        values = cells[cell][metric]
        return sum(values) / len(values)

    best = max(cells, key=value)
    figures: dict[str, Any] = {
        "best_rival_name": _called(best),
        "best_rival_r_facesim": interval(cells[best]["r_facesim"]),
        "best_rival_adherence": interval(cells[best]["prompt_adherence"]),
    }
    loras = [cell for cell in cells if cell[0].partition(",")[0] == "lora_r1"]
    if loras:
        top = max(loras, key=value)
        figures["lora_r1_best_r_facesim"] = interval(cells[top]["r_facesim"])
        enough = value(top) - 0.05 * abs(value(top))
        figures["lora_r1_steps_to_95_percent"] = min(int(cell[1]) for cell in loras if value(cell) >= enough)
    main = of_seeds(files, "main")
    if main:
        figures["encoder_minus_best_rival"] = paired(main["r_facesim"], cells[best]["r_facesim"])
        kept = [cell for cell in cells if value(cell, "prompt_adherence") >= KEPT]
        if kept:
            equal = max(kept, key=value)
            figures["best_rival_at_adherence_0_97_name"] = _called(equal)
            figures["encoder_minus_best_rival_at_adherence_0_97"] = paired(main["r_facesim"], cells[equal]["r_facesim"])
        if "factor_distance" in main:
            nearest = min(cells, key=lambda cell: value(cell, "factor_distance"))
            figures["nearest_rival_by_factors_name"] = _called(nearest)
            figures["nearest_rival_factor_distance"] = interval(cells[nearest]["factor_distance"])
            figures["factor_distance_minus_nearest_rival"] = paired(
                main["factor_distance"], cells[nearest]["factor_distance"]
            )
    return figures


def _called(cell: tuple[str, str]) -> str:
    return f"{cell[0]}, {cell[1]} steps"


def paired(ours: Sequence[float], theirs: Sequence[float]) -> Figure:
    """Mean difference over the same people and its 95 % interval."""
    return interval([a - b for a, b in zip(ours, theirs, strict=True)])


def _mean(rows: Sequence[Sequence[float]]) -> list[float]:
    return [sum(values) / len(values) for values in zip(*rows, strict=True)]


def people_of(values: Sequence[float], seeds: int) -> list[float]:
    """Scores by person, the means over seeds, of rows that are ordered by person, then seed."""
    return [sum(values[start : start + seeds]) / seeds for start in range(0, len(values), seeds)]
