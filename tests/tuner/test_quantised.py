# SPDX-License-Identifier: Apache-2.0
"""The cells of docs/quantisation.md: trained, served, merged and unmerged, or refused in words."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import bitsandbytes as bnb
import pytest
import torch
from peft import get_peft_model
from peft.utils import quantization_utils
from torch import nn
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_
from tuner_models import config, layer_of, randomise

from peft_metalora.errors import UnsupportedModuleError
from peft_metalora.tuner import fold, set_slots, to_lora, using_slots


def eight_bit(linear):
    quantised = bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=False)
    quantised.load_state_dict(linear.state_dict())
    return quantised.to("cpu")


def four_bit(linear):
    quantised = bnb.nn.Linear4bit(64, 32, compute_dtype=torch.float32, quant_type="nf4")
    quantised.load_state_dict(linear.state_dict())
    # On CPUs with bf16 products a forward pass in eval repacks the weights for inference alone; none could be trained.
    quantised.support_avx512bf16_for_cpu = False
    return quantised.to("cpu")


def torchao(recipe):
    def quantise(linear):
        holder = nn.Sequential(linear)
        quantize_(holder, recipe())
        return holder[0]

    return quantise


KINDS = {
    "bnb 8 bit": eight_bit,
    "bnb 4 bit": four_bit,
    "torchao int8 weight only": torchao(Int8WeightOnlyConfig),
    "torchao int8 dynamic": torchao(Int8DynamicActivationInt8WeightConfig),
}
RECIPES = {
    "torchao int8 weight only": Int8WeightOnlyConfig,
    "torchao int8 dynamic": Int8DynamicActivationInt8WeightConfig,
}


class Quantised(nn.Module):
    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.lin = KINDS[kind](nn.Linear(64, 32))
        if kind in RECIPES:
            settings = SimpleNamespace(get_apply_tensor_subclass=RECIPES[kind])
            self.hf_quantizer = SimpleNamespace(quantization_config=settings)

    def forward(self, x):
        return self.lin(x)


def wrapped(kind, **settings):
    base = Quantised(kind).eval()
    x = torch.randn(3, 64)
    before = base(x)
    model = get_peft_model(base, config(target_modules=["lin"], meta_r=8, **settings)).eval()
    return randomise(model), x, before


@pytest.mark.parametrize("kind", KINDS)
def test_forward_is_the_base_plus_the_product(kind):
    model, x, before = wrapped(kind, num_slots=2)
    layer = layer_of(model, "lin")
    with torch.no_grad():
        expected = before + x @ layer.get_delta_weight("default", 1).T
        with using_slots(model, [1]):
            torch.testing.assert_close(model(x), expected, atol=1e-4, rtol=1e-4)
            fold(model)
            torch.testing.assert_close(model(x), expected, atol=1e-4, rtol=1e-4)
        set_slots(model, [-1, 0, -1])
        mixed = model(x)
        assert torch.equal(mixed[[0, 2]], before[[0, 2]])


@pytest.mark.parametrize("kind", KINDS)
def test_all_factors_train(kind):
    model, x, _ = wrapped(kind)
    x.requires_grad_()
    model(x).square().sum().backward()
    trained = {name.split(".")[-2] for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert trained == {"metalora_down", "metalora_mid", "metalora_up"}
    assert x.grad.any()


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_merge_is_near_and_unmerge_exact(kind, use_dora):
    model, x, before = wrapped(kind, use_dora=use_dora)
    with torch.no_grad():
        expected = model(x)
        for _ in range(3):
            model.merge_adapter()
            error = (model(x) - expected).norm() / expected.norm()
            assert error < (0.3 if kind == "bnb 4 bit" else 0.1)
            model.unmerge_adapter()
            assert torch.equal(model(x), expected)
        with model.disable_adapter():
            assert torch.equal(model(x), before)


@pytest.mark.parametrize("kind", KINDS)
def test_dora_on_a_quantised_base(kind):
    model, x, before = wrapped(kind, use_dora=True)
    fresh = get_peft_model(Quantised(kind), config(target_modules=["lin"], use_dora=True, init_weights=True)).eval()
    torch.testing.assert_close(fresh(x), before, atol=1e-3, rtol=1e-3)
    layer = layer_of(model, "lin")
    layer.metalora_magnitude["default"].data.mul_(1.2)
    with torch.no_grad():
        weight = layer.get_base_weight().float() + layer.get_delta_weight("default")
        expected = x @ weight.T + layer.base_layer.bias
        torch.testing.assert_close(model(x), expected, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_the_export_is_the_same_function_on_the_same_base(kind):
    model, x, before = wrapped(kind)
    _, state = to_lora(model)
    with torch.no_grad():
        exported = before + x @ state["lin.lora_A.weight"].T @ state["lin.lora_B.weight"].T
        torch.testing.assert_close(model(x), exported, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("more", [{}, {"use_dora": True}, {"down_init": "pissa"}], ids=["plain", "dora", "pissa"])
def test_torchao_without_its_recipe_serves_but_does_not_merge(more):
    base = Quantised("torchao int8 weight only")
    del base.hf_quantizer
    model = get_peft_model(base, config(target_modules=["lin"], meta_r=8, **more))
    model(torch.randn(2, 64)).sum().backward()
    assert layer_of(model, "lin").metalora_down["default"].grad.any()
    with pytest.raises(UnsupportedModuleError, match="does not say how it was quantised"):
        model.merge_adapter()


class Foreign(nn.Module):
    """Stands where another library keeps its class of quantised layers."""

    SUPPORTS_METHODS: tuple = ()

    def __init__(self):
        super().__init__()
        self.in_features, self.out_features = 64, 32


class ForeignAwq(Foreign):
    SUPPORTS_METHODS = (SimpleNamespace(value="awq"),)


OTHERS = {
    "hqq": ("is_hqq_available", "hqq.core.quantize", "HQQLinear"),
    "aqlm": ("is_aqlm_available", "aqlm", "QuantizedLinear"),
    "eetq": ("is_eetq_available", "eetq", "EetqLinear"),
    "gptq": ("is_gptqmodel_available", "gptqmodel.nn_modules.qlinear", "BaseQuantLinear"),
    "awq": ("is_gptqmodel_available", "gptqmodel.nn_modules.qlinear", "BaseQuantLinear"),
    "inc": (
        "is_inc_available",
        "neural_compressor.torch.algorithms.fp8_quant._quant_common.helper_modules",
        "PatchedLinear",
    ),
    "te": ("is_te_pytorch_available", "transformer_engine", "Linear"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_backends_are_refused_before_the_model_changes(name, monkeypatch):
    available, path, cls = OTHERS[name]
    for depth in range(path.count(".") + 1):
        part = ".".join(path.split(".")[: depth + 1])
        monkeypatch.setitem(sys.modules, part, ModuleType(part))
    layer = ForeignAwq() if name == "awq" else Foreign()
    kinds = {cls: type("Other", (), {}) if name == "awq" else Foreign}
    vars(sys.modules[path]).update(kinds)
    if name == "te":
        sys.modules[path].pytorch = SimpleNamespace(Linear=Foreign, LayerNormLinear=Foreign, LayerNormMLP=Foreign)
    monkeypatch.setattr(quantization_utils, available, lambda: True)
    monkeypatch.setattr(quantization_utils, "is_gptqmodel_awq_layer", lambda module: isinstance(module, ForeignAwq))
    model = nn.Sequential(layer)
    with pytest.raises(UnsupportedModuleError, match=f"quantised by '{name}'; tested are bnb 8bit, bnb 4bit, torchao"):
        get_peft_model(model, config(target_modules=["0"]))
    assert model[0] is layer


def test_integer_weights_of_unknown_make_are_refused():  # diffusers' GGUF layers are such
    model = nn.Sequential(nn.Linear(64, 32))
    model[0].weight = nn.Parameter(torch.zeros(32, 64, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(UnsupportedModuleError, match=r"quantised \(Linear, torch.uint8\) in a way"):
        get_peft_model(model, config(target_modules=["0"]))
    assert type(model[0]) is nn.Linear
