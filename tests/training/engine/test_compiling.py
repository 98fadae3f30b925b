# SPDX-License-Identifier: Apache-2.0
"""Compiled blocks: one graph of each kind of block, none new while subjects change, and the same training."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager

from peft_metalora import hub
from peft_metalora.errors import ConfigError, NoTargetModulesError
from peft_metalora.training.engine.compiling import backend_of
from peft_metalora.training.meta_train import meta_train_on
from peft_metalora.training.personalize import personalize_many
from peft_metalora.training.stage_1 import MetaTraining
from peft_metalora.training.stage_2 import Personalization
from training_tiny import meta_config, personal_config, tiny_base, tiny_examples

# Some layers of each kind of block: a graph takes as long to make as it has adapted layers.
TARGETS = "attn.to_q,ff.net.2,proj_mlp"
GRAPHS = []


def counting(graph, inputs):
    """What compiled training consists of but for the making of kernels: graphs, forward and backward of their own."""
    GRAPHS.append(graph)
    return aot_eager(graph, inputs)


if "counting" not in torch.compiler.list_backends(exclude_tags=()):
    torch._dynamo.register_backend(counting, name="counting")


@pytest.fixture
def graphs():
    torch._dynamo.reset()
    GRAPHS.clear()
    return GRAPHS


def meta(backend):
    """Two buckets of two subjects each, with warm-up: the factors, and the number of graphs after each step."""
    base = tiny_base()
    steps = {"max_train_steps": 10, "warmup_steps": 2, "bucket_size": 2}
    config = meta_config(dynamo_backend=backend, target_modules=TARGETS, **steps)
    run = MetaTraining(base, tiny_examples(base, subjects=4), config)
    counts = [len(GRAPHS) for _ in run.steps()]
    factors = [factor.clone() for factor in run.state_dict()["factors"]]
    run.finish()
    assert not any(module._compiled_call_impl for module in base.denoiser.modules())
    return factors, counts


def test_stage_1(graphs):
    plain, none = meta("no")
    compiled, counts = meta("counting")
    assert set(none) == {0}
    # A double and a single block, with Down frozen and with Down in training; nothing new in the second bucket.
    assert counts == [2, 2] + [4] * 8
    for one, other in zip(plain, compiled, strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-5 * one.abs().max().item() + 1e-8)


def test_stage_2(graphs, tmp_path):
    base = tiny_base()
    config = meta_config(target_modules=TARGETS)
    meta_train_on(base, tiny_examples(base), config, progress=False).save(str(tmp_path / "down"))
    down, factors = hub.load_down(tmp_path / "down"), {}
    for backend in ("no", "counting"):
        base = tiny_base()
        config = personal_config(dynamo_backend=backend, max_train_steps=6)
        run = personalize_many(base, tiny_examples(base, subjects=2), config, down, progress=False)
        factors[backend] = [parameter.detach().clone() for parameter in run.parameters]
        run.remove()
        assert not any(module._compiled_call_impl for module in base.denoiser.modules())
    assert len(graphs) == 2
    for one, other in zip(factors["no"], factors["counting"], strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-5 * one.abs().max().item() + 1e-8)


def test_accelerates_launcher_is_asked_when_the_settings_say_nothing(monkeypatch):
    assert backend_of(meta_config()) is None
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    assert backend_of(meta_config()) == "eager"
    assert backend_of(meta_config(dynamo_backend="no")) is None


def test_what_cannot_be_compiled_is_refused_before_anything_changes(monkeypatch):
    base = tiny_base()
    names = [name for name, _ in base.denoiser.named_modules()]
    with pytest.raises(ConfigError, match=r"dynamo_backend must be 'no' or one of .*'inductor'.*found 'induktor'"):
        MetaTraining(base, tiny_examples(base), meta_config(dynamo_backend="induktor"))
    monkeypatch.setattr(type(base.denoiser), "_repeated_blocks", [])
    with pytest.raises(ConfigError, match="found FluxTransformer2DModel: use dynamo_backend 'no'"):
        Personalization(base, tiny_examples(base, 1), personal_config(method="lora", dynamo_backend="eager"))
    assert [name for name, _ in base.denoiser.named_modules()] == names


def test_a_refused_adapter_leaves_nothing_compiled():
    """Bug: the blocks stayed compiled when the adapter could not be put on."""
    base = tiny_base()
    settings = {"dynamo_backend": "eager", "target_modules": "no_such_layer"}
    for make in (
        lambda: MetaTraining(base, tiny_examples(base), meta_config(**settings)),
        lambda: Personalization(base, tiny_examples(base, 1), personal_config(method="lora", **settings)),
    ):
        with pytest.raises((ConfigError, NoTargetModulesError, ValueError)):
            make()
        assert not any(module._compiled_call_impl for module in base.denoiser.modules())
