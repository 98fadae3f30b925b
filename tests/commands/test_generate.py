# SPDX-License-Identifier: Apache-2.0
"""What `metalora generate` draws, refuses before a base is loaded, and calls its files."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from PIL import Image

from artefacts_tiny import write_subjects
from peft_metalora.bases.parts import Parts
from peft_metalora.commands.generate import GenerateConfig, _file_names, generate
from peft_metalora.errors import BaseModelMismatchError, ConfigError, UnreadableImageError
from pipelines_tiny import tiny_flux_pipeline
from training_tiny import teach_to_read


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    """A folder with a tiny base, a Down and Ann."""
    folder = tmp_path_factory.mktemp("generate")
    pipe = tiny_flux_pipeline()
    pipe.save_pretrained(folder / "base")
    return write_subjects(folder, pipe.transformer, "ann", lora_alpha=16, target_modules=["to_q", "to_v"])


def drawn(people, output, **changes):
    """The pictures of a short prompt at 32 px, as numbers."""
    settings = {"pretrained_model_name_or_path": str(people / "base"), "subject": [str(people / "ann")]}
    settings |= {"prompt": ["a red shirt"], "num_inference_steps": 2, "resolution": 32, "device": "cpu"}
    files = generate(GenerateConfig(**{**settings, "output_dir": str(output), **changes}), progress=False)
    return np.stack([np.asarray(Image.open(file)) for file in files]).astype(int)


def test_it_draws_the_same_from_weights_that_wait(people, tmp_path):
    pytest.importorskip("torchao")
    there = drawn(people, tmp_path / "there", quantize="int8")
    waiting = drawn(people, tmp_path / "waiting", quantize="int8", offload="model")
    assert np.abs(there - waiting).max() <= 1
    assert np.abs(there - drawn(people, tmp_path / "base", subject=[], quantize="int8")).max() > 1


@pytest.mark.parametrize("offload", ["model", "group"])
def test_a_photo_is_read_wherever_weights_wait(people, tmp_path, offload):
    shutil.copytree(people / "faces", tmp_path / "faces")
    teach_to_read(tmp_path / "faces", spread=4.0)
    Image.new("RGB", (24, 24), "grey").save(tmp_path / "ann.png")
    reading = {"subject": [], "photo": [str(tmp_path / "ann.png")], "down": str(tmp_path / "faces")}
    there = drawn(people, tmp_path / "there", **reading)
    waiting = drawn(people, tmp_path / "waiting", offload=offload, **reading)
    assert np.abs(there - waiting).max() <= 1


def test_what_does_not_fit_is_refused_before_weights_are_read(people, tmp_path, monkeypatch):
    """Bug: a subject of another base, or a photo that is none, was noticed when the whole base had been loaded."""
    monkeypatch.setattr(Parts, "bring", lambda *_: pytest.fail("weights are loaded"))
    other = tiny_flux_pipeline(attention_head_dim=16)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(BaseModelMismatchError, match="expected a base model"):
        drawn(people, tmp_path, pretrained_model_name_or_path=str(tmp_path / "other"))
    with pytest.raises(ConfigError, match="resolution must be a multiple of 8 for this base model, found 30"):
        drawn(people, tmp_path, resolution=30)
    with pytest.raises(ConfigError, match="resolution must be at least 1, found 0"):
        drawn(people, tmp_path, resolution=0)
    with pytest.raises(ConfigError, match="to draw on a CPU: accelerate brings layers to a GPU only"):
        drawn(people, tmp_path, offload="sequential")
    (tmp_path / "ann.png").write_bytes(b"no image")
    with pytest.raises(UnreadableImageError, match=r"ann\.png"):
        drawn(people, tmp_path, subject=[], photo=[str(tmp_path / "ann.png")], down=str(people / "faces"))


def test_what_the_pipeline_refuses_is_said_in_its_words(people, tmp_path):
    """Bug: a ValueError of diffusers came out."""
    with pytest.raises(ConfigError, match=r"expected what a FluxPipeline takes, found: .*max_sequence_length"):
        drawn(people, tmp_path / "out", max_sequence_length=513)
    assert not (tmp_path / "out").exists()


def test_files_of_generated_images_have_names_of_their_own() -> None:
    """Bug: of the subjects a_2, x/a and y/a the last overwrote the images of the first."""
    for subjects in (["a_2", "x/a", "y/a"], ["x/Ann", "y/ann"], ["x/..", "y/.."], ["a b", "a:b", "a_b"]):
        names = _file_names(subjects)
        assert len({name.casefold() for name in names}) == len(subjects)
        assert all("/" not in name and not name.startswith(".") for name in names)
