# SPDX-License-Identifier: Apache-2.0
"""What `convergence.py` trains on: noise levels of training, and what recipes of one shape share."""

import dataclasses
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import encoder_world

from embedded_rank_4 import embedded_down
from forked import on_processes
from peft_metalora.bases import load_base
from peft_metalora.demo.embedded import BASE
from peft_metalora.training.engine.replay import named
from peft_metalora.training.stage_settings import PersonalizeConfig


@pytest.fixture(scope="module")
def world():
    """A world without people and judges."""
    found = object.__new__(encoder_world.World)
    found.base, found.train_base = load_base(BASE), load_base(BASE)
    found.device, found.down = torch.device("cpu"), embedded_down()
    found.config = PersonalizeConfig(pretrained_model_name_or_path=str(BASE), output_dir="none", resolution=64)
    found.args, found._training = SimpleNamespace(compile=False), None
    return found


def test_training_draws_more_noise_and_pictures_are_drawn_as_ever(world):
    """Bug: the steps of drawing were shifted, too."""
    base = world.train_base
    latents = torch.zeros(200, 8, 16, 16)

    def median() -> float:
        return float(base.sample_times(latents, torch.Generator().manual_seed(0)).median())

    scheduler = base.pipeline.scheduler
    scheduler.set_timesteps(4)
    before, drawn = median(), scheduler.sigmas.tolist()
    base.shift = 4.0
    scheduler.set_timesteps(4)
    assert median() == pytest.approx(4 * before / (1 + 3 * before), abs=1e-3)
    assert scheduler.sigmas.tolist() == drawn
    base.shift = None


def test_recipes_of_one_shape_share_what_was_compiled_and_each_starts_anew(world):
    """Bug: the second of two recipes began where the first had ended."""
    first = encoder_world.Recipe("first", rows=2)
    stack, gradients = world.to_train(first)
    start = stack.values.clone()
    stack.values.add_(1.0)
    second = encoder_world.Recipe("second", rows=2, shift=4.0, lr=1e-2)
    assert world.ready_to_train(second)
    again, same = world.to_train(second)
    assert same is gradients and torch.equal(again.values, start)
    assert world.train_base.shift == 4.0
    assert not world.ready_to_train(encoder_world.Recipe("third", rows=2, r=1))
    assert world.to_train(encoder_world.Recipe("third", rows=2, r=1))[0].values.shape[1] < start.shape[1]


def test_a_recipe_on_another_down_takes_the_place_of_the_first(world):
    """Bug: the Down of the first recipe stayed on the base that was compiled."""
    recipe = encoder_world.Recipe("first", rows=2)
    _, gradients = world.to_train(recipe)
    first = world.down
    zeros, times = torch.zeros(2, 8, 16, 16), torch.full((2,), 0.5)
    text = world.base.encode_text(["a photo", "a photo"])
    inputs = named(text, latents=zeros + 1, noise=zeros, times=times, mask=None)
    before = gradients(inputs)[1].clone()
    tensors = {name: one * (2 if name.endswith(".metalora_down") else 1) for name, one in first.tensors.items()}
    world.down = dataclasses.replace(first, tensors=tensors)
    assert world.to_train(recipe)[1] is gradients
    after = gradients(inputs)[1].clone()
    world.down = first
    world.to_train(recipe)
    assert torch.equal(gradients(inputs)[1], before) and not torch.allclose(after, before)


def of_helpers(rank, path):
    torch.set_num_threads(64)
    with encoder_world.helpers(2) as pool:
        path.write_text(f"{torch.get_num_threads()} {pool.apply(torch.get_num_threads)}")


def test_helpers_leave_the_cores_to_others(tmp_path):
    """Bug: each of twenty helpers of each of three processes had as many threads as the host has cores."""
    on_processes(1, of_helpers, tmp_path / "threads")  # this process has threads and signals of other tests
    assert (tmp_path / "threads").read_text() == "8 1"
