# SPDX-License-Identifier: Apache-2.0
"""The table and the figure of docs/architecture.md show the rooms as they are; this file, run as a script, makes both.

    python tests/test_architecture_page.py

What a room is for is the first paragraph of its `__init__.py` (or of the file, at the top of the package), what it
imports is read from its files, where it stands is `LAYERS` in test_architecture.py.
"""

from __future__ import annotations

import ast
import re
from html import escape

from peft_metalora.cli import COMMANDS
from test_architecture import LAYERS, LEVEL, PACKAGE, ROOT, floor_of, rooms_imported

PAGE = ROOT / "docs" / "architecture.md"
FIGURE = ROOT / "docs" / "images" / "architecture.svg"
START, END = "<!-- rooms -->\n", "<!-- end -->"

STYLE = """
text { font: 13px system-ui, sans-serif; fill: #1f2328 }
.quiet { fill: #59636e }
.page { fill: #ffffff }
.layer { fill: #f0f3f6 }
.line { stroke: #d1d9e0 }
.room { fill: #ffffff; stroke: #59636e }
.later { fill: none; stroke-dasharray: 4 3 }
.self { fill: #d1d9e0 }
.dot { fill: #0969da }
.ring { fill: none; stroke: #0969da; stroke-width: 2 }
@media (prefers-color-scheme: dark) {
  text { fill: #f0f6fc }
  .quiet { fill: #9198a1 }
  .page { fill: #0d1117 }
  .layer { fill: #1a2029 }
  .line { stroke: #3d444d }
  .room { fill: #0d1117; stroke: #9198a1 }
  .later { fill: none }
  .self { fill: #3d444d }
  .dot { fill: #4493f8 }
  .ring { fill: none; stroke: #4493f8 }
}"""


def purpose(room: str) -> str:
    """The first paragraph of what a room says of itself; none yet for one that comes later."""
    for path in (PACKAGE / room / "__init__.py", PACKAGE / f"{room}.py"):
        if path.is_file():
            text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
            return " ".join(text.partition("\n\n")[0].split())
    return "Comes later."


def in_short(text: str) -> str:
    return re.split(r"[:;?.] |\.$", re.sub(r"`|\s\(.*?\)", "", text))[0]


def rooms() -> list[str]:
    """From the top: what a room imports stands below it."""
    imported = rooms_imported()
    floors = {room: floor_of(room, imported) for room in imported}
    return [room for layer in reversed(LAYERS) for room in sorted(layer, key=lambda room: (-floors.get(room, 0), room))]


def named_by_the_command_line() -> set[str]:
    """Rooms that `cli` names in its table and imports when a command runs."""
    return {text.split(".")[0] for command in COMMANDS.values() for text in (command.settings, command.function)}


def table() -> str:
    imported = rooms_imported()
    lines = ["| layer | room | what it is for | imports |", "|---|---|---|---|"]
    for room in rooms():
        others = ", ".join(f"`{other}`" for other in rooms() if other in imported.get(room, set()))
        lines.append(f"| {LEVEL[room] + 1} | `{room}` | {purpose(room)} | {others} |".replace("|  |", "| |"))
    return "\n".join(lines) + "\n"


ROW, CELL, NAMES, WORDS, MATRIX, HEAD = 30, 26, 46, 156, 486, 92


def figure() -> str:
    """A row and a column for each room; a dot where the room of the row imports that of the column."""
    order, imported, named = rooms(), rooms_imported(), named_by_the_command_line()
    width, bottom = MATRIX + CELL * len(order) + 36, HEAD + ROW * len(order)

    def middle(row: int) -> int:
        return HEAD + ROW * row + ROW // 2

    def column(row: int) -> int:
        return MATRIX + CELL * row + CELL // 2

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {bottom + 52}" width="{width}" role="img">',
        "<title>The rooms of peft_metalora in their layers, and which room imports which</title>",
        f"<style>{STYLE}\n</style>",
        '<rect class="page" width="100%" height="100%" rx="8"/>',
    ]
    for level in range(len(LAYERS)):
        rows = [row for row, room in enumerate(order) if LEVEL[room] == level]
        top, height = HEAD + ROW * rows[0] + 1, ROW * len(rows) - 2
        parts.append(f'<rect class="layer" x="10" y="{top}" width="{width - 20}" height="{height}" rx="4"/>')
        parts.append(f'<text class="quiet" x="28" y="{top + height / 2 + 5}" text-anchor="middle">{level + 1}</text>')
    for row, room in enumerate(order):
        y, x = middle(row), column(row)
        there = room in imported
        parts += [
            f'<line class="line" x1="{MATRIX}" y1="{y}" x2="{width - 36}" y2="{y}"/>',
            f'<line class="line" x1="{x}" y1="{HEAD}" x2="{x}" y2="{bottom}"/>',
            f'<rect class="room{"" if there else " later"}" x="{NAMES}" y="{y - 11}" width="98" height="22" rx="4"/>',
            f'<text x="{NAMES + 49}" y="{y + 4.5}" text-anchor="middle">{room}</text>',
            f'<text class="quiet" x="{WORDS}" y="{y + 4.5}">{escape(in_short(purpose(room)))}</text>',
            f'<text transform="translate({x + 4} {HEAD - 8}) rotate(-60)">{room}</text>',
        ]
    for row, room in enumerate(order):
        parts.append(f'<rect class="self" x="{column(row) - 5}" y="{middle(row) - 5}" width="10" height="10" rx="2"/>')
        for other in sorted(imported.get(room, set()), key=order.index):
            parts.append(f'<circle class="dot" cx="{column(order.index(other))}" cy="{middle(row)}" r="5.5"/>')
    for other in sorted(named - imported["cli"]):
        parts.append(
            f'<circle class="ring" cx="{column(order.index(other))}" cy="{middle(order.index("cli"))}" r="4.5"/>'
        )
    y = bottom + 26
    parts += [
        f'<circle class="dot" cx="{NAMES + 6}" cy="{y}" r="5.5"/>',
        f'<text x="{NAMES + 18}" y="{y + 4.5}">the room of this row imports the room of this column</text>',
        f'<circle class="ring" cx="{MATRIX - 44}" cy="{y}" r="4.5"/>',
        f'<text x="{MATRIX - 32}" y="{y + 4.5}">imports it by name, when the command runs</text>',
        "</svg>\n",
    ]
    return "\n".join(parts)


HINT = "run: python tests/test_architecture_page.py"


def test_the_table_is_that_of_the_layers_and_imports() -> None:
    head, _, rest = PAGE.read_text(encoding="utf-8").partition(START)
    assert rest.partition(END)[0] == table(), HINT
    assert "images/architecture.svg" in head


def test_rooms_import_downward_in_it() -> None:
    order = rooms()
    assert all(order.index(other) > order.index(room) for room, names in rooms_imported().items() for other in names)


def test_the_figure_is_too() -> None:
    assert FIGURE.read_text(encoding="utf-8") == figure(), HINT


def test_words_of_the_figure_fit() -> None:
    """The longest phrase has to end before the matrix; a letter of this size is 7 pixels wide or less on average."""
    assert max(len(in_short(purpose(room))) for room in rooms()) * 6.8 < MATRIX - WORDS


def test_files_that_the_page_names_are_there() -> None:
    named = set(re.findall(r"`([\w/.]+\.(?:py|md|txt))`", PAGE.read_text(encoding="utf-8")))
    # One without a folder lies beside another that was just named.
    lost = [name for name in named if not ((ROOT / name).is_file() or any(PACKAGE.glob(f"**/{name}")))]
    assert named
    assert not lost


if __name__ == "__main__":
    head, _, rest = PAGE.read_text(encoding="utf-8").partition(START)
    PAGE.write_text(f"{head}{START}{table()}{END}{rest.partition(END)[2]}", encoding="utf-8")
    FIGURE.write_text(figure(), encoding="utf-8")
