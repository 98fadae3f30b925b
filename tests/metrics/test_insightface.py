# SPDX-License-Identifier: Apache-2.0
"""insightface's real code (`FaceAnalysis`: routing, detection, alignment, recognition) on models built here."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from face_models import SIDE, TILE, write_pack
from peft_metalora.errors import EmbedderUnavailableError, MetricInputError
from peft_metalora.metrics import InsightFaceEmbedder, pose_difference, r_facesim

CPU = ["CPUExecutionProvider"]
WHITE, YELLOW, PINK = (255, 255, 255), (255, 255, 0), (255, 0, 255)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("insightface")
    write_pack(folder / "models" / "tiny")
    return folder


@pytest.fixture(scope="module")
def embedder(root: Path) -> InsightFaceEmbedder:
    return InsightFaceEmbedder("tiny", root=root, providers=CPU, det_size=(SIDE, SIDE))


def scene(*faces: tuple[int, int, tuple[int, int, int]]) -> Image.Image:
    """A black picture with coloured tiles at (row, column)."""
    pixels = np.zeros((SIDE, SIDE, 3), dtype=np.uint8)
    for row, column, colour in faces:
        pixels[row * TILE : (row + 1) * TILE, column * TILE : (column + 1) * TILE] = colour
    return Image.fromarray(pixels)


def direction(colour: tuple[int, int, int]) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.tensor(colour) / 127.5 - 1, dim=0)


@pytest.mark.parametrize("colour", [WHITE, YELLOW, PINK])
def test_one_face_is_found_aligned_and_embedded(embedder: InsightFaceEmbedder, colour: tuple[int, int, int]) -> None:
    seen = embedder.embed([scene((1, 2, colour))])
    assert seen.found.tolist() == [True] and seen.vectors.dtype == torch.float32
    assert float(seen.vectors[0] @ direction(colour)) > 0.98
    assert float(seen.vectors[0].norm()) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("places", [((0, 0), (2, 2)), ((2, 2), (0, 0)), ((3, 0), (1, 2))])
def test_the_largest_of_several_faces_is_taken(embedder: InsightFaceEmbedder, places) -> None:
    large, small = places
    seen = embedder.embed([scene((*large, WHITE), (*small, YELLOW))])
    assert float(seen.vectors[0] @ direction(WHITE)) > 0.98


def test_no_face_is_not_found_and_scores_0(embedder: InsightFaceEmbedder) -> None:
    seen = embedder.embed([scene(), scene((0, 1, WHITE))])
    assert seen.found.tolist() == [False, True] and not seen.vectors[0].any()
    similarity = r_facesim(seen, embedder.embed([scene((2, 2, WHITE))]))
    assert similarity.per_image.tolist() == pytest.approx([0, 1], abs=0.02) and similarity.miss_rate == 0.5


def test_only_missing_faces(embedder: InsightFaceEmbedder) -> None:
    seen = embedder.embed([scene()])
    assert seen.vectors.shape == (1, 3) and not seen.found.any()


def test_images_of_other_sizes_and_tensors(embedder: InsightFaceEmbedder) -> None:
    picture = scene((1, 1, PINK))
    large = embedder.embed([picture.resize((2 * SIDE, 2 * SIDE), Image.Resampling.NEAREST)])
    tensor = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 255
    assert large.found.all() and float(large.vectors[0] @ direction(PINK)) > 0.98
    assert torch.equal(embedder.embed(tensor).vectors, embedder.embed([picture]).vectors)


def test_together_as_alone(embedder: InsightFaceEmbedder) -> None:
    pictures = [scene((0, 0, WHITE)), scene(), scene((3, 3, PINK)), scene((1, 0, YELLOW), (2, 2, PINK))]
    alone = torch.cat([embedder.embed([picture]).vectors for picture in pictures])
    assert torch.equal(embedder.embed(pictures).vectors, alone)


def test_faces_are_recognised_in_batches_where_the_file_takes_several(tmp_path: Path, embedder, monkeypatch) -> None:
    several = InsightFaceEmbedder(str(write_pack(tmp_path, "None")), providers=CPU, batch_size=2)
    sizes = []
    recognise = several._recogniser.get_feat  # a batch leaves no other trace
    monkeypatch.setattr(several._recogniser, "get_feat", lambda faces: sizes.append(len(faces)) or recognise(faces))
    pictures = [scene((0, 0, WHITE)), scene(), scene((3, 3, PINK)), scene((1, 0, YELLOW), (2, 2, PINK))]
    seen, alone = several.embed(pictures), embedder.embed(pictures)
    assert sizes == [2, 1] and seen.found.tolist() == [True, False, True, True]
    assert torch.allclose(seen.vectors, alone.vectors, atol=1e-6)


def test_landmarks_are_those_of_the_largest_face_and_give_its_pose(embedder: InsightFaceEmbedder) -> None:
    seen = embedder.embed([scene((1, 2, WHITE)), scene(), scene((1, 2, WHITE), (3, 0, YELLOW))])
    assert seen.landmarks.shape == (3, 5, 2) and torch.equal(seen.landmarks[0], seen.landmarks[2])
    inside = seen.landmarks[0] - torch.tensor([2 * TILE, TILE])
    assert (inside > 0).all() and (inside < TILE).all()
    assert seen.landmarks[1].isnan().all()
    differences = pose_difference(seen.landmarks, seen.landmarks[:1])
    assert differences[[0, 2]].tolist() == pytest.approx([0, 0], abs=1e-6) and differences[1].isnan()


def test_a_folder_serves_as_a_pack(root: Path) -> None:
    seen = InsightFaceEmbedder(str(root / "models" / "tiny"), providers=CPU).embed([scene((1, 1, WHITE))])
    assert seen.found.all()


def test_a_pack_in_a_folder_of_its_own_name_is_explained(tmp_path: Path) -> None:
    write_pack(tmp_path / "models" / "tiny" / "tiny")
    with pytest.raises(EmbedderUnavailableError, match="not into a folder of the same name inside it"):
        InsightFaceEmbedder("tiny", root=tmp_path, providers=CPU)


def test_a_pack_without_a_recogniser(tmp_path: Path) -> None:
    (write_pack(tmp_path) / "rec.onnx").unlink()
    with pytest.raises(EmbedderUnavailableError, match="found no recognition model"):
        InsightFaceEmbedder(str(tmp_path), providers=CPU)


def test_without_insightface_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "insightface.app", None)
    with pytest.raises(EmbedderUnavailableError, match=r"pip install 'peft-metalora\[face\]'") as caught:
        InsightFaceEmbedder()
    assert isinstance(caught.value, ImportError)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "found none"),
        (torch.zeros(1, 1, 8, 8), r"found torch.float32 \(1, 1, 8, 8\)"),
        (torch.zeros(3, 8, 8), r"\(3, 8, 8\)"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "torch.uint8"),
        (torch.full((1, 3, 8, 8), 2.0), r"pixels in \[0, 1\], found 2 to 2"),
        (torch.full((1, 3, 8, 8), -1.0), r"found -1 to -1"),
        (torch.full((1, 3, 8, 8), float("nan")), "found nan to nan"),
    ],
)
def test_bad_input(embedder: InsightFaceEmbedder, images, message: str) -> None:
    with pytest.raises(MetricInputError, match=message):
        embedder.embed(images)
