# SPDX-License-Identifier: Apache-2.0
"""Cells to figures: means with 95 % bootstrap intervals over people, by method, tag and bad reference.

What could not be made and images without a face count as 0 in every mean, and are shown as a rate.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch

from ..metrics import Interval, bootstrap, coverage
from .cells import Cell

LABELS = {
    "r_facesim": "R-FaceSim",
    "real_ceiling": "real photos",
    "match": "match rate",
    "face_sim": "FaceSim",
    "copy_paste": "copy-paste",
    "pose_copy": "FaceSim - R-FaceSim",
    "pose_difference": "pose difference",
    "adherence": "adherence",
    "clip_t": "CLIP-T",
    "clip_i": "CLIP-I",
    "dino": "DINO",
    "dinov2": "DINOv2",
    "diversity": "diversity",
    "coverage": "coverage",
    "failed": "failed",
}

REAL = "real photos among themselves"

_BINS = (
    ("face_size", "By height of the face, as a share of the image's", (0.15, 0.3)),
    ("pose_difference", "By distance of the head's pose from the reference's", (0.2, 0.5)),
)
"""Measure, title, and where to divide it."""

Table = tuple[str, list[str], list[list[str]]]
"""Title, heads and rows."""


def summary(
    cells: Sequence[Cell], steps: int | None = None, thresholds: Mapping[str, float] | None = None
) -> dict[str, dict[str, Interval]]:
    """Means with intervals over people, by method and metric.

    Args:
        steps: of training; None takes each method's last ones.
        thresholds: what an image must reach, by score, to cover its prompt; what was not measured is not asked.
    """
    table: dict[str, dict[str, Interval]] = {}
    for method, own in by_method(cells).items():
        at = max(row["steps"] for cell in own for row in cell["rows"]) if steps is None else steps
        rows = [(cell["subject"], row) for cell in own for row in cell["rows"] if row["steps"] == at]
        scores = [(who, _scores(row)) for who, row in rows]
        known = {name for _, row in scores for name in row}
        table[method] = {
            # A row without a score is an image that was never made: 0, as for a miss.
            name: bootstrap(torch.tensor([row.get(name, 0.0) for _, row in scores]), [who for who, _ in scores])
            for name in LABELS
            if name in known
        }
        ceiling = real_photos(own)
        if ceiling is not None:
            table[method]["real_ceiling"] = ceiling
        if thresholds:
            table[method]["coverage"] = _coverage(rows, {name: at for name, at in thresholds.items() if name in known})
    return table


def real_photos(cells: Sequence[Cell]) -> Interval | None:
    """R-FaceSim of people's photos among themselves, with an interval over people; None where nobody has two."""
    known = {cell["subject"]: cell["real_ceiling"] for cell in cells if cell.get("real_ceiling") is not None}
    return bootstrap(torch.tensor(list(known.values()))) if known else None


def reaches(row: Mapping[str, Any], thresholds: Mapping[str, float]) -> bool:
    """Whether an image covers its prompt: a face, and every score that the row has is high enough."""
    return bool(row["found"]) and all(row[name] >= least for name, least in thresholds.items() if name in row)


def tables(cells: Sequence[Cell], thresholds: Mapping[str, float] | None = None) -> list[Table]:
    """The figures of every method after its last step, for all people and for those of each tag."""
    groups = {("", ""): list(cells)}
    for cell in cells:
        for tag, value in sorted(cell["tags"].items()):
            groups.setdefault((tag, value), []).append(cell)
    found = [(f"{tag}: {value}" if tag else "", *_table(some, thresholds)) for (tag, value), some in groups.items()]
    return found + [table for table in (*(_binned(cells, *one) for one in _BINS), edited_table(cells)) if table[2]]


def _last_rows(cells: Sequence[Cell]) -> list[tuple[str, dict[str, Any]]]:
    """Person and row of all images after the last step of one method."""
    last = max(row["steps"] for cell in cells for row in cell["rows"])
    return [(cell["subject"], row) for cell in cells for row in cell["rows"] if row["steps"] == last]


def _binned(cells: Sequence[Cell], metric: str, title: str, edges: Sequence[float]) -> Table:
    """R-FaceSim of the images with a face, by what else was measured of them; no rows where it was not.

    The last row is what real photos reach, of whatever size and pose.
    """
    bounds = [0.0, *edges, math.inf]
    names = [f"below {edges[0]:g}", *(f"{low:g} to {high:g}" for low, high in pairwise(edges)), f"from {edges[-1]:g}"]
    rows = []
    for method, own in by_method(cells).items():
        seen = [(who, row) for who, row in _last_rows(own) if row["found"] and metric in row]
        row = [method]
        for low, high in pairwise(bounds):
            some = [(who, row["r_facesim"]) for who, row in seen if low <= row[metric] < high]
            scores = torch.tensor([score for _, score in some])
            row.append(f"{bootstrap(scores, [who for who, _ in some])}, n = {len(some)}" if some else "")
        rows += [row] if seen else []
    return title, ["R-FaceSim", *names], _beside_photos(rows, cells)


def edited_rows(cells: Sequence[Cell]) -> dict[str, list[Interval]]:
    """R-FaceSim by method of the images that were edited: as drawn, and after each edit. Nothing where none was."""
    found = {}
    for method, own in by_method(cells).items():
        edited = [(cell["subject"], row) for cell in own for row in cell.get("edited", [])]
        if not edited:
            continue
        before = [(who, {**row, "edits": 0}) for who, row in _last_rows(own) if row["seed"] == 0]
        chains: list[list[tuple[str, float]]] = [[] for _ in range(max(row["edits"] for _, row in edited) + 1)]
        for who, row in (*before, *edited):
            chains[row["edits"]].append((who, row["r_facesim"]))
        for chain in chains[1:]:
            chain += [(cell["subject"], 0.0) for cell in own if cell["failure"]]
        found[method] = [
            bootstrap(torch.tensor([score for _, score in one]), [who for who, _ in one]) for one in chains
        ]
    return found


def edited_table(cells: Sequence[Cell]) -> Table:
    """`edited_rows` as a table; the last row is what real photos reach."""
    found = edited_rows(cells)
    most = max(map(len, found.values()), default=1) - 1
    heads = ["as drawn", *(f"after {count}" for count in range(1, most + 1))]
    rows = [[method, *map(str, row), *[""] * (most + 1 - len(row))] for method, row in found.items()]
    return "Edited again and again", ["R-FaceSim", *heads], _beside_photos(rows, cells)


def _beside_photos(rows: list[list[str]], cells: Sequence[Cell]) -> list[list[str]]:
    """Rows that are not none with what real photos reach, in each of their columns."""
    ceiling = real_photos(cells)
    return [*rows, [REAL, *[str(ceiling)] * (len(rows[0]) - 1)]] if rows and ceiling is not None else rows


def _table(cells: Sequence[Cell], thresholds: Mapping[str, float] | None) -> tuple[list[str], list[list[str]]]:
    found = summary(cells, thresholds=thresholds)
    metrics = [name for name in LABELS if any(name in row for row in found.values())]
    rows = []
    for method, row in found.items():
        own = [cell for cell in cells if cell["method"] == method]
        times = [cell["points"][-1]["seconds"] for cell in own if cell["points"]]
        seconds = bootstrap(torch.tensor(times)) if times else None
        rows.append(
            [
                method,
                *(str(row[name]) if name in row else "" for name in metrics),
                next((f"{cell['parameters']:,}" for cell in own if "parameters" in cell), ""),
                f"{seconds:.1f}" if seconds else "",
            ]
        )
    return ["method", *(LABELS[name] for name in metrics), "parameters", "seconds"], rows


def degraded(cells: Sequence[Cell], bad: Sequence[Cell]) -> dict[str, dict[str, dict[float, Interval]]]:
    """R-FaceSim by condition, method and strength; strength 0 is the good reference."""
    good = summary(cells)
    found: dict[str, dict[str, dict[float, Interval]]] = {}
    for name, strength in dict.fromkeys((cell["condition"], cell["strength"]) for cell in bad):
        some = [cell for cell in bad if (cell["condition"], cell["strength"]) == (name, strength)]
        for method, row in summary(some).items():
            curve = found.setdefault(name, {}).setdefault(method, {0.0: good[method]["r_facesim"]})
            curve[strength] = row["r_facesim"]
    return found


def degraded_table(cells: Sequence[Cell], found: Mapping[str, Mapping[str, Mapping[float, Interval]]]) -> Table:
    """A row for each condition and strength, a column for each method; the last row is what real photos reach.

    Args:
        cells: of good references. found: as `degraded` gives it.
    """
    methods = list(dict.fromkeys(method for own in found.values() for method in own))
    rows = [["good", *(str(next(own[method][0.0] for own in found.values())) for method in methods)]]
    for name, own in found.items():
        for strength in sorted({one for curve in own.values() for one in curve} - {0.0}):
            scores = [str(own[method][strength]) if strength in own.get(method, {}) else "" for method in methods]
            rows.append([f"{name.replace('_', ' ')} {strength:g}", *scores])
    return "Bad references", ["R-FaceSim", *methods], _beside_photos(rows, cells)


def by_method(cells: Sequence[Cell]) -> dict[str, list[Cell]]:
    """Cells of each method, in order."""
    methods: dict[str, list[Cell]] = {}
    for cell in cells:
        methods.setdefault(cell["method"], []).append(cell)
    return methods


def _scores(row: Mapping[str, Any]) -> dict[str, float]:
    scores = {name: float(row[name]) for name in LABELS if name in row}
    return {**scores, "pose_copy": row["face_sim"] - row["r_facesim"], "failed": float(not row["found"])}


def _coverage(rows: Sequence[tuple[str, Mapping[str, Any]]], thresholds: Mapping[str, float]) -> Interval:
    people = list(dict.fromkeys(who for who, _ in rows))
    shares = []
    for person in people:
        own = [row for who, row in rows if who == person]
        reached = torch.tensor([float(reaches(row, thresholds)) for row in own])
        shares.append(coverage(reached, [row["number"] for row in own], 1.0))
    return bootstrap(torch.tensor(shares))
