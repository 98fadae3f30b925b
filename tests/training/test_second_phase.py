# SPDX-License-Identifier: Apache-2.0
"""meta-train with an encoder: stage 1, then the Down is taught to read, in one run that can stop anywhere."""

from __future__ import annotations

import json
import shutil

import pytest
import yaml
from PIL import Image

from peft_metalora import load_down
from peft_metalora.cli import main
from peft_metalora.encoder import EncoderConfig, load_reader
from peft_metalora.errors import ConfigError, TooFewImagesError, TrainingError
from peft_metalora.training.engine.slot_gradients import SlotGradients
from peft_metalora.training.engine.stacked import RowGradients
from peft_metalora.training.engine.state import write_state
from peft_metalora.training.meta_train import meta_train
from peft_metalora.training.stage_settings import TrainEncoderConfig, second_phase
from peft_metalora.training.train_encoder import train_encoder
from peft_metalora.tuner.on_model import meta_lora_layers
from training_tiny import meta_config, write_people

pytestmark = pytest.mark.filterwarnings("ignore:[0-9] people. an encoder learns so few")
OF_ENCODER = {"code_size": 6, "encoder_width": 8, "encoder_hidden": 16, "random_flip": False, "resolution": 16}
WEIGHTS = "adapter_model.safetensors"
READER = "subject_space.safetensors", "subject_encoder.safetensors", "encoder_config.json"


def both_phases(place, output, **changes):
    settings = {"pretrained_model_name_or_path": str(place / "base"), "train_data_dir": str(place / "people")}
    settings |= {"encoder": "latents", "encoder_train_steps": 4, "encoder_subjects_per_batch": 2, **OF_ENCODER}
    settings |= {"encoder_images_per_subject": 1, "device": "cpu"}
    return meta_config(**{**settings, **changes}, output_dir=str(output))


def content(folder):
    """What is equal in equal runs: of the Down its fingerprint, as its file says how many seconds it took."""
    return [load_down(folder).fingerprint, *((folder / name).read_bytes() for name in READER)]


@pytest.mark.parametrize("views", [1, 0])
@pytest.mark.parametrize("flips", [True, False])
def test_it_is_stage_1_and_then_train_encoder(place, tmp_path, flips, views):
    """Bug: mirror images of stage 1, which are its default and not train-encoder's, were the encoder's too."""
    write_people(tmp_path / "others", subjects=2, each=2)
    looks = {"validation_steps": 2, "validation_data_dir": str(tmp_path / "others"), "validation_train_steps": 1}
    shared = {"random_flip": flips, "views_per_image": views, **looks}
    result = meta_train(both_phases(place, tmp_path / "both", **shared), progress=False)
    meta_train(both_phases(place, tmp_path / "down", encoder=None, **shared), progress=False)
    alone = TrainEncoderConfig(
        down=str(tmp_path / "down"),
        train_data_dir=str(place / "people"),
        output_dir=str(tmp_path / "reading"),
        max_train_steps=4,
        subjects_per_batch=2,
        images_per_subject=1,
        device="cpu",
        views_per_image=views,
        validation_steps=2,
        validation_data_dir=str(tmp_path / "others"),
        **OF_ENCODER,
    )
    train_encoder(alone, progress=False)
    scores = [(tmp_path / name / "validation" / "scores.jsonl").read_text() for name in ("both/encoder", "reading")]
    assert scores[0] == scores[1]
    assert content(tmp_path / "both") == content(tmp_path / "reading")
    down = load_down(tmp_path / "both")
    assert down.config.facts["encoder_subjects"] == result.facts["encoder_subjects"] == 3
    assert down.config.facts["subjects"] == 3 and down.config.facts["encoder_recipe"]["images_per_subject"] == 1
    # What is returned holds the Down, as without an encoder.
    assert set(result.denoiser.peft_config) == {"default"} and not result.denoiser.training
    assert all("default" in layer.metalora_down for _, layer in meta_lora_layers(result.denoiser))


def test_a_new_run_leaves_no_photos_of_people_who_left(place, tmp_path):
    """Bug: sheets with photos of people whom an older run held out stayed beside a Down that never saw them."""
    out = tmp_path / "out"
    watched = {"validation_steps": 2, "validation_train_steps": 1, "validation_subjects": 1, "validation_prompt": ["a"]}
    meta_train(both_phases(place, out, **watched, checkpointing_steps=2), progress=False)
    assert (out / "validation" / "00002.png").exists() and (out / "encoder" / "validation" / "00002.png").exists()
    meta_train(both_phases(place, out, encoder=None), progress=False)
    assert {path.name for path in out.iterdir()} == {"adapter_config.json", WEIGHTS}


@pytest.mark.parametrize("killed", ["stage 1", "encoder"])
def test_killed_in_either_phase_it_goes_on_where_it_was(place, tmp_path, monkeypatch, killed):
    meta_train(both_phases(place, tmp_path / "whole"), progress=False)
    settings = {"checkpointing_steps": 1, "checkpoints_total_limit": 2, "resume_from_checkpoint": "latest"}
    config = both_phases(place, tmp_path / "killed", **settings)
    with monkeypatch.context() as patch:
        if killed == "encoder":
            original, calls = RowGradients.__call__, []

            def third_fails(self, inputs):
                calls.append(None)
                if len(calls) == 3:
                    raise RuntimeError("killed")
                return original(self, inputs)

            patch.setattr(RowGradients, "__call__", third_fails)
            with pytest.raises(RuntimeError, match="killed"):
                meta_train(config, progress=False)
            # The Down is there already and cannot read yet.
            assert load_down(tmp_path / "killed").config.facts["steps"] == 4
            assert not (tmp_path / "killed" / READER[0]).exists()
            assert sorted(path.name for path in (tmp_path / "killed" / "encoder").iterdir()) == [
                "checkpoint-1",
                "checkpoint-2",
            ]
        else:
            meta_train(both_phases(place, tmp_path / "killed", **settings), progress=False)
            shutil.rmtree(tmp_path / "killed" / "encoder")
            shutil.rmtree(tmp_path / "killed" / "checkpoint-4")
            for name in (WEIGHTS, *READER):
                (tmp_path / "killed" / name).unlink()
    result = meta_train(config, progress=False)
    assert content(tmp_path / "killed") == content(tmp_path / "whole")
    assert set(result.denoiser.peft_config) == {"default"} and result.facts["encoder_steps"] == 4
    again = both_phases(
        place, tmp_path / "killed", resume_from_checkpoint="encoder/checkpoint-3", encoder_learning_rate=0.5
    )
    with pytest.raises(ConfigError, match="other values of encoder_learning_rate"):
        meta_train(again, progress=False)


def test_killed_in_stage_1_it_goes_on_there_beside_an_older_runs_second_phase(place, tmp_path, monkeypatch):
    """Bug: the older run's checkpoint of the second phase was taken for this run's, and refused."""
    settings, out = {"checkpointing_steps": 1, "learning_rate": 0.02}, tmp_path / "killed"
    meta_train(both_phases(place, tmp_path / "whole", **settings), progress=False)
    meta_train(both_phases(place, out, checkpointing_steps=1), progress=False)

    def write_and_die(folder, *arguments):
        write_state(folder, *arguments)
        if folder.name == "checkpoint-3":
            raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr("peft_metalora.training.engine.state.write_state", write_and_die)
        with pytest.raises(RuntimeError, match="killed"):
            meta_train(both_phases(place, out, **settings), progress=False)
    assert (out / "encoder" / "checkpoint-4").exists()
    with pytest.warns(UserWarning, match=r"going on from .*checkpoint-3"):
        meta_train(both_phases(place, out, **settings, resume_from_checkpoint="latest"), progress=False)
    assert content(out) == content(tmp_path / "whole")


def test_both_phases_are_looked_at(place, tmp_path):
    write_people(tmp_path / "others", subjects=2, each=2)
    looking = {"validation_steps": 2, "validation_data_dir": str(tmp_path / "others"), "validation_train_steps": 1}
    settings = {**looking, "validation_prompt": ["a photo"], "report_to": "tensorboard"}
    meta_train(both_phases(place, tmp_path / "out", **settings), progress=False)
    for folder in (tmp_path / "out", tmp_path / "out" / "encoder"):
        lines = (folder / "validation" / "scores.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == [2, 4]
        assert Image.open(folder / "validation" / "00004.png").size == (2 * 16, 2 * 16)
        assert list((folder / "logs").rglob("events*"))


def test_photos_of_several_shapes_and_fresh_views(place, tmp_path):
    people = write_people(tmp_path / "people", subjects=3, each=3, sizes=[(24, 24), (40, 24)])
    shapes = {"train_data_dir": str(people), "aspect_ratio_buckets": "auto", "resolution": 32}
    meta_train(both_phases(place, tmp_path / "shapes", **shapes), progress=False)
    settings = {"views_per_image": 0, "checkpointing_steps": 2, "train_data_dir": str(people)}
    meta_train(both_phases(place, tmp_path / "fresh", **settings), progress=False)
    whole = content(tmp_path / "fresh")
    shutil.rmtree(tmp_path / "fresh" / "encoder" / "checkpoint-4")
    meta_train(both_phases(place, tmp_path / "fresh", **settings, resume_from_checkpoint="latest"), progress=False)
    assert content(tmp_path / "fresh") == whole
    for name in ("shapes", "fresh"):
        down = load_down(tmp_path / name)
        assert load_reader(tmp_path / name, down, lambda pixels: pixels[:, :1].repeat(1, 4, 1, 1)[..., ::4, ::4])


def test_a_run_of_the_command_line_and_of_a_file(place, tmp_path, capsys):
    config = both_phases(place, tmp_path / "out", checkpointing_steps=4)
    changed = {"pretrained_model_name_or_path", "train_data_dir", "output_dir", "rank", "meta_rank", "warmup_steps"}
    changed |= {"max_train_steps", "subjects_per_batch", "learning_rate", "device", *OF_ENCODER}
    settings = {name: getattr(config, name) for name in changed}
    settings |= {name: getattr(config, name) for name in vars(config) if name.startswith("encoder_")}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    assert main(["meta-train", "--config", str(tmp_path / "run.yaml"), "--encoder", "latents"]) == 0
    assert "wrote the Down of 3 subjects with its encoder to" in capsys.readouterr().out
    meta_train(config, progress=False)
    assert (tmp_path / "out" / READER[0]).exists()


def test_defaults_are_the_encoders_own():
    """Settings are read without torch, and so stand beside the dataclass that an encoder is made from."""
    made, asked = EncoderConfig(), TrainEncoderConfig(down="down", output_dir="out")
    assert (asked.encoder, asked.resolution, asked.code_size) == (made.source, made.resolution, made.code_size)
    assert (asked.encoder_width, asked.encoder_hidden, asked.encoder_dropout) == (made.width, made.hidden, made.dropout)
    assert (asked.face_margin, asked.face_align) == (made.face_margin, made.face_align)
    second = second_phase(meta_config(encoder="latents"), "down", "out")
    for name in ("max_train_steps", "learning_rate", "lr_warmup_steps", "subjects_per_batch", "images_per_subject"):
        assert getattr(second, name) == getattr(asked, name)


def test_what_cannot_be_is_said_before_stage_1(place, tmp_path):
    with pytest.raises(ConfigError, match="encoder must be one of"):
        meta_train(both_phases(place, tmp_path / "out", encoder="eyes"), progress=False)
    with pytest.raises(ConfigError, match="code_size must be a whole number of at least 1"):
        both_phases(place, tmp_path / "out", code_size=0)
    alone = write_people(tmp_path / "alone", subjects=3, each=1)
    with pytest.raises(TooFewImagesError, match="give more photos"):
        meta_train(both_phases(place, tmp_path / "out", train_data_dir=str(alone)), progress=False)
    assert not (tmp_path / "out").exists()


def test_a_second_phase_that_diverges_leaves_the_down_and_says_so(place, tmp_path, monkeypatch):
    original = SlotGradients.__call__
    monkeypatch.setattr(
        SlotGradients, "__call__", lambda self, inputs: tuple(part * float("nan") for part in original(self, inputs))
    )
    with pytest.raises(
        TrainingError, match=r"finite .* in step 1.*The Down .*out is whole, but reads no photos; no check"
    ):
        meta_train(both_phases(place, tmp_path / "out", gradient_checkpointing=True), progress=False)
    assert load_down(tmp_path / "out").config.facts["steps"] == 4
