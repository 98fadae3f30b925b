# SPDX-License-Identifier: Apache-2.0
"""A script that says `torch.set_default_device("cuda")`, or sets a default dtype, gets what others get.

"meta" stands in for another device here: what is made there by mistake has no values, and what touches it fails.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import peft_metalora
from artefacts_tiny import with_down, write_pair
from peft_metalora import load_down, set_slots
from peft_metalora.checkpoint.space import SubjectSpace
from peft_metalora.encoder import EncoderConfig, Reader, make_encoder
from peft_metalora.evaluation.evaluation_settings import EvaluateConfig
from peft_metalora.evaluation.protocol import evaluate
from peft_metalora.pipelines.codes import CodeBook
from peft_metalora.training.meta_train import meta_train
from peft_metalora.training.personalize import personalize
from peft_metalora.training.stage_settings import TrainEncoderConfig
from peft_metalora.training.train_encoder import train_encoder
from training_tiny import meta_config, personal_config, save_tiny_down, write_people

ROOMS = ("checkpoint", "data", "encoder", "lora", "metrics", "pipelines")
MAKE_TENSORS = {"tensor", "zeros", "ones", "empty", "full", "arange", "linspace", "eye", "rand", "randn", "randint"}
MAKE_TENSORS |= {"randperm", "triu_indices", "tril_indices", "normal"}
LIKE_PARAMETERS = {"self.trunk(torch.zeros(1, *source.feature_shape))"}  # these may lie where the script wants them


@pytest.mark.parametrize("room", ROOMS)
def test_every_tensor_is_made_on_a_device_that_is_named(room):
    """Bug: tables of regions, codes and sums of scores were made on the script's device and met others on the CPU."""
    unnamed = []
    for path in (Path(peft_metalora.__file__).parent / room).rglob("*.py"):
        tree = ast.parse(path.read_text())
        exempt = {id(inner) for node in ast.walk(tree) if _text(node) in LIKE_PARAMETERS for inner in ast.walk(node)}
        for node in ast.walk(tree):
            made = isinstance(node, ast.Call) and _text(node.func).removeprefix("torch.") in MAKE_TENSORS
            if made and _text(node.func).startswith("torch.") and id(node) not in exempt:
                named = any(keyword.arg in ("device", None) for keyword in node.keywords)
                unnamed += [] if named else [f"{path.name}:{node.lineno} {_text(node)}"]
    assert not unnamed


def _text(node: ast.AST) -> str:
    return ast.unparse(node) if isinstance(node, ast.Attribute | ast.Call) else ""


def test_a_batch_of_several_subjects():
    """Bug: the index of the samples was made on the GPU, where it cannot be pinned: RuntimeError."""
    model, other = with_down(slots=3).eval(), with_down(slots=3).eval()
    x = torch.randn(2, 8)
    with torch.device("meta"):
        set_slots(model, [2, 0])
        found = model(x)
    set_slots(other, [2, 0])
    assert torch.equal(found, other(x)) and not torch.equal(found[0], found[1])


def test_codes(tmp_path):
    """Bug: a space around a Down had its mean on the CPU and its basis on the GPU, a blend met codes elsewhere; and
    where a script's default dtype was bfloat16, a code was rounded to that."""
    down = load_down(write_pair(tmp_path)[0])
    encoder = make_encoder(EncoderConfig(resolution=32, code_size=6, width=8, hidden=16), _shrunk)
    photo = Image.new("RGB", (32, 32), "teal")

    def codes():
        space = SubjectSpace.around(down, 6)
        read = Reader(space, encoder).codes([[photo]])[0][0]
        book = CodeBook(space)
        book.put("ann", read)
        row = torch.empty_like(space.mean)
        book.write("ann", row)
        return read, space.blend([read, -2 * read], [0.5, 0.5]), row

    expected = codes()
    with torch.device("meta"):
        elsewhere = codes()
    try:
        torch.set_default_dtype(torch.bfloat16)
        in_bfloat16 = codes()
    finally:
        torch.set_default_dtype(torch.float32)
    for found in (elsewhere, in_bfloat16):
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def _trained(home, output):
    """Each training on a tiny base, briefly, and an evaluation: what they write."""
    shared = {"pretrained_model_name_or_path": str(home / "base"), "device": "cpu"}
    many = {**shared, "train_data_dir": str(home / "people"), "validation_steps": 2, "validation_subjects": 1}
    encoder = {"down": str(home / "down"), "resolution": 16, "code_size": 6, "subjects_per_batch": 2}
    encoder |= {"encoder_width": 8, "encoder_hidden": 16, "max_train_steps": 2}
    person = {**shared, "down": str(home / "down"), "instance_data_dir": str(home / "people" / "person-0")}
    meta_train(meta_config(**many, output_dir=str(output / "down"), views_per_image=0), progress=False)
    train_encoder(TrainEncoderConfig(**many, **encoder, output_dir=str(output / "reading")), progress=False)
    personalize(personal_config(**person, output_dir=str(output / "ann"), start="mean"), progress=False)
    asked = {"data": str(home / "people"), "base": str(home / "base"), "embedder": "training_tiny:Brightness"}
    asked |= {"method": ["lora:r=1"], "steps": [1], "seeds": 1, "num_inference_steps": 1, "resolution": 16}
    asked |= {"device": "cpu", "degrade": ["noise=1.0"], "views_per_image": 1, "train_batch_size": 1}
    evaluate(EvaluateConfig(**asked, output=str(output / "evaluation")), progress=False)
    weights = {path: load_file(output / path) for path in _files(output, "*.safetensors")}
    assert len(weights) == 6
    return weights, [(output / path).read_bytes() for path in _files(output, "*.png")]


def _files(folder, pattern):
    return sorted(path.relative_to(folder) for path in folder.rglob(pattern))


@pytest.mark.filterwarnings("ignore:2 people. an encoder learns so few")
def test_training_and_evaluation(tmp_path):
    """Bug: where a script had set a default dtype or device, no training came past its first step."""
    save_tiny_down(tmp_path)
    write_people(tmp_path / "people")
    expected, pictures = _trained(tmp_path, tmp_path / "plain")
    try:
        torch.set_default_dtype(torch.float64)
        torch.set_default_device("meta")
        found, drawn = _trained(tmp_path, tmp_path / "other")
        assert torch.get_default_dtype() == torch.float64 and torch.get_default_device().type == "meta"
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert drawn == pictures and len(pictures) > 3
    for path, tensors in expected.items():
        assert all(torch.equal(found[path][name], tensor) for name, tensor in tensors.items()), path


def _shrunk(pixels: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.avg_pool2d(pixels, 4)
