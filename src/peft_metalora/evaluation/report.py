# SPDX-License-Identifier: Apache-2.0
"""Cells to a page: `report.html` (self-contained, no scripts), `report.md` and `results.jsonl`.

Intervals are 95 % bootstrap intervals over people (`metrics.bootstrap`). Failures stand first: what could not be made
and images without a face count as 0 in every mean, and are shown as a rate.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import torch

from ..files import write_bytes
from ..metrics import Interval, bootstrap

Cell = dict[str, Any]

_LABELS = {
    "r_facesim": "R-FaceSim",
    "face_sim": "FaceSim",
    "pose_copy": "FaceSim - R-FaceSim",
    "adherence": "adherence",
    "clip_t": "CLIP-T",
    "clip_i": "CLIP-I",
    "dino": "DINO",
    "failed": "failed",
}
_COLOURS = ("#1b6ca8", "#d1495b", "#3a7d44", "#8e5ea2", "#e08e0b", "#30a5a5", "#8c564b", "#555555")
_STYLE = """body{font:15px/1.45 system-ui,sans-serif;margin:2em auto;max-width:70em;padding:0 1em;color:#222}
table{border-collapse:collapse;margin:1em 0}td,th{padding:.25em .7em;border-bottom:1px solid #ddd;text-align:right}
td{white-space:nowrap;font-size:13px}td:first-child,th:first-child{text-align:left}figure{display:inline-block;margin:.3em;vertical-align:top;width:9em;
font-size:12px}figure img{width:9em;height:9em;object-fit:contain}svg{max-width:100%;height:auto}"""


def write_report(output: Path, cells: Sequence[Cell], *, gallery: int = 4) -> None:
    """Write report.html, report.md and results.jsonl into the folder that holds the images.

    Args:
        gallery: people whose images are shown.

    Raises:
        WriteFailedError: the disk refuses.
    """
    lines = [
        json.dumps({"method": cell["method"], "subject": cell["subject"], **row}) + "\n"
        for cell in cells
        for row in cell["rows"]
    ]
    write_bytes(output / "results.jsonl", "".join(lines).encode())
    write_bytes(output / "report.md", ("# Evaluation\n\n" + markdown_table(cells)).encode())
    write_bytes(output / "report.html", _page(output, cells, gallery).encode())


def summary(cells: Sequence[Cell], steps: int | None = None) -> dict[str, dict[str, Interval]]:
    """Means with intervals over people, by method and metric.

    Args:
        steps: of training; None takes each method's last ones.
    """
    table: dict[str, dict[str, Interval]] = {}
    for method, own in _by_method(cells).items():
        at = max(row["steps"] for cell in own for row in cell["rows"]) if steps is None else steps
        rows = [(cell["subject"], _scores(row)) for cell in own for row in cell["rows"] if row["steps"] == at]
        known = {name for _, row in rows for name in row}
        table[method] = {
            # A row without a score is an image that was never made: 0, as for a miss.
            name: bootstrap(torch.tensor([row.get(name, 0.0) for _, row in rows]), [who for who, _ in rows])
            for name in _LABELS
            if name in known
        }
    return table


def markdown_table(cells: Sequence[Cell]) -> str:
    """The figures of every method after its last step, and by tag where people have tags."""
    return "\n".join(
        f"{title}\n\n{_markdown(heads, rows)}\n" if title else _markdown(heads, rows) + "\n"
        for title, heads, rows in _tables(cells)
    )


def _markdown(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _tables(cells: Sequence[Cell]) -> list[tuple[str, list[str], list[list[str]]]]:
    groups = {("", ""): list(cells)}
    for cell in cells:
        for tag, value in sorted(cell["tags"].items()):
            groups.setdefault((tag, value), []).append(cell)
    tables = []
    for (tag, value), some in groups.items():
        table = summary(some)
        metrics = [name for name in _LABELS if any(name in row for row in table.values())]
        heads = ["method", *(_LABELS[name] for name in metrics), "parameters", "seconds"]
        rows = []
        for method, row in table.items():
            own = [cell for cell in some if cell["method"] == method]
            seconds = [cell["points"][-1]["seconds"] for cell in own if cell["points"]]
            shown = [str(row[name]) if name in row else "" for name in metrics]
            shown.append(str(next((cell["parameters"] for cell in own if "parameters" in cell), "")))
            rows.append([method, *shown, f"{sum(seconds) / len(seconds):.1f}" if seconds else ""])
        tables.append((f"{tag}: {value}" if tag else "", heads, rows))
    return tables


def _scores(row: dict[str, Any]) -> dict[str, float]:
    scores = {name: float(row[name]) for name in _LABELS if name in row}
    return {**scores, "pose_copy": row["face_sim"] - row["r_facesim"], "failed": float(not row["found"])}


def _by_method(cells: Sequence[Cell]) -> dict[str, list[Cell]]:
    methods: dict[str, list[Cell]] = {}
    for cell in cells:
        methods.setdefault(cell["method"], []).append(cell)
    return methods


def _page(output: Path, cells: Sequence[Cell], gallery: int) -> str:
    people = sorted({cell["subject"] for cell in cells})
    parts = [f"<p>{len(people)} people, {sum(len(cell['rows']) for cell in cells)} images.</p>"]
    parts += ["<h2>Failures and lowest R-FaceSim</h2>", _failures(output, cells), "<h2>Figures</h2>"]
    parts.append("<p>Mean and 95 % interval over people; what failed counts as 0.</p>")
    for title, heads, rows in _tables(cells):
        parts.append((f"<h3>{escape(title)}</h3>" if title else "") + _html_table(heads, rows))
    parts.append(_plots(cells))
    parts.append("<h2>Galleries</h2>" + _galleries(output, cells, people[:gallery]))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Evaluation</title>'
        f"<style>{_STYLE}</style></head><body><h1>Evaluation</h1>{''.join(parts)}</body></html>\n"
    )


def _html_table(heads: list[str], rows: list[list[str]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in heads)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _failures(output: Path, cells: Sequence[Cell]) -> str:
    said = [f"{cell['method']}, {cell['subject']}: {cell['failure']}" for cell in cells if cell["failure"]]
    rows = [(cell, row) for cell in cells for row in cell["rows"]]
    missing = sum(row["file"] is None for _, row in rows)
    no_face = sum(row["file"] is not None and not row["found"] for _, row in rows)
    text = "".join(f"<p>{escape(line)}</p>" for line in said)
    text += f"<p>{missing} images are missing, {no_face} show no face.</p>"
    worst = sorted((pair for pair in rows if pair[1]["file"]), key=lambda pair: pair[1]["r_facesim"])[:8]
    return text + "".join(
        _figure(output, row["file"], f"{cell['method']}, {cell['subject']}: {row['r_facesim']:.3f}; {row['prompt']}")
        for cell, row in worst
    )


def _figure(output: Path, file: str | Path, caption: str) -> str:
    kind = {".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}.get(Path(file).suffix.lower(), "png")
    try:
        data = base64.b64encode((output / file).read_bytes()).decode()
    except OSError:
        return f"<figure>(gone)<figcaption>{escape(caption)}</figcaption></figure>"
    picture = f'<img alt="" src="data:image/{kind};base64,{data}">'
    return f"<figure>{picture}<figcaption>{escape(caption)}</figcaption></figure>"


def _galleries(output: Path, cells: Sequence[Cell], people: Sequence[str]) -> str:
    chosen = [cell for cell in cells if cell["subject"] in people]
    references = {cell["subject"]: Path(cell["reference"]).resolve() for cell in chosen}
    parts = ["<h3>References</h3>", *(_figure(output, path, who) for who, path in sorted(references.items()))]
    prompts = dict.fromkeys(row["prompt"] for cell in chosen for row in cell["rows"])
    for prompt in prompts:
        parts.append(f"<h3>{escape(prompt)}</h3>")
        for cell in chosen:
            last = max(row["steps"] for row in cell["rows"])
            for row in cell["rows"]:
                if row["prompt"] == prompt and row["seed"] == 0 and row["steps"] == last and row["file"]:
                    words = f"{cell['method']}, {cell['subject']}: {row['r_facesim']:.3f}"
                    parts.append(_figure(output, row["file"], words))
    return "".join(parts)


def _plots(cells: Sequence[Cell]) -> str:
    """The trade-off of identity and adherence, and R-FaceSim and adherence against steps and seconds."""
    table = summary(cells)
    obeys = next((name for name in ("adherence", "clip_t") if any(name in row for row in table.values())), None)
    parts = []
    if obeys is not None:
        points = {method: [(row[obeys].value, row["r_facesim"].value)] for method, row in table.items() if obeys in row}
        parts += ["<h2>Identity against adherence</h2>", plot(points, _LABELS[obeys], "R-FaceSim")]
    curves: dict[str, dict[str, list[tuple[float, float, float]]]] = {}
    for method, own in _by_method(cells).items():
        for steps in sorted({point["steps"] for cell in own for point in cell["points"]}):
            at = summary(own, steps)[method]
            times = [point["seconds"] for cell in own for point in cell["points"] if point["steps"] == steps]
            for metric in filter(None, ("r_facesim", obeys)):
                if metric in at:
                    point = (steps, sum(times) / len(times), at[metric].value)
                    curves.setdefault(metric, {}).setdefault(method, []).append(point)
    if any(len(points) > 1 for methods in curves.values() for points in methods.values()):
        parts.append("<h2>Against training</h2>")
        for metric, methods in curves.items():
            for axis, label in ((0, "steps"), (1, "seconds of training")):
                lines = {method: [(one[axis], one[2]) for one in points] for method, points in methods.items()}
                parts.append(plot(lines, label, _LABELS[metric]))
    return "".join(parts)


def plot(
    series: dict[str, list[tuple[float, float]]],
    x_label: str,
    y_label: str,
    *,
    size: tuple[int, int] = (640, 340),
    with_legend: bool = True,
    y_range: tuple[float, float] | None = None,
) -> str:
    """An SVG of lines (or single points) with axes.

    Args:
        size: width and height in pixels, the legend at the right included.
        y_range: what the y axis spans at least, so that several plots compare.
    """
    (width, height), left, top, bottom = size, 62, 14, 46
    right = 230 if with_legend else 14
    xs, ys = ([point[axis] for points in series.values() for point in points] for axis in (0, 1))
    (x_low, x_high), (y_low, y_high) = _range(xs), _range([*ys, *(y_range or ())])

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            left + (x - x_low) / (x_high - x_low) * (width - left - right),
            height - bottom - (y - y_low) / (y_high - y_low) * (height - top - bottom),
        )

    floor, end = height - bottom, width - right
    box = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    parts = [f'<svg {box} font-family="sans-serif" font-size="12">']
    for y in _ticks(y_low, y_high):
        py = place(x_low, y)[1]
        parts.append(f'<path d="M{left} {py:.1f}H{end}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 6}" y="{py + 4:.1f}" text-anchor="end">{y:.4g}</text>')
    for x in _ticks(x_low, x_high):
        parts.append(f'<text x="{place(x, y_low)[0]:.1f}" y="{floor + 16}" text-anchor="middle">{x:.4g}</text>')
    parts.append(f'<text x="{(left + end) / 2}" y="{height - 8}" text-anchor="middle">{escape(x_label)}</text>')
    middle = (top + floor) / 2
    parts.append(
        f'<text x="14" y="{middle}" text-anchor="middle" transform="rotate(-90 14 {middle})">{escape(y_label)}</text>'
    )
    for number, points in enumerate(series.values()):
        colour = _COLOURS[number % len(_COLOURS)]
        placed = [place(*point) for point in sorted(points)]
        trace = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
        parts.append(f'<polyline points="{trace}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>' for x, y in placed]
    if with_legend:
        parts.append(f'<g transform="translate({end + 10} {top})">{legend(list(series), 4)}</g>')
    return "".join(parts) + "</svg>"


def legend(names: Sequence[str], x: int) -> str:
    """The colours of `plot` with their names, one under the other."""
    rows = [(10 + 18 * number, _COLOURS[number % len(_COLOURS)], name) for number, name in enumerate(names)]
    return "".join(
        f'<circle cx="{x}" cy="{y - 4}" r="4" fill="{colour}"/><text x="{x + 10}" y="{y}">{escape(name)}</text>'
        for y, colour, name in rows
    )


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    room = 0.08 * (high - low) or 0.05
    return low - room, high + room


def _ticks(low: float, high: float) -> list[float]:
    """Three to seven round numbers between two others."""
    unit = 10.0 ** math.floor(math.log10((high - low) / 3))
    step = max(unit * factor for factor in (1, 2, 5) if unit * factor <= (high - low) / 3)
    # Rounded: -1e-17 would be shown as it is.
    return [round(number * step, 12) + 0.0 for number in range(math.ceil(low / step), math.floor(high / step) + 1)]
