# SPDX-License-Identifier: Apache-2.0
"""What trains in which stage, whatever a caller switches on; and where a subject starts."""

from __future__ import annotations

import pytest
import torch
from tuner_models import adapted, config, down_source, layer_of, mlp, randomise

from peft_metalora.errors import AdapterNotFoundError, AdapterStateError
from peft_metalora.tuner import reset_slots, set_down_loader, set_slots, set_warmup


def gradients(model, x=None):
    """Kinds of factor ('down', 'mid', 'up', 'base') that a backward pass gives a gradient."""
    model.zero_grad(set_to_none=True)
    model(torch.randn(3, 12) if x is None else x).square().sum().backward()
    kinds = {"metalora_down": "down", "metalora_mid": "mid", "metalora_up": "up"}
    names = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
    return {next((kind for part, kind in kinds.items() if part in name), "base") for name in names}


def subject(base=None, **settings):
    """A subject on a Down that a loader brings."""
    source = down_source(randomise(adapted(base)))
    set_down_loader(lambda _: source)
    return adapted(base, stage="subject", down="someone/down", **settings), source


def test_meta_trains_all_three_factors():
    assert gradients(adapted()) == {"down", "mid", "up"}


def test_warmup_holds_down_still_until_it_ends():
    model = adapted()
    set_warmup(model, True)
    assert gradients(model) == {"mid", "up"}
    model.set_adapter("default")
    model.train()
    assert gradients(model) == {"mid", "up"}
    set_warmup(model, False)
    assert gradients(model) == {"down", "mid", "up"}


SWITCHES = {
    "nothing": lambda model: None,
    "set_adapter": lambda model: model.set_adapter("default"),
    "set_requires_grad": lambda model: model.set_requires_grad("default", True),
    "requires_grad_ on the model": lambda model: model.requires_grad_(True),
    "requires_grad_ on the layer": lambda model: layer_of(model).requires_grad_(True),
    "train": lambda model: model.requires_grad_(True).train(),
    "disable and enable": lambda model: (model.disable_adapter_layers(), model.enable_adapter_layers()),
    "flag of the parameter": lambda model: [
        down.requires_grad_(True) for down in layer_of(model).metalora_down.values()
    ],
}


@pytest.mark.parametrize("switch", SWITCHES)
def test_a_subjects_down_never_has_a_gradient(switch):
    model, _ = subject()
    SWITCHES[switch](model)
    assert gradients(model) - {"base"} == {"mid", "up"}
    assert not any(down.requires_grad for down in layer_of(model).metalora_down.values())


def test_a_subjects_down_is_a_buffer_that_is_saved_moved_and_deleted_with_it():
    model, source = subject()
    given = {f"base_model.model.lin0.metalora_down.fp-{source.fingerprint[:16]}"}
    assert given <= {name for name, _ in model.named_buffers()} and given <= set(model.state_dict())
    assert not any("metalora_down" in name for name, _ in model.named_parameters())
    model.double()
    assert all(down.dtype == torch.float64 for down in layer_of(model).metalora_down.values())
    model.delete_adapter("default")
    assert not len(layer_of(model).metalora_down) and not any("metalora_down" in name for name in model.state_dict())


@pytest.mark.parametrize("switch", SWITCHES)
def test_nor_has_the_down_of_a_meta_adapter_that_a_subject_uses(switch):
    model = adapted()
    model.add_adapter("ann", config(stage="subject", down="default"))
    SWITCHES[switch](model)
    model.set_adapter("ann")
    assert gradients(model) - {"base"} == {"mid", "up"}
    model.base_model.set_adapter(["default", "ann"])
    assert gradients(model) - {"base"} == {"mid", "up"}


def test_warmup_of_a_subject_is_refused():
    model, _ = subject()
    with pytest.raises(AdapterStateError, match="its Down never trains"):
        set_warmup(model, True)
    with pytest.raises(AdapterNotFoundError, match=r"no Meta-LoRA adapter 'bob'\. It has: default"):
        set_warmup(model, True, "bob")


def test_all_slots_share_the_one_stored_mid_and_a_new_adapter_changes_nothing():
    base, x = mlp(), torch.randn(2, 12)
    model = adapted(base, num_slots=3, init_weights=True)
    layer = layer_of(model)
    for slot in range(3):
        assert torch.equal(layer.metalora_mid["default"][slot], layer.metalora_mid_init["default"])
    set_slots(model, [2, 1])
    torch.testing.assert_close(model(x), base(x))


def test_stored_start_is_the_downs_mid_with_up_zero():
    model, source = subject(init_weights=True)
    layer = layer_of(model)
    assert torch.equal(layer.metalora_mid["default"][0], source.tensors["lin0.metalora_mid_init"])
    assert not layer.metalora_up["default"].any()


def test_mean_start_is_the_mean_subject():
    base = mlp()
    meta = randomise(adapted(base, num_slots=4))
    mids, ups = layer_of(meta).metalora_mid["default"], layer_of(meta).metalora_up["default"]
    meta.add_adapter("ann", config(stage="subject", down="default", start="mean", init_weights=True))
    assert torch.allclose(layer_of(meta).metalora_mid["ann"][0], mids.mean(0))
    assert torch.allclose(layer_of(meta).metalora_up["ann"][0], ups.mean(0))


def test_fresh_start_is_another_mid_and_may_have_another_rank():
    model, _ = subject(start="fresh", r=3, init_weights=True)
    assert layer_of(model).metalora_mid["default"].shape == (1, 3, 4)
    assert not layer_of(model).metalora_up["default"].any()


def test_reset_slots_in_place_and_only_those_asked_for():
    model = randomise(adapted(num_slots=3))
    layer = layer_of(model)
    mid, kept = layer.metalora_mid["default"], layer.metalora_mid["default"][1].clone()
    reset_slots(model, slots=[0, 2])
    assert layer.metalora_mid["default"] is mid
    assert torch.equal(mid[0], layer.metalora_mid_init["default"])
    assert torch.equal(mid[2], layer.metalora_mid_init["default"])
    assert torch.equal(mid[1], kept)
    assert not layer.metalora_up["default"][[0, 2]].any()
    with pytest.raises(AdapterStateError, match=r"3 slot\(s\), 0 to 2; got 3"):
        reset_slots(model, slots=[3])
    with pytest.raises(AdapterStateError, match="start must be one of"):
        reset_slots(model, start="zero")


def test_reset_to_the_mean_of_a_loaded_down():
    model, source = subject()
    reset_slots(model, start="mean")
    assert torch.equal(layer_of(model).metalora_up["default"], source.tensors["lin0.metalora_up"])


def test_only_the_slots_of_a_batch_get_a_gradient():
    model = randomise(adapted(num_slots=4))
    set_slots(model, [1, 3, 1])
    gradients(model)
    for factors in (layer_of(model).metalora_mid, layer_of(model).metalora_up):
        moved = [bool(grad.any()) for grad in factors["default"].grad]
        assert moved == [False, True, False, True]
