# SPDX-License-Identifier: Apache-2.0
"""Every score that the command line can ask for reaches results and report, with real code and tiny models."""

from __future__ import annotations

import json
import math
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel, ViTConfig, ViTModel

from face_models import SIDE, TILE, write_pack
from metrics.test_clip_dino import dino_v2
from metrics.test_clip_dino import tokenizer as clip_tokenizer
from peft_metalora.cli import main
from peft_metalora.data import load_image, read_subjects
from peft_metalora.demo.faces import write_dataset
from peft_metalora.demo.judges import MATCH_THRESHOLD
from peft_metalora.errors import EmbedderUnavailableError, MetricInputError
from peft_metalora.evaluation.cells import read_cells
from peft_metalora.evaluation.evaluation_settings import EvaluateConfig
from peft_metalora.evaluation.figures import reaches, summary
from peft_metalora.evaluation.judging import DemoJudge, FaceJudge, judge_for
from peft_metalora.metrics import Embeddings

WHITE, YELLOW, PINK = (255, 255, 255), (255, 255, 0), (255, 0, 255)
PROMPTS = ("a photo of {subject}, smiling", "a photo of {subject}, facing left")


def scene(*faces: tuple[int, int, tuple[int, int, int]]) -> Image.Image:
    """A black picture with coloured tiles at (row, column): each is a face to the tiny detector."""
    pixels = np.zeros((SIDE, SIDE, 3), dtype=np.uint8)
    for row, column, colour in faces:
        pixels[row * TILE : (row + 1) * TILE, column * TILE : (column + 1) * TILE] = colour
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of tiny models, by setting."""
    home = tmp_path_factory.mktemp("models")
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    clip = CLIPModel(
        CLIPConfig(
            text_config={**size, "vocab_size": 9, "max_position_embeddings": 8, "eos_token_id": 1, "pad_token_id": 2},
            vision_config={**size, "image_size": 32, "patch_size": 8},
            projection_dim=8,
        )
    )
    dino = ViTModel(ViTConfig(**size, image_size=224, patch_size=56))
    for part, name in ((clip, "clip"), (clip_tokenizer(), "clip"), (dino, "dino"), (dino_v2(), "dinov2")):
        part.save_pretrained(home / name)
    write_pack(home / "faces")
    return {
        "clip_model": str(home / "clip"),
        "dino_model": str(home / "dino"),
        "dinov2_model": str(home / "dinov2"),
        "face_pack": str(home / "faces"),
    }


@pytest.fixture
def mean_difference(monkeypatch: pytest.MonkeyPatch) -> str:
    module = types.ModuleType("distances")
    module.mean_difference = lambda: lambda first, second: (first - second).abs().mean((1, 2, 3))
    monkeypatch.setitem(sys.modules, "distances", module)
    return "distances:mean_difference"


def test_all_scores_of_images_made_elsewhere(tmp_path: Path, models: dict[str, str], mean_difference: str) -> None:
    people = {"ann": WHITE, "bob": YELLOW}
    for name, colour in people.items():
        (tmp_path / "people" / name).mkdir(parents=True)
        for number, place in enumerate(((1, 1), (2, 2), (0, 3))):
            scene((*place, colour)).save(tmp_path / "people" / name / f"{number}.png")
    (tmp_path / "prompts.yaml").write_text(json.dumps({"poses": list(PROMPTS)}))
    drawn = {
        ("ann", 0, 0): scene((3, 1, WHITE)),
        ("ann", 0, 1): scene((3, 1, WHITE)),
        ("ann", 1, 0): scene(),  # nobody
        ("ann", 1, 1): scene((0, 0, WHITE), (2, 2, YELLOW)),  # the larger of two is ann
        ("bob", 0, 0): scene((1, 1, PINK)),  # somebody else
        ("bob", 0, 1): scene((1, 1, YELLOW)),
        ("bob", 1, 0): scene((1, 1, YELLOW)),  # and the last one was not drawn
    }
    for (name, number, seed), image in drawn.items():
        path = tmp_path / "system" / name / f"{number:03d}-{seed:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    arguments = ["evaluate", "--data", str(tmp_path / "people"), "--output", str(tmp_path / "out"), "--seeds", "2"]
    arguments += ["--prompts", str(tmp_path / "prompts.yaml"), "--images", f"system={tmp_path / 'system'}"]
    arguments += ["--embedder", "insightface", "--face_providers", "CPUExecutionProvider", "--device", "cpu"]
    arguments += ["--lpips", mean_difference, "--coverage", "r_facesim=0.9", "unmeasured=1"]
    for name, folder in models.items():
        arguments += [f"--{name}", folder]
    assert main(arguments) == 0

    lines = (tmp_path / "out" / "results.jsonl").read_text().splitlines()
    rows = {(row["subject"], row["number"], row["seed"]): row for row in map(json.loads, lines)}
    assert [key for key, row in rows.items() if not row["found"]] == [("ann", 1, 0), ("bob", 1, 1)]
    for key in drawn:
        assert {"clip_t", "clip_i", "dino", "dinov2", "diversity", "pose_difference", "adherence"} <= rows[key].keys()
    assert rows["ann", 1, 0]["r_facesim"] == 0 and rows["ann", 1, 0]["pose_difference"] == 0
    assert rows["ann", 1, 1]["r_facesim"] > 0.9 and rows["bob", 0, 0]["r_facesim"] < 0.5
    assert rows["bob", 0, 1]["dino"] == pytest.approx(1, abs=1e-4) == rows["bob", 0, 1]["dinov2"]  # the reference again
    assert rows["ann", 0, 0]["diversity"] == 0 < rows["ann", 1, 0]["diversity"] == rows["ann", 1, 1]["diversity"]
    assert rows["bob", 1, 0]["diversity"] == 0  # nothing to compare it with
    assert [key for key, row in rows.items() if row["covers"]] == [
        ("ann", 0, 0), ("ann", 0, 1), ("ann", 1, 1), ("bob", 0, 1), ("bob", 1, 0)
    ]  # fmt: skip

    figures = summary(read_cells(tmp_path / "out", ["system"]), thresholds={"r_facesim": 0.9})["system"]
    assert figures["failed"].value == 0.25 and figures["coverage"].value == 1
    page, table = (tmp_path / "out" / "report.html").read_text(), (tmp_path / "out" / "report.md").read_text()
    labels = "pose difference", "CLIP-T", "CLIP-I", "DINO", "DINOv2", "diversity", "coverage", "failed"
    assert all(f"| {label} |" in table and f"<th>{label}</th>" in page for label in labels)
    assert "1 of 8 images are missing, 1 show no face" in page


class Poses:
    """A face embedder that says where the nose is by the red of the first pixel; black is no face."""

    def embed(self, images) -> Embeddings:
        red = torch.tensor([float(image.getpixel((0, 0))[0]) for image in images])
        marks = torch.tensor([[30.0, 40], [70, 40], [50, 60], [35, 80], [65, 80]]).repeat(len(red), 1, 1)
        marks[:, 2, 0] += red
        marks[red == 0] = float("nan")
        return Embeddings(torch.ones(len(red), 1) * (red > 0)[:, None], red > 0, marks)


def test_a_copied_pose_is_0_another_is_its_distance_and_no_face_counts_as_copied() -> None:
    pictures = [Image.new("RGB", (8, 8), (red, 0, 0)) for red in (10, 30, 0)]
    judge = FaceJudge(Poses())
    rows = judge.score(pictures, ["a"] * 3, judge.know(pictures[0], [pictures[1]]))
    assert [row["pose_difference"] for row in rows] == pytest.approx([0, 0.5, 0])
    assert [row["found"] for row in rows] == [True, True, False]
    assert "diversity" not in rows[0] and "clip_t" not in rows[0]


def test_the_ceiling_of_two_photos_is_that_of_both() -> None:
    judge = FaceJudge(Poses())
    pictures = [Image.new("RGB", (8, 8), (red, 0, 0)) for red in (10, 30, 0)]
    assert judge.real_ceiling(judge.know(pictures[0], pictures[1:2])) == 1
    assert math.isnan(judge.real_ceiling(judge.know(pictures[0], pictures[2:])))


def test_photos_of_a_person_are_looked_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: they were embedded anew for every method, number of steps and edit, and once more for the ceiling."""
    seen: list[int] = []

    class Counting(Poses):
        def embed(self, images) -> Embeddings:
            seen.extend(image.getpixel((0, 0))[0] for image in images)
            return super().embed(images)

    module = types.ModuleType("counting")
    module.faces = Counting
    monkeypatch.setitem(sys.modules, "counting", module)
    for folder, name, red in [("people", "0", 1), ("people", "1", 2), ("people", "2", 3), ("made", "000-000", 9)]:
        path = tmp_path / folder / "ann" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (red, 0, 0)).save(path)
    (tmp_path / "prompts.yaml").write_text(json.dumps({"poses": [PROMPTS[0]]}))
    arguments = ["evaluate", "--data", str(tmp_path / "people"), "--output", str(tmp_path / "out"), "--images"]
    arguments += [f"{name}={tmp_path / 'made'}" for name in ("one", "two")]
    arguments += ["--embedder", "counting:faces", "--prompts", str(tmp_path / "prompts.yaml"), "--device", "cpu"]
    assert main(arguments) == 0
    assert sorted(seen) == [1, 2, 3, 9, 9]


def test_an_image_covers_its_prompt_when_all_measured_scores_are_reached() -> None:
    row = {"found": True, "r_facesim": 0.5, "clip_t": 0.2}
    assert reaches(row, {"r_facesim": 0.5, "adherence": 1.0}) and not reaches(row, {"r_facesim": 0.5, "clip_t": 0.3})
    assert not reaches({**row, "found": False}, {})


def test_people_whose_photos_show_no_face_are_named(tmp_path: Path, models: dict[str, str]) -> None:
    (tmp_path / "people" / "ann").mkdir(parents=True)
    for number in range(2):
        photo = scene()
        photo.putpixel((number, 0), (1, 2, 3))  # no copies of each other
        photo.save(tmp_path / "people" / "ann" / f"{number}.png")
    (tmp_path / "made" / "ann").mkdir(parents=True)
    scene((1, 1, WHITE)).save(tmp_path / "made" / "ann" / "000-000.png")
    from peft_metalora.evaluation.protocol import evaluate

    config = EvaluateConfig(
        data=str(tmp_path / "people"),
        output=str(tmp_path / "out"),
        images=[f"made={tmp_path / 'made'}"],
        embedder="insightface",
        face_pack=models["face_pack"],
        device="cpu",
    )
    with pytest.raises(MetricInputError, match="ann: expected a face in at least one of the other photos"):
        evaluate(config, progress=False)


def test_models_that_are_not_there_are_said_to_be_so(tmp_path: Path) -> None:
    settings = {"data": "d", "output": "o", "method": ["base"], "seeds": 2, "device": "cpu"}
    with pytest.raises(EmbedderUnavailableError, match="expected the weights of"):
        judge_for(EvaluateConfig(**settings, dinov2_model=str(tmp_path)))
    with pytest.raises(ValueError, match="lpips must be alex, vgg, squeeze or module:function, found 'no:such'"):
        judge_for(EvaluateConfig(**settings, lpips="no:such"))


def test_the_embedded_domain_has_a_line_between_people(tmp_path) -> None:
    """Bug: a report on the embedded base had no match rate."""
    subjects = read_subjects(write_dataset(tmp_path / "people", "tune", 8, 3))
    photos = [[load_image(photo.path) for photo in subject.photos] for subject in subjects]
    judge, prompt = DemoJudge(), "a photo of a person, smiling"
    known = judge.know(photos[0][0], photos[0][1:2])
    others = [one for own in photos[1:] for one in own]
    rows = judge.score([photos[0][2], *others], [prompt] * (1 + len(others)), known)
    assert rows[0]["match"] == 1 and sum(row["match"] for row in rows[1:]) <= 1
    assert all(row["match"] == (row["r_facesim"] >= MATCH_THRESHOLD) for row in rows)
    strict = DemoJudge(match_threshold=0.999)
    assert strict.score([photos[0][2]], [prompt], known)[0]["match"] == 0
