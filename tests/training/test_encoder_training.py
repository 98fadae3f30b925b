# SPDX-License-Identifier: Apache-2.0
"""Training of a space and its encoder: the gradient is autograd's, photos never judge themselves, the loss falls."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig
from torch import nn

from peft_metalora.encoder import EncoderConfig, SubjectSpace, make_encoder
from peft_metalora.errors import ConfigError, TooFewImagesError
from peft_metalora.training.encoder_training import EncoderTraining, EncoderTrainingConfig, PhotoPairs, Reads
from peft_metalora.training.engine.stacked import AdapterStack, RowGradients, denoising_inputs
from training_tiny import tiny_base, tiny_examples

SIZE = 6  # numbers of a code


@pytest.fixture
def base():
    base = tiny_base()
    base.denoiser.requires_grad_(False)
    torch.manual_seed(0)
    base.denoiser.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"]))
    return base


def people(base, count=3, each=3):
    """Examples, and the same photos to be read."""
    examples = tiny_examples(base, subjects=count, each=each)
    photo = torch.arange(count * each)
    return examples, Reads(examples.latents, examples.subject, photo), photo


def training_of(base, rows=2, count=3, **changes):
    examples, reads, photo = people(base, count)
    stack = AdapterStack(base.denoiser, rows)
    layout = [(name, tuple(tensor.shape[1:])) for name, tensor in stack.parameters.items()]
    space = SubjectSpace(layout, stack.values[0], torch.zeros(SIZE, stack.values.shape[1]), "down")
    config = EncoderConfig(resolution=8, code_size=SIZE, width=8, hidden=16, dropout=0.0)
    encoder = make_encoder(config, lambda pixels: torch.zeros(len(pixels), 4, 4, 4))
    settings = {"steps": 6, "targets": 2, "warmup_steps": 2, "space_learning_rate": 3e-3, **changes}
    return EncoderTraining(
        RowGradients(base, stack),
        space,
        encoder,
        PhotoPairs(reads, examples, photo),
        reads,
        examples,
        EncoderTrainingConfig(**settings),
    )


def test_the_gradient_of_space_and_encoder_is_autograds(base):
    run = training_of(base)
    stack, space, encoder = run.gradients.stack, run.space, run.encoder
    torch.manual_seed(1)
    with torch.no_grad():
        space.basis.normal_(std=0.1)
    space.requires_grad_(True)
    parameters = [space.mean, space.basis, *encoder.parameters()]
    inputs = denoising_inputs(base, run.examples, torch.tensor([0, 1, 3, 5]), torch.Generator().manual_seed(0))
    photos = run.reads.features[[2, 4]]

    subjects = space(encoder(photos))
    stack.values.copy_(subjects.detach())
    losses, gradient = run.gradients(inputs)
    subjects.backward(gradient / 2)
    found = [parameter.grad.clone() for parameter in parameters]

    # One person after the other, through the model itself.
    for parameter in parameters:
        parameter.grad = None
    trainable = [name for name, parameter in base.denoiser.named_parameters() if parameter.requires_grad]
    total = 0
    for row in range(2):
        subject = space.split(space(encoder(photos[row : row + 1])))
        values = {name: subject[name].view(base.denoiser.get_parameter(name).shape) for name in trainable}
        own = {name: tensor[2 * row : 2 * row + 2] for name, tensor in inputs.items()}
        text = {name[5:]: tensor for name, tensor in own.items() if name.startswith("text.")}
        denoiser = base.denoiser
        base.pipeline.transformer = Called(denoiser, values)
        total = total + base.loss(own["latents"], text, own["noise"], own["times"]).mean() / 2
        base.pipeline.transformer = denoiser
    total.backward()
    torch.testing.assert_close(losses.mean(), total.detach())
    for parameter, gradient in zip(parameters, found, strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-3, atol=1e-6)
    assert max(gradient.abs().max() for gradient in found[2:]) > 0


class Called(nn.Module):
    """A model with other parameters."""

    def __init__(self, model, values):
        super().__init__()
        self._model, self.values = (model,), values

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_model"][0], name)

    def forward(self, **kwargs):
        return torch.func.functional_call(self._model[0], self.values, kwargs=kwargs)


def test_the_loss_falls_and_the_base_stays(base):
    frozen = {name: p.detach().clone() for name, p in base.denoiser.named_parameters() if not p.requires_grad}
    run = training_of(base, steps=60, space_learning_rate=1e-2)

    def loss():
        inputs = denoising_inputs(base, run.examples, torch.arange(9)[:6], torch.Generator().manual_seed(5))
        with torch.no_grad():
            run.gradients.values.copy_(run.space(run.encoder.eval()(run.reads.features[[2, 5]])))
        run.encoder.train()
        return float(run.gradients(inputs)[0].mean())

    before = loss()
    assert [step.number for step in run.steps()] == list(range(1, 61))
    assert not run.encoder.training and not run.encoder(run.reads.features).requires_grad
    assert loss() < 0.97 * before
    kept = {name: parameter for name, parameter in base.denoiser.named_parameters() if name in frozen}
    assert kept and all(torch.equal(parameter, frozen[name]) for name, parameter in kept.items())


def test_the_space_does_not_follow_the_stack_it_was_made_from(base):
    run = training_of(base)
    mean = run.space.mean.detach().clone()
    run.gradients.values.add_(1)
    assert torch.equal(run.space.mean, mean)


def test_a_photo_that_is_read_is_never_a_target_and_neither_are_views_of_it(base):
    examples = tiny_examples(base, subjects=4, each=6)
    photo = torch.arange(24) // 2  # two views of each photo
    reads = Reads(torch.zeros(36, 4, 4, 4), torch.arange(36) // 9, torch.arange(36) // 3)
    pairs = PhotoPairs(reads, examples, photo)
    generator = torch.Generator().manual_seed(0)
    seen = set()
    for _ in range(50):
        index, targets = pairs.draw(3, 3, generator)
        person = reads.person[index]
        assert len(set(person.tolist())) == 3
        assert (examples.subject[targets] == person[:, None]).all()
        assert (photo[targets] != reads.photo[index][:, None]).all()
        assert all(len(set(row)) == 3 for row in targets.tolist())
        seen |= set(index.tolist())
    assert seen == set(range(36))


def test_more_people_or_targets_than_there_are_repeat(base):
    examples, reads, photo = people(base, count=2)
    index, targets = PhotoPairs(reads, examples, photo).draw(4, 5, torch.Generator().manual_seed(0))
    assert sorted(reads.person[index].tolist()) == [0, 0, 1, 1]
    assert (photo[targets] != reads.photo[index][:, None]).all()


def test_people_with_one_photo_are_left_out_and_named(base):
    examples, reads, photo = people(base, count=3, each=2)
    photo = torch.tensor([0, 1, 2, 2, 4, 5])  # the two examples of the second are one photo
    reads = Reads(reads.features, reads.person, photo)
    with pytest.warns(UserWarning, match="1 of 3 people, who have one photo: bob"):
        pairs = PhotoPairs(reads, examples, photo, ["ann", "bob", "eve"])
    assert pairs.people.tolist() == [0, 2]
    alone = torch.arange(3).repeat_interleave(2)
    with pytest.raises(TooFewImagesError, match="give more photos"):
        PhotoPairs(Reads(reads.features, reads.person, alone), examples, alone)


def test_a_resumed_run_is_the_same_run(base):
    whole = training_of(base, steps=5)
    list(whole.steps())
    first = training_of(base, steps=5)
    steps = first.steps()
    next(steps), next(steps)
    state = copy.deepcopy(first.state_dict())
    second = training_of(base, steps=5)
    second.load_state_dict(state)
    assert [step.number for step in second.steps()] == [3, 4, 5]
    assert second.losses == whole.losses
    for one, other in zip(whole.space.parameters(), second.space.parameters(), strict=True):
        assert torch.equal(one, other)
    for one, other in zip(whole.encoder.parameters(), second.encoder.parameters(), strict=True):
        assert torch.equal(one, other)


def test_rates_rise_stay_and_fall():
    config = EncoderTrainingConfig(steps=100, warmup_steps=10, decay=0.6)
    factors = [config.factor(number) for number in range(100)]
    assert factors[:2] == [0.1, 0.2]
    assert factors[10:41] == [1.0] * 31
    assert factors[70] == pytest.approx(0.5) and factors[99] == pytest.approx(1 / 60)
    with pytest.raises(ConfigError, match="steps"):
        EncoderTrainingConfig(steps=0)


def test_a_space_of_other_subjects_is_refused(base):
    run = training_of(base)
    small = SubjectSpace([("x", (3,))], torch.zeros(3), torch.zeros(SIZE, 3), "down")
    with pytest.raises(ConfigError, match="numbers a subject"):
        EncoderTraining(run.gradients, small, run.encoder, run.pairs, run.reads, run.examples, run.config)
