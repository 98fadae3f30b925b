# SPDX-License-Identifier: Apache-2.0
"""4-bit weights that bitsandbytes repacks for CPU kernels in an eval forward: read, merged, unmerged and trained.

On a CPU without those kernels nothing repacks by itself and the same numbers must come out.
"""

from __future__ import annotations

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.functional import _convert_weight_packed_for_cpu, dequantize_4bit
from peft import get_peft_model
from torch import nn
from tuner_models import config, layer_of, randomise

NESTED = pytest.mark.parametrize("nested", [False, True], ids=["simple scales", "nested scales"])


def four_bit(nested):
    layer = bnb.nn.Linear4bit(128, 64, compute_dtype=torch.float32, quant_type="nf4", compress_statistics=nested)
    layer.load_state_dict(nn.Linear(128, 64).state_dict())
    return layer.to("cpu").eval()


def wrapped(nested, **settings):
    base = nn.Sequential(four_bit(nested))
    return randomise(get_peft_model(base, config(target_modules=["0"], meta_r=8, **settings)).eval())


def pack(weight):
    weight.data, weight.quant_state = _convert_weight_packed_for_cpu(weight.data, weight.quant_state)


@NESTED
def test_a_packed_weight_is_read_as_it_was_but_for_bf16_scales(nested):
    model = wrapped(nested)
    layer = layer_of(model, "0")
    base = layer.get_base_layer()
    usual = layer.get_base_weight()
    pack(base.weight)
    packed = base.weight.data.clone()
    read = layer.get_base_weight()
    assert (read - usual).abs().max() <= usual.abs().max() * 2**-8
    assert base.weight.quant_state.packing_format_for_cpu and torch.equal(base.weight.data, packed), "only read"
    assert torch.equal(layer.get_base_weight(), read)


@NESTED
def test_a_merge_after_images_is_near_and_its_undoing_exact(nested):
    model = wrapped(nested)
    x = torch.randn(3, 128)
    with torch.no_grad():
        expected = model(x)
        for _ in range(3):
            model.merge_adapter()
            error = (model(x) - expected).norm() / expected.norm()
            assert error < 0.3, "the rounding of four bits, not noise"
            model.unmerge_adapter()
            assert torch.equal(model(x), expected)


@NESTED
def test_dora_after_images_uses_the_weight_that_the_layer_computes_with(nested):
    model = wrapped(nested, use_dora=True)
    layer = layer_of(model, "0")
    layer.metalora_magnitude["default"].data.mul_(1.2)
    x = torch.randn(3, 128)
    with torch.no_grad():
        model(x)
        weight = layer.get_base_weight().float() + layer.get_delta_weight("default")
        torch.testing.assert_close(model(x), x @ weight.T + layer.base_layer.bias, atol=0.05, rtol=0.05)


@NESTED
def test_gradients_pass_after_an_image(nested):
    model = wrapped(nested)
    base = layer_of(model, "0").get_base_layer()
    x = torch.randn(3, 128)
    with torch.no_grad():
        model(x)
        with model.disable_adapter():
            before = model(x)
    x.requires_grad_()
    with model.disable_adapter():
        model(x).sum().backward()
    weight = dequantize_4bit(base.weight.data, base.weight.quant_state)
    torch.testing.assert_close(x.grad, weight.sum(0).expand(3, -1), atol=1e-5, rtol=1e-4)
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(model(x.detach()), before), "packed again without a loss"
