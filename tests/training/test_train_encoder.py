# SPDX-License-Identifier: Apache-2.0
"""A Down learns to read photos, from folder to folder, and a person is read with it."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from PIL import Image

from peft_metalora import MetaLoraConfig, load_down, save_down
from peft_metalora.cli import main
from peft_metalora.data import read_subjects
from peft_metalora.data.degrade import DEGRADATIONS, make_worse
from peft_metalora.encoder import EncoderConfig, make_encoder
from peft_metalora.errors import ConfigError, TooFewImagesError
from peft_metalora.metrics import Embeddings
from peft_metalora.training.examples.batches import Examples
from peft_metalora.training.examples.reading import read_photos
from peft_metalora.training.stage_settings import TrainEncoderConfig
from peft_metalora.training.train_encoder import train_encoder
from pipelines_tiny import save_tiny_flux, tiny_flux_pipeline
from training_tiny import write_people


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base and a Down on disk."""
    home = tmp_path_factory.mktemp("encoder")
    save_tiny_flux(home / "base")
    pipe = tiny_flux_pipeline()
    torch.manual_seed(0)
    config = MetaLoraConfig(r=2, meta_r=4, lora_alpha=2, target_modules=["to_q", "to_v"], init_weights=False)
    pipe.transformer.add_adapter(config, "faces")
    save_down(home / "down", pipe.transformer, "faces", base_model=str(home / "base"))
    write_people(home / "people", subjects=3, each=2)
    return home


def config_of(home, output, **changes):
    settings = {
        "down": str(home / "down"),
        "train_data_dir": str(home / "people"),
        "output_dir": str(output),
        "resolution": 16,
        "code_size": 6,
        "encoder_width": 8,
        "encoder_hidden": 16,
        "max_train_steps": 3,
        "subjects_per_batch": 2,
        "images_per_subject": 1,
        "lr_warmup_steps": 1,
        "device": "cpu",
    }
    return TrainEncoderConfig(**{**settings, **changes})


def test_a_person_is_read_with_a_down_that_learned_to(folders, tmp_path, capsys):
    output = tmp_path / "reading"
    with pytest.warns(UserWarning, match="3 people"):
        assert train_encoder(config_of(folders, output), progress=False) == output
    down = load_down(output)
    assert down.fingerprint == load_down(folders / "down").fingerprint
    assert down.config.facts["encoder_subjects"] == 3 and down.config.facts["encoder_steps"] == 3
    photo = next((folders / "people" / "person-0").glob("*.png"))
    arguments = ["read", "--down", str(output), "--photos", str(photo), "--output_dir", str(tmp_path / "ann")]
    assert main([*arguments, "--device", "cpu"]) == 0
    assert "1 photo(s)" in capsys.readouterr().out


def test_equal_seeds_are_equal_readers(folders, tmp_path):
    for name in ("one", "two"):
        with pytest.warns(UserWarning, match="people"):
            train_encoder(config_of(folders, tmp_path / name), progress=False)
    for file in ("subject_space.safetensors", "subject_encoder.safetensors", "encoder_config.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def reads_of(folders, **changes):
    """The subjects, and what a small encoder sees of their photos."""
    subjects = read_subjects(folders / "people")
    encoder = make_encoder(
        EncoderConfig(resolution=16, code_size=6, width=8), lambda pixels: torch.nn.functional.avg_pool2d(pixels, 4)
    )
    examples = Examples(torch.zeros(6, 4, 4, 4), {}, torch.zeros(6), torch.arange(6) // 2, photo=torch.arange(6))
    return read_photos(subjects, examples, encoder, config_of(folders, "unused", **changes), progress=False)


def test_bad_versions_are_read_beside_as_many_good_ones(folders):
    reads = reads_of(folders)
    assert reads.person.bincount().tolist() == [12, 12, 12] and reads.photo.bincount().tolist() == [6] * 6
    assert len(reads.features) == 4 * 6  # each version is kept once
    first = reads.of(torch.arange(6), torch.device("cpu"))
    assert all(torch.equal(row, first[0]) for row in first[:3])
    assert not any(torch.equal(row, first[0]) for row in first[3:])
    assert reads_of(folders, bad_versions=0).photo.tolist() == list(range(6))


def test_what_was_seen_is_found_again_on_disk(folders, tmp_path, monkeypatch):
    cached = {"cache_dir": str(tmp_path / "cache")}
    first = reads_of(folders, **cached)
    monkeypatch.setattr("peft_metalora.training.examples.reading.make_worse", None)
    again = reads_of(folders, **cached)
    assert torch.equal(again.features, first.features) and torch.equal(again.row, first.row)
    with pytest.raises(TypeError):
        reads_of(folders, **cached, seed=1)


def test_bad_versions_without_the_face_are_left_out_and_so_are_photos(folders, monkeypatch):
    subjects = read_subjects(folders / "people")
    corners = [float(np.asarray(photo.load())[0, 0].mean()) for one in subjects for photo in one.photos]
    limit = sorted(corners)[1] + 0.1  # two photos are darker there

    class Bright:
        """Finds a face where a picture's corner is bright."""

        def embed(self, images):
            values = torch.tensor([[float(np.asarray(image)[0, 0].mean()), 1.0] for image in images])
            return Embeddings(values, values[:, 0] > limit)

    monkeypatch.setattr("peft_metalora.encoder.sources.face.InsightFaceEmbedder", Bright)
    examples = Examples(torch.zeros(6, 4, 4, 4), {}, torch.zeros(6), torch.arange(6) // 2, photo=torch.arange(6))
    encoder = make_encoder(EncoderConfig(source="face", code_size=6))
    monkeypatch.setattr(
        "peft_metalora.training.examples.reading.make_worse", lambda image, source: Image.new("RGB", image.size)
    )
    with pytest.warns(UserWarning, match=r"skipped 2 of 6 images: expected a face in .*png, found none"):
        reads = read_photos(subjects, examples, encoder, config_of(folders, "unused", encoder="face"), progress=False)
    # What is left is the good version of each photo that shows a face.
    assert reads.photo.tolist() == [number for number, corner in enumerate(corners) if corner > limit]


def test_worse_photos_are_of_the_same_size_and_differ():
    pixels = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    photo, source = Image.fromarray(pixels), random.Random(0)
    made = [make_worse(photo, source) for _ in range(40)]
    assert all(image.size == photo.size and image.mode == "RGB" for image in made)
    assert len({image.tobytes() for image in made}) > len(DEGRADATIONS)
    dark = make_worse(photo, source, ("low_light",), erasing=False)
    assert np.asarray(dark).mean() < 0.9 * pixels.mean()


def test_what_cannot_be_trained_is_named_and_writes_nothing(folders, tmp_path):
    alone = write_people(tmp_path / "alone", subjects=2, each=1)
    with pytest.warns(UserWarning, match="people"), pytest.raises(TooFewImagesError, match="give more photos"):
        train_encoder(config_of(folders, tmp_path / "out", train_data_dir=str(alone)), progress=False)
    with pytest.warns(UserWarning, match="people"), pytest.raises(ConfigError, match="encoder must be one of"):
        train_encoder(config_of(folders, tmp_path / "out", encoder="eyes"), progress=False)
    with pytest.raises(ConfigError, match="bad_versions"):
        config_of(folders, tmp_path / "out", bad_versions=-1)
    with pytest.raises(ConfigError):
        train_encoder(config_of(folders, folders / "down"), progress=False)
    assert not (tmp_path / "out").exists()
