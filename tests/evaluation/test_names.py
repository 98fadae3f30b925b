# SPDX-License-Identifier: Apache-2.0
"""Names of people and methods become folders of the output: inside it, one each, and of the people there are."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from PIL import Image

from peft_metalora.errors import ConfigError, MetadataError
from peft_metalora.evaluation.evaluation_settings import EvaluateConfig
from peft_metalora.evaluation.prompts import read_prompts
from peft_metalora.evaluation.protocol import evaluate
from peft_metalora.evaluation.report import _picture


def config(folder: Path, **changes: object) -> EvaluateConfig:
    (folder / "prompts.yaml").write_text("scenes: ['a photo of {subject}']\n")
    settings = {
        "data": str(folder / "data"),
        "output": str(folder / "out"),
        "method": ["base"],
        "prompts": str(folder / "prompts.yaml"),
        "steps": [1],
        "num_inference_steps": 1,
        "device": "cpu",
    }
    return EvaluateConfig(**{**settings, **changes})


def photos(folder: Path, *colours: str) -> None:
    folder.mkdir(parents=True)
    for number, colour in enumerate(colours):
        Image.new("RGB", (64, 64), colour).save(folder / f"{number}.png")


@pytest.mark.parametrize("name", ["../../../victim", "{}/victim"])
def test_nothing_is_written_outside_of_the_output(tmp_path: Path, name: str) -> None:
    """Bug: "subject": "../../../victim", and an absolute path, wrote images and cell.json there."""
    work = tmp_path / "work"
    photos(work / "data", "red", "blue")
    lines = [json.dumps({"file_name": f"{n}.png", "subject": name.format(tmp_path)}) + "\n" for n in range(2)]
    (work / "data" / "metadata.jsonl").write_text("".join(lines))
    with pytest.raises(MetadataError, match="that can be the name of a folder"):
        evaluate(config(work), progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["work"] and not (work / "out").exists()


def test_whoever_left_the_data_leaves_the_report(tmp_path: Path) -> None:
    """Bug: a person removed from the data stayed in the tables and galleries of the rerun."""
    photos(tmp_path / "data" / "ann", "red", "orange")
    photos(tmp_path / "data" / "bob", "blue", "green")
    evaluate(config(tmp_path), progress=False)
    shutil.rmtree(tmp_path / "data" / "bob")
    report = evaluate(config(tmp_path), progress=False)
    rows = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert {row["subject"] for row in rows} == {"ann"}
    assert "bob" not in report.read_text() and "ann" in report.read_text()
    assert (tmp_path / "out" / "base" / "bob" / "cell.json").is_file()


def test_methods_need_folders_of_their_own(tmp_path: Path) -> None:
    """Bug: images named "LoRA" and "lora" shared a folder where a file system ignores case."""
    (tmp_path / "images").mkdir()
    with pytest.raises(ConfigError, match="each method once, found LoRA, lora twice"):
        config(tmp_path, images=[f"LoRA={tmp_path / 'images'}", f"lora={tmp_path / 'images'}"])
    with pytest.raises(ConfigError, match="another name than 'degraded'"):
        config(tmp_path, images=[f"Degraded={tmp_path / 'images'}"])


def test_prompts_from_a_pipe_are_refused(tmp_path: Path) -> None:
    """Bug: a named pipe as prompts was waited for, for ever."""
    os.mkfifo(tmp_path / "pipe.yaml")
    writer = os.open(tmp_path / "pipe.yaml", os.O_RDWR)  # so that the version with the bug reads nothing, for ever
    os.write(writer, b"scenes: [a photo]\n")
    try:
        with pytest.raises(ConfigError, match="a pipe or a device"):
            read_prompts(tmp_path / "pipe.yaml", "a person")
    finally:
        os.close(writer)


def test_the_report_shows_a_reference_as_it_was_learned(tmp_path: Path) -> None:
    """Bug: a reference that its EXIF data turns lay on its side in the report."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 20)).save(tmp_path / "turned.jpg", exif=exif)
    Image.new("RGB", (20, 40)).save(tmp_path / "upright.jpg")
    assert _picture(tmp_path / "turned.jpg") == _picture(tmp_path / "upright.jpg")
    assert _picture(tmp_path / "gone.jpg") == "(gone)"
