# SPDX-License-Identifier: Apache-2.0
"""Gradients by slots are those of the stacked step, and train a space that its Down can keep."""

from __future__ import annotations

import pytest
import torch

from peft_metalora import MetaLoraConfig, load_down, save_down
from peft_metalora.encoder import EncoderConfig, SubjectSpace, load_reader, make_encoder, save_reader
from peft_metalora.errors import AdapterNotFoundError
from peft_metalora.training.encoder_training import EncoderTraining, EncoderTrainingConfig, PhotoPairs, Reads
from peft_metalora.training.engine.slot_gradients import SlotGradients
from peft_metalora.training.engine.stacked import AdapterStack, RowGradients, denoising_inputs
from peft_metalora.training.injecting import inject
from peft_metalora.tuner.down import given, subject_config
from training_tiny import personal_config, tiny_base, tiny_examples

SUBJECTS, SIZE = 3, 6


@pytest.fixture(scope="module")
def down(tmp_path_factory):
    base = tiny_base()
    torch.manual_seed(0)
    config = MetaLoraConfig(r=2, meta_r=4, lora_alpha=2, target_modules=["to_q", "to_v"], init_weights=False)
    base.denoiser.add_adapter(config, "faces")
    folder = tmp_path_factory.mktemp("down") / "faces"
    save_down(folder, base.denoiser, "faces", base_model="tiny")
    return folder, load_down(folder)


def with_slots(down, slots, **settings):
    base = tiny_base()
    config = subject_config(down, num_slots=slots, start="mean", down="in memory", inference_mode=False)
    with given(down):
        inject(base, config, "default", personal_config(**settings))
    return base


def inputs_of(base):
    examples = tiny_examples(base, subjects=SUBJECTS)
    return denoising_inputs(base, examples, torch.arange(2 * SUBJECTS), torch.Generator().manual_seed(0))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_they_are_those_of_the_stacked_step(down, checkpointing):
    slots = with_slots(down[1], SUBJECTS, gradient_checkpointing=checkpointing)
    found = SlotGradients(slots)
    found.values += 0.1 * torch.randn(found.values.shape, generator=torch.Generator().manual_seed(1))
    inputs = inputs_of(slots)
    losses, gradient = found(inputs)

    rows = with_slots(down[1], 1)
    stack = AdapterStack(rows.denoiser, SUBJECTS)
    space = SubjectSpace.around(down[1], 1).ordered(found.names)
    factors = space.split(found.values)
    for name, tensor in stack.parameters.items():
        tensor.copy_(factors[name.removesuffix(".default")][:, None])
    wanted_losses, wanted = RowGradients(rows, stack)(inputs)
    torch.testing.assert_close(losses, wanted_losses, rtol=1e-4, atol=1e-5)
    at, parts = 0, {}
    for name, tensor in stack.parameters.items():
        size = tensor[0].numel()
        parts[name.removesuffix(".default")] = wanted[:, at : at + size]
        at += size
    in_order = torch.cat([parts[name] for name, _ in space.layout], dim=1)
    torch.testing.assert_close(gradient, in_order, rtol=1e-3, atol=1e-6)
    assert gradient.norm(dim=1).min() > 0


def test_a_down_learns_to_read_and_keeps_it(down, tmp_path):
    folder, source = down
    base = with_slots(source, 2)
    before = {name: p.detach().clone() for name, p in base.denoiser.named_parameters() if "metalora" not in name}
    space = SubjectSpace.around(source, SIZE)
    config = EncoderConfig(resolution=16, code_size=SIZE, width=8, hidden=16)
    encoder = make_encoder(config, base.encode_images)
    examples = tiny_examples(base, subjects=SUBJECTS)
    photo = torch.arange(len(examples))
    reads = Reads(examples.latents, examples.subject, photo)
    settings = EncoderTrainingConfig(steps=3, targets=1, warmup_steps=0)
    gradients = SlotGradients(base)
    space = space.ordered(gradients.names)
    run = EncoderTraining(gradients, space, encoder, PhotoPairs(reads, examples, photo), reads, examples, settings)
    assert [step.number for step in run.steps()] == [1, 2, 3]
    assert space.basis.abs().max() > 0
    for name, parameter in base.denoiser.named_parameters():
        if name in before:
            assert torch.equal(parameter, before[name])
    save_reader(folder, space.rounded(), encoder)
    assert load_reader(folder, source, base.encode_images).space.code_size == SIZE


def test_a_denoiser_without_slots_is_refused():
    with pytest.raises(AdapterNotFoundError, match="found none"):
        SlotGradients(tiny_base())
