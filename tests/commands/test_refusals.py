# SPDX-License-Identifier: Apache-2.0
"""Whatever can be refused is, before a base is opened: not even its configurations are read, or fetched."""

from __future__ import annotations

import shutil

import pytest
from PIL import Image

from peft_metalora import save_down
from peft_metalora.bases.parts import Parts
from peft_metalora.cli import main
from training_tiny import save_tiny_down, teach_to_read, with_tiny_down, write_people

SHORT = ["--device", "cpu"]
BASE = ["--pretrained_model_name_or_path", "{home}/base"]
NO_CAPTION = "expected a caption for "
NO_CLASS = "metalora: --generic must be module:Class or file.py:Class, found 'nobody:Such': ModuleNotFoundError"
OVER_THE_BASE = "expected an output apart from --pretrained_model_name_or_path, found '{home}/base'"
MANY = ["--train_data_dir", "{home}/people", "--output_dir", "{out}"]
ONE = ["--instance_data_dir", "{home}/people/person-0", "--output_dir", "{out}", "--down", "{home}/down"]
READ = ["--photos", "{home}/people/person-0", "--output_dir", "{out}", "--down", "{home}/reading"]
DRAW = ["--prompt", "a photo", "--output_dir", "{out}"]
CLASS = ["--generic", "nobody:Such"]
PHOTO = ["--photo", "{home}/ann.png"]
VALIDATION = ["--validation_steps", "1", "--validation_subjects", "1", "--validation_prompt", "a photo"]
JUDGED = [
    "--data",
    "{home}/people",
    "--output",
    "{out}",
    "--base",
    "{home}/base",
    "--embedder",
    "training_tiny:Brightness",
]
JUDGED += ["--method", "base"]
ENCODER = ["train-encoder", "--down", "{home}/down"]
REFUSED = {
    "meta-train: no caption": (["meta-train", *BASE, *MANY, "--train_data_dir", "{home}/silent"], NO_CAPTION),
    "meta-train: no caption of somebody held out": (
        ["meta-train", *BASE, *MANY, "--validation_steps", "1", "--validation_data_dir", "{home}/silent"],
        NO_CAPTION,
    ),
    "meta-train: output": (["meta-train", *BASE, *MANY, "--output_dir", "{home}/ann"], "found a subject"),
    "meta-train: cell": (["meta-train", *BASE, *MANY, "--quantize", "nf4"], "needs a GPU"),
    "meta-train: detector": (["meta-train", *BASE, *MANY, "--face_crop", "nobody:Such"], "nobody:Such"),
    "meta-train: judge": (
        ["meta-train", *BASE, *MANY, *VALIDATION, "--validation_embedder", "nobody:Such"],
        "nobody:Such",
    ),
    "meta-train: optimiser": (["meta-train", *BASE, *MANY, "--optimizer", "Such"], "found 'Such'"),
    "meta-train: class": (["meta-train", *BASE, *MANY, *CLASS], NO_CLASS),
    "meta-train: checkpoint": (
        ["meta-train", *BASE, *MANY, "--resume_from_checkpoint", "{home}/nowhere"],
        "expected training_state.safetensors in {home}/nowhere, found none",
    ),
    "train-encoder: no caption": ([*ENCODER, *MANY, "--train_data_dir", "{home}/silent"], NO_CAPTION),
    "train-encoder: Down": ([*ENCODER, *MANY, "--down", "{home}/nowhere"], "{home}/nowhere"),
    "train-encoder: output": ([*ENCODER, *MANY, "--output_dir", "{home}/ann"], "found a subject"),
    "train-encoder: over the base": ([*ENCODER, *MANY, "--output_dir", "{home}/base"], OVER_THE_BASE),
    "train-encoder: cell": ([*ENCODER, *MANY, "--quantize", "nf4"], "needs a GPU"),
    "train-encoder: eyes": ([*ENCODER, *MANY, "--encoder", "ears"], "'ears'"),
    "train-encoder: class": ([*ENCODER, *MANY, *CLASS], NO_CLASS),
    "personalize: no caption": (["personalize", *ONE, "--instance_data_dir", "{home}/ann.png"], NO_CAPTION),
    "personalize: no photo": (
        ["personalize", *ONE, "--instance_data_dir", "{home}/none.png", "--instance_prompt", "a photo"],
        "none.png",
    ),
    "personalize: Down": (["personalize", *ONE, "--down", "{home}/nowhere"], "{home}/nowhere"),
    "personalize: a Down that cannot read": (["personalize", *ONE, "--start", "encoder"], "a Down with an encoder"),
    "personalize: output": (["personalize", *ONE, "--output_dir", "{home}/ann"], "--overwrite to replace it"),
    "personalize: over the base": (["personalize", *ONE, "--output_dir", "{home}/base"], OVER_THE_BASE),
    "personalize: cell": (["personalize", *ONE, "--quantize", "nf4"], "needs a GPU"),
    "personalize: optimiser": (["personalize", *ONE, "--optimizer", "Such"], "found 'Such'"),
    "personalize: class": (["personalize", *ONE, *CLASS], NO_CLASS),
    "personalize: rank": (["personalize", *ONE, "--rank", "3"], "--rank must be the Down's, 2"),
    "read: no photo": (["read", *READ, "--photos", "{home}/none.png"], "none.png"),
    "read: Down": (["read", *READ, "--down", "{home}/nowhere"], "{home}/nowhere"),
    "read: a Down that cannot": (["read", *READ, "--down", "{home}/down"], "a Down with an encoder"),
    "read: output": (["read", *READ, "--output_dir", "{home}/ann"], "--overwrite to replace it"),
    "read: over the base": (["read", *READ, "--output_dir", "{home}/base"], OVER_THE_BASE),
    "read: detector": (["read", *READ, "--face_crop", "nobody:Such"], "nobody:Such"),
    "read: class": (["read", *READ, *CLASS], NO_CLASS),
    "generate: subject": (["generate", *BASE, *DRAW, "--subject", "{home}/nowhere"], "{home}/nowhere"),
    "generate: Down": (
        ["generate", *BASE, *DRAW, *PHOTO, "--down", "{home}/nowhere"],
        "{home}/nowhere",
    ),
    "generate: a Down that cannot read": (
        ["generate", *BASE, *DRAW, *PHOTO, "--down", "{home}/down"],
        "a Down with an encoder",
    ),
    "generate: no photo in a folder": (
        ["generate", *BASE, *DRAW, "--photo", "{home}/empty", "--down", "{home}/reading"],
        "{home}/empty",
    ),
    "generate: output": (["generate", *BASE, *DRAW, "--output_dir", "{home}/ann.png"], "ann.png"),
    "generate: cell": (["generate", *BASE, *DRAW, "--offload", "sequential"], "accelerate brings layers to a GPU only"),
    "generate: class": (["generate", *BASE, *DRAW, *CLASS], NO_CLASS),
    "estimate: class": (["estimate", "generate", *BASE, *DRAW, *CLASS], NO_CLASS),
    "generate: detector": (
        ["generate", *BASE, *DRAW, *PHOTO, "--down", "{home}/reading", "--face_crop", "nobody:Such"],
        "nobody:Such",
    ),
    "generate: device": (["generate", *BASE, *DRAW, "--device", "toaster"], "--device must be 'cpu', 'cuda'"),
    "personalize: device": (["personalize", *ONE, "--device", "xla:3"], "one that is here, found 'xla:3'"),
    "likeness: judge": (
        ["likeness", "{home}/ann.png", "{home}/ann.png", "--embedder", "training_tiny:Bright"],
        "has no attribute 'embed'",
    ),
    "demo-data: nobody": (["demo-data", "{out}", "--subjects", "0"], "expected at least one subject, found 0"),
    "demo-data: no size": (["demo-data", "{out}", "--size", "0"], "expected at least one pixel, found 0"),
    "evaluate: nobody": (["evaluate", *JUDGED, "--data", "{home}/empty"], "{home}/empty"),
    "evaluate: Down": (["evaluate", *JUDGED, "--method", "meta-lora:down={home}/nowhere"], "{home}/nowhere"),
    "evaluate: no Down": (["evaluate", *JUDGED, "--method", "meta-lora"], "needs a Down"),
    "evaluate: a Down that cannot read": (
        ["evaluate", *JUDGED, "--steps", "0", "--method", "meta-lora:down={home}/down,start=encoder"],
        "a Down with an encoder",
    ),
    "evaluate: judge": (["evaluate", *JUDGED, "--embedder", "nobody:Such"], "nobody:Such"),
    "evaluate: class": (["evaluate", *JUDGED, *CLASS], NO_CLASS),
    "evaluate: output": (["evaluate", *JUDGED, "--output", "{home}/ann.png"], "ann.png"),
    "evaluate: cell": (["evaluate", *JUDGED, "--offload", "model"], "take turns"),
}  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """People with captions and without, a Down, one that reads, Ann; nobody writes into them."""
    folder = tmp_path_factory.mktemp("refusals")
    write_people(folder / "people")
    write_people(folder / "silent", subjects=2)
    for place in (folder / "silent").iterdir():
        (place / "metadata.jsonl").unlink()
    save_tiny_down(folder, "down", "reading")
    teach_to_read(folder / "reading")
    (folder / "empty").mkdir()
    Image.new("RGB", (24, 24), "grey").save(folder / "ann.png")
    arguments = ["personalize", *ONE, "--instance_data_dir", "{home}/people/person-1", "--max_train_steps", "1"]
    given = [one.format(home=folder, out=folder / "ann") for one in [*arguments, *SHORT, "--resolution", "16"]]
    assert main(given) == 0
    return folder


@pytest.mark.parametrize("case", REFUSED)
def test_it_is_refused_in_a_sentence_and_no_base_is_opened(home, case, tmp_path, monkeypatch, capsys):
    """Bug: a missing caption, a Down that cannot read or a detector that is not there cost a download of 30 GB.

    Bug: a person was written into the folder of the base that the Down names.
    """
    arguments, message = REFUSED[case]
    monkeypatch.setattr(Parts, "pipeline", lambda *_: pytest.fail("a base is opened"))
    before = sorted(home.rglob("*"))
    out = tmp_path / "out"
    short = [] if "--device" in arguments or arguments[0] in ("likeness", "demo-data") else SHORT
    assert main([one.format(home=home, out=out) for one in [*arguments, *short]]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert message.format(home=home) in error
    assert not out.exists() and sorted(home.rglob("*")) == before


def test_a_base_of_another_name_is_refused_before_its_weights_and_a_twin_is_said(home, tmp_path, monkeypatch, capsys):
    """Bug: that a base is another one was noticed when it had been loaded whole, and that it is a twin nobody saw."""
    for name in ("turbo", "other"):
        shutil.copytree(home / "base", tmp_path / "a" / name)
    monkeypatch.chdir(tmp_path)
    pipe = with_tiny_down(0)
    save_down("down", pipe.transformer, "faces", base_model="a/raw", facts={"fits": ["a/turbo"]})
    teach_to_read(tmp_path / "down")
    photo = str(home / "people" / "person-0" / "0.png")
    learn = ["personalize", "--down", "down", "--instance_data_dir", photo, "--max_train_steps", "1"]
    commands = {
        "personalize": [*learn, "--views_per_image", "1", "--resolution", "16"],
        "read": ["read", "--down", "down", "--photos", photo],
        "generate": ["generate", "--down", "down", "--photo", photo, "--prompt", "a photo"],
    }
    for command in commands.values():
        on = [*command, *SHORT, "--output_dir", "out", "--pretrained_model_name_or_path"]
        with monkeypatch.context() as patch:
            patch.setattr(Parts, "bring", lambda *_: pytest.fail("weights are loaded"))
            assert main([*on, "a/other"]) == 2
        assert "expected the base model a/raw, found a/other" in capsys.readouterr().err
    assert main([*commands["read"], *SHORT, "--output_dir", "ann", "--pretrained_model_name_or_path", "a/turbo"]) == 0
    assert "warning: down was trained on a/raw and says that it fits a/turbo" in capsys.readouterr().err
