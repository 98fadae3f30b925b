# SPDX-License-Identifier: Apache-2.0
"""The loop is an ordinary training loop, step by step."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from peft_metalora.errors import MetaLoraError
from peft_metalora.training.engine.loop import training_steps

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
