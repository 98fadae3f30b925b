# SPDX-License-Identifier: Apache-2.0
"""LoRA's later ideas inside the three factors: each does what its paper says it does."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D
from tuner_models import adapted, config, down_source, layer_of, mlp, randomise

from peft_metalora.errors import AdapterNotFoundError, AdapterStateError, ConfigError
from peft_metalora.tuner import (
    init_down_from_data,
    lora_plus_groups,
    reset_slots,
    set_down_loader,
    set_slots,
    subject_state,
    to_lora,
    using_slots,
    write_subject,
)


def test_rslora_divides_by_the_root_of_the_rank():
    layer = layer_of(adapted(r=4, lora_alpha=3, use_rslora=True))
    assert layer.scaling["default"] == pytest.approx(3 / 2)
    layer.set_scale("default", 2)
    assert layer.scaling["default"] == pytest.approx(3)


def test_orthogonal_rows():
    down = layer_of(adapted(down_init="orthogonal")).metalora_down["default"]
    torch.testing.assert_close(3 * down @ down.T, torch.eye(4), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("autocast", [False, True])
def test_pissa_rows_are_the_weights_leading_directions(autocast):
    """Bug: inside autocast the rows came from products in bfloat16, a hundredth off."""
    base = mlp()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        model = adapted(base, down_init="pissa")
    down = layer_of(model).metalora_down["default"]
    _, _, right = torch.linalg.svd(base.lin0.weight)
    overlap = torch.linalg.svdvals(right[:4] @ down.T) * 3**0.5
    torch.testing.assert_close(overlap, torch.ones(4), atol=1e-4, rtol=1e-4)
    assert torch.equal(model.base_model.model.lin0.base_layer.weight, base.lin0.weight)


def test_pissa_on_a_convolution():
    model = adapted(nn.Sequential(nn.Conv2d(4, 6, 3)), target_modules=["0"], down_init="pissa")
    assert layer_of(model, "0").metalora_down["default"].shape == (4, 4, 3, 3)


def test_down_from_data_spans_what_the_layer_sees():
    torch.manual_seed(0)
    model = adapted(target_modules=["lin0"])
    directions = torch.linalg.qr(torch.randn(12, 4))[0].T
    batches = [torch.randn(50, 4) @ directions for _ in range(3)]
    init_down_from_data(model, lambda: [model(batch) for batch in batches])
    down = layer_of(model).metalora_down["default"]
    torch.testing.assert_close(torch.linalg.svdvals(directions @ down.T) * 3**0.5, torch.ones(4), atol=1e-4, rtol=1e-4)
    assert not layer_of(model)._forward_pre_hooks


def test_down_from_data_needs_data_and_an_owner():
    model = adapted()
    with pytest.raises(AdapterStateError, match="'lin0' saw no input"):
        init_down_from_data(model, lambda: None)
    model.add_adapter("ann", config(stage="subject", down="default"))
    with pytest.raises(AdapterStateError, match="'ann' is a subject"):
        init_down_from_data(model, lambda: None, "ann")
    with pytest.raises(AdapterNotFoundError, match="'bob'"):
        init_down_from_data(model, lambda: None, "bob")


def test_lora_plus_gives_up_its_own_rate():
    model = adapted()
    groups = lora_plus_groups(model, lr=1e-3, ratio=8)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    kinds = [{names[id(p)].split(".")[-2] for p in group["params"]} for group in groups]
    assert kinds == [{"metalora_down", "metalora_mid"}, {"metalora_up"}]
    assert [group["lr"] for group in groups] == [1e-3, pytest.approx(8e-3)]
    torch.optim.AdamW(groups)
    with pytest.raises(AdapterNotFoundError, match="Nothing of an adapter 'bob' trains"):
        lora_plus_groups(model, 1e-3, adapter_name="bob")


LINEARS = {"linear": lambda: nn.Linear(12, 16), "transformers Conv1D": lambda: Conv1D(16, 12)}


@pytest.mark.parametrize("kind", LINEARS)
def test_dora_equals_pefts_dora_on_the_same_product(kind):
    torch.manual_seed(0)
    base, x = nn.Sequential(LINEARS[kind]()).eval(), torch.randn(3, 5, 12)
    model = adapted(base, target_modules=["0"], use_dora=True, lora_alpha=3)
    layer = layer_of(model, "0")
    layer.metalora_magnitude["default"].data.mul_(torch.rand(16) + 0.5)
    peft = get_peft_model(
        copy.deepcopy(base),
        LoraConfig(r=2, lora_alpha=3, target_modules=["0"], use_dora=True, fan_in_fan_out=kind != "linear"),
    ).eval()
    theirs = peft.base_model.model[0]
    theirs.lora_A["default"].weight.data = layer.folded_factor("default", 0)
    theirs.lora_B["default"].weight.data = layer.metalora_up["default"].data[0].clone()
    theirs.lora_magnitude_vector["default"].weight.data = layer.metalora_magnitude["default"].data[0].clone()
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(model(x), peft(x))
    model(x).square().sum().backward()
    peft(x).square().sum().backward()
    torch.testing.assert_close(layer.metalora_up["default"].grad[0], theirs.lora_B["default"].weight.grad)
    torch.testing.assert_close(
        layer.metalora_magnitude["default"].grad[0], theirs.lora_magnitude_vector["default"].weight.grad
    )
    expected = model(x)
    model.merge_adapter()
    torch.testing.assert_close(model(x), expected)


def test_dora_starts_as_the_base_with_slots_means_and_no_subject():
    base, x = mlp(), torch.randn(3, 12)
    model = adapted(base, use_dora=True, num_slots=3, init_weights=True)
    torch.testing.assert_close(model(x), base(x))
    randomise(model)
    for _, factor in [(path, layer_of(model, path)) for path in ("lin0", "lin1")]:
        factor.metalora_magnitude["default"].data.mul_(torch.rand(factor.metalora_magnitude["default"].shape) + 0.5)
    alone = []
    for slot in (0, 1, 2):
        with using_slots(model, [slot]):
            alone.append(model(x))
    with using_slots(model, [2, -1, 0]):
        mixed = model(x)
    torch.testing.assert_close(mixed[0], alone[2][0])
    torch.testing.assert_close(mixed[2], alone[0][2])
    with using_slots(model, [-1]):
        assert torch.equal(model(x), base(x))
    reset_slots(model)
    torch.testing.assert_close(model(x), base(x))


def test_dora_saves_writes_and_says_what_it_cannot(tmp_path):
    base, x = mlp(), torch.randn(3, 12)
    meta = randomise(adapted(base))
    source = down_source(meta)
    set_down_loader(lambda _: source)
    model = randomise(adapted(base, stage="subject", down="a/b", use_dora=True, num_slots=2), 3)
    layer_of(model).metalora_magnitude["default"].data.mul_(1.5)
    model.save_pretrained(tmp_path)
    # Not to the bit: how a row's length is summed depends on where the weight lies in memory.
    torch.testing.assert_close(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)(x), model(x))
    state = {key: value.clone() for key, value in subject_state(model, "default", 0).items()}
    assert "lin0.metalora_magnitude" in state
    write_subject(model, "default", state, slot=1)
    expected = model(x)
    set_slots(model, [1])
    torch.testing.assert_close(model(x), expected)
    with pytest.raises(AdapterStateError, match="uses DoRA"):
        to_lora(model)
    with pytest.raises(AdapterStateError, match="uses DoRA"):
        model.add_weighted_adapter(["default"], [1.0], "twice")


def test_dora_on_a_convolution_is_refused():
    with pytest.raises(ConfigError, match="use_dora is for linear layers"):
        adapted(nn.Sequential(nn.Conv2d(4, 6, 3)), target_modules=["0"], use_dora=True)
