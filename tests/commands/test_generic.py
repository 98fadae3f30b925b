# SPDX-License-Identifier: Apache-2.0
"""A base that no family knows, through every command, with the class of `examples/z_image_base.py`."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import ZImageTransformer2DModel

from peft_metalora import enable_meta_lora, load_down, load_subject
from peft_metalora.bases import FAMILIES
from peft_metalora.bases.parts import Parts
from peft_metalora.checkpoint.config_file import read_config
from peft_metalora.cli import main
from peft_metalora.commands.serve import _checked
from peft_metalora.errors import ConfigError
from peft_metalora.evaluation.bench import Bench
from peft_metalora.evaluation.evaluation_settings import EvaluateConfig
from peft_metalora.service.artist import load_copy
from peft_metalora.service.serve_settings import ServeConfig
from pipelines_tiny import tiny_z_image_pipeline
from training_tiny import write_people

EXAMPLE = Path(__file__).parents[2] / "examples" / "z_image_base.py"
OWN = "--generic", f"{EXAMPLE}:ZImage"
SHORT = "--device", "cpu", "--resolution", "32"
TAUGHT = (
    "--max_train_steps", "2", "--warmup_steps", "1", "--rank", "1", "--meta_rank", "2", "--subjects_per_batch", "2",
    "--encoder", "latents", "--encoder_train_steps", "1", "--code_size", "4", "--encoder_width", "8",
    "--encoder_hidden", "8", "--encoder_subjects_per_batch", "2",
)  # fmt: skip
DRAWN = "--prompt", "a photo", "--num_inference_steps", "1", "--max_sequence_length", "8"
READ = "meta-lora:start=encoder"
LEARNED = "--max_train_steps", "1", "--views_per_image", "1", "--instance_prompt", "a photo"


def metalora(*arguments):
    return main([str(one) for one in arguments])


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A base, people, and a Down that reads photos: `family` as the package makes it, `own` by the class."""
    folder = tmp_path_factory.mktemp("generic")
    tiny_z_image_pipeline().save_pretrained(folder / "base")
    write_people(folder / "people", subjects=2)
    teach = "meta-train", "--pretrained_model_name_or_path", folder / "base", "--train_data_dir", folder / "people"
    assert metalora(*teach, *SHORT, *TAUGHT, "--output_dir", folder / "family") == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.delitem(FAMILIES, "ZImagePipeline")
        assert metalora(*teach, *SHORT, *TAUGHT, *OWN, "--output_dir", folder / "own") == 0
    return folder


@pytest.fixture
def unknown(monkeypatch):
    monkeypatch.delitem(FAMILIES, "ZImagePipeline")


@pytest.fixture
def photo(home):
    return home / "people" / "person-0" / "0.png"


def test_a_down_is_the_family_s_and_says_the_class(home):
    own, family = load_down(home / "own"), load_down(home / "family")
    assert own.tensors.keys() == family.tensors.keys()
    assert all(torch.equal(tensor, family.tensors[name]) for name, tensor in own.tensors.items())
    assert read_config(home / "own").encoder_fingerprint == read_config(home / "family").encoder_fingerprint
    assert own.config.facts["generic"] == "z_image_base:ZImage" and "generic" not in family.config.facts


def test_from_a_photo_to_pictures(home, photo, unknown, tmp_path, monkeypatch, capsys):
    """Read, learned, drawn, exported: pictures are those of the family, and what comes next names the class."""
    monkeypatch.chdir(tmp_path)
    assert metalora("read", "--down", home / "own", "--photos", photo, *SHORT[:2], *OWN, "--output_dir", "ann") == 0
    told = [line.partition("metalora ")[2] for line in capsys.readouterr().out.splitlines() if "metalora " in line]
    draw = shlex.split(next(line for line in told if line.startswith("generate")))
    assert draw[draw.index("--generic") + 1] == OWN[1]
    learn = "personalize", "--down", home / "own", "--instance_data_dir", photo, *SHORT, *LEARNED, *OWN
    assert metalora(*learn, "--output_dir", "bob") == 0
    for who in ("ann", "bob"):
        assert load_subject(who).config.facts["generic"] == "z_image_base:ZImage"
    assert metalora("generate", "--subject", "ann", "bob", *SHORT, *DRAWN, *OWN, "--output_dir", "drawn") == 0
    assert metalora("export", "--subject", "bob", "--output", "lora") == 0
    reading = "generate", "--down", home / "own", "--photo", photo, *SHORT, *DRAWN
    assert metalora(*reading, *OWN, "--output_dir", "own") == 0
    monkeypatch.setitem(FAMILIES, "ZImagePipeline", ("z_image", "ZImage"))
    assert metalora(*reading, "--down", home / "family", "--output_dir", "family") == 0
    assert Path("own/0-00-00.png").read_bytes() == Path("family/0-00-00.png").read_bytes()
    assert Path("drawn/ann-00-00.png").read_bytes() == Path("family/0-00-00.png").read_bytes()
    pipe = tiny_z_image_pipeline()
    pipe.load_lora_weights("lora")


def test_the_other_commands_take_it(home, photo, unknown, tmp_path, capsys):
    teach = "train-encoder", "--down", home / "own", "--train_data_dir", home / "people", *SHORT, *OWN, *TAUGHT[-8:-6]
    small = "--encoder_width", "8", "--encoder_hidden", "8", "--subjects_per_batch", "2", "--max_train_steps", "1"
    assert metalora(*teach, *small, "--output_dir", tmp_path / "again") == 0
    assert read_config(tmp_path / "again").facts["generic"] == "z_image_base:ZImage"
    read = "read", "--down", home / "own", "--photos", photo, "--output_dir", tmp_path / "out"
    assert metalora("estimate", *read, *OWN) == 0 and "GPU memory" in capsys.readouterr().out
    judged = {"data": str(home / "people"), "output": str(tmp_path), "base": str(home / "base"), "device": "cpu"}
    judged |= {"embedder": "training_tiny:Brightness", "method": [READ], "steps": [0], "down": str(home / "own")}
    assert type(Bench(EvaluateConfig(**judged, generic=OWN[1]), []).base).__module__ == "z_image_base"
    with pytest.raises(ConfigError, match="made with"):
        _ = Bench(EvaluateConfig(**judged), []).base
    base, _ = load_copy(ServeConfig(people=str(tmp_path), down=str(home / "own"), device="cpu", generic=OWN[1]), "draw")
    assert type(base).__module__ == "z_image_base"


def test_a_down_made_so_wants_the_class_and_starts_none(home, photo, tmp_path, monkeypatch, capsys):
    """Even where the family is known: a reader would see other latents. The name in the file is never imported."""
    (tmp_path / "theirs.py").write_text("from pathlib import Path\nPath(__file__).with_name('started').touch()")
    monkeypatch.syspath_prepend(tmp_path)
    shutil.copytree(home / "own", tmp_path / "down")
    file = tmp_path / "down" / "adapter_config.json"
    config = json.loads(file.read_text())
    config["facts"]["generic"] = "theirs:Base"
    file.write_text(json.dumps(config))
    out, down = ("--output_dir", tmp_path / "out"), ("--down", tmp_path / "down")
    draw = "generate", *down, "--photo", photo, "--prompt", "a photo"
    learn = "personalize", *down, "--instance_data_dir", photo, *LEARNED
    teach = "train-encoder", *down, "--train_data_dir", home / "people"
    for command in (("read", *down, "--photos", photo), draw, learn, teach, ("estimate", *draw)):
        assert metalora(*command, *SHORT[:2], *out) == 2
        told = capsys.readouterr().err
        assert f"{tmp_path / 'down'}: expected the class that it was made with, 'theirs:Base', as --generic" in told
    with pytest.raises(ConfigError, match="made with"):
        load_copy(ServeConfig(people=str(tmp_path), down=str(tmp_path / "down"), device="cpu"), "draw")
    pipe = enable_meta_lora(tiny_z_image_pipeline())
    pipe.load_meta_lora(tmp_path / "down")
    with pytest.raises(ConfigError, match="made with"):
        pipe.read_subject(photo)
    assert pipe.read_subject(photo, "ann", generic=OWN[1]) == "ann"
    assert not (tmp_path / "started").exists() and not (tmp_path / "out").exists()


def test_a_run_goes_on_with_its_own_class_alone(home, tmp_path, capsys):
    teach = "meta-train", "--pretrained_model_name_or_path", home / "base", "--train_data_dir", home / "people"
    runs = *teach, *SHORT, *TAUGHT[:10], "--output_dir", tmp_path, "--checkpointing_steps", "1"
    assert metalora(*runs, *OWN) == 0
    assert metalora(*runs, "--resume_from_checkpoint", "checkpoint-1") == 2
    assert "expected the class of the base of the run that wrote" in capsys.readouterr().err
    assert metalora(*runs, "--resume_from_checkpoint", "checkpoint-1", *OWN) == 0


@pytest.mark.parametrize(
    "attribute, flags, message",
    [
        ("_supports_gradient_checkpointing", (), "--gradient_checkpointing needs a denoiser that can, found a ZImage"),
        ("_repeated_blocks", ("--offload", "group"), "--offload 'group' needs a denoiser that names its blocks"),
    ],
)
def test_what_a_denoiser_cannot_is_refused_before_weights_are_read(
    attribute, flags, message, home, tmp_path, monkeypatch, capsys
):
    """Bug: a denoiser that computes nothing again was a traceback, and one of no named blocks was never streamed."""
    monkeypatch.setattr(Parts, "bring", lambda *_: pytest.fail("weights are loaded"))
    monkeypatch.setattr(ZImageTransformer2DModel, attribute, [] if flags else False)
    monkeypatch.setattr(ZImageTransformer2DModel, "_no_split_modules", [])
    teach = "meta-train", "--pretrained_model_name_or_path", home / "base", "--train_data_dir", home / "people"
    assert metalora(*teach, *SHORT, *OWN, "--gradient_checkpointing", *flags, "--output_dir", tmp_path / "out") == 2
    assert message in capsys.readouterr().err


def test_a_service_looks_at_the_class_before_ray_starts(home, tmp_path, monkeypatch):
    """Its copies may run in other folders."""
    monkeypatch.chdir(EXAMPLE.parent)
    asked = {"people": str(tmp_path), "down": str(home / "own")}
    assert _checked(ServeConfig(**asked, generic="z_image_base.py:ZImage")).generic == OWN[1]
    with pytest.raises(ConfigError, match="No module named 'nobody_such'"):
        _checked(ServeConfig(**asked, generic="nobody_such:Base"))
