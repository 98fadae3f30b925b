# SPDX-License-Identifier: Apache-2.0
"""Masks: the loss is learned where they are white, they follow crops and flips, and the disk knows them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from peft_metalora.data import read_subjects
from peft_metalora.errors import UnreadableImageError
from peft_metalora.training.examples.encoding import encode_subjects
from peft_metalora.training.stage_1 import MetaTraining
from peft_metalora.training.stage_2 import Personalization
from training_tiny import meta_config, personal_config, tiny_base, write_people


@pytest.fixture
def people(tmp_path):
    """Two people of two photos; the first photo of the first has a mask, white on its left half."""
    folder = write_people(tmp_path / "people", subjects=2)
    half = np.zeros((24, 20), dtype=np.uint8)
    half[:, :10] = 255
    Image.fromarray(half).save(folder / "person-0" / "0.mask.png")
    return folder


def encode(base, people, config, views=4):
    return encode_subjects(base, read_subjects(people), config, views, progress=False)


def test_masks_follow_crops_and_flips(people):
    base = tiny_base()
    examples = encode(base, people, personal_config(resolution=16))
    assert examples.mask.shape == (16, 1, 4, 4)
    assert torch.equal(examples.mask[4:], torch.ones(12, 1, 4, 4))
    flipped = [bool(examples.mask[view, 0, :, 0].mean() < examples.mask[view, 0, :, -1].mean()) for view in range(4)]
    plain = encode(base, people, personal_config(resolution=16, random_flip=False))
    assert all(mask[0, :, 0].mean() > mask[0, :, -1].mean() for mask in plain.mask[:4])
    assert set(flipped) == {True, False}
    # The edge lies where each crop has it: the white share of a view is that of its crop, and crops differ.
    shares = examples.mask[:4].mean((1, 2, 3))
    assert (shares > 0.2).all() and (shares < 0.8).all() and len(shares.unique()) > 1
    # Captions tell left from right as the masks do.
    left = encode(base, people, personal_config(random_flip=False)).text["sequence"][0]
    says_left = [torch.equal(examples.text["sequence"][row], left) for row in examples.caption[:4]]
    assert says_left == [not flip for flip in flipped]


def test_mask_is_exactly_the_crop_of_the_mask(people):
    """A photo that is its own mask: the views' pixels and weights agree."""
    path = people / "person-0"
    Image.open(path / "0.mask.png").convert("RGB").save(path / "0.png")
    base = tiny_base()
    seen = []
    original = base.encode_images
    base.encode_images = lambda pixels, *rest: (seen.append(pixels), original(pixels, *rest))[1]
    examples = encode(base, people, personal_config(resolution=16))
    brightness = torch.nn.functional.adaptive_avg_pool2d((seen[0][:, :1] + 1) / 2, (4, 4))
    assert torch.allclose(examples.mask[:4], brightness, atol=0.1)  # two resamplings: one sharpens edges


def test_cache_knows_the_mask(people, tmp_path, monkeypatch):
    base, config = tiny_base(), personal_config(cache_dir=str(tmp_path / "cache"))
    first = encode(base, people, config)

    def refuse(*args, **kwargs):
        raise AssertionError("encoded again")

    monkeypatch.setattr(base.pipeline.vae, "encode", refuse)
    again = encode(base, people, config)
    assert torch.equal(again.mask, first.mask) and torch.equal(again.latents, first.latents)
    Image.new("L", (20, 24), 255).save(people / "person-0" / "0.mask.png")
    with pytest.raises(AssertionError, match="encoded again"):
        encode(base, people, config)
    (people / "person-0" / "0.mask.png").unlink()
    with pytest.raises(AssertionError, match="encoded again"):
        encode(base, people, config)


def test_no_masks_no_weights(tmp_path):
    assert encode(tiny_base(), write_people(tmp_path / "people"), personal_config()).mask is None


def test_a_mask_that_does_not_fit_is_named(people):
    Image.new("L", (24, 20)).save(people / "person-0" / "0.mask.png")
    with pytest.raises(UnreadableImageError, match=r"shape of its photo, 20 x 24, found .*0\.mask\.png of 24 x 20"):
        encode(tiny_base(), people, personal_config())


@pytest.mark.parametrize("stage", [1, 2])
def test_both_stages_learn_from_the_masked_part_alone(people, stage):
    """A mask of nothing gives no gradient, a white one that of no mask."""
    grads = []
    for level in (0, 255, None):
        for photo in people.rglob("?.png"):
            mask = photo.with_suffix(".mask.png")
            mask.unlink(missing_ok=True)
            if level is not None:
                Image.new("L", (20, 24), 255).save(mask)
        base = tiny_base()
        examples = encode(base, people, meta_config(), views=1)
        if level == 0:  # as of views that miss the subject: a black mask is refused
            examples = replace(examples, mask=torch.zeros_like(examples.mask))
        if stage == 1:
            run = MetaTraining(base, examples, meta_config(warmup_steps=0))
            parameters = [one for one in base.denoiser.parameters() if one.requires_grad]
        else:
            chosen = encode_subjects(base, read_subjects(people)[:1], personal_config(), 1, progress=False)
            chosen = replace(chosen, mask=None if examples.mask is None else examples.mask[: len(chosen)])
            run = Personalization(base, chosen, personal_config(method="lora"))
            parameters = run.parameters
        run._loss().backward()  # a whole step would show what the optimiser makes of the gradient
        grads.append(torch.cat([one.grad.flatten() for one in parameters if one.grad is not None]))
    assert not grads[0].any() and grads[2].any()
    assert torch.allclose(grads[1], grads[2], rtol=1e-3, atol=1e-8)


def test_what_is_transparent_in_a_mask_is_not_the_subject(people):
    """Bug: it was laid on white, as in a photo, so that the mask of a tool that cuts somebody out masked nothing."""
    path = people / "person-0" / "0.mask.png"
    drawn = encode(tiny_base(), people, personal_config())
    grey = Image.open(path)
    for layers in ([Image.new("L", grey.size, 255), grey], [grey] * 4):
        Image.merge("LA" if len(layers) == 2 else "RGBA", layers).save(path)
        assert torch.equal(encode(tiny_base(), people, personal_config()).mask, drawn.mask)


@pytest.mark.parametrize("lightest", [0, 1])
def test_a_photo_whose_mask_is_light_nowhere_is_left_out_and_named(people, lightest):
    """Bug: a run on such a photo ended well and had learned nothing, and an encoder saw a grey picture."""
    path = people / "person-0" / "0.mask.png"
    Image.new("L", (20, 24), lightest).save(path)
    subjects = read_subjects(people)
    told = f"0.mask.png, whose lightest place is {lightest} of 255: draw the subject in white"
    with pytest.warns(UserWarning, match=f"skipped 1 of 4 images: .*{told}"):
        encode_subjects(tiny_base(), subjects, personal_config(), 2, progress=False, skip_unreadable=True)
    with pytest.raises(UnreadableImageError, match=told):
        encode_subjects(tiny_base(), subjects, personal_config(), 2, progress=False)
