# SPDX-License-Identifier: Apache-2.0
"""Gradients by slots are those of the stacked step, and train a space that its Down can keep."""

from __future__ import annotations

import pytest
import torch

from families_tiny import FAMILIES, TARGETS, tiny_pipeline
from peft_metalora import MetaLoraConfig, load_down, save_down
from peft_metalora.bases import base_for
from peft_metalora.encoder import EncoderConfig, SubjectSpace, load_reader, make_encoder, save_reader
from peft_metalora.errors import AdapterNotFoundError
from peft_metalora.training.encoder_training import EncoderTraining, EncoderTrainingConfig, PhotoPairs, Reads
from peft_metalora.training.engine.slot_gradients import SlotGradients
from peft_metalora.training.engine.stacked import AdapterStack, RowGradients, denoising_inputs
from peft_metalora.training.examples.batches import Examples
from peft_metalora.training.injecting import inject
from peft_metalora.tuner import DownSource, down_state, fingerprint
from peft_metalora.tuner.down import given, subject_config
from peft_metalora.tuner.placing import restore
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


def put_slots(base, down, slots, **settings):
    config = subject_config(down, num_slots=slots, start="mean", down="in memory", inference_mode=False)
    with given(down):
        inject(base, config, "default", personal_config(**settings))


def inputs_of(base):
    examples = tiny_examples(base, subjects=SUBJECTS)
    return denoising_inputs(base, examples, torch.arange(2 * SUBJECTS), torch.Generator().manual_seed(0))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_they_are_those_of_the_stacked_step(family, checkpointing):
    """Bug: a layer that sees each token of a prompt as a row (in Krea 2's text) showed the wrong people."""
    base = base_for(tiny_pipeline(family))
    torch.manual_seed(0)
    config = MetaLoraConfig(r=2, meta_r=4, lora_alpha=2, target_modules=TARGETS[family], init_weights=False)
    base.denoiser.add_adapter(config, "down")
    tensors = {name: tensor.clone() for name, tensor in down_state(base.denoiser, "down").items()}
    restore(base.denoiser, every=True)
    down = DownSource(config, tensors, fingerprint(tensors))
    latents = base.encode_images(torch.rand(2 * SUBJECTS, 3, 32, 32, generator=torch.Generator().manual_seed(2)))
    owners = torch.arange(SUBJECTS).repeat_interleave(2)
    examples = Examples(latents, base.encode_text(["a photo", "a red shirt"]), torch.arange(6) % 2, owners)
    inputs = denoising_inputs(base, examples, torch.arange(2 * SUBJECTS), torch.Generator().manual_seed(0))

    put_slots(base, down, SUBJECTS, gradient_checkpointing=checkpointing)
    slots = SlotGradients(base)
    slots.values += 0.1 * torch.randn(slots.values.shape, generator=torch.Generator().manual_seed(1))
    losses, gradient = slots(inputs)
    restore(base.denoiser, every=True)
    put_slots(base, down, 1)
    if base.host_looks:  # which cannot be stacked
        alone = SlotGradients(base)
        found = []
        for person, values in enumerate(slots.values):
            alone.values[0] = values
            found.append(alone({name: part[2 * person :][:2] for name, part in inputs.items()}))
        wanted_losses, wanted = (torch.cat(parts) for parts in zip(*found, strict=True))
    else:
        rows = RowGradients(base, AdapterStack(base.denoiser, SUBJECTS))
        assert rows.names == slots.names
        rows.values.copy_(slots.values)
        wanted_losses, wanted = rows(inputs)
    torch.testing.assert_close(losses, wanted_losses, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradient, wanted, rtol=1e-3, atol=1e-6)
    assert gradient.norm(dim=1).min() > 0


def test_either_shows_a_subject_by_itself(down):
    losses = []
    for slots in (SUBJECTS, 1):
        base = tiny_base()
        put_slots(base, down[1], slots)
        by_rows = RowGradients(base, AdapterStack(base.denoiser, SUBJECTS))
        gradients = SlotGradients(base) if slots > 1 else by_rows
        subject = gradients.values[0] + 0.1 * torch.randn(gradients.values.shape[1], generator=torch.Generator())
        gradients.values.copy_(subject.expand(SUBJECTS, -1))
        inputs = inputs_of(base)
        together = gradients(inputs)[0].mean()
        gradients.values.zero_()
        gradients.show(subject)
        with torch.no_grad():
            text = {name[5:]: tensor for name, tensor in inputs.items() if name.startswith("text.")}
            alone = base.loss(inputs["latents"], text, inputs["noise"], inputs["times"]).mean()
        torch.testing.assert_close(alone, together, rtol=1e-5, atol=1e-6)
        losses.append(alone)
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-6)


def test_a_down_learns_to_read_and_keeps_it(down, tmp_path):
    folder, source = down
    base = tiny_base()
    put_slots(base, source, 2)
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
