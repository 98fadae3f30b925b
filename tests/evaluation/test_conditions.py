# SPDX-License-Identifier: Apache-2.0
"""References made worse: learned instead of the good one, compared with good photos, reported by strength."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from peft_metalora.cli import main
from peft_metalora.data import load_image, read_subjects
from peft_metalora.data.degrade import DEGRADATIONS, degrade
from peft_metalora.demo.judges import load_judge
from peft_metalora.errors import ConfigError
from peft_metalora.evaluation.conditions import Condition, bad_reference, conditions_of
from peft_metalora.evaluation.figures import degraded, degraded_table


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("people")
    assert main(["demo-data", str(folder), "--split", "held-out", "--subjects", "1", "--images_per_subject", "3",
                 "--conditions"]) == 0  # fmt: skip
    return folder


def test_each_is_learned_drawn_after_the_last_step_and_reported(people: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.yaml").write_text('poses: ["a photo of {subject}, facing left"]\n')
    arguments = ["evaluate", "--data", str(people), "--output", str(tmp_path / "out"), "--device", "cpu"]
    arguments += ["--prompts", str(tmp_path / "prompts.yaml"), "--num_inference_steps", "2", "--views_per_image", "2"]
    arguments += ["--steps", "1", "2", "--method", "base", "--method", "lora:lr=1e-2", "--degrade", "grey=1", "yaw"]
    assert main(arguments) == 0
    lines = (tmp_path / "out" / "results.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [(row["method"], row.get("condition"), row.get("strength"), row["steps"]) for row in rows] == [
        ("base", None, None, 0),
        ("lora:lr=1e-2", None, None, 1),
        ("lora:lr=1e-2", None, None, 2),
        ("lora:lr=1e-2", "grey", 1.0, 2),
        ("lora:lr=1e-2", "yaw", 0.5, 2),
        ("lora:lr=1e-2", "yaw", 1.0, 2),
    ]
    images = [(tmp_path / "out" / row["file"]).read_bytes() for row in rows]
    assert len(set(images)) == len(images)
    grey = load_image(tmp_path / "out" / "degraded" / "grey=1.0" / "references" / "held-out-0000.png")
    assert grey.tobytes() == degrade(load_image(people / "held-out-0000" / "0.png"), "grey", 1.0).tobytes()
    good = load_image(tmp_path / "out" / "base" / "held-out-0000" / "reference.png")
    assert good.tobytes() == load_image(people / "held-out-0000" / "0.png").tobytes()
    table = (tmp_path / "out" / "report.md").read_text()
    assert "## Bad references" in table and "| yaw 0.5 |" in table and "| good |" in table
    page = (tmp_path / "out" / "report.html").read_text()
    assert "yaw: strength" in page and "grey: strength" in page
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("degraded/*/*/*/cell.json")}
    assert len(before) == 3 and main(arguments) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_mask_is_learned_with_and_another_mask_is_another_cell(people: Path, tmp_path: Path) -> None:
    """Bug: what was made worse lost its mask, and an evaluation did not notice that a mask had come or changed."""
    data = shutil.copytree(people, tmp_path / "people")
    (tmp_path / "prompts.yaml").write_text('poses: ["a photo of {subject}, facing left"]\n')
    arguments = ["evaluate", "--data", str(data), "--output", str(tmp_path / "out"), "--device", "cpu"]
    arguments += ["--prompts", str(tmp_path / "prompts.yaml"), "--num_inference_steps", "2", "--views_per_image", "1"]
    arguments += ["--steps", "2", "--method", "lora:lr=1e-1", "--degrade", "grey=1"]

    def drawn() -> list[bytes]:
        assert main(arguments) == 0
        return [path.read_bytes() for path in sorted((tmp_path / "out").rglob("00002/*.png"))]

    without = drawn()
    half = Image.new("L", (64, 64))
    half.paste(255, (0, 0, 32, 64))
    half.save(data / "held-out-0000" / "0.mask.png")
    masked = drawn()
    assert len(masked) == 2 and all(one != other for one, other in zip(masked, without, strict=True))


def test_a_photo_takes_the_place_of_a_filter_and_brings_its_caption(people: Path, tmp_path: Path) -> None:
    subject = read_subjects(people)[0]
    photo = bad_reference(people, subject, Condition("yaw", 1.0), tmp_path)
    assert photo.path == people / "held-out-0000" / "conditions" / "yaw=1.0.png" and photo.reference
    assert "facing right, neutral" in photo.caption
    assert load_judge().read([load_image(photo.path)])[0]["yaw"] == "right"
    assert not list(tmp_path.iterdir())
    filtered = bad_reference(people, subject, Condition("blur", 0.5), tmp_path)
    assert filtered.path.parent == tmp_path and filtered.caption == subject.split()[0].caption
    (people / "held-out-0000" / "conditions" / "blur=0.5.jpg").write_bytes(b"a real one")
    assert bad_reference(people, subject, Condition("blur", 0.5), tmp_path).path.suffix == ".jpg"
    assert len(subject.photos) == len(read_subjects(people)[0].photos) == 3  # those are none of the other photos


def test_all_means_every_filter_at_two_strengths(people: Path) -> None:
    subjects = read_subjects(people)
    found = conditions_of(["all", "yaw=1.0"], people, subjects)
    assert len(found) == 2 * len(DEGRADATIONS) + 1 and str(found[0]) == "blur=0.5" and str(found[-1]) == "yaw=1.0"


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["../blur"], "degrade must be NAME or NAME=STRENGTH,STRENGTH, found '../blur'"),
        (["blur=2"], "strengths above 0 and up to 1, found '2'"),
        (["blur=a lot"], "found 'a lot'"),
        (["rain"], r"expected one of blur, .* found no .*held-out-0000/conditions/rain=0.5.png"),
        (["yaw=0.75"], "yaw=0.75.png"),
        (["blur", "all"], "each condition once"),
    ],
)
def test_what_cannot_be_shown_is_refused(people: Path, texts: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        conditions_of(texts, people, read_subjects(people))


def cell(method: str, scores: list[float], **condition: object) -> dict:
    rows = [
        {"steps": 5, "found": True, "r_facesim": score, "face_sim": score, "number": n}
        for n, score in enumerate(scores)
    ]
    return {"method": method, "subject": "ann", "tags": {}, "rows": rows, "points": [], **condition}


def test_figures_by_strength_start_from_the_good_reference() -> None:
    good = [cell("a", [0.8, 0.6]), cell("b", [0.5, 0.5])]
    bad = [cell("a", [0.4, 0.2], condition="blur", strength=1.0), cell("b", [0.5, 0.3], condition="blur", strength=0.5)]
    found = degraded(good, bad)
    assert found["blur"]["a"][0.0].value == pytest.approx(0.7) and found["blur"]["a"][1.0].value == pytest.approx(0.3)
    assert found["blur"]["b"][0.5].value == pytest.approx(0.4)
    _, heads, rows = degraded_table(good, found)
    assert heads == ["R-FaceSim", "a", "b"] and [row[0] for row in rows] == ["good", "blur 0.5", "blur 1"]
    assert rows[1][1] == "" and rows[1][2] == "0.400"
