# SPDX-License-Identifier: Apache-2.0
"""Adapters taken off and put aside: the model is the one from before, module by module and flag by flag."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch import nn
from tuner_models import config, mlp

from peft_metalora.tuner.on_model import configs_of
from peft_metalora.tuner.placing import inject, remember, remove_adapters, restore, set_aside


def look(model: nn.Module) -> dict[str, object]:
    """All that an adapter may change."""
    return {
        "modules": {name: id(module) for name, module in model.named_modules()},
        "training": {name: module.training for name, module in model.named_modules()},
        "trainable": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "weights": {name: tensor.clone().tolist() for name, tensor in model.state_dict().items()},
        "attributes": sorted(vars(model)),
        "flag": getattr(model, "_hf_peft_config_loaded", None),
    }


@pytest.fixture
def model():
    model = mlp()
    model._hf_peft_config_loaded = False
    model.lin0.weight.requires_grad_(False)
    model.lin1.train()
    return model


LORA = LoraConfig(r=2, target_modules=["lin0", "lin1"], init_lora_weights=False)


@pytest.mark.parametrize("way", ["restore", "restore every", "remove the last"])
def test_the_model_is_the_one_from_before(model, way):
    """Bug: what was trainable, and which modules were in training, was not given back."""
    before = look(model)
    inject(model, config(), "faces")
    inject(model, config(stage="subject", down="faces"), "ann")
    model.requires_grad_(False).train()
    if way == "remove the last":
        remove_adapters(model, ["ann", "faces"], [])
    else:
        restore(model, every=way == "restore every")
    assert look(model) == before


@pytest.mark.parametrize("ours_first", [True, False])
def test_adapters_of_two_methods_on_one_layer_come_off_whichever_is_inside(model, ours_first):
    """Bug: the layer inside another stayed as a child of the base layer."""
    before = look(model)
    remember(model)
    for ours in (ours_first, not ours_first):
        inject_adapter_in_model(config() if ours else LORA, model, "ours" if ours else "lora")
    restore(model, every=True)
    assert look(model) == before


def test_a_lora_stays_where_ours_go(model):
    inject_adapter_in_model(LORA, model, "lora")
    model._hf_peft_config_loaded = True
    x = torch.randn(3, 12)
    expected, before = model(x), look(model)
    inject(model, config(), "faces")
    restore(model)
    assert look(model) == before and list(configs_of(model)) == ["lora"]
    assert torch.equal(model(x), expected)


def test_what_is_set_aside_comes_back_with_what_it_remembers(model):
    """Bug: a second run of training in the block would have forgotten what the model was before the first."""
    before = look(model)
    inject(model, config(), "faces")
    model.train()
    inside = look(model)
    with set_aside(model):
        assert look(model)["modules"] == before["modules"] and not model.training
        get_peft_model(model, LORA)
        inject(model, config(), "other")
    assert look(model) == inside
    restore(model)
    assert look(model) == before
