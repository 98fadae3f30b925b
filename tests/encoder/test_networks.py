# SPDX-License-Identifier: Apache-2.0
"""The encoder: what it makes of photos, what its files hold, and what is refused."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Dinov2Config, Dinov2Model

from peft_metalora.encoder import EncoderConfig, SubjectSpace, load_encoder, make_encoder
from peft_metalora.encoder.sources import make_source
from peft_metalora.encoder.sources.latents import even_exposure
from peft_metalora.errors import (
    ArtefactNotFoundError,
    ConfigError,
    ConfigFormatError,
    EmbedderUnavailableError,
    FingerprintMismatchError,
    MissingKeysError,
    NoFaceError,
    NonFiniteError,
    ShapeMismatchError,
)
from peft_metalora.metrics.embedders import Embeddings

SIZE = 6
CONFIG = EncoderConfig(resolution=32, code_size=SIZE, width=8, hidden=16)


def shrink(pixels):
    """A stand-in for a VAE: (n, 3, h, w) to (n, 3, h / 4, w / 4)."""
    return torch.nn.functional.avg_pool2d(pixels, 4)


def photo(seed=0, size=(32, 32)):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture
def space():
    return SubjectSpace([("x", (3,))], torch.zeros(3), torch.ones(SIZE, 3), "down")


@pytest.fixture
def encoder():
    return make_encoder(CONFIG, shrink)


class TestReading:
    def test_codes_have_one_length(self, encoder):
        codes = torch.stack([encoder.codes([photo(seed)])[0] for seed in range(4)])
        assert codes.shape == (4, SIZE)
        torch.testing.assert_close(codes.norm(dim=1), torch.full((4,), math.sqrt(SIZE)), rtol=1e-3, atol=1e-3)
        assert (codes[0] - codes[1]).abs().max() > 0.01

    def test_photos_together_are_read_as_one_by_one(self, encoder):
        photos = [photo(0), photo(1), photo(2)]
        alone = torch.stack([encoder.codes([one])[0] for one in photos])
        torch.testing.assert_close(encoder.codes(photos), alone, rtol=1e-4, atol=1e-5)

    def test_autocast_does_not_reach_a_code(self, encoder):
        """Bug: who was read inside autocast had another code than the same photo gives outside."""
        calm = encoder.codes([photo()])
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(encoder.codes([photo()]), calm)

    def test_reading_is_the_same_in_training_and_leaves_its_mode(self, encoder):
        calm = encoder.eval().codes([photo()])[0]
        assert torch.equal(encoder.train().codes([photo()])[0], calm)
        assert encoder.training

    def test_photos_of_any_size_are_read_at_the_resolution(self, encoder):
        wide = Image.new("RGB", (64, 32))
        wide.paste(photo(), (16, 0))
        torch.testing.assert_close(encoder.codes([wide])[0], encoder.codes([photo()])[0])

    def test_a_dark_photo_is_the_same_person(self, encoder):
        bright = Image.fromarray((np.array(photo()) * 0.95).astype(np.uint8))
        dark = Image.fromarray((np.array(bright) * 0.3).round().astype(np.uint8))
        near = (encoder.codes([dark])[0] - encoder.codes([bright])[0]).norm()
        assert near < 0.05 * (encoder.codes([photo(1)])[0] - encoder.codes([bright])[0]).norm()

    def test_equal_seeds_are_equal_encoders_and_the_global_state_stays(self):
        torch.manual_seed(3)
        before = torch.get_rng_state()
        first, second = make_encoder(CONFIG, shrink, seed=1), make_encoder(CONFIG, shrink, seed=1)
        assert torch.equal(torch.get_rng_state(), before)
        assert first.fingerprint == second.fingerprint != make_encoder(CONFIG, shrink, seed=2).fingerprint

    def test_what_cannot_be_read_is_named(self, encoder):
        with pytest.raises(ShapeMismatchError, match=r"\(n, 3, 8, 8\)"):
            encoder(torch.zeros(1, 3, 4, 4))
        with torch.no_grad():
            encoder.head[-1].bias[0] = float("nan")
        with pytest.raises(NonFiniteError, match="train the encoder again"):
            encoder.codes([photo()])[0]


def test_dark_photos_are_brought_to_one_exposure():
    pixels = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 0.9
    torch.testing.assert_close(even_exposure(pixels), pixels)
    lifted = even_exposure(pixels * 0.5)
    torch.testing.assert_close(even_exposure(pixels * 0.2), lifted)
    torch.testing.assert_close(lifted.amax(1).flatten(1).quantile(0.99, dim=1), torch.full((2,), 0.95))
    assert even_exposure(torch.zeros(1, 3, 4, 4)).abs().max() == 0


@pytest.mark.parametrize("side", [16, 20, 64])
def test_the_trunk_takes_latents_of_any_side(side):
    config = EncoderConfig(resolution=4 * side, code_size=SIZE, width=8, hidden=16)
    assert make_encoder(config, shrink)(torch.zeros(2, 3, side, side)).shape == (2, SIZE)


class TestSources:
    def test_a_vision_model_of_transformers(self, tmp_path):
        config = Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
        torch.manual_seed(0)
        Dinov2Model(config).save_pretrained(tmp_path / "dino")
        encoder = make_encoder(EncoderConfig(source=f"transformers:{tmp_path / 'dino'}", code_size=SIZE))
        assert encoder.source.feature_shape == (16,)
        codes = [encoder.codes([photo(seed)])[0] for seed in (0, 1)]
        assert (codes[0] - codes[1]).norm() > 1e-3
        assert not any(name.startswith("source") for name in encoder.state_dict())
        with pytest.raises(EmbedderUnavailableError, match="vision model"):
            make_source(f"transformers:{tmp_path / 'none'}", resolution=28)

    def test_a_face_embedder(self):
        encoder = make_encoder(EncoderConfig(source=f"face:{__name__}:faces", code_size=SIZE))
        assert encoder.codes([photo()]).shape == (1, SIZE)
        with pytest.raises(NoFaceError, match="number 2"):
            encoder.codes([photo(), Image.new("RGB", (8, 8))])[0]
        with pytest.raises(ConfigError, match="module:function"):
            make_source("face:no.such:thing", resolution=8)

    def test_what_a_source_lacks_is_named(self):
        with pytest.raises(ConfigError, match="one of latents, transformers, face"):
            EncoderConfig(source="eyes")
        with pytest.raises(ConfigError, match="needs the base's VAE"):
            make_source("latents", resolution=32)
        with pytest.raises(ConfigError, match="at least 4 x 4"):
            make_source("latents", resolution=8, encode_images=shrink)
        with pytest.raises(ConfigError, match="takes nothing after it"):
            make_source("latents:x", resolution=32, encode_images=shrink)
        with pytest.raises(ConfigError, match="needs a model"):
            make_source("transformers", resolution=32)


class Faces:
    """An embedder that sees a face in everything but black."""

    def embed(self, images):
        vectors = torch.stack([torch.tensor(np.array(image)).float().mean((0, 1)) for image in images])
        return Embeddings(torch.nn.functional.normalize(vectors, dim=1), vectors.sum(1) > 0)


def faces():
    return Faces()


class TestFiles:
    def test_an_encoder_comes_back_and_reads_alike(self, tmp_path, space, encoder):
        encoder.save(tmp_path, space)
        found = load_encoder(tmp_path, space, shrink)
        assert torch.equal(found.codes([photo()])[0], encoder.codes([photo()])[0])
        assert found.config == CONFIG and not found.training
        assert not any(parameter.requires_grad for parameter in found.parameters())

    def test_no_file_starts_code_by_itself(self, tmp_path, space):
        """Bug: an encoder_config.json of anybody named a module and a function, and reading called it."""
        made = make_encoder(EncoderConfig(source=f"face:{__name__}:faces", code_size=SIZE), None)
        made.save(tmp_path, space)
        for given in (None, f"{__name__}:photo"):
            with pytest.raises(ConfigError, match=f"face_model='{__name__}:faces'.*if you trust it"):
                load_encoder(tmp_path, space, face_model=given)
        found = load_encoder(tmp_path, space, face_model=f"{__name__}:faces")
        assert torch.equal(found.codes([photo()])[0], made.codes([photo()])[0])

    def test_an_encoder_of_another_space_is_refused(self, tmp_path, space, encoder):
        encoder.save(tmp_path, space)
        other = SubjectSpace([("x", (3,))], torch.ones(3), torch.ones(SIZE, 3), "down")
        with pytest.raises(FingerprintMismatchError, match="expected an encoder of the space"):
            load_encoder(tmp_path, other, shrink)

    def test_codes_of_another_size_are_refused_before_anything_is_written(self, tmp_path, encoder):
        other = SubjectSpace([("x", (3,))], torch.ones(3), torch.ones(SIZE + 1, 3), "down")
        with pytest.raises(ConfigError, match=rf"codes \({SIZE + 1},\)"):
            encoder.save(tmp_path, other)
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize(
        ("field", "value", "error", "text"),
        [
            ("width", "8", ConfigFormatError, "width as int"),
            ("width", True, ConfigFormatError, "width as int"),
            ("width", 12, ConfigFormatError, "multiple of 8"),
            ("width", 2**70, ConfigFormatError, "width must be from 1 to 4096"),
            ("width", 4096, ShapeMismatchError, "of shape"),
            ("hidden", 2**40, ConfigFormatError, "hidden must be from 1"),
            ("resolution", 10**6, ConfigFormatError, "resolution must be from 1"),
            ("dropout", [0] * 10_000, ConfigFormatError, r"found '\[[0, ]{59}'\."),
            ("source", "eyes", ConfigFormatError, "encoder must be one of"),
            ("format_version", 2, ConfigFormatError, "format_version 1"),
            ("hidden", 24, ShapeMismatchError, "expected head"),
            ("code_size", SIZE + 1, ShapeMismatchError, "codes of 6 numbers"),
            ("face_align", 1, ConfigFormatError, "face_align as bool"),
            ("face_margin", -1, ConfigFormatError, "face_margin must be 0 or more"),
            ("dropout", 0.5, FingerprintMismatchError, "expected the encoder"),
        ],
    )
    def test_a_changed_configuration_is_one_clear_error(self, tmp_path, space, encoder, field, value, error, text):
        encoder.save(tmp_path, space)
        path = tmp_path / "encoder_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
        with pytest.raises(error, match=text):
            load_encoder(tmp_path, space, shrink)

    def test_weights_may_be_kept_in_half_precision(self, tmp_path, space, encoder):
        encoder.save(tmp_path / "whole", space)
        codes = encoder.codes([photo(0), photo(1)])
        rounded = encoder.half().fingerprint
        encoder.save(tmp_path / "half", space)
        whole, half = (load_encoder(tmp_path / kind, space, shrink) for kind in ("whole", "half"))
        assert half.fingerprint == rounded != whole.fingerprint
        read = half.codes([photo(0), photo(1)])
        assert read.dtype == torch.float32 and not torch.equal(read, codes)
        torch.testing.assert_close(read, codes, atol=0.02, rtol=0)

    def test_changed_weights_are_refused(self, tmp_path, space, encoder):
        encoder.save(tmp_path, space)
        other = make_encoder(CONFIG, shrink, seed=9)
        other.save(tmp_path / "other", space)
        (tmp_path / "other" / "subject_encoder.safetensors").replace(tmp_path / "subject_encoder.safetensors")
        with pytest.raises(FingerprintMismatchError, match="in subject_encoder"):
            load_encoder(tmp_path, space, shrink)
        small = make_encoder(EncoderConfig(resolution=16, code_size=SIZE, width=8, hidden=16), shrink)
        small.save(tmp_path / "small", space)
        (tmp_path / "small" / "subject_encoder.safetensors").replace(tmp_path / "subject_encoder.safetensors")
        with pytest.raises(MissingKeysError, match="difference in"):
            load_encoder(tmp_path, space, shrink)

    def test_there_is_none(self, tmp_path, space):
        with pytest.raises(ArtefactNotFoundError, match="encoder_config"):
            load_encoder(tmp_path, space)
