# SPDX-License-Identifier: Apache-2.0
"""The example that makes an evaluation folder from a list of files makes what `evaluate` reads."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from PIL import Image

from peft_metalora.data import read_subjects, read_tags

SCRIPT = Path(__file__).parents[2] / "examples" / "make_evaluation_folder.py"


def run(table: Path, output: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), str(table), str(output)], capture_output=True, text=True)


def test_it_makes_people_references_and_tags(tmp_path: Path) -> None:
    for name, colour in (("a.png", "red"), ("b.png", "green"), ("c.png", "blue")):
        Image.new("RGB", (8, 8), colour).save(tmp_path / name)
    table = tmp_path / "photos.csv"
    table.write_text("person,file,reference,sex\nann,a.png,,female\nann,b.png,1,female\nbob,c.png,,\n")
    done = run(table, tmp_path / "people")
    assert done.returncode == 0, done.stderr
    ann, bob = read_subjects(tmp_path / "people")
    reference, others = ann.split()
    assert Image.open(reference.path).getpixel((0, 0)) == (0, 128, 0) and len(others) == 1
    assert (bob.name, len(bob.photos)) == ("bob", 1)
    assert read_tags(tmp_path / "people") == {"ann": {"sex": "female"}, "bob": {}}


def test_a_missing_photo_stops_it_before_anything_is_written(tmp_path: Path) -> None:
    table = tmp_path / "photos.csv"
    table.write_text("person,file\nann,none.png\n")
    done = run(table, tmp_path / "people")
    assert done.returncode != 0 and "found no file" in done.stderr
    assert not (tmp_path / "people").exists()
