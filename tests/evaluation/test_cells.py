# SPDX-License-Identifier: Apache-2.0
"""Cells on disk: one that is none is made anew, or named."""

from __future__ import annotations

import json

import pytest

from peft_metalora.errors import CorruptFileError
from peft_metalora.evaluation.cells import is_complete, read_cells

GOOD = {
    "key": "k", "method": "base", "subject": "ann", "tags": {}, "points": [], "failure": None, "reference": "ann.png",
    "rows": [{"file": None}],
}  # fmt: skip
HOSTILE = ["", "{", "5", "null", "[]", "[" * 100000, "{}", '{"key": "k"}'] + [
    json.dumps({**GOOD, "rows": rows}) for rows in (5, None, [5], [{}], [{"file": 5}], [{"file": ["x"]}])
]


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
