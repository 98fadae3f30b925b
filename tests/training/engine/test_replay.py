# SPDX-License-Identifier: Apache-2.0
"""Recorded steps equal those that run as they are written; on a CPU a recording is a function that is called again."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch
from accelerate import cpu_offload
from diffusers.hooks import apply_group_offloading
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchao.quantization import Int8WeightOnlyConfig, quantize_

from families_tiny import FAMILIES, denoiser, tiny_pipeline
from peft_metalora.bases import base_for
from peft_metalora.training import stage_1, stage_2
from peft_metalora.training.engine import replay
from peft_metalora.training.engine.processes import ALONE
from peft_metalora.training.engine.replay import MOST_RECORDINGS, WARM_UP, ReplayedLoss, why_not_recorded
from peft_metalora.training.examples.batches import Examples
from peft_metalora.training.stage_1 import MetaTraining
from peft_metalora.training.stage_2 import Personalization
from peft_metalora.tuner import set_slots
from training_tiny import meta_config, personal_config, tiny_base, tiny_examples


class Again:
    """In the place of a CUDA graph: it computes anew, and writes where the first call's result lies."""

    def __init__(self, function, result):
        self.function, self.result, self.replays = function, result, 0

    def replay(self):
        self.replays += 1
        new = self.function()
        for target, tensor in zip(
            *([one] if isinstance(one, torch.Tensor) else one for one in (self.result, new)), strict=True
        ):
            target.copy_(tensor)


@pytest.fixture
def recordings(monkeypatch):
    """Everything that was recorded, as the stages record on a GPU."""
    made = []

    def capture(function, after=None):
        result = function()
        made.append(Again(function, result))
        return made[-1], result

    monkeypatch.setattr(replay, "capture", capture)
    for stage in (stage_1, stage_2):
        monkeypatch.setattr(stage, "why_not_recorded", lambda *_: None)
    return made


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def loss_of(model):
    return lambda inputs, phase: (model(inputs["x"]) * inputs["weight"]).square().mean() * (phase or 1)


def inputs(step, rows=5):
    generator = torch.Generator().manual_seed(step)
    return {"x": torch.randn(rows, 3, generator=generator), "weight": torch.randn(rows, 1, generator=generator)}


def trained(model, loss, steps, phase=lambda step: None, rows=lambda step: 5, accumulation=1):
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=0.05), []
    for step in range(steps):
        optimizer.zero_grad()
        for part in range(accumulation):
            found = loss(inputs(step * accumulation + part, rows(step)), phase(step)) / accumulation
            losses.append(found.item())
            found.backward()
        optimizer.step()
    return losses, [parameter.detach().clone() for parameter in model.parameters()]


@pytest.mark.parametrize("accumulation", [1, 3])
def test_losses_and_gradients_are_the_same(recordings, accumulation):
    model = network()
    wanted = trained(model, loss_of(model), 8, accumulation=accumulation)
    model = network()
    replayed = ReplayedLoss(loss_of(model), model, list(model.parameters()), accumulation=accumulation)
    found = trained(model, replayed, 8, accumulation=accumulation)
    torch.testing.assert_close(found, wanted)
    assert len(recordings) == 2, "a pass forward and one backward"
    assert {one.replays for one in recordings} == {8 * accumulation - WARM_UP}


def test_every_shape_and_phase_has_a_recording_of_its_own_up_to_a_number(recordings):
    def run(loss, model):
        return trained(model, loss, 60, lambda step: 1 + step % 2, lambda step: 2 + step // 2 % 3)

    model = network()
    wanted = run(loss_of(model), model)
    model = network()
    found = run(ReplayedLoss(loss_of(model), model, list(model.parameters())), model)
    torch.testing.assert_close(found, wanted)
    assert len(recordings) == 2 * MOST_RECORDINGS < 2 * 6


def test_what_does_not_train_has_no_gradient(recordings):
    model = network()
    model[0].requires_grad_(False)
    replayed = ReplayedLoss(loss_of(model), model, list(model.parameters()))
    for step in range(6):
        model.zero_grad(set_to_none=True)
        replayed(inputs(step)).backward()
    assert recordings[0].replays == 3
    assert [parameter.grad is not None for parameter in model.parameters()] == [False, False, True, True]


def test_weights_that_moved_are_recorded_anew_and_not_for_ever(recordings, caplog):
    """A graph would go on to read where they were."""
    model = network()
    replayed = ReplayedLoss(loss_of(model), model, list(model.parameters()))

    def steps(count):
        for step in range(count):
            model.zero_grad(set_to_none=True)
            replayed(inputs(step)).backward()
            found = [parameter.grad.clone() for parameter in model.parameters()]
            model.zero_grad(set_to_none=True)
            loss_of(model)(inputs(step), None).backward()
            torch.testing.assert_close(found, [parameter.grad for parameter in model.parameters()])

    for turn in range(1, 6):
        steps(WARM_UP + 2)
        assert len(recordings) == 2 * min(turn, 3)
        model[0].weight.data = model[0].weight.data * 2
    assert "weights move" in replayed.why_not and len(caplog.records) == 1


def test_what_cannot_be_recorded_runs_as_it_is_written_and_says_so_once(monkeypatch, caplog):
    def refuse(function, after=None):
        function()
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(replay, "capture", refuse)
    model = network()
    wanted = trained(model, loss_of(model), 8)
    model = network()
    replayed = ReplayedLoss(loss_of(model), model, list(model.parameters()))
    with caplog.at_level(logging.WARNING):
        found = trained(model, replayed, 8)
    torch.testing.assert_close(found, wanted)
    assert replayed.why_not == "operation not permitted when stream is capturing"
    (record,) = caplog.records
    assert "not as a CUDA graph, with the same result: operation not permitted" in record.getMessage()


def test_the_reason_is_what_was_refused_and_not_that_the_recording_is_broken(monkeypatch):
    """Bug: torch ends a broken recording with an error of its own, which says only that."""

    def refuse(function, after=None):
        try:
            raise RuntimeError("the host asked for a number")
        finally:
            raise RuntimeError("capture was invalidated")

    monkeypatch.setattr(replay, "capture", refuse)
    model = network()
    replayed = ReplayedLoss(loss_of(model), model, list(model.parameters()))
    trained(model, replayed, 5)
    assert replayed.why_not == "the host asked for a number"


def test_a_gradient_lies_as_its_parameter_does(recordings):
    """Bug: fused optimisers refuse gradients with other strides, which `backward()` would have put right."""
    model = network()

    def loss(inputs, phase):
        turned = model[0].weight.t().contiguous()
        return (inputs["x"] @ turned).square().mean()

    replayed = ReplayedLoss(loss, model, [model[0].weight])
    for step in range(WARM_UP + 1):
        replayed(inputs(step)).backward()
    assert recordings and model[0].weight.grad.stride() == model[0].weight.stride()


def test_what_was_recorded_can_be_let_go(recordings):
    model = network()
    replayed = ReplayedLoss(loss_of(model), model, list(model.parameters()))
    for _ in range(2):
        for step in range(WARM_UP + 1):
            replayed(inputs(step)).backward()
        replayed.forget()
    assert len(recordings) == 4 and not replayed._recordings


# The stages


def run_of(run, between=None):
    losses = []
    for step in run.steps():
        losses.append(step.loss)
        if between is not None:
            between(run, step.number)
    return losses


def parameters_of(run):
    named = run.base.denoiser.named_parameters()
    return [parameter.detach().clone() for name, parameter in named if "lora" in name]


def quantised(base):
    quantize_(base.denoiser, Int8WeightOnlyConfig(), filter_fn=lambda module, name: name.endswith(("to_q", "to_v")))


def look(run, step):
    """What validation and users do between two steps."""
    denoiser = run.base.denoiser
    if step == 4:
        run.forget_recordings()
    denoiser.eval()
    set_slots(denoiser, [0] * 2)
    set_slots(denoiser, None)
    denoiser.train()


STAGE_2 = {
    "one subject": {},
    "several": {"subjects": 3},
    "checkpointing": {"subjects": 2, "gradient_checkpointing": True},
    "accumulation": {"subjects": 2, "gradient_accumulation_steps": 2},
    "quantised": {"subjects": 2, "prepare": quantised, "gradient_checkpointing": True},
    "looked at": {"subjects": 2, "between": look},
    "plain LoRA": {"method": "lora", "gradient_checkpointing": True},
    "bf16": {"subjects": 2, "prepare": lambda base: base.denoiser.bfloat16(), "mixed_precision": "bf16"},
}


@pytest.mark.parametrize("case", STAGE_2)
def test_stage_2_learns_the_same(recordings, monkeypatch, down, case):
    settings = dict(STAGE_2[case])
    subjects, prepare, between = (
        settings.pop("subjects", 1),
        settings.pop("prepare", None),
        settings.pop("between", None),
    )
    config = personal_config(max_train_steps=7, **settings)

    def learned():
        base = tiny_base()
        if prepare is not None:
            prepare(base)
        run = Personalization(base, tiny_examples(base, subjects), config, down)
        return run_of(run, between), parameters_of(run)

    found = learned()
    assert recordings and recordings[0].replays > 0
    monkeypatch.setattr(stage_2, "why_not_recorded", lambda *_: "for comparison")
    torch.testing.assert_close(found, learned(), rtol=1e-4, atol=1e-5)


STAGE_1 = {
    "warm-up": {"warmup_steps": 4, "max_train_steps": 10},
    "buckets": {"bucket_size": 2, "max_train_steps": 14, "warmup_steps": 1},
    "checkpointing": {"gradient_checkpointing": True, "warmup_steps": 0},
    "accumulation": {"gradient_accumulation_steps": 2, "images_per_subject": 2},
}


@pytest.mark.parametrize("case", STAGE_1)
def test_stage_1_learns_the_same(recordings, monkeypatch, case):
    config = meta_config(**{"max_train_steps": 8, **STAGE_1[case]})

    def learned():
        base = tiny_base()
        run = MetaTraining(base, tiny_examples(base, 4), config)
        losses = run_of(run)
        return losses, parameters_of(run)

    found = learned()
    assert sum(one.replays for one in recordings) > 0
    monkeypatch.setattr(stage_1, "why_not_recorded", lambda *_: "for comparison")
    torch.testing.assert_close(found, learned(), rtol=1e-4, atol=1e-5)


def test_photos_of_two_shapes_are_recorded_by_shape(recordings, monkeypatch):
    config = meta_config(max_train_steps=16, warmup_steps=0)

    def learned():
        base = tiny_base()
        like = tiny_examples(base, 4)
        latents = [one if number % 2 else one[:, :2] for number, one in enumerate(like.latents)]
        run = MetaTraining(base, Examples(latents, like.text, like.caption, like.subject), config)
        losses = run_of(run)
        return losses, parameters_of(run)

    found = learned()
    assert len(recordings) > 2
    monkeypatch.setattr(stage_1, "why_not_recorded", lambda *_: "for comparison")
    torch.testing.assert_close(found, learned(), rtol=1e-4, atol=1e-5)


def test_a_resumed_run_equals_the_uninterrupted_one(recordings, down):
    def run():
        base = tiny_base()
        return Personalization(base, tiny_examples(base, 2), personal_config(max_train_steps=12), down)

    whole = run()
    run_of(whole)
    first, second = run(), run()
    for step in first.steps():
        if step.number == 6:
            break
    second.load_state_dict(first.state_dict())
    run_of(second)
    assert all(torch.equal(one, other) for one, other in zip(parameters_of(whole), parameters_of(second), strict=True))


# Where it can be


class FromTheHost(TorchDispatchMode):
    """What is brought from the host's memory to a device, and what the host asks of it: a graph has neither."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, operation, types, arguments=(), kwargs=None):
        result = operation(*arguments, **(kwargs or {}))
        tensors = [one for one in arguments if isinstance(one, torch.Tensor)]
        name = str(operation)
        if ("_local_scalar_dense" in name or "nonzero" in name) or (
            ("copy" in name)
            and isinstance(result, torch.Tensor)
            and result.is_meta
            and any(t.device.type == "cpu" for t in tensors)
        ):
            self.found.append(name)
        return result


@pytest.mark.parametrize("family", FAMILIES)
def test_from_the_second_time_on_a_loss_takes_nothing_from_the_host(family):
    """Bug: positions and sizes came from the host in each step; a recorded step would read where they were."""
    pipe = tiny_pipeline(family)
    base = base_for(pipe)
    if base.host_looks:
        assert base.host_looks in why_not_recorded(pretend_gpu(base), personal_config(), ALONE)
        return
    text = base.encode_text(["a photo", "a man"])
    denoiser(pipe).to("meta")
    channels = denoiser(pipe).config.in_channels // (4 if family in ("flux", "qwen_image", "krea2") else 1)
    latents, noise = (torch.empty(2, channels, 8, 8, device="meta") for _ in range(2))
    times = base.sample_times(torch.empty(2, channels, 8, 8)).to("meta")
    text = {name: tensor.to("meta") for name, tensor in text.items()}
    seen = []
    for _ in range(2):
        with FromTheHost() as host:
            base.loss(latents, text, noise, times)
        seen.append(host.found)
    assert seen[1] == []


def pretend_gpu(base):
    """The base, as one whose denoiser is on a GPU."""
    return SimpleNamespace(device=torch.device("cuda"), denoiser=base.denoiser, stream=None, host_looks=base.host_looks)


def test_why_not(caplog, monkeypatch):
    base, config = tiny_base(), personal_config()
    assert why_not_recorded(base, config, ALONE) == "there is no GPU" and not caplog.records
    gpu = pretend_gpu(base)
    assert why_not_recorded(gpu, config, ALONE) is None
    assert why_not_recorded(gpu, config, ALONE, "a reason of the stage") == "a reason of the stage"
    assert "compiled" in why_not_recorded(gpu, personal_config(dynamo_backend="eager"), ALONE)
    gpu.stream = object()
    assert "streamed" in why_not_recorded(gpu, config, ALONE)
    gpu.stream = None
    cpu_offload(base.denoiser, torch.device("cpu"))
    assert "hooks" in why_not_recorded(gpu, config, ALONE)
    other = tiny_base()
    apply_group_offloading(other.denoiser, torch.device("cpu"), offload_type="leaf_level")
    assert "hooks" in why_not_recorded(pretend_gpu(other), config, ALONE)

    class Linear8bitLt(nn.Module):
        pass

    third = tiny_base()
    third.denoiser.extra = Linear8bitLt()
    assert "outliers" in why_not_recorded(pretend_gpu(third), config, ALONE)
    assert all("with the same result" in record.getMessage() for record in caplog.records)


def test_checkpointing_keeps_random_numbers_only_where_some_are_drawn(down, monkeypatch):
    """Reading the generator's state cannot be recorded."""
    asked = []
    monkeypatch.setattr(torch, "get_rng_state", lambda real=torch.get_rng_state: (asked.append(1), real())[1])
    for draws in (False, True):
        base = tiny_base()
        if draws:
            base.denoiser.x_embedder = nn.Sequential(base.denoiser.x_embedder, nn.Dropout(0.1))
        run = Personalization(base, tiny_examples(base, 1), personal_config(gradient_checkpointing=True), down)
        asked.clear()
        run._loss().backward()
        assert bool(asked) == draws
        run.remove()
