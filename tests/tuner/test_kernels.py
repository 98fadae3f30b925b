# SPDX-License-Identifier: Apache-2.0
"""The GPU kernels, on a CPU run by Triton's interpreter (conftest.py): their numbers, and the layer that uses them."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from tuner_models import adapted, config, layer_of, randomise

from peft_metalora.tuner import fold, fused, kernels, linear, set_slots

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def with_kernels(monkeypatch):
    """The fused road takes the kernels for every small rank, on the CPU too."""

    def usable(x, r):
        return kernels if r <= fused.KERNEL_RANK and x.is_contiguous() else None

    monkeypatch.setattr(fused, "triton_kernels", usable)
    monkeypatch.setattr(linear, "triton_kernels", usable)


def case(factors, r, dtype, k=40, n=72, meta_r=20):
    torch.manual_seed(r)
    rows, tokens = 3, 7
    y, x = (
        torch.randn(rows, tokens, n, dtype=dtype, device=DEVICE),
        torch.randn(rows, tokens, k, dtype=dtype, device=DEVICE),
    )
    h = torch.randn(rows, tokens, meta_r, dtype=dtype, device=DEVICE)
    return y, x, h, torch.randn(factors, r, k, device=DEVICE), torch.randn(factors, n, r, device=DEVICE)


def relative(found, expected):
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize("r", [1, 2, 3, 4])
@pytest.mark.parametrize("factors", [1, 3])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
def test_add_product_is_the_dense_product(r, factors, dtype, tolerance):
    y, x, _, a, up = case(factors, r, dtype)
    small = x.double() @ a.double().mT
    expected = y.double() + 0.5 * small @ up.double().mT
    z, both, later = torch.full((3, 7, r), torch.nan, device=DEVICE), y.clone(), y.clone()
    kernels.add_product_(both, x, a, up, 0.5, z)
    assert relative(both, expected) < tolerance
    assert relative(z, small) < 1e-6
    kernels.add_product_(later, None, None, up.mT.contiguous().mT, 0.5, z)  # other strides, z as given
    torch.testing.assert_close(later, both, rtol=0, atol=0)


@pytest.mark.parametrize("factors", [1, 3])
def test_programs_may_share_the_columns_of_a_token(monkeypatch, factors):
    y, x, _h, a, up = case(factors, 2, torch.float32, k=40, n=300)
    wanted, z = y.clone(), torch.full((3, 7, 2), torch.nan, device=DEVICE)
    kernels.add_product_(wanted, x, a, up, 0.5)
    kernels._add_numbers.cache_clear()
    monkeypatch.setattr(kernels, "_launchers", {})
    monkeypatch.setattr(kernels, "ADD_TILES", ((5, kernels.Tile(2, 128, 1, shares=2)), (0, kernels.Tile(1, 64, 1))))
    kernels.add_product_(y, x, a, up, 0.5, z)
    kernels._add_numbers.cache_clear()
    torch.testing.assert_close(y, wanted)
    torch.testing.assert_close(z, x @ a.mT)


def test_tiles_need_not_fit():
    torch.manual_seed(0)
    y, x = torch.zeros(1, 5, 1500, device=DEVICE), torch.randn(1, 5, 2050, device=DEVICE)
    a, up = torch.randn(1, 3, 2050, device=DEVICE), torch.randn(1, 1500, 3, device=DEVICE)
    kernels.add_product_(y, x, a, up, 1.0)
    assert relative(y, x.double() @ a.double().mT @ up.double().mT) < 1e-6


@pytest.mark.parametrize("r", [1, 2, 3, 4])
@pytest.mark.parametrize("factors", [1, 3])
def test_gradients_are_those_of_autograd(r, factors):
    dy, _, h, _, up = case(factors, r, torch.float32, meta_r=300)
    mid = torch.randn(factors, r, 300, dtype=torch.float64, device=DEVICE, requires_grad=True)
    exact_up = up.double().requires_grad_()
    z = h.double() @ mid.mT
    z.retain_grad()
    (0.5 * z @ exact_up.mT).backward(dy.double())
    dz, dmid, dup = kernels.factor_gradients(dy, z.detach().float(), h, up, 0.5)
    for found, expected in ((dz, z.grad), (dmid, mid.grad), (dup, exact_up.grad)):
        assert found.shape == expected.shape
        assert relative(found, expected) < 1e-6


def model_and_input(r, stage, dtype):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(24, 16)).to(DEVICE, dtype)
    settings = {"target_modules": ["0"], "num_slots": 3, "r": r, "lora_alpha": 3}
    model = adapted(base, **settings)
    if stage == "subject":
        model.add_adapter("ann", config(stage="subject", down="default", **settings))
        model.set_adapter("ann")
    return randomise(model), torch.randn(4, 5, 24, dtype=dtype, device=DEVICE)


@pytest.mark.parametrize("index", [None, [2, 0, -1, 1]])
@pytest.mark.parametrize("folded", [True, False])
@pytest.mark.parametrize("r", [1, 4])
def test_inference_is_that_of_plain_products(monkeypatch, r, folded, index):
    model, x = model_and_input(r, "subject", torch.float32)
    set_slots(model, index)
    if folded:
        fold(model)
    calls = []
    # On a CPU fused and plain give the same numbers; only a launch tells which it was.
    monkeypatch.setattr(kernels, "_launch", lambda *given, real=kernels._launch: (calls.append(1), real(*given)))
    with torch.no_grad():
        found = model(x)
        assert len(calls) == 1
        monkeypatch.undo()
        layer_of(model, "0").shown_subject = None
        plain = model(x)
        torch.testing.assert_close(found, plain)
        if index is not None:
            torch.testing.assert_close(found[2], layer_of(model, "0").base_layer(x)[2], rtol=0, atol=0)


@pytest.mark.parametrize("index", [None, [2, 0, -1, 1]])
@pytest.mark.parametrize("stage", ["meta", "subject"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_training_is_that_of_plain_products(monkeypatch, dtype, tolerance, stage, index):
    model, x = model_and_input(2, stage, dtype)
    set_slots(model, index)
    goal = torch.randn(4, 5, 16, dtype=dtype, device=DEVICE)

    def gradients():
        model.zero_grad(set_to_none=True)
        given = x.clone().requires_grad_()
        (model(given) * goal).sum().backward()
        return {"x": given.grad, **{name: p.grad for name, p in model.named_parameters() if p.grad is not None}}

    found = gradients()
    monkeypatch.undo()
    plain = gradients()
    assert found.keys() == plain.keys()
    assert any("metalora_down" in name for name in found) == (stage == "meta")
    for name, gradient in found.items():
        assert gradient.dtype == plain[name].dtype
        assert relative(gradient, plain[name]) < tolerance, name


@pytest.fixture
def compiled(monkeypatch):
    """Kernels that Triton has "compiled": what was launched, with its arguments."""
    launched = []

    class Compiled:
        function, packed_metadata = "function", "metadata"

        def __getitem__(self, grid):
            pass

        def run(self, *given):
            assert given[3:9] == ("stream", "function", "metadata", None, None, None)
            launched.append((given[:3], given[9:]))

    class Kernel:
        def __getitem__(self, grid):
            def launch(*arguments, num_warps):
                launched.append((grid, arguments))
                return Compiled()

            return launch

    monkeypatch.setattr(kernels, "_add_product", Kernel())
    monkeypatch.setattr(kernels, "_launchers", {})
    driver = SimpleNamespace(active=SimpleNamespace(get_current_stream=lambda _: "stream"))
    monkeypatch.setattr(kernels.triton.runtime, "driver", driver)
    return launched


def test_few_launches_are_remembered(compiled, monkeypatch):
    """Bug: what was launched for a shape was kept for ever, and a service sees images of any size."""
    monkeypatch.setattr(kernels, "MOST_SHAPES", 4)
    for tokens in (*range(1, 12), 11):
        y, x = torch.zeros(1, tokens, 8), torch.zeros(1, tokens, 8)
        kernels.add_product_(y, x, torch.zeros(1, 1, 8), torch.zeros(1, 8, 1), 1.0)
    assert len(kernels._launchers) == 4 and len(compiled) == 12
    assert kernels._add_numbers.cache_info().maxsize is not None


@pytest.mark.parametrize("gpus", [1, 4])
def test_what_adds_again_launches_the_same(compiled, monkeypatch, gpus):
    """Bug: on a machine of several GPUs nothing added again, and every call looked up what it launches."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    y, x, a, up = torch.zeros(2, 3, 8), torch.zeros(2, 3, 16), torch.zeros(1, 1, 16), torch.zeros(1, 8, 1)
    assert kernels.adder(y, x, a, up, 0.5) is None, "nothing is compiled"
    kernels.add_product_(y, x, a, up, 0.5)
    again = kernels.adder(y, x, a, up, 0.5)
    chosen = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: chosen.append(device) or nullcontext())
    other = torch.ones(2, 3, 8), torch.ones(2, 3, 16)
    again(*other)
    assert chosen == ([] if gpus == 1 else [y.get_device()]), "another GPU may be the current one by then"
    (grid, arguments), (same_grid, same) = compiled
    assert grid == same_grid and arguments[4:] == same[4:]
    assert same[:4] == tuple(tensor.data_ptr() for tensor in (*other, a, up))


def test_the_second_launch_is_that_of_the_first(compiled):
    given = torch.zeros(2, 3, 8), torch.zeros(2, 3, 16), torch.zeros(1, 1, 16), torch.zeros(1, 8, 1)
    for _ in range(2):
        kernels.add_product_(*given, 0.5)
    (grid, first), (same_grid, second) = compiled
    assert grid == same_grid and first[4:] == second[4:]
    assert all(one is other for one, other in zip(first[:4], second[:4], strict=True))
