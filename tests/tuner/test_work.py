# SPDX-License-Identifier: Apache-2.0
"""What is done in each call does not grow with the model: no layer is visited, and no change of one is missed."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from tuner_models import adapted, config, layer_of, mlp, randomise

from peft_metalora.errors import SubjectIndexError
from peft_metalora.tuner import TokenSlots, on_model, set_slots, set_token_slots, using_slots
from peft_metalora.tuner.layer import MetaLoraLayer
from peft_metalora.tuner.placing import shown_alone


@pytest.fixture
def visits(monkeypatch):
    """Names of the modules that somebody asks for while going through a model."""
    found = []

    def counted(walk):
        def walked(*args, **kwargs):
            for name, module in walk(*args, **kwargs):
                found.append(name)
                yield name, module

        return walked

    monkeypatch.setattr(nn.Module, "named_modules", counted(nn.Module.named_modules))
    monkeypatch.setattr(on_model, "_named_layers", counted(on_model._named_layers))
    return found


def slotted(**settings):
    return randomise(adapted(num_slots=3, **settings))


def test_layers_are_those_that_torch_finds_and_nobody_looks_into_them():
    """Bug: each load of a subject went through a dozen containers in each layer some twenty times."""
    model = slotted()
    model.again = model.lin0  # a module of two names has the first
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["lin0", "lin1"]), model, "lora")
    wanted = [(name, one) for name, one in model.named_modules() if isinstance(one, MetaLoraLayer)]
    assert wanted and list(on_model._named_layers(model)) == wanted
    looked_into = []
    for _, layer in wanted:
        layer.metalora_mid.named_modules = layer.metalora_mid.modules = lambda *_: looked_into.append(1)
    assert [layer for _, layer in on_model.meta_lora_layers(model)] == [layer for _, layer in wanted]
    assert not looked_into


def test_choosing_subjects_visits_no_layer(visits):
    """Bug: `set_slots` went through all modules of a model, 4.9 ms for those of FLUX.1."""
    model = slotted()
    set_slots(model, [0])
    assert visits, "the first one looks at what there is"
    visits.clear()
    set_slots(model, [1, 2])
    with using_slots(model, [0, 1]), shown_alone(model, "default"):
        set_slots(model, [2], each=True)
    set_slots(model, None)
    assert visits == []


def test_the_tables_of_tokens_that_layers_have_are_not_given_again(visits):
    model = slotted()
    table = TokenSlots()
    tables = {"lin0": table}
    set_token_slots(model, tables)
    visits.clear()
    for _ in range(3):
        set_token_slots(model, tables)
        assert layer_of(model).token_slots is table and layer_of(model, "lin1").token_slots is not table
        visits.clear()
        set_token_slots(model, None)
        assert visits == [] and not layer_of(model).subject_index.by_tokens
        visits.clear()
    set_token_slots(model.base_model.model, {})
    set_token_slots(model, tables)
    assert layer_of(model).token_slots is table, "somebody else gave others meanwhile"


def changes():
    def more(model):
        model.add_adapter("many", config(num_slots=9))
        model.set_adapter("many")

    def other(model):
        model.add_adapter("one", config(num_slots=5))
        layer_of(model, "lin1").set_adapter("one")

    def fewer(model):
        more(model)
        set_slots(model, [8])
        set_slots(model, None)
        model.delete_adapter("many")
        model.set_adapter("default")

    return {"more": (more, 9), "one layer shows another": (other, 3), "fewer": (fewer, 3)}


@pytest.mark.parametrize("change", changes())
def test_a_change_of_the_layers_is_seen(change):
    model = slotted()
    set_slots(model, [2])
    do, slots = changes()[change]
    set_slots(model, None)
    do(model)
    set_slots(model, [slots - 1])
    with pytest.raises(SubjectIndexError, match=rf"holds {slots} slot"):
        set_slots(model, [slots])


def test_a_merge_and_its_end_are_seen():
    model = slotted()
    set_slots(model, [1])
    model.merge_adapter()
    with pytest.raises(SubjectIndexError, match="merged"):
        set_slots(model, [2])
    model.unmerge_adapter()
    set_slots(model, [2])


def test_adapters_that_others_took_off_are_gone():
    model = slotted()
    set_slots(model, [1])
    inner = model.base_model.model
    model.unload()
    with pytest.raises(SubjectIndexError, match="no Meta-LoRA layers"):
        set_slots(inner, [1])


@pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_has_an_index_of_its_own(again):
    model = slotted()
    set_slots(model, [1])
    twin = again(model)
    set_slots(twin, [2])
    assert layer_of(model).subject_index.values == (1,) and layer_of(twin).subject_index.values == (2,)
    assert layer_of(twin, "lin0").subject_index is layer_of(twin, "lin1").subject_index


def test_models_that_join_a_module_are_chosen_for_as_well():
    both = nn.ModuleDict({"a": slotted()})
    set_slots(both, [1])
    both["b"] = slotted()
    set_slots(both, [2])
    assert [layer_of(both[name]).subject_index.values for name in "ab"] == [(2,), (2,)]


def test_what_shows_for_a_call_leaves_the_choice_alone():
    model, x = slotted(), torch.randn(2, 12)
    model.add_adapter("other", config(num_slots=3))
    randomise(model, 2)
    alone = {}
    for name in ("other", "default"):
        model.set_adapter(name)
        alone[name] = model(x)
    with shown_alone(model, "other"):
        assert layer_of(model).active_adapters == ["other"]
        torch.testing.assert_close(model(x), alone["other"])
        with shown_alone(model, None):
            assert torch.equal(model(x), mlp()(x))
    torch.testing.assert_close(model(x), alone["default"])
    assert layer_of(model).active_adapters == ["default"]
