# SPDX-License-Identifier: Apache-2.0
"""People who do not exist: one person in a folder, no two alike, as stage 1 reads them; on the embedded base, too."""

from __future__ import annotations

import itertools
import runpy
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from PIL import Image

from peft_metalora import MetaTrainConfig, meta_train
from peft_metalora.data import read_subjects
from peft_metalora.demo.embedded import BASE
from peft_metalora.demo.judges import load_embedder
from peft_metalora.demo.scene import parse_caption
from peft_metalora.metrics import Embeddings
from pipelines_tiny import tiny_flux2_pipeline, tiny_flux_pipeline, tiny_qwen_image_pipeline

SCRIPT = Path(__file__).parents[2] / "examples" / "make_people.py"


@pytest.fixture(scope="module")
def script():
    return Namespace(**runpy.run_path(str(SCRIPT)))


class Colours:
    """A person is a colour; a picture that is all black shows nobody."""

    def embed(self, images):
        vectors = torch.tensor([image.convert("RGB").getpixel((0, 0)) for image in images]).float()
        return Embeddings(torch.nn.functional.normalize(vectors, dim=-1), vectors.any(1))


def painted(colours):
    """Draws the next colour, whatever is asked; what was asked is kept."""
    asked, turn = [], iter(colours)

    def draw(prompt, seed, reference):
        asked.append((prompt, seed, reference is not None))
        return Image.new("RGB", (8, 8), next(turn))

    return draw, asked


def settings(tmp_path, **changes):
    plain = {"output": str(tmp_path / "people"), "people": 2, "scenes": 1, "same": 0.9, "different": 0.5, "tries": 2}
    return Namespace(**{**plain, "seed": 0, **changes})


def test_a_face_decides_who_is_new_and_what_shows_them(script, tmp_path):
    """Bug: a folder with another person's picture in it, or one person in two folders."""
    colours = [
        "red",
        "lime",
        "red",
        "red",
        "black",
        "blue",
        "blue",
    ]  # Ann; a stranger, Ann; Ann again, nobody, Bob; Bob
    draw, asked = painted(colours)
    args = settings(tmp_path, tries=3)
    assert script.make_people(script.made_up, draw, Colours(), args) == (2, 0)
    people = read_subjects(args.output)
    assert [subject.tags["sex"] for subject in people] == ["female", "male"]
    for person, colour in zip(people, [(255, 0, 0), (0, 0, 255)], strict=True):
        assert [photo.load().getpixel((0, 0)) for photo in person.photos] == [colour, colour]
        assert [photo.reference for photo in person.photos] == [True, False]
        assert all(photo.caption.startswith("a photo of a person, ") for photo in person.photos)
    assert [with_reference for *_, with_reference in asked] == [False, True, True, False, False, False, True]
    assert len({seed for _, seed, _ in asked}) == len(asked)
    again, asked = painted([])
    assert script.make_people(script.made_up, again, Colours(), args) == (2, 0) and not asked


def test_somebody_who_cannot_be_drawn_is_given_up(script, tmp_path):
    draw, _ = painted(["red", "lime", "lime", *itertools.repeat("black", 2)])
    args = settings(tmp_path)
    assert script.make_people(script.made_up, draw, Colours(), args) == (0, 2)
    assert not Path(args.output).exists()


def test_a_pipeline_that_takes_a_reference_draws_with_and_without_one(script):
    pipe = tiny_flux2_pipeline()
    draw = script.drawer(pipe, pipe, height=64, width=64, num_inference_steps=1, max_sequence_length=8, strength=0.7)
    portrait = draw("a photo of a person", 0, None)
    scene, other = (draw("a red shirt", 1, reference) for reference in (portrait, Image.new("RGB", (64, 64), "red")))
    assert portrait.size == scene.size == (64, 64) and scene.tobytes() != other.tobytes()
    with pytest.raises(SystemExit, match="takes a reference image, found FluxPipeline"):
        script.drawer(tiny_flux_pipeline(), tiny_flux_pipeline())


def test_a_pipeline_whose_guidance_asks_for_a_negative_prompt_gets_an_empty_one(script):
    """Bug: portraits by Qwen-Image had no guidance."""
    pipe, size = tiny_qwen_image_pipeline(), {"height": 16, "width": 16, "num_inference_steps": 1}
    draw = script.drawer(pipe, tiny_flux2_pipeline(), **size)
    wanted = pipe("a red shirt", negative_prompt=" ", generator=torch.Generator().manual_seed(0), **size).images[0]
    assert draw("a red shirt", 0, None).tobytes() == wanted.tobytes()


def test_a_down_of_people_who_do_not_exist(monkeypatch, tmp_path, capsys):
    output = tmp_path / "people"
    arguments = ["--demo", "--output", output, "--people", 2, "--scenes", 2, "--steps", 6, "--tries", 9]
    monkeypatch.setattr(sys, "argv", ["make_people.py", *map(str, arguments)])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    assert "has 2 people; 0 were given up" in capsys.readouterr().out
    people = read_subjects(output, min_photos=3)
    vectors = [load_embedder().embed([photo.load() for photo in person.photos]).vectors for person in people]
    assert all(float((one[1:] @ one[0]).min()) >= 0.45 for one in vectors)
    assert float(vectors[0][0] @ vectors[1][0]) < 0.35
    assert all(parse_caption(photo.caption) for person in people for photo in person.photos)
    config = {"pretrained_model_name_or_path": str(BASE), "output_dir": str(tmp_path / "down"), "resolution": 64}
    config |= {"max_train_steps": 2, "warmup_steps": 1, "subjects_per_batch": 2, "balance_by": "sex", "device": "cpu"}
    down = meta_train(MetaTrainConfig(train_data_dir=str(output), **config), progress=False)
    assert down.facts["subjects"] == 2
