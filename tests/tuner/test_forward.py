# SPDX-License-Identifier: Apache-2.0
"""The forward pass against a dense float64 reference, slots against separate adapters, and the subject index."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from torch import nn
from tuner_models import adapted, config, layer_of, mlp, randomise

from peft_metalora.errors import SubjectIndexError
from peft_metalora.tuner import set_slots, using_slots


def dense(layer, x, slot, name="default"):
    """base(x) + scaling * Up @ Mid @ Down @ x in float64, from the factors alone."""
    base = layer.get_base_layer()
    y = x.double() @ base.weight.double().T + (0 if base.bias is None else base.bias.double())
    if slot < 0:
        return y
    down = layer.metalora_down[layer.down_key[name]].double()
    mid, up = layer.metalora_mid[name][slot].double(), layer.metalora_up[name][slot].double()
    return y + layer.scaling[name] * x.double() @ (up @ mid @ down).T


@settings(max_examples=25, deadline=None)
@given(
    d_in=st.integers(3, 9),
    d_out=st.integers(3, 9),
    r=st.integers(1, 12),
    meta_r=st.integers(1, 12),
    lead=st.sampled_from([(2,), (2, 3), (4, 2, 2)]),
    slots=st.integers(1, 3),
    alpha=st.sampled_from([1, 2.5]),
    rslora=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    grad=st.booleans(),
    seed=st.integers(0, 99),
)
def test_forward_is_the_dense_product(d_in, d_out, r, meta_r, lead, slots, alpha, rslora, dtype, grad, seed):
    torch.manual_seed(seed)
    base = nn.Sequential(nn.Linear(d_in, d_out)).to(dtype)
    model = adapted(
        base, target_modules=["0"], r=r, meta_r=meta_r, num_slots=slots, lora_alpha=alpha, use_rslora=rslora
    )
    randomise(model)
    layer, x = layer_of(model, "0"), torch.randn(*lead, d_in).to(dtype)
    index = torch.randint(-1, slots, (lead[0],)).tolist()
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 1e-2}[dtype]
    with torch.set_grad_enabled(grad):
        alone = model(x)
        with using_slots(model, index):
            mixed = model(x)
    assert alone.dtype == dtype
    torch.testing.assert_close(alone.double(), dense(layer, x, 0), atol=tolerance, rtol=tolerance)
    for row, slot in enumerate(index):
        torch.testing.assert_close(mixed[row].double(), dense(layer, x[row], slot), atol=tolerance, rtol=tolerance)


def test_slots_equal_separate_adapters():
    base, x = mlp(), torch.randn(3, 12)
    model = randomise(adapted(base, num_slots=3))
    with using_slots(model, [2, 0, 1]):
        together = model(x)
    for row, slot in enumerate([2, 0, 1]):
        alone = adapted(base)
        for path in ("lin0", "lin1"):
            one, many = layer_of(alone, path), layer_of(model, path)
            one.metalora_down["default"].data.copy_(many.metalora_down["default"])
            one.metalora_mid["default"].data.copy_(many.metalora_mid["default"][slot : slot + 1])
            one.metalora_up["default"].data.copy_(many.metalora_up["default"][slot : slot + 1])
        torch.testing.assert_close(alone(x[row : row + 1])[0], together[row])


@pytest.mark.parametrize("grad", [True, False])
def test_no_subject_is_exactly_the_base_even_beside_a_broken_slot(grad):
    base, x = mlp(), torch.randn(2, 5, 12)
    model = randomise(adapted(base, num_slots=2))
    layer_of(model).metalora_up["default"].data.fill_(float("nan"))
    layer_of(model).metalora_mid["default"].data.fill_(float("inf"))
    with torch.set_grad_enabled(grad), using_slots(model, [-1, -1]):
        assert torch.equal(model(x), base(x))


def test_index_repeats_as_a_whole_for_guidance():
    model, x = randomise(adapted(num_slots=2)), torch.randn(4, 12)
    with using_slots(model, [1, 0, 1, 0]):
        spelled_out = model(x)
    with using_slots(model, [1, 0]):
        assert torch.equal(model(x), spelled_out)


def test_batch_that_is_no_multiple_is_refused():
    model = adapted(num_slots=2)
    with using_slots(model, [0, 1]), pytest.raises(SubjectIndexError, match="3 samples, which is no multiple of the 2"):
        model(torch.randn(3, 12))


@pytest.mark.parametrize("index", [[2], [-2], [0, 5]])
def test_unknown_slots_are_refused_and_the_index_stays(index):
    model = adapted(num_slots=2)
    set_slots(model, [1])
    with pytest.raises(SubjectIndexError, match=r"2 slot\(s\), numbered 0 to 1"):
        set_slots(model, index)
    assert layer_of(model).subject_index.values == (1,)


@pytest.mark.parametrize("index", [[], [0.5], [True]])
def test_index_must_be_whole_numbers(index):
    with pytest.raises(SubjectIndexError, match="must be whole numbers"):
        set_slots(adapted(), index)


def test_one_index_for_all_layers_overwritten_in_place():
    model = adapted(num_slots=3)
    set_slots(model, [0, 1])
    index = layer_of(model).subject_index
    assert layer_of(model, "lin1").subject_index is index
    before = index.slot.data_ptr()
    set_slots(model, torch.tensor([2, -1]))
    assert index.slot.data_ptr() == before
    assert index.slot.tolist() == [2, 0]
    assert index.present.flatten().tolist() == [True, False]
    set_slots(model, None)
    assert index.slot is None


def test_context_restores_the_index_before_it():
    model = adapted(num_slots=2)
    set_slots(model, [1])
    with pytest.raises(RuntimeError, match="inside"), using_slots(model, [0, 0]):
        raise RuntimeError("inside")
    assert layer_of(model).subject_index.values == (1,)


def test_layers_without_the_index_are_reported():
    with pytest.raises(SubjectIndexError, match="no Meta-LoRA layers"):
        set_slots(mlp(), [0])


def test_frozen_down_keeps_no_input_for_backward():
    saved = []
    model = adapted(init_weights=True, target_modules=["lin0"])
    layer_of(model).metalora_down["default"].requires_grad_(False)
    x = torch.randn(64, 12)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        layer_of(model)(x)
    assert (64, 12) not in saved


def test_a_hook_sees_the_output_of_the_base():
    base, x = mlp(), torch.randn(2, 12)
    model, seen = randomise(adapted(base)), []
    layer_of(model).base_layer.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        model(x)
    assert torch.equal(seen[0], base.lin0(x))


def test_compiled_graph_survives_swaps_and_mixes_of_subjects():
    model, x = randomise(adapted(num_slots=3)), torch.randn(4, 12)
    set_slots(model, [0, 1, 2, -1])
    torch._dynamo.reset()
    compiled = torch.compile(model.base_model.model, fullgraph=True, backend="eager")
    with torch.no_grad():
        compiled(x)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for index in ([2, 2, -1, 0], [1, 1, 1, 1]):
                set_slots(model, index)
                torch.testing.assert_close(compiled(x), model(x))


def test_two_active_adapters_add_up():
    base, x = mlp(), torch.randn(3, 12)
    model = randomise(adapted(base, target_modules=["lin1"]))
    model.add_adapter("other", config(target_modules=["lin1"]))
    randomise(model, 5)
    parts = []
    for name in ("default", "other"):
        model.set_adapter(name)
        parts.append(model(x) - base(x))
    model.base_model.set_adapter(["default", "other"])
    torch.testing.assert_close(model(x), base(x) + parts[0] + parts[1])


def test_dropout_works_in_training_only():
    model = randomise(get_peft_model(copy.deepcopy(mlp()), config(lora_dropout=0.5)))
    x = torch.randn(2, 12)
    model.train()
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("shape", [(0, 12), (0, 5, 12), (2, 0, 12)])
@pytest.mark.parametrize("index", [None, [1, 1], [0, 1], [-1, 1]])
def test_an_empty_batch_goes_through(index, shape, grad):
    """Bug: without samples, and with several subjects chosen, it ended in an error about a reshape."""
    model = randomise(adapted(num_slots=2))
    set_slots(model, index)
    with torch.set_grad_enabled(grad):
        assert model(torch.randn(shape)).shape == (*shape[:-1], 10)
