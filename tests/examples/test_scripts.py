# SPDX-License-Identifier: Apache-2.0
"""Both scripts of `examples/` on the embedded base, a few steps of each, as a user would start them."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from PIL import Image, ImageChops, ImageStat

from peft_metalora import hub
from peft_metalora.demo.embedded import RESOLUTION
from peft_metalora.demo.faces import write_dataset

EXAMPLES = Path(__file__).parents[2] / "examples"


def start(monkeypatch, script, *arguments):
    monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
    runpy.run_path(str(EXAMPLES / script), run_name="__main__")


def test_a_down_then_a_person_then_their_picture(monkeypatch, tmp_path):
    write_dataset(str(tmp_path / "people"), "meta", 8, 2)
    down, people = tmp_path / "down", tmp_path / "people"
    start(monkeypatch, "train_down.py", "--demo", "--data", people, "--output", down, "--steps", 8)
    facts = hub.load_down(down).config.facts
    assert (facts["steps"], facts["subjects"], facts["images"]) == (8, 8, 16)
    photo, prompt = people / "meta-0000" / "0.png", "a photo of a person, facing left, smiling, in a red shirt"
    given = ["--demo", "--down", down, "--photo", photo, "--prompt", prompt]
    start(monkeypatch, "personalize_and_draw.py", *given, "--output", tmp_path / "ann", "--steps", 3)
    names = {path.name for path in (tmp_path / "ann").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "pytorch_lora_weights.safetensors"} < names
    (picture,) = (tmp_path / "ann").glob("*.png")
    drawn = Image.open(picture).convert("RGB")
    assert drawn.size == (RESOLUTION, RESOLUTION)
    assert min(ImageStat.Stat(drawn).stddev) > 10  # a picture, not a flat colour
    # Another person, another picture.
    given[4] = people / "meta-0001" / "0.png"
    start(monkeypatch, "personalize_and_draw.py", *given, "--output", tmp_path / "bob", "--steps", 3)
    (other,) = (tmp_path / "bob").glob("*.png")
    assert ImageChops.difference(Image.open(other).convert("RGB"), drawn).getbbox() is not None


def test_a_script_to_learn_from_is_read_in_one_screen_or_two():
    scripts = [path for path in EXAMPLES.glob("*.py") if path.name != "make_people.py"]  # a tool, not a lesson
    assert len(scripts) > 2 and [path.name for path in scripts if len(path.read_text().splitlines()) > 60] == []


def test_the_table_of_examples_is_whole():
    table = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    found = [*EXAMPLES.glob("*.py"), *EXAMPLES.glob("notebooks/*.ipynb")]
    names = [path.relative_to(EXAMPLES).as_posix() for path in found]
    folders = [f"{path.name}/" for path in EXAMPLES.iterdir() if path.is_dir() and path.name != "notebooks"]
    assert [name for name in names + folders if f"`{name}`" not in table and "__pycache__" not in name] == []
