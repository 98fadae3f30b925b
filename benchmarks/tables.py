# SPDX-License-Identifier: Apache-2.0
"""Figures from benchmarks/results/*.json to the docs: tables between markers, and the plots of docs/results.md.

    python benchmarks/tables.py

In README.md and docs/*.md everything between `<!-- table: NAME -->` and `<!-- end -->` is written anew; NAME is a key
of `TABLES`. Plots go to docs/results/*.svg. A test compares the committed pages with what this command writes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

from result_plots import domains, plots

from peft_metalora.evaluation.figures import REAL
from peft_metalora.evaluation.summary import interval
from peft_metalora.files import write_bytes

ROOT = Path(__file__).parents[1]
RESULTS, DOCS = ROOT / "benchmarks" / "results", ROOT / "docs"
BLOCK = re.compile(r"<!-- table: (\w+) -->\n.*?<!-- end -->", re.DOTALL)
Data = dict[str, Any]

IMAGE_GEN = {
    "meta_lora_subject": "Meta-LoRA, Mid and Up on a Down (rank 4, Down 64)",
    "meta_lora_meta": "Meta-LoRA, all three factors",
    "meta_lora_subject_fused": "Meta-LoRA, Mid and Up on a Down, AdamW fused",
    "lora_r32": "LoRA, rank 32, as PEFT's benchmark has it",
    "lora_r32_fused": "LoRA, rank 32, AdamW fused",
    "lora_r32_bf16_fused": "LoRA, rank 32, factors in bf16, AdamW fused",
    "lora_r32_autocast_fused": "LoRA, rank 32, bf16 autocast, AdamW fused",
    "oft": "OFT, blocks of 32",
    "lokr": "LoKr, rank 32",
    "vera": "VeRA, rank 32",
}
EQUAL_ADHERENCE = 0.9

# Figure, what it is, its goal (None: a plain figure), and whether a larger one is better.
Goal = tuple[str, str, float | None, bool]
LAYER: tuple[Goal, ...] = (
    ("unfolded_over_lora_r1_b4", "forward, unfolded / LoRA r=1, batch 4", 1.0, False),
    ("unfolded_over_base_b4", "forward, unfolded / base, batch 4", 1.05, False),
    ("folded_over_base_b4", "forward, folded / base, batch 4", 1.05, False),
    ("folded_over_base_b1", "forward, folded / base, batch 1", 1.15, False),
    ("folded_over_base_compiled_b4", "the same compiled / compiled base, batch 4", 1.03, False),
    ("merged_over_base_b4", "forward, merged / base, batch 4", 1.0, False),
    ("default_over_base_b1", "forward, loaded and called / base, batch 1", 1.1, False),
    ("default_over_base_b4", "forward, loaded and called / base, batch 4", 1.04, False),
    ("default_over_base_compiled_b4", "the same compiled / compiled base, batch 4", 1.02, False),
    ("train_step_over_lora_r1_b4", "training step as written / LoRA r=1 in float32, no autocast, batch 4", 0.87, False),
    ("train_mem_over_lora_r1_b4", "its peak memory / LoRA r=1 in float32, no autocast, batch 4", 0.84, False),
    ("train_step_over_eager_lora_r1_b1", "recorded training step / LoRA r=1, fastest eager way, batch 1", 0.6, False),
    ("train_step_over_graphed_lora_r1_b1", "the same / LoRA r=1 recorded, batch 1", 0.95, False),
    ("frozen_step_over_graphed_lora_r1_b1", "the frozen base alone, recorded / that, batch 1: the floor", None, False),
    ("train_step_over_compiled_lora_r1_b1", "compiled training step / LoRA r=1 compiled, batch 1", 0.95, False),
    ("train_step_over_graphed_lora_r1_b4", "training step, recorded / LoRA r=1 recorded, batch 4", None, False),
    ("frozen_step_over_graphed_lora_r1_b4", "the frozen base alone, recorded / that, batch 4: the floor", None, False),
    ("train_step_over_best_lora_r1_b4", "training step, fastest way / LoRA r=1, fastest way, batch 4", 0.945, False),
    ("train_mem_over_best_lora_r1_b4", "its peak memory / that of LoRA's way, batch 4", 0.95, False),
)
SERVING: tuple[Goal, ...] = (
    ("subject_mb", "one subject in memory, MB", None, False),
    ("swap_ms_1", "a subject from host memory into its slot, 1 loaded, ms", 1.0, False),
    ("swap_ms_100", "the same, 100 loaded, ms", 1.0, False),
    ("swap_ms_1000", "the same, 1000 loaded, ms", 1.0, False),
    ("swap_ms_1000000_codes", "a subject of a code, 1,000,000 codes in host memory, ms", 0.3, False),
    ("host_bytes_per_code", "host memory of each, bytes", 1000.0, False),
    ("stock_lora_r1_mb", "a LoRA of rank 1 in memory, MB", None, False),
    ("stock_hotswap_ms", "diffusers and PEFT LoRA: hotswap, ms", None, False),
    ("stock_set_adapters_ms_50", "diffusers and PEFT LoRA: set_adapters, 50 loaded, ms", None, False),
    ("mixed_over_single_b4", "4 different subjects in a batch / one subject", 1.02, False),
    ("mixed_over_single_b8", "8 different subjects in a batch / one subject", 1.02, False),
    ("mixed_over_single_compiled_b4", "4 different subjects / one subject, compiled", 1.02, False),
    ("one_by_one_over_mixed_b4", "4 subjects one by one, chosen by `set_slots` / in one batch", None, False),
    ("one_by_one_over_mixed_b8", "8 subjects one by one, chosen by `set_slots` / in one batch", None, False),
    ("alone_over_mixed_b4", "4 passes of one subject, nothing chosen between / 4 in one batch", None, False),
    ("lora_alone_over_mixed_b4", "4 passes of a LoRA r=1 / 4 subjects in one batch", None, False),
    ("fused_lora_alone_over_mixed_b4", "4 passes of LoRAs fused already / 4 subjects in one batch", None, False),
    ("load_1000th_over_first", "loading the 1000th subject as an adapter / the first", 1.1, False),
    ("recompilations", "recompilations while subjects change", 0.0, False),
    ("merged_over_base", "forward with a merged subject / base", 1.0, False),
    ("merge_ms", "time to merge another subject in, ms", None, False),
)
SERVICE: tuple[Goal, ...] = (
    ("people", "people", None, False),
    ("requests", "requests at twice the capacity", None, False),
    ("compared", "pictures that were drawn again, alone", None, False),
    ("wrong_person", "of them, another person's", 0.0, False),
    ("lost", "requests that were neither answered nor refused as they should be", 0.0, False),
    ("refused", "requests that were refused (429)", None, False),
    ("refused_with_retry_after", "of them, told when to come again", None, False),
    ("replicas_killed", "copies killed", None, False),
    ("repeated", "requests that died with a copy and were drawn by another one", None, False),
    ("deleted", "people deleted under way", None, False),
    ("asked_for_after_deletion", "requests for them afterwards", None, False),
    ("deleted_still_served", "of them, answered with a picture", 0.0, False),
    ("enrolled", "people brought in under way", None, False),
    ("capacity_images_per_s", "capacity, images a second", None, False),
    ("capacity_images_per_s_afterwards", "the same after all else", None, False),
    ("goodput_at_twice_over_capacity", "images a second at twice the capacity / capacity", 0.9, True),
    ("p50_s_at_0_8", "a request at 0.8 of the capacity, median, s", None, False),
    ("p95_s_at_0_8", "95 of 100, s", None, False),
    ("p99_s_at_0_8", "99 of 100, s", None, False),
    ("p50_s_at_twice", "a request at twice the capacity, median, s", None, False),
    ("p95_s_at_twice", "95 of 100, s", None, False),
    ("p99_s_at_twice", "99 of 100, s", None, False),
    ("mean_batch", "images in a batch, mean", None, False),
)
SERVICE_FLUX: tuple[Goal, ...] = (
    ("people", "people, each in one image", None, False),
    ("images_per_s_b1", "one by one, images a second", None, False),
    ("images_per_s_b2", "batches of 2", None, False),
    ("images_per_s_b4", "batches of 4", None, False),
    ("images_per_s_b8", "batches of 8", None, False),
    ("mixed_b2_over_one_by_one", "batches of 2 / one by one", None, True),
    ("mixed_b4_over_one_by_one", "batches of 4 / one by one", None, True),
    ("mixed_b8_over_one_by_one", "batches of 8 / one by one", None, True),
)
TRAINING: tuple[Goal, ...] = (
    ("step_over_diffusers_lora_r1", "step of stage 2 / diffusers' loop with LoRA r=1, as its script is", 0.87, False),
    ("mem_over_diffusers_lora_r1", "its peak memory / diffusers' loop with LoRA r=1, as its script is", 0.84, False),
    ("step_over_best_lora_r1", "step of stage 2 / that loop in its fastest way, not compiled, batch 4", 0.945, False),
    ("mem_over_best_lora_r1", "its peak memory / that way", 0.95, False),
    ("step_over_eager_lora_r1_b1", "step of stage 2 / that loop in its fastest eager way, batch 1", 0.6, False),
    ("step_over_best_lora_r1_b1", "step of stage 2 / that loop in its fastest way, batch 1", 0.95, False),
    ("people_per_gpu_hour_serial", "375 steps at batch 1: so many an hour and GPU, steps alone", None, True),
    ("people_per_gpu_hour_slots", "the same, eight people in slots", None, True),
    ("people_per_gpu_hour_whole", "people an hour and GPU, from photo to saved subject, default settings", None, True),
    ("stage1_speedup_embedded", "samples a second of stage 1 on the embedded base / before recorded steps", 3.0, True),
    *(
        (f"{job}_{way}_scaling_{count}gpu", f"{what}, {count} GPUs, share of ideal, {said}", goal, True)
        for job, what in (("stage1", "samples a second of stage 1"), ("encoder", "people a second of an encoder"))
        for way, said, two, eight in (("weak", "batch grows", 0.95, 0.93), ("strong", "batch fixed", 0.85, 0.75))
        for count, goal in ((2, two if job == "stage1" else None), (4, None), (8, eight))
    ),
    ("encoder_train_people_per_second_flux", "people a second of an encoder's training, one GPU", None, True),
    ("encoder_train_peak_gib_flux", "its peak memory, GiB", None, False),
    ("flux_24gb_peak_gib", "peak memory of stage 2 on an int8 base, text cached, batch 1, GiB", 24.0, False),
    ("compiled_over_eager_b4", "step of stage 2, compiled / eager, batch 4", None, False),
    ("compiled_over_eager_b1", "step of stage 2, compiled / eager, batch 1", None, False),
    ("whole_peak_gib_2gpu", "peak memory of stage 1 on each of two GPUs, base whole, GiB", None, False),
    ("divided_peak_gib_2gpu", "the same, base divided by FSDP 2, GiB", None, False),
    ("divided_step_over_whole_2gpu", "step of stage 1 on two GPUs, base divided / whole", None, False),
)


def load() -> dict[str, Data]:
    """Every file of results, by name."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("*.json"))}


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def source(data: Data, command: str = "", note: str = "") -> str:
    """Machine, date and command of a run, the line under each table."""
    command = data.get("command", command)
    # Where an output went says nothing of how it was made.
    command = re.sub(r" --out(put)? \S+", "", command)
    versions = data.get("versions", {"torch": data.get("torch", "")})
    shown = ", ".join(f"{name} {value}" for name, value in versions.items())
    # Groups of figures, such as divided_*, would be emphasis.
    notes = re.sub(r"\w+_\*", r"`\g<0>`", "".join(f" {text}" for text in data.get("notes", ())))
    return (
        f"\n{data['machine']}, {shown}, {data['date']}; `{command}`{note}{'.' if notes and not note else ''}{notes}\n"
    )


def goals(data: Data, rows: Sequence[Goal]) -> str:
    """Figures beside their goals; what misses its goal says so."""
    lines = []
    for key, text, goal, larger in rows:
        value = data["figures"].get(key)
        shown = "not measured" if value is None else f"{value:.0f}" if value == int(value) else f"{value:.3g}"
        if value is not None and 0.5 <= value < 2:
            shown = f"{value:.3f}"
        wanted = "" if goal is None else f"{'at least' if larger else 'at most'} {goal:g}"
        # Two digits, as the goals are given.
        met = value is not None and goal is not None and (value >= goal if larger else round(value, 2) <= goal)
        reached = "" if goal is None else "open" if value is None else "yes" if met else "**no**"
        lines.append([text, shown, wanted, reached])
    return table(["", "measured", "goal", "reached"], lines) + source(data)


def spread(found: Data, digits: int = 3) -> str:
    """`value [low, high]`; a target that is never reached is a dash."""
    if found["value"] is None:
        return "-"
    low, high = (f"{found[end]:.{digits}f}" if found[end] is not None else "-" for end in ("low", "high"))
    return f"{found['value']:.{digits}f} [{low}, {high}]"


def beside_photos(rows: Sequence[Sequence[str]], ceiling: Data | None, *columns: int) -> list[Sequence[str]]:
    """Rows with a last one: what real photos reach, in the columns of R-FaceSim; without it where it was not measured.

    Args:
        columns: numbers of those columns; the second one if none is given.
    """
    if ceiling is None:
        return list(rows)
    shown = columns or (1,)
    last = [spread(ceiling) if number in shown else "" for number in range(len(rows[0]))]
    return [*rows, [f"*{REAL}*", *last[1:]]]


def photos_of(data: Data, people: int | None = None) -> Data | None:
    """The ceiling of a file of `evaluation.py`, of all or of the first people."""
    found = data.get("real_photos")
    return interval(found[:people]) if found else None


COPIED = "copy_paste"


def with_copies(scores: Sequence[Data]) -> list[str]:
    """The further column of a table where some row has a copy-paste score: its heading is "copy-paste"."""
    return ["copy-paste"] if any(COPIED in one for one in scores) else []


def copied(one: Data, head: Sequence[str]) -> list[str]:
    """Its cell."""
    return [spread(one[COPIED]) if COPIED in one else "" for _ in head]


EVALUATION_COMMAND = "python benchmarks/evaluation.py --output benchmarks/results"


def ranked(data: Data) -> list[tuple[str, Data]]:
    """Methods with their figures, the best R-FaceSim first."""
    found = {name: {**one, **data["figures"][name]} for name, one in data["methods"].items()}
    return sorted(found.items(), key=lambda pair: -pair[1]["r_facesim"]["value"])


def drawn(data: Data) -> str:
    people = f"{data['subjects']} held-out people, {data['seeds']} seeds, {data['prompts']} prompts"
    return f". {people}; mean [95 % interval over people]."


def rivals(results: dict[str, Data]) -> str:
    data = results["evaluation"]
    rows = [
        [
            one["label"],
            f"{one['parameters']['value']:,}",
            *(spread(one[metric]) for metric in ("r_facesim", "face_sim", "prompt_adherence", "copied_background")),
            f"{1000 * one['seconds']['value']:.0f}",
            f"{one['learning_rate']:g}",
        ]
        for _, one in ranked(data)
    ]
    base = {metric: interval(values, data["seeds"]) for metric, values in data["base"].items()}
    metrics = ("r_facesim", "face_sim", "prompt_adherence", "copied_background")
    rows.append(["base model", "0", *(spread(base[metric]) for metric in metrics), "", ""])
    heads = ["method", "numbers trained", "R-FaceSim", "FaceSim", "adherence", "copied wall", "ms a person", "rate"]
    return table(heads, beside_photos(rows, photos_of(data), 2)) + source(data, EVALUATION_COMMAND, drawn(data))


def at_adherence(one: Data, wanted: float) -> str:
    """R-FaceSim where the curve of means passes this adherence, on a straight line between two scored steps."""
    points = [(mean(score["prompt_adherence"]), mean(score["r_facesim"])) for score in one["curve"].values()]
    for (high, before), (low, after) in pairwise(points):
        if high >= wanted >= low and high > low:
            return f"{before + (high - wanted) / (high - low) * (after - before):.3f}"
    return "-"


def steps(results: dict[str, Data]) -> str:
    data = results["evaluation"]
    counts = sorted({int(step) for _, one in ranked(data) for step in one["curve"]} - {0})
    rows = []
    for _, one in ranked(data):
        curve = [one["curve"][str(step)] for step in counts]
        cells = [f"{mean(score['r_facesim']):.3f} / {mean(score['prompt_adherence']):.3f}" for score in curve]
        rows.append([one["label"], *cells, spread(one["speed_up"], 2), at_adherence(one, EQUAL_ADHERENCE)])
    heads = ["method", *(f"{step} steps" for step in counts)]
    heads += ["fewer steps than LoRA r=1, times", f"R-FaceSim at adherence {EQUAL_ADHERENCE}"]
    rows = beside_photos(rows, photos_of(data), *range(1, len(counts) + 1))
    return table(heads, rows) + source(data, EVALUATION_COMMAND, drawn(data))


def robustness(results: dict[str, Data]) -> str:
    data = results["evaluation"]
    found = data["robustness"]
    rows = [
        [condition.replace("_", " "), *(spread(interval(own[condition]["r_facesim"])) for own in found.values())]
        for condition in next(iter(found.values()))
    ]
    people = len(next(iter(found.values()))["clean"]["r_facesim"])
    note = f". R-FaceSim after {data['headline_steps']} steps; {people} people, one seed; mean [95 % interval]."
    heads = ["reference", *(data["methods"][name]["label"] for name in found)]
    rows = beside_photos(rows, photos_of(data, people), *range(1, len(heads)))
    return table(heads, rows) + source(data, EVALUATION_COMMAND, note)


def variants(results: dict[str, Data]) -> str:
    data = results["variants"]
    rows = [
        [
            one["label"],
            f"{one['parameters']:,}",
            f"{one['learning_rate']:g}",
            *(spread(data["figures"][name][metric]) for metric in ("r_facesim", "prompt_adherence")),
            f"{1000 * data['figures'][name]['seconds']['value']:.0f}",
        ]
        for name, one in data["variants"].items()
    ]
    heads = ["variant", "numbers trained", "rate", "R-FaceSim", "adherence", "ms a person"]
    rows = beside_photos(rows, photos_of(results["evaluation"]), 3)
    return table(heads, rows) + source(data, EVALUATION_COMMAND, drawn(data))


def down_starts(results: dict[str, Data]) -> str:
    data = results["variants"]
    last = str(data["headline_steps"])
    rows = []
    for how, one in data["down_starts"].items():
        scores = [one[start]["curve"][last] for start in ("stored", "mean")]
        cells = [spread(interval(score[name])) for score in scores for name in ("r_facesim", "prompt_adherence")]
        rows.append([how, *cells])
    stage_1 = next(iter(data["down_starts"].values()))["stage_1_steps"]
    note = f". A stage 1 of {stage_1} steps; {data['subjects']} held-out people, one seed; mean [95 % interval]."
    heads = ["Down starts as", "stored Mid: R-FaceSim", "adherence", "mean: R-FaceSim", "adherence"]
    rows = beside_photos(rows, photos_of(results["evaluation"]), 1, 3)
    return table(heads, rows) + source(data, EVALUATION_COMMAND, note)


def regions(results: dict[str, Data]) -> str:
    data = results["regions"]
    labels = {
        "alone": "each alone, in a picture of 64 x 64 px",
        "regions": "**a region each**",
        "sum_half": "sum of both adapters, weight 0.5 each",
        "sum": "sum of both adapters, weight 1 each",
        "nobody": "no subject",
    }
    metrics = ("right", "wrong", "swapped", "better")
    rows = [[label, *(spread(data["figures"][way][metric]) for metric in metrics)] for way, label in labels.items()]
    people = (
        f"{data['pairs']} pairs of held-out people, {data['prompts']} prompts, {data['steps']} steps on one image each"
    )
    note = f". {people}; mean [95 % interval over pairs]."
    heads = ["", "to the right person", "to the other one", "halves nearer to the other one", "better way round"]
    return table(heads, rows) + source(data, note=note)


def readme(results: dict[str, Data]) -> str:
    """People who are read beside each fine-tuned method at the number of steps at which it is nearest to them."""
    data, rows = results["convergence"], []
    for family in ("main", "small", "lora", "random", "image_prompt"):
        if f"{family}-0" not in data["recipes"]:
            continue
        clean = data["recipes"][f"{family}-0"]["clean"]
        scores = clean["r_facesim"], clean["prompt_adherence"]
        if family == "main":
            scores = data["figures"]["zero_step_r_facesim"], data["figures"]["zero_step_adherence"]
        rows.append([ZERO_STEPS[family], "0", *map(spread, scores)])
    for kind in ("lora_r1", "lora_r16", "t_lora", "mean_lora", "full", "meta_lora_mean"):
        curves = [one["curve"] for name, one in data["rivals"].items() if name.partition(", ")[0] == kind]
        if not curves:
            continue
        step, best = max(
            (point for curve in curves for point in curve.items()), key=lambda point: point[1]["r_facesim"]["value"]
        )
        rows.append([FINE_TUNED[kind], step, spread(best["r_facesim"]), spread(best["prompt_adherence"])])
    rows = beside_photos(rows, data["figures"]["real_ceiling"], 2)
    note = ZERO_STEPS_NOTE.removesuffix(".") + "; the first row of three trainings, the others of one."
    return table(["method", "steps", "R-FaceSim", "adherence"], rows) + zero_source(results, note=note)


def image_gen(results: dict[str, Data]) -> str:
    """A row a method of what needs no weights; the columns that do are open."""
    data = results["image_gen"]
    figures = data["figures"]
    quantities = {"step_ms": "{:.0f}", "peak_gib": "{:.2f}", "parameters": "{:,}", "file_mb": "{:.2f}"}
    rows = []
    for name, label in IMAGE_GEN.items():
        if f"{name}_step_ms" not in figures:
            continue
        cells = [
            shown.format(figures[f"{name}_{quantity}"]) if f"{name}_{quantity}" in figures else "not measured"
            for quantity, shown in quantities.items()
        ]
        rows.append([label, *cells, *("open" if value is None else f"{value:g}" for value in data["open"].values())])
    heads = ["method", "ms a step", "peak memory, GiB", "numbers trained", "file, MB", *data["open"]]
    return table(heads, rows) + source(data)


STOPS = {
    "moved 0.01": "moved by 1 %",
    "moved 0.03": "moved by 3 %, the default",
    "moved 0.05": "moved by 5 %",
    "moved 0.1": "moved by 10 %",
    "25 steps": "25 steps",
    "100 steps": "100 steps",
    "lowest held loss": "the loss on held-out crops is lowest",
}
PHOTOS = {"clean": "good photo", "sunglasses:0.5": "sunglasses", "blur:1.0": "blurred"}
RATE_OF_READ = "0.0003"


def stopping(results: dict[str, Data]) -> str:
    """What is gained in R-FaceSim from a read start where each rule stops, by the photo that is read and tuned on."""
    figures = results["stopping"]["figures"]
    rows = []
    for rule, label in STOPS.items():
        found = [figures[f"{photo}, rate {RATE_OF_READ}"][rule] for photo in PHOTOS]
        gains = [
            f"{one['gain']['value']:+.3f} [{one['gain']['low']:+.3f}, {one['gain']['high']:+.3f}]" for one in found
        ]
        rows.append([label, *gains, f"{found[0]['steps']:.0f}", f"{found[-1]['adherence']:+.2f}"])
    heads = ["stop when", *PHOTOS.values(), "steps, good", "adherence, blurred"]
    note = (
        f". 32 people of `tune`, one reference, one training of the encoder; rate {RATE_OF_READ}, 10 steps of warm-up."
    )
    return table(heads, rows) + source(results["stopping"], note=note)


# Figure of convergence.json, what it is, its goal, and whether a larger one is better.
ZERO_GOALS: tuple[Goal, ...] = (
    ("zero_step_r_facesim", "R-FaceSim after 0 steps", 0.70, True),
    ("zero_step_over_real_ceiling", "the same over what real photos reach among themselves", 0.85, True),
    ("encoder_minus_best_rival", "minus the best fine-tuned method, at any number of steps", 0.0, True),
    (
        "encoder_minus_best_rival_at_adherence_0_97",
        "minus the best of those whose adherence is 0.97",
        None,
        True,
    ),
    ("zero_step_adherence", "adherence", 0.97, True),
    ("copied_background_over_chance", "copied wall, minus chance", 0.02, False),
    ("gain_25_steps", "gain of 25 steps of tuning", 0.0, True),
    ("lowest_before_stop", "lowest gain before the automatic stop", -0.005, True),
    ("small_zero_step_r_facesim", "rank 1, 0.59 x the numbers of LoRA of rank 1", 0.67, True),
    ("main_minus_image_prompt_adapter", "minus the image-prompt adapter", 0.0, True),
    ("encoder_meta_minus_encoder_lora", "rank 1: minus the encoder with LoRA of rank 1", None, True),
    ("main_minus_encoder_lora", "rank 4: minus the encoder with LoRA of rank 1", None, True),
    ("main_minus_random_down", "rank 4: minus the encoder on a Down that was never trained", None, True),
    ("low_light_unseen", "low light 0.5, left out of training", 0.30, True),
    ("sunglasses_unseen", "sunglasses 0.5, left out of training", 0.45, True),
    ("blur_unseen", "blur 1.0, left out of training", 0.50, True),
    ("low_light_seen", "low light 0.5, seen in training", 0.40, True),
    ("sunglasses_seen", "sunglasses 0.5, seen in training", 0.55, True),
    ("blur_seen", "blur 1.0, seen in training", 0.60, True),
    ("zero_step_second_judge", "R-FaceSim by the second judge", None, True),
    ("second_judge_ceiling", "what real photos reach by it", None, True),
    ("outside_over_real_ceiling", "people outside the range of training, over their ceiling", None, True),
    ("distance_to_render", "distance of the face to the true render", None, False),
    ("distance_to_render_of_another", "to the render of another person", None, False),
    ("distance_to_render_of_real_photos", "of real photos through the autoencoder", None, False),
    ("mark_shown_0_steps", "how much of a mark is shown, 0 steps", None, True),
    ("mark_shown_unmarked", "of one that is not there", None, False),
    ("mark_shown_100_steps", "after 100 steps on the marked photo", None, True),
    ("images_to_0_65", "target images until 0.65, at most", None, False),
    ("code_bytes", "bytes of a code", 1000, False),
    ("read_ms_flux", "FLUX.1-dev's shapes: a photo of 1024 px to an installed subject, ms", 200, False),
    ("expand_ms_flux", "expansion into the slot, ms", 0.3, False),
)
TYPEFACE_GOALS: tuple[Goal, ...] = (
    ("zero_step_r_facesim", "R-FaceSim after 0 steps", None, True),
    ("zero_step_over_real_ceiling", "the same over what photos of a font reach among themselves", 0.85, True),
    ("encoder_minus_best_rival", "minus the best fine-tuned method, at any number of steps", 0.0, True),
    ("best_rival_adherence", "adherence of that method", None, True),
    ("zero_step_adherence", "adherence", 0.95, True),
    ("zero_step_content_right", "letters right", None, True),
    ("copied_background_over_chance", "copied paper, minus chance", 0.02, False),
    ("zero_step_copied_content", "the glyph that was read, where another is asked for", None, False),
    ("gain_25_steps", "gain of 25 steps of tuning", 0.0, True),
    ("lowest_before_stop", "lowest gain before the automatic stop", -0.005, True),
    ("main_minus_image_prompt_adapter", "minus the image-prompt adapter", 0.0, True),
    ("main_minus_encoder_lora", "rank 4: minus the encoder with LoRA of rank 1", None, True),
    ("main_minus_random_down", "rank 4: minus the encoder on a Down that was never trained", None, True),
    ("small_zero_step_r_facesim", "rank 1", None, True),
    ("low_light_seen", "low light 0.5, seen in training", None, True),
    ("blur_seen", "blur 1.0, seen in training", None, True),
)
ZERO_STEPS = {
    "main": "encoder + Meta-LoRA, rank 4",
    "small": "encoder + Meta-LoRA, rank 1",
    "demo": "the same, half the channels in the encoder",
    "lora": "encoder + LoRA, rank 1",
    "image_prompt": "encoder + image-prompt adapter",
    "random": "encoder + Meta-LoRA, rank 4, random Down",
    "small_random": "encoder + Meta-LoRA, rank 1, random Down",
}
FINE_TUNED = {
    "lora_r1": "LoRA, rank 1",
    "lora_r16": "LoRA, rank 16",
    "full": "full fine-tuning",
    "meta_lora_mean": "Meta-LoRA, mean",
    "mean_lora": "LoRA, rank 4, from a mean LoRA",
    "t_lora": "T-LoRA, rank 1 to 16 by time",
    "meta_lora_time": "Meta-LoRA, mean, rank 1 to 4 by time",
    "dora": "DoRA, rank 4",
    "oft": "OFT, blocks of 32",
    "textual_inversion": "textual inversion",
}
ZERO_STEPS_NOTE = ". 32 held-out people, one reference, 3 noises, 8 prompts; mean [95 % interval over people]."
FONTS_NOTE = ZERO_STEPS_NOTE.replace("people", "fonts")


HERE = f"\n[Machines and command](#results){ZERO_STEPS_NOTE}\n"
"""The line under further tables of the page that has both at its top."""


def zero_source(results: dict[str, Data], file: str = "convergence", note: str = ZERO_STEPS_NOTE) -> str:
    """Where the runs were made: the first one, and which ones elsewhere."""
    first, *others = results[file]["origins"].items()
    elsewhere: dict[str, dict[str, None]] = {}
    for name, origin in others:
        if origin["machine"] != first[1]["machine"]:
            family, _, number = name.removeprefix("rivals-").rpartition("-")
            elsewhere.setdefault(origin["machine"], {})[family or number] = None
    machines = "".join(f" On {machine}: {', '.join(names)}." for machine, names in elsewhere.items())
    return source(first[1], note=note + machines)


def zero_curves(results: dict[str, Data]) -> str:
    """Zero steps by people in training, and by target images seen; each a training of its own that ended."""
    figures = results["convergence"]["figures"]
    people, images = (figures.get(key, {}) for key in ("by_people", "by_images"))
    plots = [
        f"![R-FaceSim in zero steps against {what}](results/zero_{name}.svg)"
        for name, what, found in (("people", "people in training", people), ("images", "target images seen", images))
        if len(found) > 1
    ]
    rows = [[f"{int(count):,} people, 3,000 steps", spread(score)] for count, score in people.items()]
    rows += [[f"4,096 people, {int(count):,} target images", spread(score)] for count, score in images.items()]
    rows = beside_photos(rows, figures["real_ceiling"])
    return "\n".join(plots) + "\n\n" + table(["training", "R-FaceSim, 0 steps"], rows) + HERE


def zero_goals(results: dict[str, Data]) -> str:
    return beside_goals(results["convergence"]["figures"], ZERO_GOALS) + HERE


def beside_goals(figures: Data, rows: Sequence[Goal]) -> str:
    """Figures of `convergence.py`, most of them with an interval, beside their goals."""
    lines = []
    for key, text, goal, larger in rows:
        found = figures.get(key)
        exact = not isinstance(found, dict)
        shown = "not measured" if found is None else f"{found:.3g}" if exact else spread(found)
        if isinstance(found, int):
            shown = f"{found:,}"
        wanted = "" if goal is None else f"{'at least' if larger else 'at most'} {goal:g}"
        reached = ""
        if goal is not None:
            # A difference has to be above 0 with all of its interval.
            value = None if found is None else found if exact else found["low" if goal == 0 else "value"]
            met = value is not None and (value >= goal if larger else value <= goal)
            reached = "open" if value is None else "yes" if met else "**no**"
        lines.append([text, shown, wanted, reached])
    return table(["", "measured", "goal", "reached"], lines)


def zero_steps(results: dict[str, Data]) -> str:
    recipes, rows = results["convergence"]["recipes"], []
    more = with_copies([one["clean"] for one in recipes.values()])
    for family, label in ZERO_STEPS.items():
        for name, one in recipes.items():
            if name.rpartition("-")[0] == family:
                scores = [one["clean"][key] for key in ("r_facesim", "prompt_adherence", "copied_background")]
                cells = [*map(spread, scores), spread(one["clean"]["factor_distance"]), *copied(one["clean"], more)]
                rows.append([f"{label}, training {name[-1]}", f"{one['numbers']:,}", f"{one['seconds']:.0f}", *cells])
    first = recipes["main-0"]["zero_steps"]
    for variant in ("code fitted to other photos", "nearest training person", "another person's photo", "mean subject"):
        keys = ("r_facesim", "prompt_adherence", "copied_background", "factor_distance")
        scores = [spread(first[variant][key]) for key in keys]
        rows.append([f"*{variant}*", "", "", *scores, *copied(first[variant], more)])
    heads = ["0 steps", "numbers", "s of training", "R-FaceSim", "adherence", "copied wall", "distance of factors"]
    rows = beside_photos(rows, results["convergence"]["figures"]["real_ceiling"], 3)
    return table([*heads, *more], rows) + HERE


SHOWN_STEPS = ("100", "300", "700")


def zero_rivals(results: dict[str, Data]) -> str:
    """Of each method, after some numbers of steps, the schedule of rates that came nearer to the person by then."""
    data, rows = results["convergence"], []
    kinds: dict[str, list[tuple[str, Data]]] = {}
    for name, one in data["rivals"].items():
        kind, _, how = name.partition(", ")
        kinds.setdefault(kind, []).append((how or "constant", one))
    tuned = data["recipes"]["main-0"]["tuning"][RATE_OF_READ]
    points = [(label, kinds[kind], step) for kind, label in FINE_TUNED.items() if kind in kinds for step in SHOWN_STEPS]
    more = with_copies(
        [*tuned.values(), *(scores for one in data["rivals"].values() for scores in one["curve"].values())]
    )

    def cells(scores: Data) -> list[str]:
        keys = ("r_facesim", "prompt_adherence", "copied_background", "factor_distance")
        return [*(spread(scores[key]) if key in scores else "" for key in keys), *copied(scores, more)]

    for label, ways, step in points:
        there = [(how, one["learning_rate"], one["curve"][step]) for how, one in ways if step in one["curve"]]
        if there:
            how, rate, scores = max(there, key=lambda way: way[2]["r_facesim"]["value"])
            rows.append([label, step, *cells(scores), f"{rate:g}, {how.partition(' over')[0]}"])
    rows += [
        ["**read, then tuned**", step, *cells(tuned[step]), f"{RATE_OF_READ}, constant"] for step in ("0", "25", "100")
    ]
    heads = ["method", "steps", "R-FaceSim", "adherence", "copied wall", "distance of factors", *more, "rate"]
    return table(heads, beside_photos(rows, data["figures"]["real_ceiling"], 2)) + HERE


def typefaces(results: dict[str, Data]) -> str:
    """The second domain: goals; then read fonts, each fine-tuned method where it is best, floors and ceilings."""
    data = results["typefaces"]
    figures, recipes = data["figures"], data["recipes"]
    keys = "r_facesim", "second_r_facesim", "prompt_adherence", "content_right"

    def row(label: str, steps: str, scores: Data) -> list[str]:
        return [label, steps, *(spread(scores[key]) for key in keys)]

    ceilings = spread(figures["real_ceiling"]), spread(figures["second_judge_ceiling"])
    rows = [["photos of a font among themselves", "", *ceilings, "", ""]]
    for family, label in ZERO_STEPS.items():
        own = [name for name in recipes if name.rpartition("-")[0] == family]
        rows += [row(f"{label}, training {name[-1]}", "0", recipes[name]["clean"]) for name in own]
    best: dict[str, tuple[str, Data]] = {}
    for name, one in data["rivals"].items():
        for step, scores in one["curve"].items():
            kind = name.partition(", ")[0]
            if kind not in best or scores["r_facesim"]["value"] > best[kind][1]["r_facesim"]["value"]:
                best[kind] = step, scores
    rows += [row(FINE_TUNED[kind], *found) for kind, found in best.items()]
    variants = "code fitted to other photos", "nearest training person", "another person's photo", "mean subject"
    first = recipes["main-0"]["zero_steps"]
    rows += [row(f"*{name.replace('person', 'font')}*", "", first[name]) for name in variants]
    heads = ["", "steps", "R-FaceSim", "second judge", "adherence", "letters right"]
    methods = table(heads, rows) + zero_source(results, "typefaces", FONTS_NOTE)
    return f"{beside_goals(figures, TYPEFACE_GOALS)}\n{methods}"


def joint(results: dict[str, Data]) -> str:
    """Of each domain: encoders and tuned people on its own Down, on that of both, and on the others."""
    data = results["joint"]
    rows = []
    for half, arms in data["figures"].items():
        for name, scores in arms.items():
            people, _, down = name.removeprefix("tuned-").partition("-on-")
            how = f"none, {data['tuned_steps']} steps" if name.startswith("tuned-") else people
            apart = scores.get("r_facesim_minus_own"), scores.get("prompt_adherence_minus_own")
            cells = [spread(scores[metric]) for metric in ("r_facesim", "prompt_adherence")]
            rows.append([half, how, down, *cells, *(spread(one) if one else "" for one in apart)])
        rows.append([f"*{half}: {REAL}*", "", "", spread(data["real_ceiling"][half]), "", "", ""])
    heads = ["drawn", "encoder reads", "Down over", "R-FaceSim", "adherence", "minus own Down", "adherence minus own"]
    bases = [f"{name} {base['adherence']['all']:.3f}" for name, base in data["base"].items()]
    note = f". Adherence of the base without an adapter: {', '.join(bases)}." if bases else "."
    first = next(iter(data["origins"].values()))
    note += (
        f" {first['people']} held-out people, {first['noises']} noises, one training; mean [95 % interval over people]."
    )
    return table(heads, rows) + source({**first, "command": data["command"]}, note=note)


def noise_levels(results: dict[str, Data]) -> str:
    """What share of a gradient is a person's own, by noise level and domain."""
    data = results["noise_levels"]
    found: dict[str, list[Data]] = data["figures"]
    bands = [f"{row['from']:g} to {row['to']:g}" for row in next(iter(found.values()))]
    columns = [[f"{row['share']:.3f}" for row in rows] for rows in found.values()]
    rows = [list(cells) for cells in zip(bands, *columns, strict=True)]
    return table(["noise level", *found], rows) + "".join(source(one) for one in data["origins"].values())


def zero_bad(results: dict[str, Data]) -> str:
    recipes = results["convergence"]["recipes"]
    shown = {"main-0": "every corruption in training", "unseen-0": "without low light, sunglasses and blur"}
    first = recipes["main-0"]["zero_steps"]
    rows = [
        [variant.replace("_", " "), *(spread(recipes[name]["zero_steps"][variant]["r_facesim"]) for name in shown)]
        for variant in first
        if variant == "clean" or variant.endswith((" 0.5", " 1.0"))
    ]
    rows = beside_photos(rows, results["convergence"]["figures"]["real_ceiling"], 1, 2)
    return table(["photo that is read", *shown.values()], rows) + HERE


def story(results: dict[str, Data]) -> str:
    """The plots of identity against steps and seconds, of each domain that was measured."""
    lines = []
    for domain, (_, seconds) in domains(results).items():
        shown = ("steps", "seconds") if seconds else ("steps",)
        lines += [f"![{domain}: identity against {axis}](results/story_{axis}_{domain}.svg)" for axis in shown]
    key = "![The methods by colour](results/story_key.svg)"
    clock = source(results["seconds"], note=", one person alone, batch 4.") if "seconds" in results else ""
    return "\n".join([*lines, key]) + "\n" + zero_source(results) + clock


# Figure of memory.json -> base and side of its recipe, and how the base is held there.
SMALL_CARDS = {
    "klein_personalize_gib": "FLUX.2 klein 4B, 1024 px, int8",
    "sdxl_personalize_gib": "SDXL, 1024 px, int8",
    "flux_personalize_1024_gib": "FLUX.1-dev, 1024 px, int8 in host memory",
    "flux_personalize_512_gib": "FLUX.1-dev, 512 px, nf4 in host memory",
}
CELL = re.compile(
    r"(?P<base>\w+) (?P<job>personalize|generate) (?P<pixels>\d+) (?P<bits>\w+) (?P<away>\w+)(?: batch (?P<batch>\d+))?"
)
CELL_BASES = {
    "flux": "FLUX.1-dev",
    "flux3": "FLUX.3",
    "krea2": "Krea 2",
    "qwen_image": "Qwen-Image",
    "wan": "Wan 2.2 5B",
    "z_image": "Z-Image",
}


def memory_cells(results: dict[str, Data]) -> str:
    """What other bases and other ways to hold them took, without a cap."""
    data, rows = results["memory"], []
    for name, found in sorted(data["cells"].items()):
        cell = CELL.fullmatch(name)
        if cell is None:
            raise SystemExit(
                f"memory.json: expected cells such as 'flux personalize 512 nf4 group batch 4', got {name!r}"
            )
        held = f"`{cell['bits']}`, `{cell['away']}`" + (f", batch {cell['batch']}" if cell["batch"] else "")
        took = found["seconds_a_step"]
        each = [f"{found['gib']:.2f}", "" if took is None else f"{took:.2f}", f"{found['host_gib']:.1f}"]
        rows.append([CELL_BASES[cell["base"]], f"`{cell['job']}`", f"{cell['pixels']} px", held, *each])
    heads = ["base", "command", "size", "quantize, offload", "peak, GiB", "seconds a step", "host memory, GiB"]
    return table(heads, rows) + source(data)


QUANTIZED_WAYS = {"lora_r1": "LoRA r=1", "unfolded": "ours", "folded": "ours, folded", "merged": "ours, merged"}


def quantized(results: dict[str, Data]) -> str:
    """What an adapter costs on weights of fewer bits."""
    figures = results["layer"]["figures"]
    rows = [
        [f"`{bits}`, batch {batch}", *(f"{figures[f'{way}_over_base_{bits}_b{batch}']:.3f}" for way in QUANTIZED_WAYS)]
        for bits in ("int8", "fp8", "nf4")
        for batch in (1, 4)
    ]
    return table(["forward pass / base", *QUANTIZED_WAYS.values()], rows) + source(
        {**results["layer"], "notes": [], "command": "python benchmarks/layer.py --part quantized"}
    )


RECIPES = {
    "flux_read_gib": "FLUX.1-dev, a person read off a photo",
    "sdxl_personalize_gib": "SDXL, a person at 1024 px",
    "klein_personalize_gib": "FLUX.2 klein 4B, a person at 1024 px",
    "flux_personalize_512_gib": "FLUX.1-dev, a person at 512 px",
    "flux_personalize_1024_gib": "FLUX.1-dev, a person at 1024 px",
    "flux_generate_1024_gib": "FLUX.1-dev, pictures at 1024 px",
}


def recipes(results: dict[str, Data]) -> str:
    """What each recipe took under a cap of its card's size."""
    data, rows = results["memory"], []
    for figure, what in RECIPES.items():
        found = data["details"][figure]
        file = re.search(r"examples/recipes/\S+", found["command"])
        if file is None or not found["fits"]:
            raise SystemExit(f"memory.json: expected a recipe that fits its card, found {figure}: {found['command']}")
        took = found["seconds_a_step"]
        seconds = f"{found['seconds']:.0f} in all" if took is None else f"{took:.2f}"
        peak, host = f"**{found['gib']:.2f}**", f"{found['host_gib']:.1f}"
        card = found["machine"].removeprefix("NVIDIA ").partition(" ")[0]
        rows.append([f"{what}: `{file[0]}`", f"{found['card']} GB", peak, seconds, host, card])
    heads = ["recipe", "made for", "peak, GiB", "seconds a step", "host memory, GiB", "run on"]
    return table(heads, rows)


DOWN_SAMPLES = 40_000
VIEWS_A_STEP = 4  # as the recipes gather them


def down_hours(results: dict[str, Data]) -> str:
    """Hours of a Down's training, by base and size of the card, from seconds a sample that were measured."""
    training, memory = results["training"], results.get("memory", {"details": {}})
    whole = training["details"]["scaling"]["whole"]["1"]["stage1_weak"]["per_second"]
    ways: list[tuple[str, str, float | None]] = [("FLUX.1-dev, 512 px, bf16", "80 GB", whole)]
    for figure, name in SMALL_CARDS.items():
        found = memory["details"].get(figure, {})
        seconds = found.get("seconds_a_step") if found.get("fits") else None
        card = f"{found['card']} GB" if "card" in found else ""
        ways.append((name, card, seconds and VIEWS_A_STEP / seconds))
    rows = [
        [name, card, "not measured", ""]
        if rate is None
        else [name, card, f"{rate:.2g}", f"{DOWN_SAMPLES / rate / 3600:.2g}"]
        for name, card, rate in ways
    ]
    return table(["base", "card", "samples a second", f"hours of {DOWN_SAMPLES:,} samples"], rows)


PEOPLE, TIMES = 10_000, 100  # of a large run, and how often each is seen in stage 1 and read by the encoder
NETWORK = 50.0  # GB a second of each GPU, between hosts
HOSTS = {1: "1", 4: "4, one host (measured speeds)", 8: "8, one host", 64: "64, eight hosts", 512: "512, 64 hosts"}


def many_people(results: dict[str, Data]) -> str:
    """Hours of a large run on more GPUs than were measured, with what four keep of the ideal speed."""
    training = results["training"]
    one, four = (training["details"]["scaling"]["whole"][count] for count in ("1", "4"))
    step, within = four["stage1_weak"]["step_ms"], four["stage1_weak"]["exchange_ms"]
    between = 2 * four["stage1_weak"]["exchanged_mb"] / NETWORK
    rows = []
    for count, label in HOSTS.items():
        waits = "" if count == 1 else f"{within:.1f} ms" if count <= 8 else f"{between:.0f} ms"
        cells = []
        for job in ("stage1_weak", "encoder_weak"):
            share = 1.0 if count == 1 else training["figures"][f"{job}_scaling_4gpu"]
            took = four[job]["step_ms"]
            further = 1.0 if count <= 8 else (took + between - within) / took
            hours = PEOPLE * TIMES / one[job]["per_second"] / 3600 / count / share * further
            cells += [f"{hours:.0f}" if hours >= 10 else f"{hours:.2g}", f"{hours * count:.0f}"]
        rows.append([label, *cells[:2], waits + (f" of {step:.0f}" if count == 4 else ""), *cells[2:]])
    heads = ["GPUs", "hours of stage 1", "GPU-hours", "a step waits for sums", "hours of the encoder", "GPU-hours"]
    return table(heads, rows)


JOBS = {
    "stage1_weak": "stage 1, batch grows",
    "stage1_strong": "stage 1, batch fixed",
    "encoder_weak": "encoder, batch grows",
    "encoder_strong": "encoder, batch fixed",
}
LAYOUTS = {"whole": "whole", "fsdp2": "divided"}


def training_profile(results: dict[str, Data]) -> str:
    """Where a step on several GPUs goes: what the first of them computes, and its transfers."""
    data, rows = results["training_profile"], []
    for job, label in JOBS.items():
        for layout, base in LAYOUTS.items():
            for count, found in data["details"]["scaling"].get(layout, {}).items():
                one = found[job]
                computed = one["kernel_ms"] - one["nccl_ms"]
                rows.append([label, count, base, *(f"{ms:,.0f}" for ms in (one["step_ms"], computed, one["nccl_ms"]))])
    heads = ["training", "GPUs", "base", "a step, ms", "computing, ms", "NCCL, waits included, ms"]
    return table(heads, rows) + source(data)


TARGETS = 4  # photos that judge each person in a step, in `training.py` and in `convergence.py`


def encoder_hours(results: dict[str, Data]) -> str:
    """What target images gave on the drawn domain, and the hours they take on FLUX.1-dev's shapes."""
    training = results["training"]
    rate = TARGETS * training["figures"]["encoder_train_people_per_second_flux"]
    rows = [
        [f"{int(count):,}", spread(score), f"{int(count) / rate / 3600:.0f}"]
        for count, score in results["convergence"]["figures"]["by_images"].items()
    ]
    note = next(note for note in training["notes"] if note.startswith("The training of an encoder: "))
    heads = ["target images", "R-FaceSim in zero steps, drawn faces", f"hours at {rate:.1f} a second"]
    rows = beside_photos(rows, results["convergence"]["figures"]["real_ceiling"])
    return table(heads, rows) + f"\n{note}\n"


COPYING = {
    "meta-lora:start=encoder": "**read, 0 steps**",
    "lora:r=1,lr=1e-2": "LoRA, rank 1, {steps} steps",
    "base": "base model",
    "reference": "the reference itself, for every prompt",
}


def copying(results: dict[str, Data]) -> str:
    """What is copied and what matches, and beside it who it still is after edits."""
    data, metrics = results["copying"], ("r_facesim", "match", "copy_paste", "face_sim", "adherence")
    most = max(map(len, data["edited"].values()))
    rows = []
    for name, label in COPYING.items():
        if name not in data["figures"]:
            continue
        edits = [f"{one['value']:.3f}" for one in data["edited"].get(name, [])[1:]]
        cells = [spread(data["figures"][name][metric], 2) for metric in metrics]
        rows.append([label.format(**data), *cells, *(edits or [""] * (most - 1))])
    for name in data["edited"].keys() - data["figures"].keys():
        edits = [f"{one['value']:.3f}" for one in data["edited"][name][1:]]
        rows.insert(1, [f"*{name}*", *[""] * len(metrics), *edits])
    rows.append([f"*{REAL}*", spread(data["real_photos"], 2), *[""] * (len(metrics) + most - 2)])
    heads = ["", "R-FaceSim", "match rate", "copy-paste", "FaceSim", "adherence"]
    heads += [f"R-FaceSim after {count} edit{'s' * (count > 1)}" for count in range(1, most)]
    note = f". {data['people']} held-out people, {data['prompts']} prompts; mean [95 % interval over people]."
    return table(heads, rows) + source(data, note=note)


FROM_LORAS = {
    "random": "random Down",
    "random, mean of LoRAs": "random Down, from the mean of the LoRAs",
    "activations": "Down from activations",
    "activations, mean of LoRAs": "Down from activations, from the mean of the LoRAs",
    "common": "**Down from LoRAs, one common start**",
    "many": "**Down from LoRAs, a start each**",
    "trained": "trained Down",
    "LoRA": "LoRA, rank 4",
    "LoRA, mean of LoRAs": "LoRA, rank 4, from the mean of the LoRAs",
    "space, common": "**codes, common start, on the Down from LoRAs**",
    "space, many": "**codes, a start each, on the Down from LoRAs**",
    "space, random": "codes, common start, on a random Down",
    "space, trained": "codes, common start, on the trained Down",
    "space, LoRA": "codes, common start, without a Down",
    "space, common, read": "codes, common start, read first",
}


FROM_LORAS_BESIDE = {
    "random, mean of LoRAs": "minus a random Down from the mean of the LoRAs",
    "trained": "minus the trained Down",
}


def from_loras(results: dict[str, Data]) -> str:
    """A Down and a space of ordinary LoRAs beside others, after equal steps, and person by person."""
    data = results["from_loras"]
    figures, found = data["figures"], data["families"]
    counts = list(next(iter(figures["scores"].values())))
    counts, last, rows = list(dict.fromkeys([*counts[:2], counts[-1]])), counts[-1], []
    for name, one in found.items():
        scores = figures["scores"][name]
        label, size = name, ""
        if name.endswith(" rows"):
            label, _, size = name.rpartition(", ")
        cells = [spread(scores[step]["r_facesim"]) for step in counts]
        less = [figures["differences"].get(f"{name} - {control}") for control in FROM_LORAS_BESIDE]
        paired = ["" if one is None else spread(one[last]) for one in less]
        label = FROM_LORAS[label].replace("Down", f"Down of {size}" if size else "Down", 1)
        rows.append(
            [label, *cells, spread(scores[last]["prompt_adherence"]), *paired, f"{one['arm']}, {one['rate']:g}"]
        )
    heads = ["", *(f"{step} steps" for step in counts), f"adherence, {last} steps"]
    heads += [*FROM_LORAS_BESIDE.values(), "chosen, rate"]
    note = (
        f". LoRAs of {data['meta_people']} people; {data['people']} people of `{data['split']}`, one reference, "
        f"{data['seeds']} noise{'s' * (data['seeds'] > 1)}, {data['prompts']} prompts; R-FaceSim, mean [95 % interval "
        "over people]."
    )
    ceiling = interval(data["real_photos"])
    return table(heads, beside_photos(rows, ceiling, *range(1, len(counts) + 1))) + source(data, note=note)


TABLES: dict[str, tuple[str, Callable[[dict[str, Data]], str]]] = {
    "story": ("convergence", story),
    "rivals": ("evaluation", rivals),
    "steps": ("evaluation", steps),
    "robustness": ("evaluation", robustness),
    "readme": ("convergence", readme),
    "variants": ("variants", variants),
    "down_starts": ("variants", down_starts),
    "regions": ("regions", regions),
    "layer": ("layer", lambda results: goals(results["layer"], LAYER)),
    "serving": ("serving", lambda results: goals(results["serving"], SERVING)),
    "image_gen": ("image_gen", image_gen),
    "service": ("service", lambda results: goals(results["service"], SERVICE)),
    "stopping": ("stopping", stopping),
    "copying": ("copying", copying),
    "encoder_hours": ("training", encoder_hours),
    "zero_goals": ("convergence", zero_goals),
    "zero_steps": ("convergence", zero_steps),
    "zero_rivals": ("convergence", zero_rivals),
    "zero_curves": ("convergence", zero_curves),
    "zero_bad": ("convergence", zero_bad),
    "typefaces": ("typefaces", typefaces),
    "joint": ("joint", joint),
    "noise_levels": ("noise_levels", noise_levels),
    "from_loras": ("from_loras", from_loras),
    "service_flux": ("service_flux", lambda results: goals(results["service_flux"], SERVICE_FLUX)),
    "down_hours": ("training", down_hours),
    "many_people": ("training", many_people),
    "memory_cells": ("memory", memory_cells),
    "recipes": ("memory", recipes),
    "quantized": ("layer", quantized),
    "training_profile": ("training_profile", training_profile),
    "training": ("training", lambda results: goals(results["training"], TRAINING)),
}
"""Name of a block -> the file it needs, and what writes it."""


def fill(text: str, results: dict[str, Data]) -> str:
    """A page with every block written anew; one whose results are not there says so.

    Raises:
        SystemExit: a block of an unknown name.
    """

    def write(found: re.Match[str]) -> str:
        name = found[1]
        if name not in TABLES:
            raise SystemExit(f"table {name!r}: expected one of {', '.join(TABLES)}")
        file, write_table = TABLES[name]
        text = (
            write_table(results) if file in results else f"\nOpen: there is no `benchmarks/results/{file}.json` yet.\n"
        )
        return f"<!-- table: {name} -->\n{text}<!-- end -->"

    return BLOCK.sub(write, text)


def pages() -> dict[Path, str]:
    """Every page with its blocks, and every plot, as they should be on disk."""
    results = load()
    texts = {path: path.read_text(encoding="utf-8") for path in [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]}
    wanted = {path: fill(text, results) for path, text in texts.items()}
    return wanted | {
        DOCS / "results" / name: drawing for name, drawing in plots(results, ZERO_STEPS, FINE_TUNED).items()
    }


def main() -> None:
    (DOCS / "results").mkdir(exist_ok=True)
    for path, text in pages().items():
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            write_bytes(path, text.encode())
            print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
