# SPDX-License-Identifier: Apache-2.0
"""The cells of docs/quantisation.md: trained, served, merged and unmerged, or refused in words."""

from __future__ import annotations

import sys
from contextlib import contextmanager
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
from peft_metalora.tuner.layer import MetaLoraLayer
from peft_metalora.tuner.linear import Linear


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
MAKERS = {**KINDS, "none": lambda linear: linear}
RECIPES = {
    "torchao int8 weight only": Int8WeightOnlyConfig,
    "torchao int8 dynamic": Int8DynamicActivationInt8WeightConfig,
}


class Quantised(nn.Module):
    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.lin = MAKERS[kind](nn.Linear(64, 32))
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


def frozen(kind, **settings):
    """A model whose factors are frozen, as those of a loaded subject."""
    model, x, before = wrapped(kind, **settings)
    layer_of(model, "lin").set_requires_grad("default", False)
    return model, x, before


@contextmanager
def only_road(monkeypatch, *, general):
    """Let layers take the general road, or no other than the short one."""
    with monkeypatch.context() as patch:
        if general:
            patch.setattr(Linear, "_fusible", lambda *_: None)
        else:
            patch.setattr(MetaLoraLayer, "forward", lambda *_: pytest.fail("the general road was taken"))
        yield


@pytest.mark.parametrize("index", [None, [1], [-1], [1, -1, 0]], ids=str)
@pytest.mark.parametrize("state", ["by itself", "by hand", "unfolded"])
@pytest.mark.parametrize("kind", KINDS)
def test_inference_takes_a_short_road(kind, state, index, monkeypatch):
    """Bug: on quantised bases every pass took the general road, slower than LoRA's at batch 1, and without kernels."""
    model, x, _ = wrapped(kind, num_slots=2) if state == "unfolded" else frozen(kind, num_slots=2)
    if state == "by hand":
        fold(model)
    set_slots(model, index)
    with torch.no_grad():
        with only_road(monkeypatch, general=True):
            wanted = model(x)
        for given in (x, x[:, None], x.repeat(2, 1)):
            with only_road(monkeypatch, general=False):
                found = model(given), model(given)
            assert torch.equal(*found), "the first pass has the bits of the others"
            for part in found[0].reshape(-1, *wanted.shape):
                torch.testing.assert_close(part, wanted, atol=1e-5, rtol=1e-5)
    by_itself = state != "unfolded" and index in (None, [1])
    assert (layer_of(model, "lin").shown_subject is not None) == by_itself


def changes():
    def written(factors, slot):
        factors["default"][slot].mul_(2)

    def moved(factors, _):
        factors["default"].data = factors["default"].data * 2

    return {
        "mid": lambda layer: written(layer.metalora_mid, 1),
        "up": lambda layer: written(layer.metalora_up, 1),
        "down": lambda layer: written(layer.metalora_down, slice(None)),
        "other data": lambda layer: moved(layer.metalora_mid, 1),
        "scale": lambda layer: layer.set_scale("default", 0.5),
        "slot": lambda layer: set_slots(layer, [0]),
    }


@pytest.mark.parametrize("change", changes())
@pytest.mark.parametrize("kind", KINDS)
def test_folds_on_a_short_road_follow(kind, change, monkeypatch):
    model, x, _ = frozen(kind, num_slots=2)
    layer = layer_of(model, "lin")
    set_slots(layer, [1])
    with torch.no_grad():
        before = layer(x)
        changes()[change](layer)
        after = layer(x)
        with only_road(monkeypatch, general=True):
            wanted = layer(x)
    assert not torch.allclose(after, before, atol=1e-3)
    torch.testing.assert_close(after, wanted, atol=1e-5, rtol=1e-5)


def held(base, how):
    """Let somebody hold what a base layer gives: the list that it is kept in, and what ends it."""
    outputs, end = [], lambda: None
    if how == "hook":
        end = base.register_forward_hook(lambda _module, _given, output: outputs.append(output)).remove
    elif how == "hook everywhere":
        end = nn.modules.module.register_module_forward_hook(
            lambda module, _given, output: outputs.append(output) if module is base else None
        ).remove
    elif how == "its own forward":
        forward = base.forward
        base.forward = lambda x: outputs.append(forward(x)) or outputs[-1]
    else:

        class Keeping(type(base)):
            def forward(self, x):
                outputs.append(super().forward(x))
                return outputs[-1]

        base.__class__ = Keeping
    return outputs, end


@pytest.mark.parametrize("how", ["hook", "hook everywhere", "its own forward", "its own class"])
@pytest.mark.parametrize("kind", ["none", "bnb 4 bit", "torchao int8 weight only"])
def test_what_others_hold_of_the_base_is_not_added_onto(kind, how):
    """Bug: a base of a class of its own that kept what it gave found the adapter's product on it."""
    model, x, before = frozen(kind)
    layer = layer_of(model, "lin")
    with torch.no_grad():
        wanted = model(x)
        layer.shown_subject = None
        outputs, end = held(layer.base_layer, how)
        try:
            found = model(x), model(x)
        finally:
            end()
    for one, kept in zip(found, outputs, strict=True):
        torch.testing.assert_close(one, wanted, atol=1e-5, rtol=1e-5)
        assert torch.equal(kept, before)
    assert layer.shown_subject is not None, "folded by itself all the same"


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_short_road_cannot_do_is_done_by_the_general_one(kind, monkeypatch):
    model, x, before = frozen(kind, lora_dropout=0.5)
    model.add_adapter("other", config(target_modules=["lin"], meta_r=8, use_dora=True))
    randomise(model)
    roads, short = [], Linear._infer
    monkeypatch.setattr(Linear, "_infer", lambda *given: roads.append(1) or short(*given))

    def general():
        roads.clear()
        result = model(x)
        assert not roads
        return result

    layer = layer_of(model, "lin")
    with torch.no_grad():
        alone = model(x)
        assert roads
        torch.testing.assert_close(model(x.clone().requires_grad_()), alone, atol=1e-5, rtol=1e-5)
        layer.set_adapter("other", inference_mode=True)
        decomposed = general()
        layer.set_adapter(["default", "other"], inference_mode=True)
        both = general()
        assert not torch.allclose(both, decomposed, atol=1e-3)
        layer.set_adapter("default", inference_mode=True)
        layer.train()
        assert not torch.equal(general(), general()), "dropout"
        layer.eval()
        with model.disable_adapter():
            assert torch.equal(general(), before)
        layer.merge()
        general()
        layer.unmerge()
        assert torch.equal(model(x), alone)
    layer.set_requires_grad("default", True)
    assert general().requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_a_short_road_under_autocast(kind, monkeypatch):
    """A 4-bit layer gives float32 under autocast where its input has it; others give what autocast says."""
    model, x, _ = frozen(kind)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        found = model(x)
        with only_road(monkeypatch, general=True):
            wanted = model(x)
    assert found.dtype == wanted.dtype
    torch.testing.assert_close(found, wanted, atol=0.05, rtol=0.05)


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


@pytest.mark.parametrize("nested", [False, True], ids=["simple scales", "nested scales"])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_a_merged_4_bit_weight_is_quantised_as_the_base_was(nested, quant_type):
    options = {"compute_dtype": torch.float32, "quant_type": quant_type, "compress_statistics": nested}
    linear = bnb.nn.Linear4bit(64, 32, **options)
    linear.load_state_dict(nn.Linear(64, 32).state_dict())
    linear.support_avx512bf16_for_cpu = False
    model = randomise(get_peft_model(nn.Sequential(linear.to("cpu")), config(target_modules=["0"], meta_r=8)))

    def how():
        weight = layer_of(model, "0").base_layer.weight
        state = weight.quant_state
        held = [part for part in (weight, state.absmax, state.state2 and state.state2.absmax) if part is not None]
        return state.nested, state.quant_type, state.blocksize, state.dtype, [(one.dtype, one.shape) for one in held]

    before = how()
    assert before[:2] == (nested, quant_type)
    model.merge_adapter()
    assert how() == before


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
