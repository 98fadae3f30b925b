# SPDX-License-Identifier: Apache-2.0
"""Prior preservation: the class prompt keeps the base's meaning, without a picture of the class."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from peft_metalora.data import read_subjects
from peft_metalora.errors import ConfigError
from peft_metalora.training.examples.encoding import encode_captions, encode_subjects
from peft_metalora.training.prior import class_prompt, distance_from_base
from peft_metalora.training.stage_2 import Personalization
from peft_metalora.tuner import set_slots
from training_tiny import personal_config, tiny_base, tiny_examples, write_people

CLASS = "a photo of a person"


def examples_with_class(base, subjects=1):
    return replace(tiny_examples(base, subjects), prior=encode_captions(base, [CLASS]))


def make_run(base, down, method="meta-lora", subjects=1, **changes):
    config = personal_config(method=method, class_prompt=CLASS, **changes)
    return Personalization(base, examples_with_class(base, subjects), config, down)


def drift(run, slots=None):
    """Mean square distance of the adapted model from the base on the class prompt, at fixed noises."""
    base, generator = run.base, torch.Generator().manual_seed(9)
    latents = run.examples.latents
    noise = torch.randn(latents.shape, generator=generator)
    times = base.sample_times(latents, generator)
    distance = distance_from_base(base, run.examples.prior, latents, noise, times)
    if run.uses_slots:
        set_slots(base.denoiser, slots)
    with torch.no_grad():
        return distance()


@pytest.mark.parametrize("method", ["meta-lora", "lora"])
def test_the_distance_is_0_at_the_start_and_the_formula_after_a_step(base, down, method):
    run = make_run(base, down, method, prior_loss_weight=1.0)
    assert drift(run).abs().max() < 1e-10
    weights = [parameter.requires_grad for parameter in base.denoiser.parameters()]
    list(run.steps())
    assert [parameter.requires_grad for parameter in base.denoiser.parameters()] == weights
    found = drift(run)
    generator = torch.Generator().manual_seed(9)
    latents = run.examples.latents
    noise = torch.randn(latents.shape, generator=generator)
    times = base.sample_times(latents, generator)
    text = {name: tensor.expand(len(latents), *tensor.shape[1:]) for name, tensor in run.examples.prior.items()}
    with torch.no_grad():
        noisy = base.add_noise(latents, noise, times)
        adapted = base.predict(noisy, text, times)
        run.remove()
        plain = base.predict(noisy, text, times)
    expected = (adapted - plain).square().mean((1, 2, 3))
    assert torch.allclose(found, expected, rtol=1e-3) and (found > 1e-9).all()


@pytest.mark.parametrize("method", ["meta-lora", "lora"])
def test_it_keeps_the_class_nearer_to_the_base(down, method):
    distances, losses = [], []
    for weight in (0.0, 10.0):
        run = make_run(tiny_base(), down, method, prior_loss_weight=weight, max_train_steps=24)
        losses.append([step.loss for step in run.steps()])
        distances.append(drift(run).mean().item())
    assert distances[1] < 0.5 * distances[0]
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-6)  # nothing is drawn for it, and it starts from 0


def test_weight_0_changes_no_bit(down):
    found = []
    for examples in (tiny_examples, examples_with_class):
        base = tiny_base()
        subjects = examples(base, 1)
        run = Personalization(base, subjects, personal_config(prior_loss_weight=0.0), down)
        list(run.steps())
        found.append([parameter.detach().clone() for parameter in run.parameters])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_every_person_keeps_the_class_as_if_alone(down):
    """Slots: each subject's distance is its own, and many at once become what they become one by one."""
    base = tiny_base()
    both = examples_with_class(base, 2)
    config = personal_config(class_prompt=CLASS, prior_loss_weight=5.0, max_train_steps=5)
    together = Personalization(base, both, config, down)
    list(together.steps())
    slots = [parameter.detach().clone() for parameter in together.parameters]
    apart = drift(together, [0, 0, 1, 1])
    assert (apart[:2] != apart[2:]).all()
    together.remove()
    for subject in range(2):
        rows = both.subject == subject
        only = replace(
            both,
            latents=both.latents[rows],
            caption=both.caption[rows],
            subject=torch.zeros(2, dtype=torch.int64),
        )
        alone = Personalization(base, only, config, down)
        list(alone.steps())
        for parameter, whole in zip(alone.parameters, slots, strict=True):
            assert torch.allclose(parameter[0], whole[subject], atol=2e-5)
        alone.remove()


def test_the_class_prompt_is_the_instance_prompt_without_the_trigger(base, tmp_path):
    def prompt(**changes):
        return class_prompt(personal_config(**{"prior_loss_weight": 1.0, **changes}))

    assert prompt(instance_prompt="a photo of {trigger} person", trigger="sks") == "a photo of person"
    assert prompt(instance_prompt="a photo of sks person", trigger="sks") == "a photo of person"
    assert prompt(class_prompt="a man", instance_prompt="a photo") == "a man"
    assert prompt(instance_prompt="a photo of {trigger}", trigger="sks", prior_loss_weight=0.0) is None
    for text in ("a photo of a person", None, "{trigger}"):
        with pytest.raises(ConfigError, match="give class_prompt"):
            prompt(instance_prompt=text, trigger="sks")
    people = read_subjects(write_people(tmp_path / "people", subjects=1))
    config = personal_config(prior_loss_weight=1.0, class_prompt=CLASS)
    examples = encode_subjects(base, people, config, 1, progress=False)
    assert torch.equal(examples.prior["sequence"], base.encode_text([CLASS])["sequence"])
    with pytest.raises(ConfigError, match="embedding of the class prompt"):
        Personalization(base, tiny_examples(base, 1), replace(config, method="lora"))
    with pytest.raises(ConfigError, match="prior_loss_weight must be 0 or more"):
        personal_config(prior_loss_weight=-1.0)
