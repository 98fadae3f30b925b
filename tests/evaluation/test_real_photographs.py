# SPDX-License-Identifier: Apache-2.0
"""The whole road on real photographs with a real recogniser, dlib: learn, draw, edit, judge, report, and stop in time.

A tiny random base draws no faces. So what it draws is a miss, as it should be; and where a test needs faces, pictures
are put in the place of what it draws.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from peft_metalora import hub
from peft_metalora.bases.base import Base
from peft_metalora.cli import main
from photographs import another, real_photos
from training_tiny import save_tiny_down, teach_to_read

SMALL = ["--resolution", "16", "--device", "cpu", "--instance_prompt", "a photo"]


@pytest.fixture(scope="module")
def photos() -> list[Image.Image]:
    return real_photos()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, photos: list[Image.Image]) -> Path:
    """A tiny base, a Down that reads, two real people with two photos each, pictures of the right and the wrong one."""
    folder = tmp_path_factory.mktemp("real")
    save_tiny_down(folder)
    teach_to_read(folder / "down")
    for number, photo in enumerate(photos[:2]):
        for name, picture in (
            ("people", {"0": photo, "1": another(photo)}),
            ("right", {"000-000": photo, "001-000": another(photo)}),
            ("wrong", {"000-000": photos[1 - number]}),
        ):
            (folder / name / f"person-{number}").mkdir(parents=True)
            for file, shown in picture.items():
                shown.save(folder / name / f"person-{number}" / f"{file}.png")
    (folder / "prompts.yaml").write_text("poses: ['a photo of {subject}', '{subject} , smiling']\n")
    return folder


def test_a_whole_evaluation(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    methods = ["base", "lora:r=1", "meta-lora:start=encoder"]
    arguments = ["evaluate", "--data", home / "people", "--output", tmp_path / "out", "--embedder", "dlib", *SMALL]
    arguments += ["--base", home / "base", "--down", home / "down", "--prompts", home / "prompts.yaml", "--edits", "2"]
    arguments += ["--method", *methods, "--steps", "0", "1", "--num_inference_steps", "2", "--views_per_image", "2"]
    arguments += ["--images", f"right={home / 'right'}", f"wrong={home / 'wrong'}"]
    assert main(list(map(str, arguments))) == 0, capsys.readouterr().err
    rows = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    of = {name: [row for row in rows if row["method"] == name] for name in (*methods, "right", "wrong")}
    assert all(row["match"] == 1 and row["r_facesim"] > 0.7 for row in of["right"]) and len(of["right"]) == 4
    drawn_wrong = [row for row in of["wrong"] if row["file"]]
    assert len(drawn_wrong) == 2 and all(row["match"] == 0 and 0.2 < row["r_facesim"] < 0.5 for row in drawn_wrong)
    # A copy of the reference, and the other photo of the person.
    assert {row["number"]: round(row["copy_paste"], 3) for row in of["right"]} == {0: 1, 1: -1}
    for method in methods:
        assert (tmp_path / "out" / of[method][0]["file"]).is_file()
        assert not any(row["found"] for row in of[method])  # noise is nobody
        assert {row.get("edits", 0) for row in of[method]} == {0, 1, 2}
    report = (tmp_path / "out" / "report.md").read_text()
    for text in ("| match rate |", "real photos", "By height of the face", "By distance of the head's pose"):
        assert text in report, text
    assert "Edited again and again" in report


def test_dlib_stops_a_training_and_chooses_its_step(
    home: Path, tmp_path: Path, photos: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = iter([photos[1], another(photos[0]), photos[2], photos[3]])  # a stranger, the person, strangers
    monkeypatch.setattr(Base, "draw", lambda self, **options: [next(looks)])
    person = home / "people" / "person-0"
    arguments = ["personalize", "--pretrained_model_name_or_path", home / "base", "--down", home / "down"]
    arguments += ["--instance_data_dir", person / "1.png", "--validation_data_dir", person / "0.png", "--patience", "2"]
    arguments += ["--validation_embedder", "dlib", "--validation_prompt", "a photo", "--validation_steps", "2"]
    arguments += ["--output_dir", tmp_path / "out", "--max_train_steps", "50", *SMALL]
    assert main(list(map(str, arguments))) == 0
    assert hub.load_subject(tmp_path / "out").config.facts["steps"] == 4
    assert next(looks, None) is None


def test_dlib_scores_held_out_people_of_stage_1(home: Path, tmp_path: Path) -> None:
    arguments = ["meta-train", "--pretrained_model_name_or_path", home / "base", "--train_data_dir", home / "people"]
    arguments += ["--validation_data_dir", home / "people", "--validation_embedder", "dlib", "--validation_prompt", "a"]
    arguments += [
        "--validation_steps",
        "1",
        "--max_train_steps",
        "1",
        "--warmup_steps",
        "0",
        "--rank",
        "2",
        "--meta_rank",
        "4",
        *SMALL,
    ]
    assert main(list(map(str, [*arguments, "--output_dir", tmp_path / "out"]))) == 0
    [record] = map(json.loads, (tmp_path / "out" / "validation" / "scores.jsonl").read_text().splitlines())
    assert record["score"] == 0 and len(record["subjects"]) == 2  # noise has no face, which counts as 0
