# SPDX-License-Identifier: Apache-2.0
"""Quantised and waiting weights: every cell of the table runs and gives the same, or is refused in a sentence."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import pytest
import torch
from bitsandbytes.nn import Linear4bit
from diffusers import BitsAndBytesConfig, FluxTransformer2DModel
from diffusers.quantizers.bitsandbytes import BnB4BitDiffusersQuantizer
from torch import nn

import four_bits
from families_tiny import FAMILIES
from peft_metalora.bases import memory, open_base, streaming
from peft_metalora.bases.memory import (
    CIRCUMSTANCES,
    OFFLOADS,
    QUANTIZERS,
    USES,
    Whole,
    ready_to_draw,
    require_supported,
)
from peft_metalora.errors import ConfigError
from peft_metalora.training.examples.batches import Examples
from peft_metalora.training.stage_2 import Personalization
from pipelines_tiny import PIPELINES
from training_tiny import personal_config

CPU = torch.device("cpu")


def possible(quantize, offload, use, *circumstances):
    try:
        require_supported(Whole(quantize, offload), use, *circumstances)
    except ConfigError as error:
        return str(error)
    return None


class TestTable:
    def test_what_is_refused_is_told_with_what_goes(self):
        """Walks all cells: family by family they are alike, which the cells that run show below."""
        refused = 0
        for circumstance in (None, *CIRCUMSTANCES):
            given = [] if circumstance is None else [circumstance]
            for quantize, offload, use in itertools.product(QUANTIZERS, OFFLOADS, USES):
                told = possible(quantize, offload, use, *given)
                if told is None:
                    continue
                refused += 1
                assert f"found {quantize!r} and {offload!r} to {use}" in told and "\n" not in told
                offloads = [one for one in OFFLOADS if possible(quantize, one, use, *given) is None]
                quantizers = [one for one in QUANTIZERS if possible(one, offload, use, *given) is None]
                if offloads:
                    assert f"offload {' or '.join(offloads)} with quantize {quantize}" in told
                if quantizers:
                    assert f"quantize {' or '.join(quantizers)} with offload {offload}" in told
                assert offloads or quantizers or "none with none" in told
        assert refused > 50

    def test_nothing_special_is_always_possible(self):
        for use, circumstance in itertools.product(USES, CIRCUMSTANCES):
            assert possible("none", "none", use, circumstance) is None

    def test_every_row_refuses_something(self):
        for row in memory._TABLE:
            given = [row.where] if row.where else []
            assert memory._refusal(row.quantize[0], row.offload[0], row.use[0], given) is row

    def test_names_that_are_none(self):
        assert "quantize must be one of none, int8, fp8, nf4, found 'int4'" in possible("int4", "none", "train")
        assert "offload must be one of" in possible("none", "disk", "draw")

    def test_a_package_that_is_missing(self, monkeypatch):
        monkeypatch.setattr(memory.importlib.util, "find_spec", lambda name: None)
        assert (
            possible("nf4", "none", "train")
            == "quantize 'nf4' needs bitsandbytes, found none: pip install bitsandbytes"
        )


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A tiny base of every family as a folder."""
    folder = tmp_path_factory.mktemp("bases")
    for family in FAMILIES:
        PIPELINES[family]().save_pretrained(folder / family)
    return folder


def trained(folder, held, **changes):
    """The factors after a step or two on a base that is held so, and the base."""
    base = open_base(folder, memory=held)
    base.place(CPU, encoders=True, denoiser=False)
    latents = base.encode_images(torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1)
    text = base.encode_text(["a red shirt"])
    base.place(CPU, encoders=False)
    zeros = torch.zeros(2, dtype=torch.int64)
    settings = {"max_train_steps": 2, "gradient_checkpointing": True, "method": "lora", "rank": 2, **changes}
    run = Personalization(base, Examples(latents, text, zeros, zeros), personal_config(**settings))
    for _ in run.steps():
        pass
    assert (base.stream is not None) == (held.offload == "group")
    return torch.cat([parameter.detach().flatten() for parameter in run.parameters]), base


@pytest.fixture(scope="module")
def there(bases):
    """The factors after the same steps where no weight waits, by family and quantiser."""
    return functools.cache(lambda family, quantize: trained(bases / family, Whole(quantize))[0])


# All quantisers on one family, and on each of the others one.
STREAMED = [*(("flux", quantize) for quantize in QUANTIZERS), ("sd15", "fp8"), ("sdxl", "nf4"), ("sd3", "int8")]
STREAMED += [("flux2", "nf4"), ("z_image", "int8"), ("qwen_image", "nf4"), ("krea2", "fp8"), ("wan", "int8")]


@pytest.mark.parametrize(("family", "quantize"), STREAMED)
def test_training_is_the_same_wherever_blocks_wait(bases, there, family, quantize, monkeypatch):
    assert {family for family, _ in STREAMED} == set(FAMILIES)
    four_bits.allow_on_a_cpu(monkeypatch)
    waiting, _ = trained(bases / family, Whole(quantize, "group"))
    torch.testing.assert_close(waiting, there(family, quantize), atol=1e-5, rtol=1e-4)


def test_training_is_the_same_where_encoders_take_turns(bases, there):
    waiting, base = trained(bases / "flux", Whole("int8", "model"))
    assert torch.equal(waiting, there("flux", "int8"))
    assert base.stream is None


def test_no_waiting_weight_is_used(bases, there, monkeypatch):
    """Bug: a backward pass computes with weights that have left, or with another block's in their place."""
    poison = streaming._Block.park

    def park(self):
        poison(self)
        for weight, host in zip(self.weights, self.host, strict=True):
            weight.show(torch.full_like(host, torch.nan))

    monkeypatch.setattr(streaming._Block, "park", park)
    waiting, base = trained(bases / "sdxl", Whole(offload="group"))
    torch.testing.assert_close(waiting, there("sdxl", "none"), atol=1e-5, rtol=1e-4)
    blocks = streaming.blocks_of(base.denoiser)
    parked = [block for block in blocks if block.attn1.to_q.get_base_layer().weight.isnan().all()]
    assert 0 < len(parked) < len(blocks)


def test_blocks_come_one_ahead_in_both_passes(bases, monkeypatch):
    base = open_base(bases / "flux", memory=Whole(offload="group"))
    base.place(CPU, encoders=False)
    stream = base.stream
    forward = [(stream._after(number, number - 1 if number else None)) for number in range(2)]
    assert forward == [1, 0]
    base.denoiser.train()
    assert stream._after(1, 0) == 0, "what a backward pass needs after the last block is the one before"
    many = streaming.BlockStream.__new__(streaming.BlockStream)
    many._blocks = [stream._blocks[0]] * 9
    assert [many._after(number, number + 1) for number in (7, 4, 1, 0)] == [6, 3, 0, 0]
    assert many._after(0, 8) == 1, "the next forward pass"


def test_what_is_put_on_a_streamed_base_comes_to_the_device(bases):
    base = open_base(bases / "flux", memory=Whole(offload="group"))
    base.place(CPU, encoders=False)
    with torch.device("meta"):
        base.denoiser.late = nn.Linear(2, 2)
    base.denoiser.late = base.denoiser.late.to_empty(device="cpu")
    base.stream.settle()
    assert {parameter.device for parameter in base.denoiser.parameters()} == {CPU}


def test_what_is_quantised(bases, monkeypatch):
    """Blocks and large text encoders; not VAE and CLIP, nor the small parts around the blocks."""
    four_bits.allow_on_a_cpu(monkeypatch)
    base = open_base(bases / "flux", memory=Whole("nf4"))
    base.place(CPU, encoders=True)
    pipe, denoiser = base.pipeline, base.denoiser
    assert isinstance(denoiser.single_transformer_blocks[0].proj_out, Linear4bit)
    assert isinstance(denoiser.transformer_blocks[0].attn.to_q, Linear4bit)
    assert type(denoiser.x_embedder) is nn.Linear and type(denoiser.context_embedder) is nn.Linear
    assert isinstance(pipe.text_encoder_2.encoder.block[0].layer[0].SelfAttention.q, Linear4bit)
    assert not any(isinstance(one, Linear4bit) for part in (pipe.vae, pipe.text_encoder) for one in part.modules())
    assert base.dtype == torch.float32


@pytest.fixture
def placed(bases, monkeypatch):
    """The weights that diffusers quantised, by name: where it was told to, and what came of them; and the denoiser."""
    four_bits.allow_on_a_cpu(monkeypatch)
    monkeypatch.setattr(BnB4BitDiffusersQuantizer, "update_device_map", lambda _, given: given or {"": "cuda:1"})
    quantise, made = BnB4BitDiffusersQuantizer.create_quantized_param, {}

    def on_a_cpu(self, model, value, name, device, *args, **options):
        quantise(self, model, value, name, CPU, *args, **options)
        made[name] = (torch.device(device), model.get_parameter(name).data)

    monkeypatch.setattr(BnB4BitDiffusersQuantizer, "create_quantized_param", on_a_cpu)
    monkeypatch.setattr(streaming.HostMemory, "__init__", lambda self, pinned: vars(self).update(_pinned=False))
    base = open_base(bases / "flux", memory=Whole("nf4", "group"))
    base.load_denoiser(CPU)
    return made, base.denoiser


def test_what_will_wait_is_on_the_host_as_soon_as_it_is_quantised(placed):
    """Bug: all of it lay on the device first, and the most that a card of 8 GB held was in the loading."""
    made, denoiser = placed
    weights = {f"{name}.weight" for name, one in denoiser.named_modules() if isinstance(one, Linear4bit)}
    assert weights and weights <= made.keys() and {device for device, _ in made.values()} == {torch.device("cuda:1")}
    for name, parameter in denoiser.named_parameters():  # with diffusers' own map none of them were on a CPU
        assert parameter.device == CPU
        assert name not in made or parameter.data_ptr() != made[name][1].data_ptr()
        assert name not in made or torch.equal(parameter.data, made[name][1])
    assert denoiser.hf_quantizer.quantization_config.quant_method == "bitsandbytes"


def test_whoever_else_loads_four_bits_has_them_where_diffusers_puts_them(bases, placed, monkeypatch):
    made, _ = placed
    monkeypatch.setattr(BnB4BitDiffusersQuantizer, "update_device_map", lambda _, given: given or {"": "cpu"})
    made.clear()
    theirs = FluxTransformer2DModel.from_pretrained(
        bases / "flux" / "transformer", quantization_config=BitsAndBytesConfig(load_in_4bit=True)
    )
    assert type(theirs.hf_quantizer) is BnB4BitDiffusersQuantizer
    assert all(theirs.get_parameter(name).data_ptr() == data.data_ptr() for name, (_, data) in made.items())
    assert made and {device for device, _ in made.values()} == {CPU}


def test_what_is_page_locked_already_is_not_copied(monkeypatch):
    """Bug: a host held the weights twice while they were brought to where they wait."""
    there = torch.ones(3)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda self: self.data_ptr() == there.data_ptr())
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, pin_memory=False, **options: empty(*size, **options))
    host = streaming.HostMemory(pinned=True)
    assert host.keep(there).data_ptr() == there.data_ptr()
    other, another = host.keep(there + 1), host.keep(there + 2)
    assert other.tolist() == [2, 2, 2] and another.tolist() == [3, 3, 3]


DRAWN = ("none", "group"), ("int8", "model"), ("int8", "group"), ("fp8", "group"), ("nf4", "model")
# A video autoencoder keeps what it saw of the frames before.
DRAWN = [*(("flux", *cell) for cell in DRAWN), ("wan", "none", "group"), ("wan", "int8", "model")]


def drawn(folder, held):
    base = open_base(folder, memory=held)
    base.load(CPU)
    pipe = base.pipeline
    pipe.set_progress_bar_config(disable=True)
    ready_to_draw(pipe, held, CPU)
    options = {"num_inference_steps": 2, "height": 32, "width": 32, "output_type": "np", "max_sequence_length": 8}
    options |= {"num_frames": 5} if base.frames_per_second else {}
    generator = torch.Generator().manual_seed(0)
    return np.stack([*base.clips(prompt="a photo of a person", generator=generator, **options)[0]])


@pytest.mark.parametrize(("family", "quantize", "offload"), DRAWN)
def test_drawing_is_the_same_wherever_weights_wait(bases, family, quantize, offload, monkeypatch):
    four_bits.allow_on_a_cpu(monkeypatch)
    there, waiting = drawn(bases / family, Whole(quantize)), drawn(bases / family, Whole(quantize, offload))
    assert np.abs(there - waiting).max() < 1e-5
