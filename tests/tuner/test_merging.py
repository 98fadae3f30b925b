# SPDX-License-Identifier: Apache-2.0
"""Merge equals forward, unmerge restores the bits, fold equals forward, sums of subjects are sums of functions."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, inject_adapter_in_model
from peft.functional import set_adapter
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D
from tuner_models import adapted, config, layer_of, mlp, randomise

from peft_metalora.errors import AdapterNotFoundError, AdapterStateError, NonFiniteError, SubjectIndexError
from peft_metalora.tuner import (
    add_weighted_subject,
    fold,
    set_merge_backup,
    set_slots,
    subject_state,
    unfold,
    using_slots,
    write_subject,
)
from peft_metalora.tuner.on_model import meta_lora_layers

BASES = {
    "linear": (lambda: nn.Linear(12, 16), (4, 5, 12)),
    "no bias": (lambda: nn.Linear(12, 16, bias=False), (4, 12)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, dilation=2), (4, 4, 9, 9)),
    "reflecting conv2d": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (4, 4, 9, 9)),
    "one conv2d image": (lambda: nn.Conv2d(4, 6, 3), (4, 9, 9)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding="same"), (4, 4, 8)),
    "conv3d": (lambda: nn.Conv3d(3, 6, (1, 2, 2)), (4, 3, 3, 4, 4)),
    "transformers Conv1D": (lambda: Conv1D(16, 12), (4, 3, 12)),
}


def wrapped(kind, dtype=torch.float32, seed=0, **settings):
    torch.manual_seed(seed)
    make, shape = BASES[kind]
    base, x = nn.Sequential(make()).eval().to(dtype), torch.randn(*shape).to(dtype)
    return base, x, randomise(adapted(base, target_modules=["0"], **settings), seed)


@settings(max_examples=30, deadline=None)
@given(
    kind=st.sampled_from(sorted(BASES)),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    ranks=st.sampled_from([(2, 4), (1, 1), (8, 3), (2, 40)]),
    slots=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_merge_and_fold_equal_the_forward_pass_and_undo_exactly(kind, dtype, ranks, slots, seed):
    _, x, model = wrapped(kind, dtype, seed, r=ranks[0], meta_r=ranks[1], num_slots=slots, lora_alpha=3)
    slot = seed % slots
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 0.15}[dtype]
    weight = layer_of(model, "0").get_base_layer().weight
    before = weight.detach().clone()
    with torch.no_grad():
        set_slots(model, None if slot == 0 else [slot])
        expected = model(x)
        fold(model)
        torch.testing.assert_close(model(x), expected, atol=tolerance, rtol=tolerance)
        unfold(model)
        model.merge_adapter()
        torch.testing.assert_close(model(x), expected, atol=tolerance, rtol=tolerance)
        model.unmerge_adapter()
    assert torch.equal(layer_of(model, "0").get_base_layer().weight, before)


@pytest.mark.parametrize("kind", BASES)
def test_mixed_batches_equal_one_by_one(kind):
    base, x, model = wrapped(kind, num_slots=3)
    if kind == "one conv2d image":
        x = torch.randn(4, *x.shape)
    with torch.no_grad():
        alone = []
        for slot in (0, 1, 2):
            set_slots(model, [slot])
            alone.append(model(x))
        set_slots(model, [2, -1, 0, 1])
        for folded in (False, True):
            together = model(x)
            for row, expected in enumerate([alone[2], base(x), alone[0], alone[1]]):
                torch.testing.assert_close(together[row], expected[row], atol=1e-5, rtol=1e-4)
            assert torch.equal(together[1], model.base_model.model[0].base_layer(x)[1])
            if not folded:
                fold(model)


@pytest.mark.parametrize("where", ["device", "host"])
def test_bits_return_after_many_merges(where):
    _, _, model = wrapped("linear", torch.bfloat16)
    set_merge_backup(model, where)
    before = model.base_model.model[0].base_layer.weight.clone()
    for _ in range(200):
        model.merge_adapter()
        model.unmerge_adapter()
    assert torch.equal(model.base_model.model[0].base_layer.weight, before)


def test_the_kept_weight_costs_what_the_docs_say():
    _, _, model = wrapped("linear")
    layer = layer_of(model, "0")
    old = layer.base_layer.weight.data_ptr()
    model.merge_adapter()
    assert layer.metalora_kept["weight"].data_ptr() == old
    model.unmerge_adapter()
    assert len(layer.metalora_kept) == 0
    set_merge_backup(model, "none")
    model.merge_adapter()
    assert len(layer.metalora_kept) == 0
    with pytest.raises(AdapterStateError, match="was not kept"):
        model.unmerge_adapter()
    with pytest.raises(AdapterStateError, match="Unmerge it before"):
        set_merge_backup(model, "host")
    with pytest.raises(AdapterStateError, match="must be one of"):
        set_merge_backup(model, "disk")


def test_merge_and_unload_leaves_a_plain_model_and_keeps_no_copy():
    base, x = mlp(), torch.randn(3, 12)
    model = randomise(adapted(base))
    expected = model(x)
    merged = model.merge_and_unload()
    assert type(merged.lin0) is nn.Linear
    torch.testing.assert_close(merged(x), expected)


def test_unload_gives_the_base_back():
    base, x = mlp(), torch.randn(3, 12)
    model = randomise(adapted(base))
    plain = model.unload()
    assert torch.equal(plain(x), base(x))
    assert [name for name, _ in plain.named_modules()] == [name for name, _ in base.named_modules()]


def test_safe_merge_of_a_broken_adapter_merges_nothing():
    base, x = mlp(), torch.randn(3, 12)
    model = randomise(adapted(base))
    layer_of(model, "lin1").metalora_up["default"].data[0, 0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="NaNs detected in the merged weights"):
        model.merge_adapter(safe_merge=True)
    assert not layer_of(model, "lin0").merged
    with model.disable_adapter():
        assert torch.equal(model(x), base(x))


def test_disable_while_merged_is_the_base():
    base, x = mlp(), torch.randn(3, 12)
    model = randomise(adapted(base))
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(model(x), base(x))


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"use_rslora": True, "num_slots": 2}])
@pytest.mark.parametrize("names", [["default"], ["default", "other"]])
def test_autocast_does_not_reach_a_merged_weight(settings, names):
    """Bug: inside autocast the merged weight came out in bfloat16, in a model of float32."""
    model = adapted(mlp(), **settings)
    model.add_adapter("other", config(**settings))
    randomise(model)
    layer = layer_of(model)
    expected = layer.merged_weight(names)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model.merge_adapter(names)
    assert layer.get_base_layer().weight.dtype == torch.float32
    torch.testing.assert_close(layer.get_base_layer().weight, expected, rtol=0, atol=0)


def test_merging_needs_one_subject_and_holds_the_index():
    model, x = randomise(adapted(num_slots=3)), torch.randn(2, 12)
    set_slots(model, [0, 2])
    with pytest.raises(AdapterStateError, match=r"one subject for the whole batch, but \[0, 2\]"):
        model.merge_adapter()
    set_slots(model, [2, 2])
    expected = model(x)
    model.merge_adapter()
    torch.testing.assert_close(model(x), expected)
    with pytest.raises(SubjectIndexError, match="Unmerge it"):
        set_slots(model, [0, 0])


def test_several_adapters_merge_together_and_by_name():
    base, x = mlp(), torch.randn(3, 12)
    model = randomise(adapted(base))
    model.add_adapter("other", config())
    randomise(model, 4)
    model.base_model.set_adapter(["default", "other"])
    both = model(x)
    model.merge_adapter(["default"])
    with pytest.warns(UserWarning, match="additionally merging other"):
        model.merge_adapter()
    torch.testing.assert_close(model(x), both)
    model.unmerge_adapter()
    assert torch.equal(layer_of(model).base_layer.weight, base.lin0.weight)


def test_an_adapter_that_is_named_twice_is_merged_once():
    """Bug: it was added twice."""
    base, x = mlp(), torch.randn(3, 12)
    model = randomise(adapted(base))
    wanted = model(x)
    model.merge_adapter(["default", "default"])
    torch.testing.assert_close(model(x), wanted)


@pytest.mark.parametrize("where", ["device", "host"])
def test_adapters_merged_in_turn_are_what_they_are_together(where):
    """Bug: DoRA's rows were measured on the weight into which the one before was merged already."""
    model, x = adapted(use_dora=True), torch.randn(3, 12)
    model.add_adapter("other", config(use_dora=True))
    randomise(model)
    set_merge_backup(model, where)
    model.base_model.set_adapter(["default", "other"])
    with torch.no_grad():
        both = model(x)
        for name in ("default", "other"):
            model.merge_adapter([name])
        torch.testing.assert_close(model(x), both)
        model.add_adapter("new", config(use_dora=True, init_weights=True))
        model.unmerge_adapter()
        assert torch.equal(model(x), both)
        model.set_adapter("new")
        torch.testing.assert_close(model(x), mlp()(x), msg="one that comes while others are merged starts as the base")


def test_dora_is_not_merged_after_others_that_cannot_be_taken_out():
    model = randomise(adapted())
    model.add_adapter("dora", config(use_dora=True))
    set_merge_backup(model, "none")
    model.merge_adapter(["default"])
    merged = layer_of(model).base_layer.weight.clone()
    with pytest.raises(AdapterStateError, match="was not kept"):
        model.merge_adapter(["dora"])
    assert torch.equal(layer_of(model).base_layer.weight, merged)


@pytest.mark.parametrize("ours_first", [True, False])
@pytest.mark.parametrize("merges", ["ours style", "style ours"])
@pytest.mark.parametrize("ends", ["ours style", "style ours"])
@pytest.mark.parametrize("dora", [True, False])
def test_merges_of_two_methods_end_in_any_order(ours_first, merges, ends, dora):
    """Bug: ours brought the weight from before both back, from which LoRA then took itself: the base was broken."""
    base, x = mlp(), torch.randn(3, 12)
    settings = {
        "ours": config(use_dora=dora),
        "style": LoraConfig(r=2, target_modules=["lin0", "lin1"], init_lora_weights=False),
    }
    for name in ("ours", "style") if ours_first else ("style", "ours"):
        inject_adapter_in_model(settings[name], base, name)
    randomise(base)
    set_adapter(base, ["ours", "style"])
    layers = {"ours": [layer for _, layer in meta_lora_layers(base)]}
    layers["style"] = [m for m in base.modules() if isinstance(m, BaseTunerLayer) and m not in layers["ours"]]
    with torch.no_grad():
        wanted = base(x)
        for name in merges.split():
            [layer.merge() for layer in layers[name]]
        for layer in layers["ours"]:
            layer.set_scale("ours", 0.5)
        for name in ends.split():
            [layer.unmerge() for layer in layers[name]]
        for layer in layers["ours"]:
            layer.set_scale("ours", 1)
        for path, layer in meta_lora_layers(base):
            torch.testing.assert_close(layer.get_base_layer().weight, mlp().get_submodule(path).weight)
        torch.testing.assert_close(base(x), wanted)


def test_what_is_parked_elsewhere_is_not_unmerged():
    """Bug: under sequential offloading disabled adapters were said to be unmerged, and the person went on to show."""
    model = randomise(adapted())
    model.merge_adapter()
    layer = layer_of(model)
    layer.base_layer.weight = nn.Parameter(layer.base_layer.weight.to("meta"))
    with pytest.raises(AdapterStateError, match="parked by offloading"), model.disable_adapter():
        model(torch.randn(3, 12))
    assert layer.merged


def test_scale_of_a_folded_or_merged_subject():
    base, x = mlp(), torch.randn(3, 12)
    model = randomise(adapted(base, target_modules=["lin1"]))
    full = model(x) - base(x)
    fold(model)
    with torch.no_grad():
        for layer in (layer_of(model, "lin1"),):
            layer.set_scale("default", 0.5)
            torch.testing.assert_close(model(x) - base(x), full / 2)
            layer.scale_layer(4)
            torch.testing.assert_close(model(x) - base(x), full * 2)
            layer.unscale_layer(2)
            torch.testing.assert_close(model(x) - base(x), full)
            layer.unscale_layer()
            torch.testing.assert_close(model(x) - base(x), full)
    layer_of(model, "lin1").set_scale("default", 0.25)
    model.merge_adapter()
    torch.testing.assert_close(model(x) - base(x), full / 4)


def test_a_subject_folded_at_scale_zero_comes_back():
    base, x = mlp(), torch.randn(3, 12)
    model = randomise(adapted(base, target_modules=["lin1"]))
    full = model(x) - base(x)
    layer_of(model, "lin1").set_scale("default", 0)
    fold(model)
    with torch.no_grad():
        torch.testing.assert_close(model(x), base(x))
        layer_of(model, "lin1").set_scale("default", 1)
        torch.testing.assert_close(model(x) - base(x), full)


def test_a_fold_follows_a_written_subject_and_training_ignores_it():
    model, x = randomise(adapted(num_slots=2)), torch.randn(3, 12)
    fold(model)
    state = {key: value * 3 for key, value in subject_state(model, "default", 0).items()}
    write_subject(model, "default", state, slot=1)
    with using_slots(model, [1]):
        with torch.no_grad():
            folded = model(x)
        live = model(x)
    torch.testing.assert_close(folded, live)
    live.sum().backward()
    assert layer_of(model).metalora_mid["default"].grad[1].any()


def weighted(combination_type, **options):
    base, x = mlp(), torch.randn(5, 12)
    model = adapted(base, target_modules=["lin1"])
    for name in ("ann", "bob"):
        model.add_adapter(name, config(stage="subject", down="default", target_modules=["lin1"], lora_alpha=3))
    randomise(model)
    parts = {}
    for name in ("ann", "bob"):
        model.set_adapter(name)
        parts[name] = model(x) - base(x)
    model.add_weighted_adapter(["ann", "bob"], [0.7, -1.5], "both", combination_type, **options)
    model.set_adapter("both")
    return model, x, model(x) - base(x), 0.7 * parts["ann"] - 1.5 * parts["bob"]


@pytest.mark.parametrize("combination", [("cat", {}), ("svd", {"svd_rank": 4}), ("svd", {"svd_rank": 99})])
def test_weighted_sum_is_exact_where_the_rank_allows(combination):
    model, _, got, expected = weighted(combination[0], **combination[1])
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
    layer = layer_of(model, "lin1")
    assert layer.down_key["both"] == "default"
    assert layer.metalora_mid["both"].shape == (1, 4, 4)


def test_weighted_sum_of_lower_rank_is_the_best_there_is():
    model, _, _, _ = weighted("svd", svd_rank=2)
    layer = layer_of(model, "lin1")
    total = 0.7 * layer.get_delta_weight("ann") - 1.5 * layer.get_delta_weight("bob")
    left, values, right = torch.linalg.svd(total)
    best = left[:, :2] * values[:2] @ right[:2]
    torch.testing.assert_close(layer.get_delta_weight("both"), best, atol=1e-5, rtol=1e-4)


def test_linear_combination_of_one_is_itself():
    model = randomise(adapted(num_slots=2))
    add_weighted_subject(model, ["default"], [-2.0], "twice", "linear", slots=[1])
    layer = layer_of(model)
    torch.testing.assert_close(layer.get_delta_weight("twice"), -2 * layer.get_delta_weight("default", 1))


def test_a_weighted_sum_saves_and_loads(tmp_path):
    from peft import PeftModel
    from tuner_models import down_source

    from peft_metalora.tuner import set_down_loader

    model, x, _, _ = weighted("cat")
    expected, source = model(x), down_source(model)
    set_down_loader(lambda _: source)
    model.save_pretrained(tmp_path, selected_adapters=["both"])
    loaded = PeftModel.from_pretrained(copy.deepcopy(mlp()), tmp_path / "both")
    torch.testing.assert_close(loaded(x), expected)


def test_sums_that_cannot_be_are_refused():
    model = adapted()
    model.add_adapter("other", config(r=1))
    model.add_adapter("ann", config(stage="subject", down="default", start="fresh", r=1))
    for adapters, weights, kind, message in (
        (["default"], [1, 1], "cat", "one weight"),
        (["default"], [1], "sum", "must be one of"),
        (["default"], [1], "dare_linear_svd", "needs a density above 0"),
        (["default", "ann"], [1, 1], "ties", "needs a density above 0"),
        (["default", "ann"], [1, 1], "linear", "needs equal ranks"),
        (["default", "other"], [1, 1], "linear", "needs equal ranks"),
    ):
        with pytest.raises(AdapterStateError, match=message):
            model.add_weighted_adapter(adapters, weights, "new", kind)
    for kind in ("ties", "magnitude_prune"):
        with pytest.raises(AdapterStateError, match=f"'{kind}' needs equal ranks"):
            model.add_weighted_adapter(["default", "ann"], [1, 1], "new", kind, density=0.5)
    with pytest.raises(AdapterStateError, match="majority_sign_method must be"):
        model.add_weighted_adapter(["default"], [1], "new", "ties", density=0.5, majority_sign_method="most")
    with pytest.raises(AdapterStateError, match="'ann' is taken"):
        model.add_weighted_adapter(["default"], [1], "ann")
    with pytest.raises(AdapterNotFoundError, match="Adapter bob does not exist"):
        model.add_weighted_adapter(["bob"], [1], "new")
    assert sorted(model.peft_config) == ["ann", "default", "other"]


def test_a_module_trained_whole_goes_into_a_sum_of_subjects_once():
    base, x = mlp(), torch.randn(5, 12)
    model = adapted(base, target_modules=["lin0"])
    for name, more in (("ann", {"modules_to_save": ["lin1"]}), ("bob", {}), ("eve", {"modules_to_save": ["lin1"]})):
        model.add_adapter(name, config(stage="subject", down="default", target_modules=["lin0"], **more))
    randomise(model)
    model.base_model.model.lin1.modules_to_save["ann"].weight.data.mul_(2)
    with pytest.raises(AdapterStateError, match=r"found 1 such instance\(s\).*'lin1' of 'ann', 'eve'"):
        model.add_weighted_adapter(["ann", "eve"], [1, 1], "both")
    model.add_weighted_adapter(["bob", "ann"], [0.0, 1.0], "sum")
    model.set_adapter("ann")
    expected = model(x)
    model.set_adapter("sum")
    torch.testing.assert_close(model(x), expected)
    assert model.peft_config["sum"].modules_to_save == ["lin1"]


def test_a_fold_does_not_outlive_training():
    model, x = randomise(adapted()), torch.randn(3, 12)
    fold(model)
    model.train()
    layer_of(model).metalora_mid["default"].data.mul_(2)
    model.eval()
    expected = model(x)
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected)


def test_index_and_fold_made_in_inference_mode_can_be_written_outside():
    model, x = randomise(adapted(num_slots=2)), torch.randn(2, 12)
    with torch.inference_mode():
        set_slots(model, [0, 1])
        fold(model)
        model(x)
    set_slots(model, [1, 0])
    write_subject(model, "default", {k: v.clone() for k, v in subject_state(model, "default", 0).items()}, 1)
    rows = model(torch.cat([x[:1], x[:1]]))
    torch.testing.assert_close(rows[0], rows[1])


@pytest.mark.parametrize("backup", ["device", "host", "none"])
@pytest.mark.parametrize("first", [None, ["default"]])
def test_a_merge_that_is_refused_leaves_what_was_merged_before(first, backup):
    """Bug: only layers without a merge were restored; on top of one, half of the second merge stayed."""
    model = adapted()
    model.add_adapter("bob", config(stage="subject", down="default"))
    randomise(model)
    layer_of(model, "lin1").metalora_up["bob"].data.fill_(float("nan"))
    set_merge_backup(model, backup)
    if first:
        model.base_model.merge_adapter(first)
    before = {path: layer_of(model, path).base_layer.weight.clone() for path in ("lin0", "lin1")}
    with pytest.raises(NonFiniteError):
        model.base_model.merge_adapter(["bob"], safe_merge=True)
    for path, weight in before.items():
        assert torch.equal(layer_of(model, path).base_layer.weight, weight)
        assert layer_of(model, path).merged_adapters == (first or [])
    if first and backup != "none":
        model.base_model.unmerge_adapter()
        assert torch.equal(layer_of(model).base_layer.weight, mlp().lin0.weight)


def test_merge_and_unload_is_refused_as_a_whole():
    """Bug: `merge_and_unload(safe_merge=True)` merged the layers before the broken one for good."""
    model = randomise(adapted())
    layer_of(model, "lin1").metalora_up["default"].data.fill_(float("nan"))
    x = torch.randn(3, 12)
    with pytest.raises(NonFiniteError):
        model.merge_and_unload(safe_merge=True)
    assert torch.equal(layer_of(model).base_layer.weight, mlp().lin0.weight) and not layer_of(model).merged
    assert model(x).isnan().all()
