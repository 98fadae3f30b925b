# SPDX-License-Identifier: Apache-2.0
"""The roads of a linear layer agree, and the fused one keeps and computes as little as it says."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from tuner_models import adapted, config, layer_of, randomise

from peft_metalora.tuner import fold, set_slots
from peft_metalora.tuner.fused import FusedLinear


def layer_and_input(stage="meta", bias=True, r=2, slots=3, dtype=torch.float64):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(12, 16, bias=bias)).to(dtype)
    model = adapted(base, target_modules=["0"], num_slots=slots, lora_alpha=3, r=r)
    if stage == "subject":
        model.add_adapter("ann", config(stage="subject", down="default", target_modules=["0"], num_slots=slots, r=r))
        model.set_adapter("ann")
    randomise(model)
    return model, layer_of(model, "0"), torch.randn(4, 5, 12, dtype=dtype, requires_grad=True)


def nodes(tensor):
    """Names of all autograd nodes behind a tensor."""
    seen, todo = set(), [tensor.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [parent for parent, _ in node.next_functions]
    return [node.name() for node in seen]


def gradients(model, layer, x):
    model.zero_grad(set_to_none=True)
    x.grad = None
    y = model(x)
    y.square().sum().backward()
    found = {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}
    return y.detach(), {"x": x.grad.clone(), **found}


@pytest.mark.parametrize("index", [None, [2, 0, -1, 1], [1, -1]])
@pytest.mark.parametrize("stage", ["meta", "subject"])
@pytest.mark.parametrize("bias", [True, False])
def test_fused_and_general_roads_have_the_same_output_and_gradients(stage, bias, index):
    model, layer, x = layer_and_input(stage, bias)
    set_slots(model, index)
    fused = gradients(model, layer, x)
    assert "FusedLinearBackward" in nodes(model(x))
    handle = layer.base_layer.register_forward_hook(lambda *_: None)
    general = gradients(model, layer, x)
    assert "FusedLinearBackward" not in nodes(model(x))
    handle.remove()
    torch.testing.assert_close(fused, general)
    assert any("metalora_down" in name for name in fused[1]) == (stage == "meta")


@pytest.mark.parametrize("index", [None, [2, 0, -1, 1]])
@pytest.mark.parametrize("stage", ["meta", "subject"])
def test_autocast_takes_the_fused_road_where_it_would_not_convert_the_weights(stage, index):
    model, layer, x = layer_and_input(stage, dtype=torch.float32)
    set_slots(model, index)
    layer.base_layer.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fused = gradients(model, layer, x)
        assert "FusedLinearBackward" in nodes(model(x))
        handle = layer.base_layer.register_forward_hook(lambda *_: None)
        general = gradients(model, layer, x)
        handle.remove()
        layer.base_layer.float()
        assert "FusedLinearBackward" not in nodes(model(x))
    assert fused[0].dtype == torch.bfloat16
    assert {value.dtype for value in fused[1].values()} == {torch.float32}
    for name, value in general[1].items():
        assert (fused[1][name] - value).norm() < 0.02 * value.norm(), name
    torch.testing.assert_close(fused[0], general[0], rtol=0.02, atol=0.05)


def test_gradients_of_the_fused_node_are_the_numerical_ones():
    torch.manual_seed(0)
    for rows in (1, 3):
        arguments = [
            torch.randn(*shape, dtype=torch.float64, requires_grad=grad)
            for shape, grad in [
                ((rows, 4, 5), True),
                ((6, 5), False),
                ((6,), False),
                ((3, 5), True),
                ((rows, 2, 3), True),
                ((rows, 6, 2), True),
            ]
        ]
        assert torch.autograd.gradcheck(lambda *a: FusedLinear.apply(*a, 0.7), arguments)


def test_a_subject_keeps_down_x_and_not_x():
    _, layer, x = layer_and_input("subject", slots=1)
    shapes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(tuple(t.shape)) or t, lambda t: t):
        layer(x)
    assert (1, 20, 4) in shapes
    assert (1, 20, 12) not in shapes


@pytest.mark.parametrize(
    ("index", "folded", "r"),
    [(None, True, 1), (None, False, 3), ([2, 0, -1, 1], True, 3), ([2, 0, -1, 1], False, 1)],
)
def test_compiled_and_eager_serve_the_same(index, folded, r):
    model, layer, x = layer_and_input(r=r, dtype=torch.float32)
    set_slots(model, index)
    if folded:
        fold(model)
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(layer, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize("index", [None, [2, 0, -1, 1]])
def test_compiled_unfolded_multiplies_no_tokens_beside_the_base(index):
    """Bug: without a fold Mid @ Down @ x ran as a matrix product that nothing melts into (1.044 of the base)."""
    model, layer, _ = layer_and_input("subject", r=1, dtype=torch.float32)
    x, products = torch.randn(4, 300, 12), []
    set_slots(model, index)

    def look(graph, _):
        for node in graph.graph.nodes:
            shape = getattr(node.meta.get("example_value"), "shape", ())
            if any(word in str(node.target) for word in ("linear", "matmul", "mm")) and any(
                size >= 300 for size in shape
            ):
                products.append(node)
        return graph.forward

    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(layer, fullgraph=True, backend=look)
        torch.testing.assert_close(compiled(x), layer(x))
    assert len(products) == 1


ROADS = {
    "hook on the base": lambda layer: layer.base_layer.register_forward_hook(lambda *_: None),
    "trainable base": lambda layer: layer.base_layer.weight.requires_grad_(True),
    "replaced forward": lambda layer: setattr(layer.base_layer, "forward", layer.base_layer.forward),
}


@pytest.mark.parametrize("road", ROADS)
def test_what_fusing_would_bypass_is_not_fused(road):
    model, layer, x = layer_and_input()
    expected = model(x)
    ROADS[road](layer)
    got = model(x)
    torch.testing.assert_close(got, expected)
    assert "FusedLinearBackward" not in nodes(got)
    if road == "trainable base":
        got.sum().backward()
        assert layer.base_layer.weight.grad.any()


@pytest.mark.parametrize("stage", ["meta", "subject"])
def test_torch_func_sees_what_autograd_sees(stage):
    model, layer, x = layer_and_input(stage)
    _, expected = gradients(model, layer, x)
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def loss(values, one):
        return functional_call(model, values, (one[None],)).square().sum()

    per_sample = vmap(grad(loss), in_dims=(None, 0))(trained, x.detach())
    for name, found in per_sample.items():
        short = name.removeprefix("base_model.model.0.")
        torch.testing.assert_close(found.sum(0), expected[short])


@pytest.mark.parametrize("kind", ["full_backward_pre_hook", "full_backward_hook", "forward_pre_hook", "forward_hook"])
@pytest.mark.parametrize("everywhere", [False, True])
def test_hooks_of_the_base_layer_are_called(kind, everywhere):
    """Bug: the fused road, which never calls the base, looked for some kinds of hooks only, and for no global ones."""
    _, layer, x = layer_and_input()
    seen = []

    def hook(module, *_):
        seen.append(module)

    if everywhere:
        handle = getattr(nn.modules.module, f"register_module_{kind}")(hook)
    else:
        handle = getattr(layer.base_layer, f"register_{kind}")(hook)
    try:
        layer(x).sum().backward()
    finally:
        handle.remove()
    assert seen.count(layer.base_layer) == 1


@pytest.mark.parametrize("folded", [False, True])
def test_compiled_in_float64_nobody_is_the_base(folded):
    """Bug: the compiler's road summed in float32 whatever the dtype: nobody was 1.5e-8 off the base."""
    model, layer, x = layer_and_input()
    if folded:
        fold(model)
    set_slots(model, [-1, -1, -1, -1])
    try:
        with torch.no_grad():
            wanted = layer.base_layer(x)
            assert torch.equal(torch.compile(model, backend="eager", fullgraph=True)(x), wanted)
            set_slots(model, [0, 1, 2, 0])
            compiled = torch.compile(model, backend="eager", fullgraph=True)(x)
            torch.testing.assert_close(compiled, model(x), rtol=0, atol=1e-12)
    finally:
        torch._dynamo.reset()
