# SPDX-License-Identifier: Apache-2.0
"""The loop is an ordinary training loop, step by step."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from peft_metalora.errors import MetaLoraError, TrainingError
from peft_metalora.training.engine.loop import LossScale, Sanity, Step, training_steps
from peft_metalora.training.engine.slot_optimizer import SlotOptimizer

TARGET = torch.tensor([1.0, -2.0, 0.5])
DATA = torch.randn(64, 5, 3, generator=torch.Generator().manual_seed(0))


def error(weight, inputs):
    return ((inputs @ (weight - TARGET)) ** 2).mean()


def problem():
    weight, batches = nn.Parameter(torch.zeros(3)), iter(DATA)
    return weight, lambda: error(weight, next(batches))


def test_equals_a_loop_written_out():
    weight, loss = problem()
    steps = list(training_steps(loss, torch.optim.SGD([weight], lr=0.1), steps=4, accumulation=2))
    expected, batches = torch.zeros(3, requires_grad=True), iter(DATA)
    for _ in range(4):
        gradient = sum(torch.autograd.grad(error(expected, next(batches)), expected)[0] for _ in range(2)) / 2
        expected = (expected - 0.1 * gradient).detach().requires_grad_()
    assert torch.allclose(weight, expected)
    assert [step.number for step in steps] == [1, 2, 3, 4]
    assert steps[-1].loss < steps[0].loss
    assert all(step.seconds > 0 and step.lr == 0.1 for step in steps)


def test_schedule_and_clipping():
    weight, loss = problem()
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (step + 1) / 4)
    before = weight.detach().clone()
    rates, lengths = [], []
    for step in training_steps(
        loss, optimizer, steps=3, scheduler=scheduler, clip=lambda: nn.utils.clip_grad_norm_([weight], 1e-3)
    ):
        rates.append(step.lr)
        lengths.append((weight.detach() - before).norm().item())
        before = weight.detach().clone()
    assert rates == [0.25, 0.5, 0.75]
    assert lengths == pytest.approx([0.25e-3, 0.5e-3, 0.75e-3], rel=1e-3)


def test_goes_on_after_the_steps_that_were_done():
    weight, loss = problem()
    assert [s.number for s in training_steps(loss, torch.optim.SGD([weight], lr=0.1), steps=5, done=3)] == [4, 5]


def test_stops_before_a_bad_loss_reaches_the_weights():
    weight = nn.Parameter(torch.ones(2))
    losses = iter([weight.sum(), weight.sum() * float("nan")])
    steps = training_steps(lambda: next(losses), torch.optim.SGD([weight], lr=0.1), steps=2)
    next(steps)
    kept = weight.detach().clone()
    with pytest.raises(MetaLoraError, match="finite loss, found nan in step 2: lower the learning rate"):
        next(steps)
    assert torch.equal(weight, kept)


class _Overflows(torch.autograd.Function):
    """The number itself; its gradient is infinite where the loss was scaled beyond `limit`."""

    @staticmethod
    def forward(ctx, number, limit):
        ctx.limit = limit
        return number.clone()

    @staticmethod
    def backward(ctx, grad):
        return torch.where(grad > ctx.limit, torch.inf, grad), None


def test_a_step_that_overflows_in_float16_is_done_again_with_half_the_scale():
    """Bug: a run in float16 ended, or its weights were moved by infinity."""
    weight, loss = problem()
    seen, scale = [], LossScale(2.0**16, good=5)

    def watched():
        seen.append(weight.detach().clone())
        return _Overflows.apply(loss(), 2.0**14)

    steps = list(training_steps(watched, torch.optim.SGD([weight], lr=0.1), steps=3, scale=scale))
    assert [step.number for step in steps] == [1, 2, 3] and len(seen) == 5
    assert not torch.stack(seen[:3]).any() and seen[3].any()
    assert (scale.value, scale.good) == (2.0**14, 3)
    expected, batches = torch.zeros(3, requires_grad=True), iter(DATA[2:])
    for _ in range(3):
        (gradient,) = torch.autograd.grad(error(expected, next(batches)), expected)
        expected = (expected - 0.1 * gradient).detach().requires_grad_()
    torch.testing.assert_close(weight, expected)


def test_a_gradient_that_is_infinite_at_any_scale_stops_the_run():
    weight, loss = problem()
    steps = training_steps(
        lambda: _Overflows.apply(loss(), 0.0), torch.optim.SGD([weight], lr=0.1), steps=2, scale=LossScale()
    )
    with pytest.raises(TrainingError, match="expected finite gradients, found NaN or infinity in step 1"):
        next(steps)
    assert not weight.any()


def test_the_scale_grows_when_nothing_overflowed_for_long_and_is_only_for_float16():
    scale = LossScale(4.0, good=1999)
    scale.see(False)
    assert (scale.value, scale.good) == (8.0, 0)
    assert [LossScale.of(precision) for precision in ("auto", "no", "bf16")] == [None] * 3


def test_a_loss_is_waited_for_after_all_that_a_gpu_can_do_meanwhile_and_before_the_weights_move():
    weight, loss = problem()
    events = []

    class Watched(torch.optim.SGD):
        def step(self):
            events.append("step")
            super().step()

    def read(value):
        events.append("read")

        def wait():
            events.append("wait")
            return value.item()

        return wait

    steps = training_steps(
        loss, Watched([weight], lr=0.1), steps=1, accumulation=2, clip=lambda: events.append("clip"), read=read
    )
    expected = [error(torch.zeros(3), inputs).item() for inputs in DATA[:2]]
    assert next(steps).loss == pytest.approx(sum(expected) / 2)
    assert events == ["read", "read", "clip", "wait", "wait", "step"]


OPTIMIZERS = {
    "sgd": lambda one: torch.optim.SGD([one], lr=0.1, momentum=0.9),
    "adamw": lambda one: torch.optim.AdamW([one], lr=0.1),
    "fused adamw": lambda one: torch.optim.AdamW([one], lr=0.1, fused=True),
    "fused sgd": lambda one: torch.optim.SGD([one], lr=0.1, momentum=0.9, fused=True),
    "slots": lambda one: SlotOptimizer(torch.optim.AdamW, [one], lr=0.1),
    "fused slots": lambda one: SlotOptimizer(torch.optim.AdamW, [one], lr=0.1, fused=True),
    "fused shared": lambda one: SlotOptimizer(
        torch.optim.AdamW, [nn.Parameter(torch.ones(1, 2))], shared=[one], lr=0.1, fused=True
    ),
}


@pytest.mark.parametrize("clipped", [True, False])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_no_weight_moves_by_a_gradient_that_is_not_finite(kind, value, clipped):
    """Bug: with a finite loss it destroyed the weights, and a step later they were said to be those of before."""
    weight = nn.Parameter(torch.ones(1, 3))
    optimizer = OPTIMIZERS[kind](weight)
    calls = []

    def loss():
        calls.append(None)
        if isinstance(optimizer, SlotOptimizer):
            optimizer.see([0])
        found = (weight * torch.arange(1.0, 4.0)).sum()
        if len(calls) == 3:
            found.register_hook(lambda gradient: gradient * value)
        return found

    def clip():
        if isinstance(optimizer, SlotOptimizer):
            optimizer.clip_grad_norm_(1.0)
        else:
            nn.utils.clip_grad_norm_([weight], 1.0)

    shared = []
    seen = {}
    with pytest.raises(TrainingError, match=r"finite gradients, found NaN or infinity in step 3: lower") as raised:
        for step in training_steps(
            loss, optimizer, steps=3, clip=clip if clipped else None, share=lambda tensors: shared.append(tensors)
        ):
            seen[step.number] = weight.detach().clone()
    assert raised.value.good_step == 2 and seen[2].isfinite().all() and not torch.equal(seen[1], seen[2])
    assert torch.equal(weight, seen[2])
    assert [[tensor.item() for tensor in tensors] for tensors in shared] == [[0], [0], [1]]


def test_a_fused_optimiser_is_not_waited_for():
    """The host hears of a bad gradient in the next step; the weights and the moments are as they were meanwhile."""
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
    losses = iter([lambda: weight.sum(), lambda: (weight.sum() * 0).sqrt() + weight.sum(), lambda: weight.sum()])
    steps = training_steps(lambda: next(losses)(), optimizer, steps=3)
    next(steps)
    kept, moments = weight.detach().clone(), {k: v.clone() for k, v in optimizer.state[weight].items()}
    assert next(steps).number == 2
    assert torch.equal(weight, kept)
    assert all(torch.equal(optimizer.state[weight][name], value) for name, value in moments.items())
    with pytest.raises(TrainingError, match="in step 2"):
        next(steps)
    assert torch.equal(weight, kept)


def see_all(losses, nothing=2.0, done=0):
    sanity = Sanity(nothing, done=done)
    for number, loss in enumerate(losses, start=done + 1):
        sanity.see(Step(number, loss, 0.1, 0.0))


def test_a_run_that_is_worse_than_knowing_nothing_is_lost():
    """Bug: `learning_rate 1e3` trained to rubbish in silence: the loss settles where a constant has it."""
    good = [0.6, 0.5, 0.7, 0.4]
    with pytest.raises(TrainingError, match=r"loss below 2, .* after 0.4 at best: .*lower the learning rate") as raised:
        see_all([*good, 4.7, 3.9, 2.4, 1.9, 2.0, 1.9, 1.9])
    assert raised.value.good_step == 3  # the loss of step 4 was that of the weights of step 3
    with pytest.raises(TrainingError, match="3 steps up to 3"):
        see_all([0.6, 4.7, 3.2])
    with pytest.raises(TrainingError) as raised:
        see_all([0.6, 4.7, 3.2], done=100)
    assert raised.value.good_step == 100
    see_all([*good, 9.0, 0.5, 0.6, 0.4, 0.5])  # a spike
    see_all([2.8, 2.5, 2.9, 2.0, 3.1] * 20)  # random weights, no better from the start
    see_all([0.02, 1.5, 0.8, 1.4, 0.02, 1.9] * 20)  # low and high noise levels, one by one


def test_no_step_uses_the_attention_of_cudnn():
    """Bug: on a Hopper GPU torch takes cuDNN's attention, whose backward pass crashes or gives NaN with torch 2.11."""
    weight, loss = problem()
    seen = []

    def watched():
        seen.append(torch.backends.cuda.cudnn_sdp_enabled())
        weight.register_post_accumulate_grad_hook(lambda _: seen.append(torch.backends.cuda.cudnn_sdp_enabled()))
        return loss()

    torch.backends.cuda.enable_cudnn_sdp(True)  # as in a new process: scripts that a test ran before may turn it off
    assert torch.backends.cuda.cudnn_sdp_enabled()
    for _ in training_steps(watched, torch.optim.SGD([weight], lr=0.1), steps=1):
        assert torch.backends.cuda.cudnn_sdp_enabled()
    assert seen == [False, False]
