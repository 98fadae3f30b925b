# SPDX-License-Identifier: Apache-2.0
"""Stage 1 learns held-out subjects on the way, says how well, and is the same as without."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from PIL import Image, ImageChops, ImageOps
from safetensors.torch import load_file

from peft_metalora.data import load_image
from peft_metalora.errors import ConfigError, CorruptFileError, NoFaceError, NoImagesError
from peft_metalora.training.meta_train import meta_train
from peft_metalora.training.personalize import personalize_many
from peft_metalora.training.stage_1 import MetaTraining
from peft_metalora.training.watching import held_out
from peft_metalora.training.watching.of_a_down import DownValidation
from peft_metalora.training.watching.tracking import Trackers
from peft_metalora.training.watching.validation_scores import HeldOutLoss
from peft_metalora.tuner import set_slots
from peft_metalora.tuner.on_model import meta_lora_layers
from pipelines_tiny import save_tiny_flux
from training_tiny import Brightness, meta_config, personal_config, tiny_base, tiny_examples, write_people


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("down-validation")
    save_tiny_flux(folder / "base")
    write_people(folder / "people", subjects=3)
    write_people(folder / "others", subjects=2, each=3)
    return folder


def config_for(place, output, **changes):
    settings = {"pretrained_model_name_or_path": str(place / "base"), "train_data_dir": str(place / "people")}
    settings |= {"max_train_steps": 8, "bucket_size": 2, "warmup_steps": 1, "lr_scheduler": "cosine"}
    return meta_config(**{**settings, **changes}, output_dir=str(output))


def looking(place, **changes):
    settings = {"validation_steps": 2, "validation_data_dir": str(place / "others"), "validation_train_steps": 3}
    return {**settings, **changes}


def records(folder):
    return [json.loads(line) for line in (folder / "validation" / "scores.jsonl").read_text().splitlines()]


def assert_same_down(one, other):
    found, expected = (load_file(folder / "adapter_model.safetensors") for folder in (one, other))
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_training_does_not_notice_and_a_score_and_a_picture_are_written(place, tmp_path):
    meta_train(config_for(place, tmp_path / "blind"), progress=False)
    drawing = looking(place, validation_prompt=["a photo", "a red shirt"], validation_steps=4)
    meta_train(config_for(place, tmp_path / "seeing", **drawing), progress=False)
    assert_same_down(tmp_path / "seeing", tmp_path / "blind")
    found = records(tmp_path / "seeing")
    assert [record["step"] for record in found] == [4, 8]
    for record in found:
        assert list(record["subjects"]) == ["person-0", "person-1"]
        assert record["score"] == pytest.approx(sum(record["subjects"].values()) / 2)
    assert len({record["score"] for record in found}) == 2
    names = sorted(path.name for path in (tmp_path / "seeing" / "validation").iterdir())
    assert names == ["00004.png", "00008.png", "scores.jsonl"]
    sheet = Image.open(tmp_path / "seeing" / "validation" / "00008.png")
    assert sheet.size == (3 * 16, 2 * 16)
    cells = [[sheet.crop((16 * x, 16 * y, 16 * x + 16, 16 * y + 16)) for x in range(3)] for y in range(2)]
    for row, person in zip(cells, ("person-0", "person-1"), strict=True):
        reference = load_image(place / "others" / person / "0.png")
        assert ImageChops.difference(row[0], ImageOps.fit(reference, (16, 16))).getbbox() is None
        assert ImageChops.difference(row[1], row[2]).getbbox() is not None
    # One noise for all, so a difference between the rows is a difference between the subjects.
    assert ImageChops.difference(cells[0][1], cells[1][1]).getbbox() is not None


def test_the_score_is_that_of_stage_2_on_the_down_as_it_is_by_then(tmp_path):
    run = MetaTraining(tiny_base(), tiny_examples(tiny_base()), meta_config(max_train_steps=3))
    for _ in run.steps():
        pass
    base, learned, scored = tiny_base(), tiny_examples(run.base, 2, seed=5), tiny_examples(run.base, 1, seed=6)
    config = meta_config(output_dir=str(tmp_path), validation_steps=3, validation_train_steps=4)
    run.config = config
    held = held_out.HeldOut(["a", "b"], [], [], [scored, scored])
    layers = dict(meta_lora_layers(run.base.denoiser))
    validation = DownValidation(run, held, learned, Trackers(config, run.processes), 0)
    assert validation.look(2) is None
    before = torch.get_rng_state()
    found = validation.look(3)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(layer is layers[path] for path, layer in meta_lora_layers(run.base.denoiser))
    assert run.base.denoiser.training and list(run.base.denoiser.peft_config) == ["stage_1"]
    again = personal_config(max_train_steps=4, train_batch_size=1)
    alone = personalize_many(base, learned, again, run.down(), progress=False)
    scores = []
    for slot in (0, 1):
        set_slots(base.denoiser, [slot])
        scores.append(HeldOutLoss(base, scored, seed=0)())
    assert alone.steps_done == 4 and scores[0] != scores[1]
    assert found == pytest.approx(sum(scores) / 2, rel=1e-6)


def test_resumed_goes_on_with_its_scores(place, tmp_path):
    settings = looking(place, checkpointing_steps=3, resume_from_checkpoint="latest")
    meta_train(config_for(place, tmp_path / "whole", **settings), progress=False)
    whole = records(tmp_path / "whole")
    assert [record["step"] for record in whole] == [2, 4, 6, 8]
    # As if killed in step 5: the score of step 4 is there, the last checkpoint is that of step 3.
    for path in (tmp_path / "whole" / "checkpoint-6").iterdir():
        path.unlink()
    (tmp_path / "whole" / "adapter_model.safetensors").rename(tmp_path / "adapter_model.safetensors")
    meta_train(config_for(place, tmp_path / "whole", **settings), progress=False)
    assert_same_down(tmp_path / "whole", tmp_path)
    assert records(tmp_path / "whole") == whole
    # Bug: lines that are none of scores were a JSONDecodeError, TypeError or KeyError.
    scores = tmp_path / "whole" / "validation" / "scores.jsonl"
    for text in ("{", "5", '{"score": 1}', "[" * 50000, '{"step": "a"}'):
        scores.write_text(text + "\n")
        with pytest.raises(CorruptFileError, match=r"scores.jsonl, found: .*Remove it"):
            held_out._records(scores, 8)  # private: a run for each text would be seconds
    with pytest.raises(CorruptFileError, match=r"scores.jsonl, found: .*Remove it"):
        meta_train(config_for(place, tmp_path / "whole", **settings), progress=False)


def test_a_reference_that_is_gone_by_then_ends_no_run(place, tmp_path, monkeypatch):
    """Bug: each validation opened the references for its sheet, and ended a run of hours when one had gone."""
    others = shutil.copytree(place / "others", tmp_path / "others")
    config = config_for(place, tmp_path / "out", **looking(place, validation_prompt=["a photo"], validation_steps=4))
    see = held_out.Watch.see

    def gone(self, number):
        shutil.rmtree(others, ignore_errors=True)
        see(self, number)

    monkeypatch.setattr(held_out.Watch, "see", gone)
    meta_train(replace(config, validation_data_dir=str(others)), progress=False)
    assert (tmp_path / "out" / "validation" / "00008.png").is_file()


def test_some_subjects_of_the_training_data_are_held_out(place, tmp_path):
    held = {"validation_steps": 3, "validation_subjects": 1, "validation_train_steps": 2, "bucket_size": None}
    result = meta_train(config_for(place, tmp_path / "a", **held, max_train_steps=3), progress=False)
    assert (result.facts["subjects"], result.facts["images"]) == (2, 4)
    assert [list(record["subjects"]) for record in records(tmp_path / "a")] == [["person-2"]]
    with pytest.raises(ConfigError, match="more subjects than the 4 that are held out for validation, found 3"):
        meta_train(config_for(place, tmp_path / "b", validation_steps=3), progress=False)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("broken", ["0.png", "2.png"])
def test_photos_of_held_out_people_that_cannot_be_used_are_left_out_and_named(place, tmp_path, monkeypatch, broken):
    """Bug: one of them ended the run when all others were encoded, where one to train on is left out with a warning."""
    people = tmp_path / "people"
    shutil.copytree(place / "others", people)
    (people / "person-1" / broken).write_bytes(b"no image")
    monkeypatch.setattr(held_out, "face_embedder", lambda name, setting: Brightness())
    settings = looking(place, validation_data_dir=str(people), validation_prompt=["a photo"], max_train_steps=4)
    settings |= {"validation_embedder": "training_tiny:Brightness", "encoder": "latents", "encoder_train_steps": 2}
    settings |= {"code_size": 6, "encoder_width": 8, "encoder_hidden": 16, "encoder_subjects_per_batch": 2}
    with pytest.warns(UserWarning, match=f"skipped 1 of 6 images: .*person-1/{broken} which cannot be decoded"):
        meta_train(config_for(place, tmp_path / "a", **settings), progress=False)
    assert all(list(record["subjects"]) == ["person-0", "person-1"] for record in records(tmp_path / "a"))
    for path in (people / "person-1").glob("*.png"):
        path.write_bytes(b"no image")
    with pytest.raises(NoImagesError, match="a readable image of each subject, found none of person-1"):
        meta_train(config_for(place, tmp_path / "b", **settings), progress=False)


def test_score_of_a_face_model(place, tmp_path, monkeypatch):
    monkeypatch.setattr(held_out, "face_embedder", lambda name, setting: Brightness())
    settings = looking(
        place, validation_prompt=["a photo"], validation_embedder="training_tiny:Brightness", validation_subjects=1
    )
    meta_train(config_for(place, tmp_path / "a", **settings, max_train_steps=4), progress=False)
    found = records(tmp_path / "a")
    assert len(found) == 2
    assert all(0.9 < record["score"] <= 1 for record in found)


def test_held_out_photos_without_a_face_are_named_before_the_first_step(place, tmp_path, monkeypatch):
    """Bug: the first validation ended the run, and what was learned by then was lost."""

    class Blind(Brightness):
        def embed(self, images):
            seen = super().embed(images)
            return replace(seen, found=torch.zeros_like(seen.found))

    monkeypatch.setattr(held_out, "face_embedder", lambda name, setting: Blind())
    monkeypatch.setattr(MetaTraining, "_loss", lambda self: pytest.fail("a step"))
    settings = looking(place, validation_prompt=["a photo"], validation_embedder="training_tiny:Brightness")
    told = r"a face in one of the 2 photo\(s\) that validation compares with, found none in .*person-0.*: add a photo"
    with pytest.raises(NoFaceError, match=told):
        meta_train(config_for(place, tmp_path / "a", **settings), progress=False)


def test_settings_that_cannot_be():
    # Bug: with prompts alone nothing was drawn, and nobody told.
    for name, value in {"validation_data_dir": "people", "validation_subjects": 2, "validation_prompt": ["a"]}.items():
        with pytest.raises(ConfigError, match=f"{name} needs validation_steps, found none: say how often"):
            meta_config(**{name: value})
    with pytest.raises(ConfigError, match="give validation_steps and validation_prompt too"):
        meta_config(validation_steps=2, validation_embedder="insightface")
