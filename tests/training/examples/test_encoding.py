# SPDX-License-Identifier: Apache-2.0
"""Photos become latents and captions text embeddings, once; the disk gives back what was encoded."""

from __future__ import annotations

import hashlib
import os
import warnings
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from peft_metalora.bases import base_for
from peft_metalora.data import cut, load_image, random_box, read_subjects
from peft_metalora.errors import ConfigError, TrainingError
from peft_metalora.training.examples.cache import Cache
from peft_metalora.training.examples.encoding import encode_captions, encode_subjects
from training_tiny import CAPTIONS, personal_config, tiny_base, write_people


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    return write_people(tmp_path_factory.mktemp("examples") / "people")


def encode(base, people, config, views=3):
    return encode_subjects(base, read_subjects(people), config, views, progress=False)


def equal(one, other):
    text = all(torch.equal(one.text[name], other.text[name]) for name in one.text)
    return text and all(torch.equal(getattr(one, n), getattr(other, n)) for n in ("latents", "caption", "subject"))


def test_views_are_crops_and_their_captions_follow_the_mirror(base, people):
    examples = encode(base, people, personal_config())
    assert examples.latents.shape == (3 * 2 * 3, 4, 4, 4)
    assert examples.subject.tolist() == [0] * 6 + [1] * 6 + [2] * 6
    assert [len(positions) for positions in examples.by_subject()] == [6, 6, 6]
    photo = people / "person-0" / "0.png"
    content = hashlib.sha256(photo.read_bytes()).hexdigest()
    generator = torch.Generator().manual_seed(int(content[:12], 16))
    flip = bool(torch.rand((), generator=generator) < 0.5)
    image = load_image(photo)
    pixels = cut(image, random_box(image.size, (16, 16), generator), (16, 16), flip=flip)
    assert torch.allclose(examples.latents[:1], base.encode_images(pixels[None]), atol=1e-5)
    caption = CAPTIONS[0].replace("left", "right") if flip else CAPTIONS[0]
    _, text = examples.pick(torch.tensor([0]))
    assert torch.allclose(text["sequence"], base.encode_text([caption])["sequence"], atol=1e-6)
    # Two captions, one of them in two directions.
    assert len(examples.text["sequence"]) == 3


def test_a_photo_is_encoded_alike_whoever_is_beside_it(base, people):
    together = encode(base, people, personal_config())
    alone = encode_subjects(base, read_subjects(people)[1:2], personal_config(), 3, progress=False)
    assert torch.equal(alone.latents, together.latents[6:12])


def test_no_mirror_images_when_not_asked_for(base, people):
    examples = encode(base, people, personal_config(random_flip=False))
    assert len(examples.text["sequence"]) == len(CAPTIONS)


def test_disk_gives_back_what_was_encoded_without_any_encoder(base, people, tmp_path, monkeypatch):
    config = personal_config(cache_dir=str(tmp_path / "cache"))
    first = encode(base, people, config)
    assert torch.equal(first.latents, encode(base, people, personal_config()).latents)

    def refuse(*args, **kwargs):
        raise AssertionError("encoded again")

    monkeypatch.setattr(base.pipeline.vae, "encode", refuse)
    monkeypatch.setattr(base.pipeline, "encode_prompt", refuse)
    assert equal(encode(base, people, config), first)
    for change in ({"seed": 1}, {"random_flip": False}, {"resolution": 24}):
        with pytest.raises(AssertionError, match="encoded again"):
            encode(base, people, replace(config, **change))


@pytest.mark.parametrize("folder", [None, "cache"])
def test_what_is_encoded_has_the_layout_of_what_is_read(tmp_path, folder):
    """Bug: an encoder that was resumed with a cache was not, to the last bit, what it would have been: features came
    out of a convolution in its own layout, and from the file in the plain one, on which others round otherwise."""
    cache = Cache(folder and str(tmp_path / folder))

    def make():
        return {"features": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)}

    assert [cache.get({}, make)["features"].stride() for _ in range(2)] == [(48, 16, 4, 1)] * 2


def test_a_cached_file_of_other_content_is_encoded_anew(base, people, tmp_path):
    """Bug: a flipped bit of a cached file was trained on, and one of other names ended in a KeyError."""
    config = personal_config(cache_dir=str(tmp_path / "cache"))
    first = encode(base, people, config)
    files = sorted((tmp_path / "cache").rglob("*.safetensors"))
    for number, path in enumerate(files):
        if number % 2:
            save_file({f"x{name}": tensor for name, tensor in load_file(path).items()}, path)
        else:
            content = bytearray(path.read_bytes())
            content[-1] ^= 1
            path.write_bytes(content)
    assert equal(encode(base, people, config), first)


OWN = """
import torch
from peft_metalora.bases.flux1 import Flux1

SCALE = {scale}


class Own(Flux1):
    @torch.no_grad()
    def text_of(self, prompts):
        return {{name: tensor * SCALE for name, tensor in super().text_of(prompts).items()}}


class Other(Own):
    def latents_of(self, pixels):
        return super().latents_of(pixels) * SCALE
"""


def test_what_another_class_of_the_base_makes_is_encoded_anew(base, people, tmp_path):
    """Bug: after an edit of a class of one's own, a run with a cache trained on what the class had made before; so it
    did after a change of an autoencoder's shift."""
    config = personal_config(cache_dir=str(tmp_path / "cache"))
    scales = {}
    for scale in (1.0, 0.5):
        (tmp_path / "own.py").write_text(OWN.format(scale=scale))
        for name in ("Own", "Other"):
            own = base_for(base.pipeline, generic=f"{tmp_path}/own.py:{name}")
            encode(own, people, config)  # the second time from the cache
            found = encode(own, people, config)
            assert equal(found, encode(own, people, personal_config()))
            scales[scale, name] = found
    assert len({float(one.text["sequence"].sum()) for one in scales.values()}) == 2
    assert len({float(one.latents.sum()) for one in scales.values()}) == 2
    first = encode(base, people, config)
    base.pipeline.vae.register_to_config(shift_factor=0.25)
    assert not torch.equal(encode(base, people, config).latents, first.latents)


def test_another_model_or_photo_or_a_damaged_file_is_encoded_anew(base, people, tmp_path):
    config = personal_config(cache_dir=str(tmp_path / "cache"))
    first = encode(base, people, config)
    with torch.no_grad():
        next(base.pipeline.vae.encoder.parameters()).mul_(1.5)
    assert not torch.equal(encode(base, people, config).latents, first.latents)
    base = tiny_base()
    for path in (tmp_path / "cache").rglob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:20])
    assert equal(encode(base, people, config), first)
    copy = write_people(tmp_path / "people")
    (copy / "person-0" / "0.png").write_bytes((copy / "person-2" / "1.png").read_bytes())
    changed = encode(base, copy, config)
    assert not torch.equal(changed.latents[:3], first.latents[:3])
    assert torch.equal(changed.latents[3:], first.latents[3:])


def test_a_file_of_the_cache_that_holds_something_else_is_made_anew(base, people, tmp_path):
    """Bug: KeyError, RuntimeError or another photo's latents, from a file that was exchanged or put there."""
    config = personal_config(cache_dir=str(tmp_path))
    first = encode(base, people, config)
    files = sorted(tmp_path.rglob("*.safetensors"))
    contents = [path.read_bytes() for path in files]
    for shift in range(1, len(files)):  # each has another's name
        for number, path in enumerate(files):
            path.write_bytes(contents[(number + shift) % len(files)])
        assert equal(encode(base, people, config), first)
    for tensors in ({}, {"latents": torch.zeros(1)}, {"latents": torch.zeros(2, 4, 4, 4), "flip": torch.zeros(5)}):
        for path in files:
            save_file(tensors, path)
        assert equal(encode(base, people, config), first)
    for path in files:
        path.unlink()
        os.mkfifo(path)
    assert equal(encode(base, people, config), first)
    assert [path.read_bytes() for path in files] == contents


def test_captions_in_batches_equal_one_by_one(base):
    captions = [f"a photo of a {colour} shirt" for colour in ("red", "green", "blue")]
    whole, parts = encode_captions(base, captions), encode_captions(base, captions, batch_size=1)
    assert all(torch.allclose(whole[name], parts[name], atol=1e-6) for name in whole)


def test_the_trigger_takes_its_place_in_captions(base, tmp_path):
    copy = write_people(tmp_path / "people", subjects=1, each=1)
    (copy / "person-0" / "metadata.jsonl").unlink()
    config = personal_config(instance_prompt="a photo of {trigger}", random_flip=False)
    with pytest.raises(ConfigError, match="expected a trigger"):
        encode(base, copy, config)
    text = encode(base, copy, replace(config, trigger="a red shirt")).text
    assert torch.equal(text["sequence"], encode_captions(base, ["a photo of a red shirt"])["sequence"])


def test_a_photo_that_went_missing_is_skipped_like_a_broken_one(base, tmp_path):
    """Bug: a link to nothing, or a photo that was moved meanwhile, ended a run that skips broken photos."""
    people = read_subjects(write_people(tmp_path / "people", subjects=2, each=3))
    (tmp_path / "people" / "person-0" / "1.png").unlink()
    (tmp_path / "people" / "person-1" / "0.png").write_bytes(b"no image")
    for views in (2, 0):
        with pytest.warns(UserWarning, match=r"skipped 2 of 6 images: .*found no file .*1\.png.*0\.png"):
            examples = encode_subjects(base, people, personal_config(), views, progress=False, skip_unreadable=True)
        assert examples.subject.bincount().tolist() == [2 * max(views, 1)] * 2 if views else [2, 2]


@pytest.mark.parametrize("views", [1, 0])
def test_a_group_photo_comes_with_a_hint(base, tmp_path, views):
    """Bug: of a wide photo of several people, crops anywhere were trained on, and nothing spoke of --face_crop."""
    wide = read_subjects(write_people(tmp_path / "wide", 1, 2, sizes=[(48, 20), (20, 20)]))
    with pytest.warns(UserWarning, match=r"at most 42% of .*0\.png \(1 photo\(s\).*face_crop.*aspect_ratio_buckets"):
        encode_subjects(base, wide, personal_config(), views, progress=False)
    near = read_subjects(write_people(tmp_path / "near", 1, 2, sizes=[(20, 24), (28, 20)]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encode_subjects(base, near, personal_config(), views, progress=False)
        fitting = personal_config(aspect_ratio_buckets="16,16;16,32")
        encode_subjects(base, wide, fitting, views, progress=False)


def test_overflow_is_named_and_never_kept(base, people, tmp_path):
    """Bug: NaN of a VAE in float16 was cached, and later runs in any precision were told to lower the learning rate."""
    config = personal_config(cache_dir=str(tmp_path))
    with torch.no_grad():
        weight = next(base.pipeline.vae.parameters())
        kept = weight.clone()
        weight.mul_(float("inf"))
    for views in (2, 0):
        with pytest.raises(TrainingError, match="the VAE, found NaN or infinity in torch"):
            encode(base, people, config, views).batch(torch.tensor([0]))
    with torch.no_grad():
        weight.copy_(kept)
        next(base.pipeline.text_encoder_2.parameters()).mul_(float("inf"))
    with pytest.raises(TrainingError, match="a text encoder, found NaN"):
        encode_captions(base, CAPTIONS, cache_dir=str(tmp_path))
    for path in tmp_path.rglob("*.safetensors"):
        assert all(torch.isfinite(tensor).all() for tensor in load_file(path).values())


def test_numbers_that_an_older_release_kept_are_made_anew(base, people, tmp_path):
    """Bug: a cache that held NaN poisoned every run that found it."""
    config = personal_config(cache_dir=str(tmp_path))
    first = encode(base, people, config)
    for path in list(tmp_path.rglob("*.safetensors")):
        tensors = {
            name: tensor * float("nan") if tensor.is_floating_point() else tensor
            for name, tensor in load_file(path).items()
        }
        save_file(tensors, path)
    assert equal(encode(base, people, config), first)
    assert equal(encode(base, people, config), first)
