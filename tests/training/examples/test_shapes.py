# SPDX-License-Identifier: Apache-2.0
"""Aspect-ratio buckets: photos keep their shape, a batch has one, nobody is seen less for it, and runs resume."""

from __future__ import annotations

import hashlib
import math

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from peft_metalora.data import cut, load_image, random_box, read_subjects
from peft_metalora.errors import ConfigError
from peft_metalora.training.examples.batches import Examples
from peft_metalora.training.examples.encoding import encode_captions, encode_subjects
from peft_metalora.training.examples.shapes import crop_shapes, nearest_shape, parse_shapes
from peft_metalora.training.meta_train import meta_train
from peft_metalora.training.personalize import personalize
from peft_metalora.training.stage_1 import MetaTraining
from peft_metalora.training.stage_2 import Personalization
from peft_metalora.training.watching.validation_scores import HeldOutLoss
from peft_metalora.tuner import set_slots
from training_tiny import CAPTIONS, meta_config, personal_config, write_people

SIZES = [(24, 24), (40, 24), (26, 40)]  # width, height: square, wide, tall
AUTO = {"aspect_ratio_buckets": "auto", "resolution": 32}


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    return write_people(tmp_path_factory.mktemp("shapes"), subjects=4, each=3, sizes=SIZES)


def mixed(base, subjects=2):
    """Five latents a subject: two of one shape, three of another."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(4, 4, 6), (4, 4, 6), (4, 6, 4), (4, 6, 4), (4, 6, 4)] * subjects
    latents = [torch.randn(shape, generator=generator) for shape in shapes]
    owners = torch.arange(subjects).repeat_interleave(5)
    return Examples(latents, encode_captions(base, CAPTIONS), torch.arange(len(shapes)) % 2, owners)


@pytest.mark.parametrize(("resolution", "multiple"), [(512, 16), (768, 16), (1024, 16), (1024, 32), (64, 16), (8, 8)])
def test_automatic_shapes_fit_the_base_and_have_the_area(resolution, multiple):
    shapes = crop_shapes("auto", resolution, multiple)
    assert (resolution, resolution) in shapes
    for height, width in shapes:
        assert height % multiple == width % multiple == 0
        assert 0.85 * resolution**2 <= height * width <= resolution**2
        assert 0.5 <= width / height <= 2
        assert (width, height) in shapes
    if resolution >= 64 * multiple // 16 * 8:
        assert len(shapes) == 5


def test_nearest_shape_is_the_one_that_loses_least():
    shapes = crop_shapes("auto", 512, 16)

    def lost(shape, width, height):
        scale = min(width / shape[1], height / shape[0])
        return 1 - shape[0] * shape[1] * scale**2 / (width * height)

    for width, height in ((300, 300), (400, 300), (300, 400), (1920, 1080), (1000, 3000), (123, 98)):
        chosen = nearest_shape(shapes, width, height)
        assert lost(chosen, width, height) == pytest.approx(min(lost(one, width, height) for one in shapes))


def test_shapes_as_diffusers_scripts_take_them():
    assert parse_shapes("672,1568;688,1504") == [(672, 1568), (688, 1504)]
    assert crop_shapes(None, 512, 16) == [(512, 512)]
    for text in ("", "512", "512,512;", "512,0", "a,b", "512x512"):
        with pytest.raises(ConfigError, match="'auto' or 'height,width;height,width'"):
            meta_config(aspect_ratio_buckets=text)
    with pytest.raises(ConfigError, match="multiples of 16 for this base model, found 24,32"):
        crop_shapes("32,32;24,32", 512, 16)


def test_each_photo_is_cut_to_the_shape_nearest_to_its_own(base, people):
    config = personal_config(**AUTO, random_flip=False)
    people = read_subjects(people)
    examples = encode_subjects(base, people, config, 2, progress=False)
    found = [tuple(latent.shape) for latent in examples.latents]
    assert found == [(4, 8, 8), (4, 8, 8), (4, 6, 10), (4, 6, 10), (4, 10, 6), (4, 10, 6)] * 4
    index = torch.tensor([4, 11])
    assert torch.equal(examples.pick(index)[0], torch.stack([examples.latents[4], examples.latents[11]]))
    photo = people[0].photos[1]
    generator = torch.Generator().manual_seed(int(hashlib.sha256(photo.read()).hexdigest()[:12], 16))
    image = load_image(photo.path)
    pixels = cut(image, random_box(image.size, (24, 40), generator), (24, 40))
    assert torch.allclose(examples.latents[2], base.encode_images(pixels[None])[0], atol=1e-5)


def test_the_shape_of_a_photo_is_that_of_the_upright_photo(base, tmp_path):
    (tmp_path / "ann").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 24), "red").save(tmp_path / "ann" / "0.jpg", exif=exif)
    config = personal_config(**AUTO, instance_prompt="a photo")
    assert encode_subjects(base, read_subjects(tmp_path), config, 1, progress=False).latents.shape == (1, 4, 10, 6)


def test_photos_of_one_shape_stay_one_tensor(base, people):
    people = read_subjects(people)
    squares = [type(person)(person.name, person.photos[:1]) for person in people]
    examples = encode_subjects(base, squares, personal_config(**AUTO), 2, progress=False)
    plain = encode_subjects(base, squares, personal_config(resolution=32), 2, progress=False)
    assert isinstance(examples.latents, torch.Tensor) and torch.equal(examples.latents, plain.latents)


@pytest.mark.parametrize("shards", [1, 2])
def test_a_pass_of_stage_1_has_one_shape_and_its_loss_is_the_mean_over_the_batch(base, shards, monkeypatch):
    config = meta_config(subjects_per_batch=2, images_per_subject=2, shards=shards, max_train_steps=6)
    run = MetaTraining(base, mixed(base, subjects=4), config)
    calls, original = [], base.loss

    def loss(latents, text, noise, times, mask=None):
        found = original(latents, text, noise, times, mask)
        calls.append((latents.shape[1:], noise.shape == latents.shape, found.detach()))
        return found

    monkeypatch.setattr(base, "loss", loss)
    steps = list(run.steps())
    assert len(calls) == shards * 6
    assert all(same for _, same, _ in calls) and len({shape for shape, _, _ in calls}) == 2
    for number, step in enumerate(steps):
        losses = torch.cat([found for _, _, found in calls[shards * number : shards * (number + 1)]])
        assert len(losses) == 4 and step.loss == pytest.approx(losses.mean().item(), rel=1e-5)


def test_gradient_of_several_shapes_is_that_of_the_mean(base):
    """Two shards of different shapes, summed over two passes, against one backward of the mean.

    It runs the parts of a step by hand: after a whole step the gradient is gone.
    """
    latents = [torch.randn(4, 4, 6), torch.randn(4, 6, 4)]
    examples = Examples(latents, encode_captions(base, CAPTIONS), torch.tensor([0, 1]), torch.tensor([0, 1]))
    config = meta_config(subjects_per_batch=2, shards=2, max_train_steps=2, warmup_steps=0, max_grad_norm=0.0)
    run = MetaTraining(base, examples, config)
    next(run.steps())  # Up is no longer 0
    run.optimizer.zero_grad(set_to_none=True)
    state = run._generator.get_state()
    for _ in range(2):
        (run._loss() / 2).backward()
    down = run._layers[0].metalora_down["stage_1"]
    found = down.grad.clone()
    run._generator.set_state(state)
    run.optimizer.zero_grad(set_to_none=True)
    parts = run._draw()
    for part in parts:
        set_slots(base.denoiser, part.slots)
        latents, text = examples.pick(torch.tensor(part.index))
        (base.loss(latents, text, part.noise, part.times).sum() / 2).backward()
    assert len(parts) == 2 and found.abs().max() > 0
    assert torch.allclose(down.grad, found, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("stage", ["meta", "meta-lora", "lora"])
def test_resumed_equals_uninterrupted_bit_for_bit(place, people, tmp_path, stage):
    shared = {"pretrained_model_name_or_path": str(place / "base"), "max_train_steps": 8, **AUTO}

    def run(output, **changes):
        if stage == "meta":
            config = meta_config(
                train_data_dir=str(people),
                bucket_size=2,
                shards=2,
                output_dir=str(output),
                **shared,
                **changes,
            )
            meta_train(config, progress=False)
        else:
            down = str(place / "down") if stage == "meta-lora" else None
            config = personal_config(
                instance_data_dir=str(people / "person-0"),
                down=down,
                method=stage,
                validation_steps=4,
                output_dir=str(output),
                **shared,
                **changes,
            )
            personalize(config, progress=False)
        return {path.name: load_file(path) for path in output.glob("*.safetensors")}

    whole = run(tmp_path / "whole", checkpointing_steps=1)
    for step in (1, 3, 5):
        again = run(tmp_path / f"again-{step}", resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert all(torch.equal(whole[file][name], again[file][name]) for file in whole for name in whole[file])


def test_stage_2_sees_every_view_of_every_shape_equally_often(base, monkeypatch):
    examples = mixed(base, subjects=1)
    run = Personalization(base, examples, personal_config(method="lora", max_train_steps=200, learning_rate=1e-9))
    seen, original = [], Examples.batch

    def batch(self, index, seeds=None):
        seen.extend(index.tolist())
        return original(self, index, seeds)

    monkeypatch.setattr(Examples, "batch", batch)
    monkeypatch.setattr(base, "loss", lambda latents, *rest: run.parameters[0].sum() + torch.zeros(len(latents)))
    for _ in run.steps():
        pass
    counts = torch.bincount(torch.tensor(seen), minlength=5) / len(seen)
    assert counts.tolist() == pytest.approx([0.2] * 5, abs=0.07)


def test_several_people_in_slots_need_one_shape(base, down):
    with pytest.raises(ConfigError, match="views of one shape for 2 subjects"):
        Personalization(base, mixed(base), personal_config(), down)


def test_held_out_loss_of_several_shapes_is_the_mean_of_all(base):
    examples = mixed(base, subjects=1)
    score = HeldOutLoss(base, examples, seed=1, draws=2)
    total = 0.0
    for latents, text, noise, times, _ in score._parts:  # the noise that it drew once and keeps to itself
        total -= base.loss(latents, text, noise, times).sum().item()
    assert len(score._parts) == 2 and score() == pytest.approx(total / 10, rel=1e-5)
    assert math.isfinite(score()) and score() == score()
