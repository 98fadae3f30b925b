# SPDX-License-Identifier: Apache-2.0
"""Models come when they are needed and leave when they are done; a hull says what can be asked without weights."""

from __future__ import annotations

import gc
import os
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import T5EncoderModel

from peft_metalora.bases import base_for, load_base, open_base
from peft_metalora.bases.parts import is_hull
from peft_metalora.errors import BaseModelMismatchError
from peft_metalora.training.examples.encoding import encode_captions
from pipelines_tiny import PIPELINES, save_tiny_flux, tiny_flux_pipeline


def numbers(module):
    return dict(module.state_dict())


@pytest.mark.parametrize("family", PIPELINES)
def test_a_hull_says_what_is_asked_before_weights_are_there(family, tmp_path):
    made = PIPELINES[family]()
    made.save_pretrained(tmp_path)
    base, whole = open_base(tmp_path), load_base(tmp_path)
    models = [name for name, part in made.components.items() if isinstance(part, torch.nn.Module)]
    assert models and all(is_hull(getattr(base.pipeline, name)) for name in models)
    assert base.pixel_multiple == whole.pixel_multiple and base.max_sequence_length == whole.max_sequence_length
    assert base.target_modules == whole.target_modules
    shapes = {name: tensor.shape for name, tensor in numbers(whole.denoiser).items()}
    assert {name: tensor.shape for name, tensor in numbers(base.denoiser).items()} == shapes
    base.place("cpu", encoders=True)
    for name in models:
        part, own = getattr(base.pipeline, name), numbers(getattr(made, name))
        assert all(torch.equal(tensor, own[key]) for key, tensor in numbers(part).items())
        assert not part.training and not any(parameter.requires_grad for parameter in part.parameters())


def test_what_is_done_leaves_memory(tmp_path):
    base = open_base(save_tiny_flux(tmp_path))
    base.place("cpu", encoders=True, denoiser=False)
    assert is_hull(base.denoiser) and not is_hull(base.pipeline.text_encoder_2)
    before = encode_captions(base, ["a red shirt"])
    leaving = weakref.ref(base.pipeline.text_encoder_2)
    base.place("cpu", encoders=False, vae=True)
    gc.collect()
    assert leaving() is None and is_hull(base.pipeline.text_encoder_2)
    assert not is_hull(base.denoiser) and not is_hull(base.pipeline.vae)
    base.place("cpu", encoders=True)
    again = encode_captions(base, ["a red shirt"])
    assert all(torch.equal(tensor, again[name]) for name, tensor in before.items())


def test_a_given_pipeline_keeps_its_models():
    pipe = tiny_flux_pipeline()
    encoder, base = pipe.text_encoder_2, base_for(pipe)
    base.place("cpu", encoders=False)
    assert pipe.text_encoder_2 is encoder and not is_hull(encoder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_photos_go_where_layers_come_one_by_one(dtype, monkeypatch):
    """Bug: `generate --photo --offload sequential` sent the photo to where the weights wait: a traceback."""
    pipe = tiny_flux_pipeline().to(dtype)
    pipe.vae.register_to_config(force_upcast=True)
    pipe.enable_sequential_cpu_offload(device="cpu")  # accelerate computes so on a GPU only
    base, seen = base_for(pipe), []
    monkeypatch.setattr(base, "latents_of", lambda pixels: seen.append(pixels) or pixels)
    base.encode_images(torch.zeros(1, 3, 16, 16))
    assert [(pixels.device.type, pixels.dtype) for pixels in seen] == [("cpu", dtype)]


def test_every_process_of_a_divided_run_reads_the_text_encoders(tmp_path, monkeypatch):
    """Bug: transformers below 5.21 gave zeros for text encoders to all processes but the first of `--use_fsdp`."""
    seen = []
    load = T5EncoderModel.from_pretrained.__func__

    def watched(cls, *arguments, **options):
        seen.append(os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"])
        return load(cls, *arguments, **options)

    base = open_base(save_tiny_flux(tmp_path))
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    monkeypatch.setattr(T5EncoderModel, "from_pretrained", classmethod(watched))
    base.place("cpu", encoders=True)
    assert set(seen) == {"false"} and os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "true"


def test_a_pipeline_of_lists_that_name_no_model(tmp_path):
    """Bug: a list of more than two numbers in a pipeline's index, as Krea 2 has, was taken for a model's class."""
    pipe = PIPELINES["krea2"]()
    pipe.register_to_config(text_encoder_select_layers=(1, 2, 1))
    pipe.save_pretrained(tmp_path)
    assert is_hull(open_base(tmp_path).denoiser)


@pytest.mark.parametrize(("part", "file"), [("text_encoder_2", "model"), ("transformer", "diffusion_pytorch_model")])
def test_weights_that_are_missing_are_not_drawn_at_random(part, file, tmp_path):
    """Bug: transformers filled up a text encoder whose file lacks weights at random, with a line in the log."""
    path = save_tiny_flux(tmp_path) / part / f"{file}.safetensors"
    weights = load_file(path)
    lost = next(name for name in weights if name.endswith(("wo.weight", "norm_k.weight")))
    weights.pop(lost)
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(BaseModelMismatchError, match=f"expected all weights of {part} .* '{lost}' the first"):
        open_base(tmp_path).place("cpu", encoders=True)


def test_weights_of_another_shape(tmp_path):
    path = save_tiny_flux(tmp_path) / "text_encoder" / "model.safetensors"
    weights = load_file(path)
    other = next(name for name in weights if name.endswith("fc1.bias"))
    weights[other] = torch.zeros(3)
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(BaseModelMismatchError, match=r"fc1\.bias"):
        open_base(tmp_path).place("cpu", encoders=True)
