# SPDX-License-Identifier: Apache-2.0
"""Cells to a page: `report.html` (self-contained, no scripts), `report.md` and `results.jsonl`; failures stand first.

Pictures on the page are thumbnails, so that a report of a thousand images can still be opened; the images themselves
lie beside it.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ..data import load_image
from ..errors import DataError
from ..files import write_bytes
from ..hub.markdown import as_text
from .cells import Cell
from .figures import LABELS, REAL, Table, by_method, degraded, degraded_table, reaches, real_photos, summary, tables
from .plots import key, panels, plot

_THUMBNAIL = 160
_WORST = 2  # of each method
_STYLE = """:root{color-scheme:light dark;--line:#8884}
body{font:15px/1.5 system-ui,sans-serif;margin:1.5em auto;max-width:76em;padding:0 1em}
h1,h2,h3{line-height:1.2}h2{margin-top:2em}h3{font-size:1em;margin:1.4em 0 .3em}
.scroll{overflow-x:auto}table{border-collapse:collapse}
td,th{padding:.3em .6em;border-bottom:1px solid var(--line);text-align:right;vertical-align:top;font-size:13px}
th{vertical-align:bottom}td:first-child,th:first-child{text-align:left;overflow-wrap:anywhere;min-width:7em}
td small{display:block;opacity:.7;white-space:nowrap}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,30em),1fr));gap:1em}
svg{max-width:100%;height:auto}.key span{display:inline-block;margin-right:1em}.key svg{vertical-align:-1px}
figure{display:inline-block;margin:.3em;vertical-align:top;width:10em;font-size:12px;line-height:1.3;overflow-wrap:anywhere}
img{display:block;width:8em;height:8em;object-fit:contain;background:#8882}figure img{width:100%;height:10em}
.gallery td,.gallery th{border:0;text-align:left;font-size:12px;padding:.2em .3em}
.gallery th{max-width:8em;min-width:0;overflow-wrap:anywhere;font-weight:600}"""


def write_report(
    output: Path,
    cells: Sequence[Cell],
    bad: Sequence[Cell] = (),
    *,
    gallery: int = 4,
    thresholds: Mapping[str, float] | None = None,
) -> None:
    """Write report.html, report.md and results.jsonl into the folder that holds the images.

    Args:
        bad: cells of references made worse. gallery: people whose images are shown.
        thresholds: as `summary` takes them.

    Raises:
        WriteFailedError: the disk refuses.
    """
    thresholds = thresholds or {}
    lines = []
    for cell in (*cells, *bad):
        named = {name: cell[name] for name in ("method", "subject", "condition", "strength") if name in cell}
        for row in (*cell["rows"], *cell.get("edited", [])):
            lines.append(json.dumps({**named, **row, "covers": reaches(row, thresholds)}) + "\n")
    write_bytes(output / "results.jsonl", "".join(lines).encode())
    write_bytes(output / "report.md", _markdown(cells, bad, thresholds).encode())
    write_bytes(output / "report.html", _page(output, cells, bad, gallery, thresholds).encode())


def _markdown(cells: Sequence[Cell], bad: Sequence[Cell], thresholds: Mapping[str, float]) -> str:
    found = tables(cells, thresholds) + ([degraded_table(cells, degraded(cells, bad))] if bad else [])
    parts = ["# Evaluation", _counts(cells, bad), _note(cells, thresholds)]
    for title, heads, rows in found:
        first, *others = ("| " + " | ".join(map(as_text, line)) + " |" for line in (heads, *rows))
        table = "\n".join([first, "| --- " * len(heads) + "|", *others])
        parts += [f"## {as_text(title)}", table] if title else [table]
    return "\n\n".join(parts) + "\n"


def _counts(cells: Sequence[Cell], bad: Sequence[Cell]) -> str:
    people, methods = ({cell[name] for cell in cells} for name in ("subject", "method"))
    images = sum(len(cell["rows"]) for cell in (*cells, *bad))
    return f"{len(people)} people, {len(methods)} methods, {images} images."


def _note(cells: Sequence[Cell], thresholds: Mapping[str, float]) -> str:
    text = "Mean and 95 % interval over people, after each method's last step; what failed counts as 0."
    measured = {name for cell in cells for row in cell["rows"] for name in row}
    asked = [f"{LABELS.get(name, name)} {least:g}" for name, least in thresholds.items() if name in measured]
    if asked:
        text += f" Coverage: share of prompts with an image that reaches {' and '.join(asked)}."
    return text


def _page(
    output: Path, cells: Sequence[Cell], bad: Sequence[Cell], gallery: int, thresholds: Mapping[str, float]
) -> str:
    people = sorted({cell["subject"] for cell in cells})[:gallery]
    parts = [
        f"<p>{_counts(cells, bad)}</p>",
        "<h2>Failures, and the lowest R-FaceSim of each method</h2>",
        _failures(output, cells, bad),
    ]
    parts += ["<h2>Figures</h2>", f"<p>{escape(_note(cells, thresholds))}</p>"]
    parts += [_html_table(table) for table in tables(cells, thresholds)]
    parts.append(_plots(cells))
    if bad:
        parts.append(_bad_references(cells, bad))
    parts.append(f"<h2>Galleries</h2>{_galleries(output, cells, people)}")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Evaluation</title>'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<style>{_STYLE}</style></head><body><h1>Evaluation</h1>{''.join(parts)}</body></html>\n"
    )


def _html_table(table: Table) -> str:
    title, heads, rows = table
    head = "".join(f"<th>{escape(cell)}</th>" for cell in heads)
    body = "".join("<tr>" + "".join(f"<td>{_with_interval(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    named = f"<h3>{escape(title)}</h3>" if title else ""
    return f'{named}<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def _with_interval(cell: str) -> str:
    value, bracket, rest = cell.partition(" [")
    return escape(value) + (f"<small>[{escape(rest)}</small>" if bracket else "")


def _failures(output: Path, cells: Sequence[Cell], bad: Sequence[Cell]) -> str:
    said = [f"{cell['method']}, {cell['subject']}: {cell['failure']}" for cell in (*cells, *bad) if cell["failure"]]
    rows = [(cell, row) for cell in (*cells, *bad) for row in cell["rows"]]
    missing = sum(row["file"] is None for _, row in rows)
    no_face = sum(row["file"] is not None and not row["found"] for _, row in rows)
    text = "".join(f"<p>{escape(line)}</p>" for line in said)
    text += f"<p>{missing} of {len(rows)} images are missing, {no_face} show no face.</p>"
    worst: list[tuple[Cell, dict[str, Any]]] = []
    for own in by_method(cells).values():
        last = [
            (cell, row)
            for cell in own
            for row in cell["rows"]
            if row["file"] and row["steps"] == max(one["steps"] for one in cell["rows"])
        ]
        worst += sorted(last, key=lambda pair: pair[1]["r_facesim"])[:_WORST]
    return text + "".join(
        f"<figure>{_picture(output / row['file'])}<figcaption><b>{row['r_facesim']:.3f}</b> {escape(cell['subject'])}"
        f"<br>{escape(cell['method'])}<br>{escape(row['prompt'])}</figcaption></figure>"
        for cell, row in worst
    )


def _picture(path: Path) -> str:
    try:
        image = load_image(path)
    except DataError:
        return "(gone)"
    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=88)
    return f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def _galleries(output: Path, cells: Sequence[Cell], people: Sequence[str]) -> str:
    """For each prompt a row a person and a column a method, after the last step and from seed 0."""
    chosen = [cell for cell in cells if cell["subject"] in people]
    references = {cell["subject"]: output / cell["reference"] for cell in chosen}
    methods = list(by_method(chosen))
    parts = ["<h3>References</h3>"]
    parts += [
        f"<figure>{_picture(path)}<figcaption>{escape(who)}</figcaption></figure>"
        for who, path in sorted(references.items())
    ]
    shown: dict[tuple[str, str, str], dict[str, Any]] = {}
    for cell in chosen:
        last = max(row["steps"] for row in cell["rows"])
        for row in cell["rows"]:
            if row["seed"] == 0 and row["steps"] == last:
                shown[row["prompt"], cell["subject"], cell["method"]] = row
    head = "".join(f"<th>{escape(name)}</th>" for name in ("", *methods))
    for prompt in dict.fromkeys(prompt for prompt, _, _ in shown):
        body = ""
        for person in people:
            body += f"<tr><td>{escape(person)}</td>"
            for method in methods:
                row = shown.get((prompt, person, method))
                body += f"<td>{_picture(output / row['file']) if row and row['file'] else '(missing)'}"
                body += f"{row['r_facesim']:.3f}</td>" if row else "</td>"
            body += "</tr>"
        parts.append(
            f'<h3>{escape(prompt)}</h3><div class="scroll"><table class="gallery"><tr>{head}</tr>{body}</table></div>'
        )
    return "".join(parts)


def _plots(cells: Sequence[Cell]) -> str:
    """R-FaceSim and adherence against each other, against steps and against seconds; a line goes through the steps."""
    table, methods = summary(cells), by_method(cells)
    obeys = next((name for name in ("adherence", "clip_t") if any(name in row for row in table.values())), None)
    points: dict[str, list[dict[str, float]]] = {method: [] for method in methods}
    for method, own in methods.items():
        for steps in sorted({row["steps"] for cell in own for row in cell["rows"]}):
            times = [point["seconds"] for cell in own for point in cell["points"] if point["steps"] == steps]
            found = {name: interval.value for name, interval in summary(own, steps)[method].items()}
            trained = {"steps": steps, "seconds": sum(times) / len(times)} if times else {}
            points[method].append({**found, **trained})

    def drawn(x: str, y: str, x_label: str) -> str:
        series = {
            method: [(point[x], point[y]) for point in own if x in point and y in point]
            for method, own in points.items()
        }
        series = {method: line for method, line in series.items() if line}
        options: dict[str, Any] = {"size": (460, 320), "with_legend": False, "names": list(methods)}
        rules = _rules(cells) if y == "r_facesim" else {}
        return f"<div>{plot(series, x_label, LABELS[y], rules=rules, **options)}</div>"

    parts = []
    if obeys is not None:
        parts += ["<h2>Identity against adherence</h2>", key(list(methods)), drawn(obeys, "r_facesim", LABELS[obeys])]
    if any(sum("steps" in point for point in own) > 1 for own in points.values()):
        parts += ["<h2>Against training</h2>", key(list(methods)), '<div class="plots">']
        for metric in filter(None, ("r_facesim", obeys)):
            parts += [drawn("steps", metric, "steps"), drawn("seconds", metric, "seconds of training")]
        parts.append("</div>")
    return "".join(parts)


def _rules(cells: Sequence[Cell]) -> dict[str, float]:
    ceiling = real_photos(cells)
    return {} if ceiling is None else {REAL: ceiling.value}


def _bad_references(cells: Sequence[Cell], bad: Sequence[Cell]) -> str:
    found = degraded(cells, bad)
    grids = {
        name.replace("_", " "): {
            method: [(strength, curve[strength].value) for strength in sorted(curve)] for method, curve in own.items()
        }
        for name, own in found.items()
    }
    _, heads, rows = degraded_table(cells, found)
    note = "The reference alone is made worse; images are compared with good photos. Strength 0 is the good reference."
    drawn = panels(grids, "{}: strength", "R-FaceSim", names=list(by_method(cells)), rules=_rules(cells))
    table = _html_table(("", heads, rows))
    return f'<h2>Bad references</h2><p>{note}</p><div class="scroll">{drawn}</div>{table}'
