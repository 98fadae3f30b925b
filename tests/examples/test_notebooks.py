# SPDX-License-Identifier: Apache-2.0
"""The notebooks run from the first cell to the last on the embedded base, and lie in git without what they printed.

Their cells are executed here, in one process: a kernel would import torch anew for each, and need three packages more.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import ImageChops

NOTEBOOKS = Path(__file__).parents[2] / "examples" / "notebooks"


def run(name):
    """What the cells of a notebook have defined at its end."""
    book = json.loads((NOTEBOOKS / f"{name}.ipynb").read_text(encoding="utf-8"))
    defined = {"__name__": "__main__"}
    for number, cell in enumerate(book["cells"]):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{name}.ipynb, cell {number}", "exec"), defined)
    return SimpleNamespace(**defined)


def differ(one, other):
    return ImageChops.difference(one, other).getbbox() is not None


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_a_notebook_holds_nothing_that_was_printed(path):
    """Bug: pictures and paths of somebody's machine in git, and a cell that only a kernel of Jupyter understands."""
    book = json.loads(path.read_text(encoding="utf-8"))
    assert (book["nbformat"], book["nbformat_minor"]) == (4, 5)
    for cell in book["cells"]:
        assert cell["source"] and not cell["source"][0].startswith(("%", "!"))
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
    links = [part.partition(")")[0] for cell in book["cells"] for part in "".join(cell["source"]).split("](")[1:]]
    assert links and all((NOTEBOOKS / link.partition("#")[0]).is_file() for link in links)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_quick_start(tmp_path):
    left = run("quick_start")
    ann, bob, nobody = left.images
    assert differ(ann, bob) and differ(ann, nobody) and differ(bob, nobody)
    assert left.pipe.get_active_adapters() == ["polished"] and (tmp_path / "ann.safetensors").exists()


def test_make_a_down():
    left = run("make_a_down")
    assert left.down.facts["subjects"] == left.PEOPLE and left.down.facts["steps"] == left.STEPS
    assert left.pipe.get_active_adapters() == ["ann"]


def test_serve():
    left = run("serve")
    assert differ(*left.first[:2]) and differ(*left.second)
    assert [*left.table.names()] == left.names[1:]


def test_evaluate():
    left = run("evaluate")
    assert left.report.is_file() and {line["method"] for line in left.lines} == {*left.METHODS}
    assert len(left.lines) == left.PEOPLE * len(left.METHODS)
