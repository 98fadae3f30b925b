# SPDX-License-Identifier: Apache-2.0
"""What an evaluation keeps on disk: a folder a cell, which is one method and one person.

A cell lies in `output/<method>/<person>/` (for a bad reference in `output/degraded/<condition>/<method>/<person>/`):
images as `<steps>/<prompt>-<seed>.png`, and `cell.json`, which is written last and says what the cell was made from.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..data import read_file
from ..errors import CorruptFileError, MetaLoraError
from .evaluation_settings import safe

Cell = dict[str, Any]
_PARTS = {"key", "method", "subject", "tags", "rows", "points", "failure", "reference"}


def home_of(output: str | Path, condition: object | None = None) -> Path:
    """The folder of the cells of one condition, or of good references."""
    return Path(output) if condition is None else Path(output) / "degraded" / str(condition)


def read_cells(output: str | Path, names: Sequence[str]) -> list[Cell]:
    """The finished cells of some methods, as `cell.json` has them, in the order of the names.

    Args:
        output: as `home_of` gives it.

    Raises:
        CorruptFileError: a cell that is no JSON.
    """
    return [_read(path) for name in names for path in sorted((Path(output) / safe(name)).glob("*/cell.json"))]


def is_complete(output: Path, folder: Path, key: str) -> bool:
    """Whether a cell is there, was made from what the key says, and has its images."""
    if not (folder / "cell.json").is_file():
        return False
    try:
        cell = _read(folder / "cell.json")
    except MetaLoraError:
        return False
    return cell.get("key") == key and all(
        row["file"] is None or (output / row["file"]).is_file() for row in (*cell["rows"], *cell.get("edited", []))
    )


def remove_cell(output: Path, folder: Path) -> None:
    """Before images are made anew: neither does an older cell show the new ones as its own, nor do older images stay,
    which may be of somebody else who was called so."""
    with suppress(MetaLoraError):
        cell = _read(folder / "cell.json")
        named = [row["file"] for row in (*cell["rows"], *cell.get("edited", []))]
        files = [output / name for name in (*named, cell["reference"]) if name]
        files = [path for path in files if folder.resolve() in path.resolve().parents]
        for path in files:
            path.unlink(missing_ok=True)
        for place in {path.parent for path in files} - {folder}:
            with suppress(OSError):  # something else is there
                place.rmdir()
    (folder / "cell.json").unlink(missing_ok=True)


def hash_of(what: Path | Any) -> str:
    """Of an image file's bytes, or of anything that JSON can hold; raises as `read_file`."""
    data = read_file(what) if isinstance(what, Path) else json.dumps(what, sort_keys=True).encode()
    return hashlib.sha256(data).hexdigest()


def _read(path: Path) -> Cell:
    try:
        cell: Cell = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CorruptFileError(f"{path}: expected a cell in JSON, found: {error}. Remove it and run again.") from error
    is_whole = isinstance(cell, dict) and cell.keys() >= _PARTS and isinstance(cell["reference"], str)
    if not is_whole or not all(map(_are_rows, (cell["rows"], cell.get("edited", [])))):
        raise CorruptFileError(f"{path}: expected a cell in JSON, found something else. Remove it and run again.")
    return cell


def _are_rows(rows: Any) -> bool:
    return isinstance(rows, list) and all(
        isinstance(row, dict) and isinstance(row.get("file", 0), (str, type(None))) for row in rows
    )
