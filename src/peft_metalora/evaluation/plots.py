# SPDX-License-Identifier: Apache-2.0
"""Plots as SVG text, without a plotting library: lines or points with axes, and their legends.

Text and axes have the colour of the text around them, so that a plot can be read on a dark page too.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from html import escape

Series = Mapping[str, Sequence[tuple[float, float]]]

_COLOURS = ("#1b76bc", "#d1495b", "#3a9447", "#9467bd", "#e08e0b", "#2aa5a5", "#a0665a", "#808080")


def plot(
    series: Series,
    x_label: str,
    y_label: str,
    *,
    size: tuple[int, int] = (340, 260),
    with_legend: bool = True,
    x_range: tuple[float, ...] = (),
    y_range: tuple[float, ...] = (),
    names: Sequence[str] | None = None,
    rules: Mapping[str, float] | None = None,
    hollow: Collection[tuple[float, float]] = (),
    log_x: bool = False,
) -> str:
    """An SVG of lines (or single points) with axes. As wide as a phone by default, so that two stand side by side.

    Args:
        size: width and height in pixels; the legend comes below.
        x_range, y_range: what an axis spans at least, so that several plots compare.
        names: all names that have a colour, in order; by default those of `series`.
        rules: values of y that a dashed line with its name marks.
        hollow: points that are drawn as rings.
        log_x: x by its logarithm; all of it is above 0 then.
    """
    (width, height), left, top, bottom, right = size, 52, 14, 46, 14
    names = list(series) if names is None else names
    rules = rules or {}
    xs, ys = ([point[axis] for points in series.values() for point in points] for axis in (0, 1))
    scaled = math.log10 if log_x else float
    x_low, x_high = _range([scaled(x) for x in (*xs, *x_range)])
    y_low, y_high = _range([*ys, *y_range, *rules.values()])

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            left + (scaled(x) - x_low) / (x_high - x_low) * (width - left - right),
            height - bottom - (y - y_low) / (y_high - y_low) * (height - top - bottom),
        )

    floor, end = height - bottom, width - right
    shown = [name for name in names if name in series]
    whole = height + 18 * len(shown) + 8 if with_legend else height
    parts = [_svg(width, whole)]
    for y in _ticks(y_low, y_high):
        py = place(1.0, y)[1]
        parts.append(f'<path d="M{left} {py:.1f}H{end}" stroke="currentColor" stroke-opacity="0.18"/>')
        parts.append(f'<text x="{left - 6}" y="{py + 4:.1f}" text-anchor="end">{y:.4g}</text>')
    for x in _powers(x_low, x_high) if log_x else _ticks(x_low, x_high):
        parts.append(f'<text x="{place(x, y_low)[0]:.1f}" y="{floor + 16}" text-anchor="middle">{x:.4g}</text>')
    parts.append(f'<text x="{(left + end) / 2}" y="{height - 8}" text-anchor="middle">{escape(x_label)}</text>')
    middle = (top + floor) / 2
    parts.append(
        f'<text x="14" y="{middle}" text-anchor="middle" transform="rotate(-90 14 {middle})">{escape(y_label)}</text>'
    )
    for name, y in rules.items():
        py = place(1.0, y)[1]
        parts.append(f'<path d="M{left} {py:.1f}H{end}" stroke="currentColor" stroke-dasharray="2 3"/>')
        parts.append(f'<text x="{end}" y="{py - 5:.1f}" text-anchor="end">{escape(name)}</text>')
    for name, points in series.items():
        number = names.index(name)
        placed = [place(*point) for point in points]
        trace = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
        dashes = ' stroke-dasharray="6 3"' if number >= len(_COLOURS) else ""
        parts.append(
            f'<polyline points="{trace}" fill="none" stroke="{_colour(number)}" stroke-width="2"{dashes}>'
            f"<title>{escape(name)}</title></polyline>"
        )
        parts += [_dot(x, y, number, name, ring=point in hollow) for (x, y), point in zip(placed, points, strict=True)]
    if with_legend:
        parts.append(f'<g transform="translate({left} {height + 4})">{legend(shown, 4, names)}</g>')
    return "".join(parts) + "</svg>"


def panels(
    grids: Mapping[str, Series],
    x_label: str,
    y_label: str,
    *,
    names: Sequence[str] | None = None,
    size: tuple[int, int] = (300, 230),
    columns: int = 3,
    rules: Mapping[str, float] | None = None,
) -> str:
    """An SVG of small plots with equal axes, a panel each, and one legend below.

    Args:
        grids: series by the panel's name.
        x_label: `{}` in it becomes the panel's name.
        names, rules: as `plot` takes them. size: of a panel.
    """
    width, height = size
    shown = list(dict.fromkeys(name for series in grids.values() for name in series))
    names = names or shown
    points = [point for series in grids.values() for line in series.values() for point in line]
    xs, ys = ([point[axis] for point in points] for axis in (0, 1))
    x_range, y_range = (min(xs), max(xs)), (min(ys), max(ys))
    parts = []
    for number, (panel, series) in enumerate(grids.items()):
        drawn = plot(
            series,
            x_label.format(panel),
            y_label,
            size=size,
            with_legend=False,
            x_range=x_range,
            y_range=y_range,
            names=names,
            rules=rules,
        )
        place = f'<svg x="{number % columns * width}" y="{number // columns * height}" '
        parts.append(drawn.replace("<svg ", place, 1))
    down = -(-len(grids) // columns) * height
    parts.append(f'<g transform="translate(40 {down})">{legend(shown, 14, names)}</g>')
    total = down + 18 * len(shown) + 20
    return _svg(min(columns, len(grids)) * width, total) + "".join(parts) + "</svg>"


def legend(shown: Sequence[str], x: int, names: Sequence[str] | None = None) -> str:
    """The colours of `plot` with their names, one under the other; part of an SVG."""
    numbers = [(names or shown).index(name) for name in shown]
    return "".join(
        f'{_dot(x, 6 + 18 * row, number)}<text x="{x + 10}" y="{10 + 18 * row}">{escape(name)}</text>'
        for row, (number, name) in enumerate(zip(numbers, shown, strict=True))
    )


def key(names: Sequence[str]) -> str:
    """The same as a line of HTML that wraps."""
    entries = (
        f'<span><svg width="12" height="12" viewBox="0 0 12 12" aria-hidden="true">{_dot(6, 6, number)}</svg> '
        f"{escape(name)}</span>"
        for number, name in enumerate(names)
    )
    return f'<p class="key">{" ".join(entries)}</p>'


def _svg(width: int, height: int) -> str:
    box = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    return f'<svg {box} font-family="sans-serif" font-size="12" fill="currentColor">'


def _dot(x: float, y: float, number: int, name: str | None = None, ring: bool = False) -> str:
    """Round in the first round of colours, square in the second."""
    colour = _colour(number)
    look = f'fill="none" stroke="{colour}" stroke-width="2"' if ring else f'fill="{colour}"'
    title = f"<title>{escape(name)}</title>" if name is not None else ""
    if number < len(_COLOURS):
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" {look}>{title}</circle>'
    return f'<rect x="{x - 3.5:.1f}" y="{y - 3.5:.1f}" width="7" height="7" {look}>{title}</rect>'


def _colour(number: int) -> str:
    return _COLOURS[number % len(_COLOURS)]


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


def _powers(low: float, high: float) -> list[float]:
    """Powers of ten, and where they are few also twice and five times those, between two given by their logarithms."""
    factors = (1, 2, 5) if high - low < 2 else (1,)
    found = (factor * 10.0**power for power in range(math.floor(low), math.ceil(high) + 1) for factor in factors)
    return [value for value in found if low <= math.log10(value) <= high]
