# SPDX-License-Identifier: Apache-2.0
"""A slot is trained exactly as if it were a separate adapter."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from peft_metalora.errors import ConfigError, SubjectIndexError
from peft_metalora.training.engine.slot_optimizer import SlotOptimizer

SLOTS = 4
SHAPES = [(2, 5), (3, 2), (7, 2)]
OPTIMIZERS = [
    (torch.optim.AdamW, {"lr": 0.03, "weight_decay": 0.1}),
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    (torch.optim.RMSprop, {"lr": 0.01}),
    *((cls, {"lr": 0.01}) for cls in (torch.optim.Adagrad, torch.optim.Adamax, torch.optim.NAdam, torch.optim.RAdam)),
    (torch.optim.AdamW, {"lr": 0.03, "fused": True}),
    (torch.optim.Adafactor, {"lr": 0.05}),  # not elementwise: statistics of rows and columns
]

EXACT = torch.optim.AdamW, torch.optim.SGD, torch.optim.RMSprop, torch.optim.Adafactor


def make(seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(SLOTS, *shape, generator=generator)) for shape in SHAPES]


def gradients(parameters: list[nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize(("optimizer_class", "options"), OPTIMIZERS)
def test_equals_separate_adapters(optimizer_class, options):
    parameters = make()
    optimizer = SlotOptimizer(optimizer_class, parameters, **options)
    separate = [[nn.Parameter(parameter.detach()[slot].clone()) for parameter in parameters] for slot in range(SLOTS)]
    alone = [optimizer_class(one, **options) for one in separate]
    batches = [[0, 1], [1], [0, 2], [1, 2, 0], [2], [0, 1]]
    for step, slots in enumerate(batches):
        gradients(parameters, step)
        for slot in slots:
            for proxy, parameter in zip(separate[slot], parameters, strict=True):
                proxy.grad = parameter.grad[slot].clone()
            alone[slot].step()
        optimizer.see(slots)
        optimizer.step()
    for slot in range(SLOTS):
        for proxy, parameter in zip(separate[slot], parameters, strict=True):
            torch.testing.assert_close(proxy, parameter[slot], rtol=2e-6, atol=1e-7)
            if optimizer_class in EXACT and not options.get("fused"):
                assert torch.equal(proxy, parameter[slot])
    assert all(torch.equal(now[3], start[3]) for now, start in zip(parameters, make(), strict=True))


def test_absent_slot_keeps_every_bit_in_spite_of_momentum_and_decay():
    parameters = make()
    optimizer = SlotOptimizer(torch.optim.AdamW, parameters, lr=0.1, weight_decay=0.5)
    for step, slots in enumerate(([0, 1], [1])):
        before = [parameter.detach()[0].clone() for parameter in parameters]
        gradients(parameters, step)
        optimizer.see(slots)
        optimizer.step()
        moved = [not torch.equal(old, new[0]) for old, new in zip(before, parameters, strict=True)]
        assert moved == [0 in slots] * len(SHAPES)


def test_shared_parameters_have_their_own_rate_and_move_every_step():
    parameters, shared = make(), [nn.Parameter(torch.ones(3))]
    optimizer = SlotOptimizer(torch.optim.SGD, parameters, shared=shared, lr=0.1, shared_options={"lr": 0.01})
    gradients(parameters + shared, 0)
    expected = 1 - 0.01 * shared[0].grad
    optimizer.step()  # no slot seen
    assert torch.equal(shared[0], expected)
    assert all(torch.equal(now, start) for now, start in zip(parameters, make(), strict=True))


def test_schedulers_set_both_rates():
    parameters, shared = make(), [nn.Parameter(torch.ones(3))]
    optimizer = SlotOptimizer(torch.optim.SGD, parameters, shared=shared, lr=0.1, shared_options={"lr": 0.01})
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    gradients(parameters + shared, 0)
    expected = 1 - 0.005 * shared[0].grad, parameters[0][2] - 0.05 * parameters[0].grad[2]
    optimizer.see([2])
    optimizer.step()
    scheduler.step()
    assert torch.allclose(shared[0], expected[0], rtol=1e-6)
    assert torch.allclose(parameters[0][2], expected[1], rtol=1e-6)


def test_reset_drops_the_state_of_a_slot_and_reads_it_anew():
    parameters = make()
    optimizer = SlotOptimizer(torch.optim.Adam, parameters, lr=0.1)
    for step in range(3):
        gradients(parameters, step)
        optimizer.see([0, 1])
        optimizer.step()
    with torch.no_grad():
        for parameter, start in zip(parameters, make(), strict=True):
            parameter[0] = start[0]
    optimizer.reset([0])
    fresh, start = SlotOptimizer(torch.optim.Adam, (again := make()), lr=0.1), again
    gradients(parameters, 9)
    gradients(again, 9)
    for one in (optimizer, fresh):
        one.see([0])
        one.step()
    assert all(torch.equal(now[0], other[0]) for now, other in zip(parameters, start, strict=True))


def test_clips_each_slot_by_its_own_norm():
    parameters = make()
    optimizer = SlotOptimizer(torch.optim.SGD, parameters, lr=1.0)
    gradients(parameters, 0)
    for parameter in parameters:
        parameter.grad[1] *= 1e-4
    before, small = flat(parameters), flat([parameter.grad for parameter in parameters])[1]
    norms = optimizer.clip_grad_norm_(1.0)
    assert norms[0] > 1 > norms[1]
    optimizer.see(range(SLOTS))
    optimizer.step()
    moved = before - flat(parameters)
    assert torch.allclose(moved[[0, 2, 3]].norm(dim=1), torch.ones(3), atol=1e-5)
    assert torch.allclose(moved[1], small, rtol=0, atol=1e-6)

    gradients(parameters, 1)  # the next step has its own gradients, not those that were clipped before
    before, fresh = flat(parameters), flat([parameter.grad for parameter in parameters])
    optimizer.see(range(SLOTS))
    optimizer.step()
    assert torch.allclose(before - flat(parameters), fresh, atol=1e-5)


def test_follows_parameters_that_were_moved():
    parameters = make()
    optimizer = SlotOptimizer(torch.optim.SGD, parameters, lr=1.0)
    for turn in range(2):
        gradients(parameters, turn)
        before, expected = flat(parameters), flat([parameter.grad for parameter in parameters])
        optimizer.see(range(SLOTS))
        optimizer.step()
        assert torch.allclose(before - flat(parameters), expected, atol=1e-5)
        for parameter in parameters:
            parameter.data = parameter.data.clone()


def flat(tensors):
    """(SLOTS, numbers of a slot), a copy."""
    return torch.cat([tensor.detach().flatten(1) for tensor in tensors], dim=1).clone()


@pytest.mark.parametrize(("optimizer_class", "options"), OPTIMIZERS)
def test_resumed_equals_uninterrupted(optimizer_class, options):
    def run(parameters, optimizer, steps):
        for step in steps:
            gradients(parameters, step)
            optimizer.see([step % 3, 3])
            optimizer.step()

    whole = make()
    run(whole, SlotOptimizer(optimizer_class, whole, **options), range(8))
    half = make()
    first = SlotOptimizer(optimizer_class, half, **options)
    run(half, first, range(4))
    resumed = [nn.Parameter(parameter.detach().clone()) for parameter in half]
    second = SlotOptimizer(optimizer_class, resumed, **options)
    second.load_state_dict(first.state_dict())
    run(resumed, second, range(4, 8))
    assert all(torch.equal(one, other) for one, other in zip(whole, resumed, strict=True))


def test_errors():
    with pytest.raises(ConfigError, match="common number of slots"):
        SlotOptimizer(torch.optim.SGD, [nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(4, 3))], lr=0.1)
    with pytest.raises(SubjectIndexError, match="slots 0 to 3"):
        SlotOptimizer(torch.optim.SGD, make(), lr=0.1).see([4])


def test_an_interrupted_step_leaves_nothing_behind():
    """Bug: after an error between `see` and `step`, the next step moved the slots of both, the first by momentum."""
    parameters = make()
    optimizer = SlotOptimizer(torch.optim.AdamW, parameters, lr=0.1, weight_decay=0.5)
    for step, slots in enumerate(([0, 1], [1])):
        optimizer.zero_grad()
        gradients(parameters, step)
        optimizer.see(slots)
        if step == 0:
            optimizer.step()
    optimizer.zero_grad()  # of the next step, where the one before stopped
    before = flat(parameters)
    gradients(parameters, 2)
    optimizer.see([0])
    optimizer.see([2])  # of a second micro-batch
    optimizer.step()
    moved = (flat(parameters) != before).any(dim=1)
    assert moved.tolist() == [True, False, True, False]


@pytest.mark.parametrize(("optimizer_class", "options"), OPTIMIZERS)
def test_all_slots_take_one_step_of_an_optimizer(monkeypatch, optimizer_class, options):
    """Bug: each seen slot took a step of its own, in Python: longer than the pass of a small base on a GPU."""
    calls, step = [], optimizer_class.step
    monkeypatch.setattr(optimizer_class, "step", lambda self, *given: (calls.append(1), step(self, *given))[1])
    parameters = make()
    optimizer = SlotOptimizer(optimizer_class, parameters, **options)
    for slots in ([0, 1, 3], [2], range(SLOTS)):
        gradients(parameters, 0)
        optimizer.see(slots)
        optimizer.step()
    assert len(calls) == (8 if optimizer_class is torch.optim.Adafactor else 3)


def test_only_gradients_of_seen_slots_are_gathered():
    parameters = make()
    optimizer = SlotOptimizer(torch.optim.SGD, parameters, lr=1.0)
    gradients(parameters, 0)
    for parameter in parameters:
        parameter.grad[1] = torch.nan  # nobody looks
    before, wanted = flat(parameters), flat([parameter.grad for parameter in parameters])
    optimizer.see([3, 0])
    norms = optimizer.clip_grad_norm_(1.0)
    assert torch.allclose(norms, torch.where(torch.tensor([1, 0, 0, 1]) > 0, wanted.norm(dim=1), 0))
    optimizer.step()
    moved = before - flat(parameters)
    assert torch.allclose(moved[[0, 3]].norm(dim=1), torch.ones(2), atol=1e-5) and not moved[[1, 2]].any()


def test_slots_that_are_seen_after_clipping_are_clipped_as_well():
    parameters = make()
    optimizer = SlotOptimizer(torch.optim.SGD, parameters, lr=1.0)
    gradients(parameters, 0)
    before = flat(parameters)
    optimizer.see([0])
    optimizer.clip_grad_norm_(0.5)
    optimizer.see([2])
    optimizer.step()
    assert torch.allclose((before - flat(parameters))[[0, 2]].norm(dim=1), torch.full((2,), 0.5), atol=1e-5)


def test_a_state_of_the_optimizer_of_each_slot_is_taken_up():
    """A checkpoint from when each slot had an optimiser object: the same file."""
    parameters = make()
    optimizer = SlotOptimizer(torch.optim.AdamW, parameters, lr=0.1)
    gradients(parameters, 0)
    optimizer.see([1, 2])
    optimizer.step()
    saved = optimizer.state_dict()["slots"]
    assert set(saved) == {1, 2} and saved[1]["param_groups"][0]["params"] == [0]
    alone = torch.optim.AdamW([nn.Parameter(flat(parameters)[1])], lr=0.1)
    alone.load_state_dict(saved[1])
    assert alone.state[alone.param_groups[0]["params"][0]]["step"] == 1
