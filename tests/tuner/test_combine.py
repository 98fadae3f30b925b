# SPDX-License-Identifier: Apache-2.0
"""Sums of adapters of different Downs: the same function, a Down of their own, and a life without their parts."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.utils import set_peft_model_state_dict
from torch import nn
from tuner_models import adapted, config, down_source, layer_of, mlp, randomise

from peft_metalora.errors import AdapterStateError
from peft_metalora.tuner import add_weighted_subject, down, set_down_loader, to_lora
from peft_metalora.tuner.combine import COMBINATIONS
from peft_metalora.tuner.on_model import meta_lora_layers

WEIGHTS = {"default": 0.7, "other": -1.5, "ann": 0.4}


class Nested(nn.Module):
    """A convolution, a linear layer, and one whose name ends like the other's."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3, padding=1)
        self.lin = nn.Linear(5, 12)
        self.block = nn.ModuleDict({"lin": nn.Linear(12, 7)})

    def forward(self, x):
        return self.block["lin"](torch.tanh(self.lin(torch.relu(self.conv(x)).mean((2, 3)))))


def nested():
    torch.manual_seed(0)
    return Nested().eval()


def three_adapters(**of_other):
    """'default' and 'other' with a Down each, of other ranks and scale, and 'ann' on the Down of 'default'."""
    model = adapted(nested(), target_modules=["conv", "lin"])
    settings = {"r": 3, "meta_r": 5, "lora_alpha": 7, "target_modules": ["conv", "lin"], **of_other}
    model.add_adapter("other", config(**settings))
    model.add_adapter("ann", config(stage="subject", down="default", start="fresh", target_modules=["conv", "lin"]))
    return randomise(model), torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def dense_sum(layer, names, weights=WEIGHTS):
    return sum(weights[name] * layer.get_delta_weight(name) for name in names if name in layer.metalora_mid)


def assert_is_sum(model, name, parts, weights=WEIGHTS):
    for _, layer in meta_lora_layers(model):
        torch.testing.assert_close(layer.get_delta_weight(name), dense_sum(layer, parts, weights), atol=1e-5, rtol=1e-5)


def loaded(model, name, folder):
    model.save_pretrained(folder, selected_adapters=[name])
    return PeftModel.from_pretrained(nested(), folder / name).eval()


def test_a_sum_on_stacked_downs_is_exact():
    base, x = mlp(), torch.randn(5, 12)
    model = adapted(base, target_modules=["lin1"])
    model.add_adapter("other", config(target_modules=["lin1"], r=3, meta_r=5, lora_alpha=7))
    model.add_adapter("ann", config(stage="subject", down="default", target_modules=["lin1"], use_rslora=True))
    randomise(model)
    expected = 0
    for name, weight in WEIGHTS.items():
        model.set_adapter(name)
        expected += weight * (model(x) - base(x)).detach()
    model.add_weighted_adapter(list(WEIGHTS), list(WEIGHTS.values()), "sum")
    model.set_adapter("sum")
    torch.testing.assert_close(model(x) - base(x), expected, atol=1e-5, rtol=1e-5)
    layer = layer_of(model, "lin1")
    assert layer.down_key["sum"] == "sum" and layer.scaling["sum"] == 1
    # ann shares its Down with default, so that two are stacked for three
    assert torch.equal(layer.metalora_down["sum"], torch.cat([layer.metalora_down[k] for k in ("default", "other")]))
    assert layer.metalora_mid["sum"].shape == (1, 2 + 3 + 2, 4 + 5)
    assert not layer.metalora_mid["sum"][0, :2, 4:].any() and not layer.metalora_mid["sum"][0, 2:5, :4].any()


def test_slots_of_one_adapter_and_another_down_add_up():
    model = adapted(num_slots=2)
    model.add_adapter("other", config())
    randomise(model)
    add_weighted_subject(model, ["default", "other", "default"], [1, 1, -2], "sum", slots=[0, 0, 1])
    layer = layer_of(model)
    expected = layer.get_delta_weight("default") + layer.get_delta_weight("other")
    expected -= 2 * layer.get_delta_weight("default", 1)
    torch.testing.assert_close(layer.get_delta_weight("sum"), expected, atol=1e-5, rtol=1e-5)
    assert layer.metalora_down["sum"].shape[0] == 8


@pytest.mark.parametrize("rank", [1, 3, 99, None])
def test_a_sum_of_lower_rank_is_the_best_there_is(rank):
    model, _ = three_adapters()
    model.add_weighted_adapter(list(WEIGHTS), list(WEIGHTS.values()), "sum", "svd", svd_rank=rank)
    for path in ("conv", "lin"):
        layer = layer_of(model, path)
        total = dense_sum(layer, WEIGHTS).double()
        left, values, right = torch.linalg.svd(total.flatten(1), full_matrices=False)
        best = (left[:, : rank or 3] * values[: rank or 3]) @ right[: rank or 3]
        torch.testing.assert_close(layer.get_delta_weight("sum").flatten(1), best.float(), atol=1e-5, rtol=1e-4)
        assert layer.r["sum"] == min(rank or 3, 7, layer.d_out)


def test_a_linear_sum_adds_factors_over_both_downs():
    model, _ = three_adapters(r=2)
    model.add_weighted_adapter(["default", "other"], [0.5, -2.0], "sum", "linear")
    layer = layer_of(model, "lin")
    scales = 0.5 * layer.scaling["default"], -2.0 * layer.scaling["other"]
    mids = [layer.metalora_mid[name][0] for name in ("default", "other")]
    ups = [layer.metalora_up[name][0] for name in ("default", "other")]
    mid = torch.cat([abs(scale) ** 0.5 * mid for scale, mid in zip(scales, mids, strict=True)], dim=1)
    up = abs(scales[0]) ** 0.5 * ups[0] - abs(scales[1]) ** 0.5 * ups[1]
    torch.testing.assert_close(layer.metalora_mid["sum"][0], mid)
    torch.testing.assert_close(layer.metalora_up["sum"][0], up)
    with pytest.raises(AdapterStateError, match="needs equal ranks"):
        three_adapters()[0].add_weighted_adapter(["default", "other"], [1, 1], "sum", "linear")


@pytest.mark.parametrize("combination", ["cat", "svd"])
def test_a_sum_loads_again_and_outlives_its_parts(tmp_path, combination):
    model, x = three_adapters(target_modules=["lin", "block.lin"], exclude_modules=["conv"])
    model.peft_config["default"].facts = {"domain": "faces", "trigger": "ann"}
    model.add_weighted_adapter(list(WEIGHTS), list(WEIGHTS.values()), "sum", combination)
    if combination == "cat":
        assert_is_sum(model, "sum", WEIGHTS)
    model.set_adapter("sum")
    expected = model(x)
    for name in ("ann", "other", "default"):
        model.delete_adapter(name)
    assert torch.equal(model(x), expected)
    again = loaded(model, "sum", tmp_path)
    torch.testing.assert_close(again(x), expected, atol=1e-6, rtol=1e-5)
    assert {path: layer.r["default"] for path, layer in meta_lora_layers(again)} == {
        path: layer.r["sum"] for path, layer in meta_lora_layers(model)
    }
    stored = again.peft_config["default"]
    assert (stored.stage, stored.down, stored.facts, stored.exclude_modules) == ("meta", None, None, None)


def test_adapters_that_share_no_layer_add_up(tmp_path):
    base, x = nested(), torch.randn(4, 3, 6, 6)
    model = adapted(base, target_modules=["conv"])
    model.add_adapter("other", config(target_modules=["block.lin"], meta_r=6))
    randomise(model)
    model.add_weighted_adapter(["default", "other"], [1, 1], "sum")
    model.base_model.set_adapter(["default", "other"])
    expected = model(x)
    model.set_adapter("sum")
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(loaded(model, "sum", tmp_path)(x), expected, atol=1e-6, rtol=1e-5)
    downs = layer_of(model, "conv").metalora_down
    assert torch.equal(downs["sum"], downs["default"]) and downs["sum"].data_ptr() != downs["default"].data_ptr()


def test_a_sum_on_its_own_down_carries_subjects(tmp_path):
    model, x = three_adapters()
    model.add_weighted_adapter(["default", "other"], [1, 1], "sum")
    model.set_adapter("sum")
    expected = model(x)
    settings = {"r": 5, "meta_r": 9, "lora_alpha": 5, "target_modules": ["conv", "lin"], "init_weights": True}
    model.add_adapter("bob", config(stage="subject", down="sum", start="mean", **settings))
    model.set_adapter("bob")
    torch.testing.assert_close(model(x), expected)
    again = loaded(model, "sum", tmp_path / "down")
    assert down.fingerprint(down_source(again).tensors) == model.peft_config["bob"].down_fingerprint
    source = down_source(again)
    set_down_loader(lambda _: source)
    torch.testing.assert_close(loaded(model, "bob", tmp_path)(x), expected, atol=1e-6, rtol=1e-5)


def test_a_sum_leaves_what_trains_as_it_was_and_trains_once_it_is_active():
    model, x = three_adapters()
    model.delete_adapter("ann")
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    model.add_weighted_adapter(["default", "other"], [1, 1], "sum")
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    assert {name: flags[name] for name in before} == before
    assert flags.keys() > before.keys() and not any(flag for name, flag in flags.items() if name not in before)
    model.set_adapter("sum")
    model(x).sum().backward()
    assert layer_of(model, "lin").metalora_down["sum"].grad is not None


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_a_stacked_down_has_the_wider_dtype(dtypes):
    model, _ = three_adapters()
    for name, dtype in zip(("default", "other"), dtypes, strict=True):
        for _, layer in meta_lora_layers(model):
            for factors in (layer.metalora_down, layer.metalora_mid, layer.metalora_up):
                factors[name].data = factors[name].data.to(dtype)
    model.add_weighted_adapter(["default", "other"], [1, 1], "sum")
    for _, layer in meta_lora_layers(model):
        for factors in (layer.metalora_down, layer.metalora_mid, layer.metalora_up, layer.metalora_mid_init):
            assert factors["sum"].dtype == dtypes[1]


def test_a_refused_sum_changes_nothing():
    model = adapted(target_modules=["lin0"])
    model.add_adapter("other", config(target_modules=["lin0", "lin1"], use_dora=True))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(AdapterStateError, match="uses DoRA"):
        model.add_weighted_adapter(["default", "other"], [1, 1], "sum")
    assert model.state_dict().keys() == before.keys() and list(model.peft_config) == ["default", "other"]


def test_a_sum_merges_and_converts_as_any_adapter():
    model, x = three_adapters()
    model.add_weighted_adapter(["default", "other"], [1, 1], "sum")
    model.set_adapter("sum")
    expected = model(x)
    lora, state = to_lora(model, "sum")
    assert lora.r == 5 and state["lin.lora_A.weight"].shape == (5, 5)
    model.merge_adapter()
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-4)


def test_a_sum_on_one_down_copies_none_of_it():
    model, _ = three_adapters()
    model.add_weighted_adapter(["default", "ann"], [1, -1], "sum")
    layer = layer_of(model, "lin")
    assert layer.down_key["sum"] == "default" and "sum" not in layer.metalora_down
    assert (model.peft_config["sum"].stage, model.peft_config["sum"].down) == ("subject", "default")


@pytest.mark.parametrize("ending", ["", "_svd"])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("ties", {}),
        ("ties", {"majority_sign_method": "frequency"}),
        ("dare_ties", {}),
        ("dare_linear", {}),
        ("magnitude_prune", {}),
    ],
)
def test_sums_that_drop_numbers_are_those_of_pefts_lora(kind, options, ending, tmp_path, monkeypatch):
    # What DARE keeps, by chance: here the same numbers for both.
    monkeypatch.setattr(torch, "bernoulli", lambda p: (torch.arange(p.numel()).view_as(p) % 5 < 3).to(p))
    model = adapted(nested(), target_modules=["block.lin", "lin"])
    model.add_adapter("other", config(meta_r=5, lora_alpha=7, target_modules=["block.lin", "lin"]))
    randomise(model)
    lora = None
    for name in ("default", "other"):
        lora_config, state = to_lora(model, name)
        if lora is None:
            lora = get_peft_model(nested(), lora_config)
        else:
            lora.add_adapter(name, lora_config)
        set_peft_model_state_dict(lora, {f"base_model.model.{key}": value for key, value in state.items()}, name)
    for one in (model, lora):
        one.add_weighted_adapter(["default", "other"], [0.8, -1.3], "sum", kind + ending, density=0.6, **options)
    layers = {path.removeprefix("base_model.model."): layer for path, layer in lora.named_modules()}
    for path, layer in meta_lora_layers(model):
        torch.testing.assert_close(layer.get_delta_weight("sum"), layers[path].get_delta_weight("sum"))
        assert layer.get_delta_weight("sum").any() and layer.r["sum"] == layers[path].r["sum"] == 2
    found = loaded(model, "sum", tmp_path)
    for (_, layer), (_, other) in zip(meta_lora_layers(found), meta_lora_layers(model), strict=True):
        torch.testing.assert_close(layer.get_delta_weight("default"), other.get_delta_weight("sum"))


def test_a_sum_on_one_down_loads_where_another_module_has_the_same_ending(tmp_path):
    model = adapted(nested(), target_modules="lin")
    model.add_adapter("ann", config(stage="subject", down="default", start="fresh", target_modules="lin"))
    randomise(model)
    source = down_source(model)
    model.add_weighted_adapter(["default", "ann"], [1, 2], "sum")
    set_down_loader(lambda _: source)
    found = loaded(model, "sum", tmp_path)
    assert [path for path, _ in meta_lora_layers(found)] == ["lin"]
    torch.testing.assert_close(
        layer_of(found, "lin").get_delta_weight("default"), layer_of(model, "lin").get_delta_weight("sum")
    )


@pytest.mark.parametrize("kind", COMBINATIONS)
def test_autocast_does_not_reach_a_sum(kind):
    """Bug: inside autocast the whole differences of '..._svd' came from products in bfloat16, and were kept."""

    def summed(autocast):
        torch.manual_seed(0)
        model = randomise(adapted(nested(), num_slots=2, target_modules=["block.lin", "lin"]))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            model.add_weighted_adapter(["default", "default"], [0.8, -1.3], "sum", kind, slots=[0, 1], density=1.0)
        return {path: layer.get_delta_weight("sum") for path, layer in meta_lora_layers(model)}

    inside, outside = summed(True), summed(False)
    assert all(torch.equal(inside[path], delta) and delta.any() for path, delta in outside.items())
