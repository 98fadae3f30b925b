# SPDX-License-Identifier: Apache-2.0
"""The plots of docs/results.md, which `tables.py` writes: first identity against steps and seconds, every method."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import mean
from typing import Any

from peft_metalora.evaluation.figures import REAL
from peft_metalora.evaluation.plots import legend, panels, plot

Data = dict[str, Any]
Labels = Mapping[str, str]
Point = tuple[float, float, float]  # steps, R-FaceSim, adherence

# Two plots of at most eight lines each; Meta-LoRA and the LoRA of rank 1 are in both.
GROUPS = {
    "controls": ("meta_lora_mean", "meta_lora_stored", "lora_r1", "random_down", "mean_lora", "lora_r4"),
    "others": ("meta_lora_mean", "full", "lora_r1", "lora_r16", "oft", "dora", "loha", "vera"),
}
READ = ("main", "small", "lora", "image_prompt", "random", "small_random")
RATE = "0.0003"  # of stage 2 from a read start
KEPT = 0.9  # adherence below which a method has lost much of the prompt
STYLE = (
    "<style>svg{color:#1f2328;background:#fff}"
    "@media (prefers-color-scheme:dark){svg{color:#f0f6fc;background:#0d1117}}</style>"
)


def plots(results: dict[str, Data], read: Labels, fine_tuned: Labels) -> dict[str, str]:
    """File name -> SVG of everything that docs/results.md shows.

    Args:
        read, fine_tuned: what encoders and rivals of `convergence.json` are called.
    """
    data, drawings = results["evaluation"], {}
    photos = data.get("real_photos")
    rules = {REAL: mean(photos)} if photos else {}
    for group, names in GROUPS.items():
        chosen = {data["methods"][name]["label"]: data["methods"][name]["curve"] for name in names}
        means = {
            label: [
                (float(step), mean(score["r_facesim"]), mean(score["prompt_adherence"]))
                for step, score in curve.items()
                if step != "0"
            ]
            for label, curve in chosen.items()
        }
        for metric, axis, y_label in (("r_facesim", 1, "R-FaceSim"), ("adherence", 2, "adherence")):
            lines = {label: [(point[0], point[axis]) for point in points] for label, points in means.items()}
            drawings[f"{metric}_{group}.svg"] = plot(lines, "steps", y_label, rules=rules if axis == 1 else {})
        lines = {label: [(point[2], point[1]) for point in points] for label, points in means.items()}
        drawings[f"tradeoff_{group}.svg"] = plot(lines, "adherence", "R-FaceSim", rules=rules)
    drawings["robustness.svg"] = _robustness_grid(data)
    drawings |= _story(results, read, fine_tuned)
    drawings |= _of_encoders(results["convergence"]["figures"])
    return {name: _standalone(drawing) for name, drawing in drawings.items()}


def domains(results: dict[str, Data]) -> dict[str, tuple[Data, Data | None]]:
    """The figures of `convergence.py` by domain, and what one person takes there, where that was measured."""
    found = {"faces": (results["convergence"], results.get("seconds"))}
    if "typefaces" in results:
        found["typefaces"] = results["typefaces"], results["typefaces"].get("seconds")
    return found


def _story(results: dict[str, Data], read: Labels, fine_tuned: Labels) -> dict[str, str]:
    """Identity against steps, seconds and adherence: people who were read, then tuned, beside fine-tuning."""
    curves = {domain: _curves(data) for domain, (data, _) in domains(results).items()}
    labels = {**read, **{name: label for name, label in fine_tuned.items() if name not in read}}
    names = {name: labels.get(name, name) for own in curves.values() for name in own}
    order, drawings = list(names.values()), {}
    for domain, (data, seconds) in domains(results).items():
        steps = {names[name]: points for name, points in curves[domain].items()}
        drawn = {"steps": steps}
        if seconds:
            drawn["seconds"] = {
                names[name]: [
                    (seconds["read"].get(name, 0.0) + step * seconds["step"][name], *rest) for step, *rest in points
                ]
                for name, points in curves[domain].items()
                if name in seconds["step"]
            }
        for axis, series in drawn.items():
            drawings[f"story_{axis}_{domain}.svg"] = plot(
                {label: [(x, y) for x, y, _ in points] for label, points in series.items()},
                f"{domain}: {axis}" + (" of training" if axis == "steps" else ", one person alone"),
                "R-FaceSim",
                with_legend=False,
                names=order,
                y_range=(0.0,),
                rules={REAL: data["figures"]["real_ceiling"]["value"]},
                hollow={(x, y) for points in series.values() for x, y, kept in points if kept < KEPT},
                log_x=axis == "seconds",
            )
        constant = {**curves[domain], **{n: _points(one["curve"]) for n, one in data["rivals"].items() if n in names}}
        trades = {names[name]: [(kept, score) for _, score, kept in points] for name, points in constant.items()}
        ceiling = {REAL: data["figures"]["real_ceiling"]["value"]}
        drawings[f"story_tradeoff_{domain}.svg"] = plot(trades, "adherence", "R-FaceSim", names=order, rules=ceiling)
    box = f'viewBox="0 0 340 {18 * len(order) + 30}" width="340" height="{18 * len(order) + 30}"'
    ring = f"Rings: an adherence below {KEPT}"
    drawings["story_key.svg"] = (
        f'<svg {box} font-family="sans-serif" font-size="12" fill="currentColor"><g transform="translate(52 8)">'
        f'{legend(order, 4)}<circle cx="4" cy="{18 * len(order) + 6}" r="4" fill="none" stroke="currentColor" '
        f'stroke-width="2"/><text x="14" y="{18 * len(order) + 10}">{ring}</text></g></svg>'
    )
    return drawings


def _of_encoders(figures: Data) -> dict[str, str]:
    """Zero steps against what training had, beside what fine-tuning reaches."""
    drawings = {}
    lines = {REAL: "real_ceiling", "the best fine-tuned method": "best_rival_r_facesim"}
    rules = {label: figures[key]["value"] for label, key in lines.items()}
    for name, label, unit in (("people", "people in training", 1), ("images", "thousand target images seen", 1000)):
        points = [(float(count) / unit, score["value"]) for count, score in figures[f"by_{name}"].items()]
        if len(points) > 1:
            drawings[f"zero_{name}.svg"] = plot(
                {"encoder, 0 steps": points}, label, "R-FaceSim", with_legend=False, rules=rules, log_x=True
            )
    return drawings


def _curves(data: Data) -> dict[str, list[Point]]:
    """Points by method; of a rival those of any schedule that come nearer to the person than all in fewer steps."""
    found: dict[str, list[Point]] = {}
    for family in READ:
        one = data["recipes"].get(f"{family}-0")
        if one:
            tuned = one.get("tuning") or {}
            curve = tuned.get(RATE) or next(iter(tuned.values()), {"0": one["clean"]})
            found[family] = _points(curve)
    rivals: dict[str, list[Point]] = {}
    for label, one in data["rivals"].items():
        rivals.setdefault(label.partition(", ")[0], []).extend(_points(one["curve"]))
    for name, points in rivals.items():
        found[name] = []
        for point in sorted(points, key=lambda point: (point[0], -point[1])):
            if not found[name] or point[1] > found[name][-1][1]:
                found[name].append(point)
    return found


def _points(curve: Data) -> list[Point]:
    return [
        (float(step), scores["r_facesim"]["value"], scores["prompt_adherence"]["value"])
        for step, scores in curve.items()
    ]


def _robustness_grid(data: Data) -> str:
    found = data["robustness"]
    grids: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for name, own in found.items():
        scores = {condition: mean(score["r_facesim"]) for condition, score in own.items()}
        for condition, score in scores.items():
            kind, _, strength = condition.rpartition(" ")
            if kind:
                line = grids.setdefault(kind.replace("_", " "), {}).setdefault(data["methods"][name]["label"], [])
                line += [(float(strength), score)] if line else [(0.0, scores["clean"]), (float(strength), score)]
    people = len(next(iter(found.values()))["clean"]["r_facesim"])
    photos = data.get("real_photos")
    rules = {"real photos": mean(photos[:people])} if photos else {}
    return panels(grids, "{}: strength", "R-FaceSim", size=(210, 180), columns=2, rules=rules)


def _standalone(drawing: str) -> str:
    """A drawing as a file of its own: light or dark, as the page that shows it."""
    head, rest = drawing.split(">", 1)
    return head.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1) + f">{STYLE}{rest}\n"
