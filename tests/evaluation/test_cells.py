# SPDX-License-Identifier: Apache-2.0
"""Cells on disk: one that is none is made anew, or named."""

from __future__ import annotations

import json

import pytest

from peft_metalora.errors import CorruptFileError
from peft_metalora.evaluation.cells import is_complete, read_cells, remove_cell

GOOD = {
    "key": "k", "method": "base", "subject": "ann", "tags": {}, "points": [], "failure": None, "reference": "ann.png",
    "rows": [{"file": None}],
}  # fmt: skip
HOSTILE = (
    ["", "{", "5", "null", "[]", "[" * 100000, "{}", '{"key": "k"}']
    + [
        json.dumps({**GOOD, part: rows})
        for part in ("rows", "edited")
        for rows in (5, None, [5], [{}], [{"file": 5}], [{"file": ["x"]}])
    ]
    + [json.dumps({**GOOD, "reference": 5})]
)


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: text[:30])
def test_a_cell_that_is_none_is_not_complete_and_named(tmp_path, text):
    """Bug: RecursionError, AttributeError, TypeError and KeyError, which no message named a file in."""
    folder = tmp_path / "base" / "ann"
    folder.mkdir(parents=True)
    (folder / "cell.json").write_text(json.dumps(GOOD))
    assert is_complete(tmp_path, folder, "k") and read_cells(tmp_path, ["base"]) == [GOOD]
    (folder / "cell.json").write_text(text)
    assert not is_complete(tmp_path, folder, "k")
    with pytest.raises(CorruptFileError, match=r"cell.json: expected a cell in JSON, found.* Remove it"):
        read_cells(tmp_path, ["base"])


def test_a_cell_that_is_made_anew_leaves_no_older_images(tmp_path):
    """Bug: images after steps, or of prompts, that are no longer asked for stayed, of who was called so before."""
    folder = tmp_path / "base" / "ann"
    mine = [tmp_path / "ann.png", folder / "mine.txt", folder / "00005" / "mine.png"]
    made = [f"base/ann/{name}" for name in ("00002/00-0.png", "00005/00-0.png", "edits/00-1.png", "reference.png")]
    for path in (*mine, *(tmp_path / name for name in made)):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("here")
    rows = [{"file": name} for name in (*made[:2], "ann.png", "../ann.png", None)]
    cell = {**GOOD, "rows": rows, "edited": [{"file": made[2]}], "reference": made[3]}
    (folder / "cell.json").write_text(json.dumps(cell))
    remove_cell(tmp_path, folder)
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == sorted(mine)
    assert sorted(path.name for path in folder.iterdir()) == ["00005", "mine.txt"]
    (folder / "cell.json").write_text("broken")
    remove_cell(tmp_path, folder)
    assert not (folder / "cell.json").exists()
