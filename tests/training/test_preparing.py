# SPDX-License-Identifier: Apache-2.0
"""The parts of a base are loaded in turn, and none before all that can be refused has been."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch

from peft_metalora.bases.parts import Parts, is_hull
from peft_metalora.cli import main
from peft_metalora.data import read_subjects
from peft_metalora.errors import BaseModelMismatchError, ConfigError, NoCaptionError, UnreadableImageError
from peft_metalora.training.engine.processes import ALONE
from peft_metalora.training.personalize import personalize
from peft_metalora.training.preparing import prepare
from peft_metalora.training.stage_2 import Personalization
from pipelines_tiny import save_tiny_flux
from training_tiny import meta_config, personal_config, write_people


def test_never_all_of_a_base_is_loaded_at_once(place, tmp_path, monkeypatch):
    """Bug: text encoders, VAE and denoiser were held together, 46 GiB of FLUX.1-dev, from the first moment on."""
    together = []
    bring = Parts.bring

    def watch(self, pipeline, names, *device):
        bring(self, pipeline, names, *device)
        parts = pipeline.components.items()
        together.append({name for name, part in parts if isinstance(part, torch.nn.Module) and not is_hull(part)})

    monkeypatch.setattr(Parts, "bring", watch)
    settings = {"pretrained_model_name_or_path": str(place / "base"), "output_dir": str(tmp_path)}
    subjects = read_subjects(place / "people")
    config = personal_config(**settings, weighting_scheme="none", shift=4.0)
    base, _, _, _ = prepare(config, subjects, torch.device("cpu"), ALONE, None, progress=False)
    assert {"vae", "text_encoder", "text_encoder_2"} in together and {"transformer"} in together
    assert not any(len(parts) > 3 for parts in together)
    assert not is_hull(base.denoiser)
    assert (base.weighting_scheme, base.shift) == ("none", 4.0)


class TestRefusedBeforeTheBaseIsLoaded:
    @pytest.fixture(autouse=True)
    def nothing_is_loaded(self, monkeypatch):
        monkeypatch.setattr(Parts, "bring", lambda *_: pytest.fail("weights are loaded"))

    def run(self, place, tmp_path, **changes):
        settings = {
            "pretrained_model_name_or_path": str(place / "base"),
            "instance_data_dir": str(place / "people" / "person-0"),
            "down": str(place / "down"),
            "output_dir": str(tmp_path / "out"),
        }
        personalize(personal_config(**{**settings, **changes}), progress=False)

    def test_a_missing_caption(self, place, tmp_path):
        people = write_people(tmp_path / "people", subjects=1)
        (people / "person-0" / "metadata.jsonl").unlink()
        with pytest.raises(NoCaptionError, match="expected a caption"):
            self.run(place, tmp_path, instance_data_dir=str(people / "person-0"))

    def test_a_photo_that_is_none(self, place, tmp_path):
        photo = tmp_path / "ann.png"
        photo.write_bytes(b"no image")
        with pytest.raises(UnreadableImageError, match=r"ann\.png"):
            self.run(place, tmp_path, instance_data_dir=str(photo), instance_prompt="a photo")

    def test_a_down_of_another_base(self, place, tmp_path):
        save_tiny_flux(tmp_path / "other", attention_head_dim=16)
        with pytest.raises(BaseModelMismatchError, match="expected a base model"):
            self.run(place, tmp_path, pretrained_model_name_or_path=str(tmp_path / "other"))

    def test_a_shift_that_is_none(self, place, tmp_path):
        with pytest.raises(ConfigError, match="shift must be above 0, found 0"):
            self.run(place, tmp_path, shift=0.0)

    def test_a_resolution_that_does_not_fit(self, place, tmp_path):
        with pytest.raises(ConfigError, match="multiple of 8"):
            self.run(place, tmp_path, resolution=20)


def test_a_run_without_enough_memory_leaves_nothing(place, tmp_path, monkeypatch, capsys):
    def full(self):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8 GiB.")

    monkeypatch.setattr(Personalization, "_loss", full)
    arguments = [
        "--pretrained_model_name_or_path",
        place / "base",
        "--instance_data_dir",
        place / "people" / "person-0",
    ]
    arguments += ["--down", place / "down", "--output_dir", tmp_path / "out", "--resolution", 16, "--device", "cpu"]
    assert main(["personalize", "--device", "cpu", *map(str, arguments)]) == 2
    assert "expected enough memory, found: CUDA out of memory" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_called_like_a_repository_is_refused_with_the_way_out(place, tmp_path, monkeypatch):
    """Bug: a Down of a repository was refused on a folder `models/mine` of the working directory as on any other
    repository, and the message did not say how a folder is written that is none."""
    monkeypatch.chdir(tmp_path)
    for name in ("base", "down"):
        shutil.copytree(place / name, tmp_path / {"base": "models/mine"}.get(name, name))
    values = json.loads((tmp_path / "down" / "adapter_config.json").read_text())
    (tmp_path / "down" / "adapter_config.json").write_text(json.dumps(values | {"base_model_name_or_path": "a/raw"}))
    photo = str(place / "people" / "person-0" / "0.png")
    settings = {"instance_data_dir": photo, "down": "down", "output_dir": "ann"}
    told = r"expected the base model a/raw, found models/mine\. .* no copy of that repository, write \./models/mine\."
    with pytest.raises(BaseModelMismatchError, match=told):
        personalize(personal_config(**settings, pretrained_model_name_or_path="models/mine"), progress=False)
    personalize(personal_config(**settings, pretrained_model_name_or_path="./models/mine"), progress=False)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"revision": "../x"}, r"revision must be a branch, a tag or a commit, found '\.\./x'"),
        ({"revision": ""}, "revision must be .* found ''"),
        ({"down_revision": "a b"}, "down_revision must be .* found 'a b'"),
        ({"instance_prompt": "x" * 300_000}, "instance_prompt must be of at most 20000 characters, .* found 300002"),
        ({"domain": "x" * 300_000}, "domain must be of at most 20000 characters"),
        ({"fits": [f"a/b{number}" for number in range(20_000)]}, "fits must be of at most 20000 characters"),
    ],
)
def test_what_could_not_be_saved_is_refused_with_the_settings(changes, told):
    """Bug: with a base and a Down in folders a revision is asked of nobody, and a prompt may be of any length: both
    were refused as the result was saved, after all steps, and it was lost."""
    with pytest.raises(ConfigError, match=told):
        (meta_config if changes.keys() & {"domain", "fits"} else personal_config)(**changes)


@pytest.mark.parametrize(
    ("make", "settings", "told"),
    [
        (meta_config, {"target_modules": "("}, r"found '\(': missing \)"),
        (personal_config, {"target_modules": "to_q(", "method": "lora"}, r"found 'to_q\(': missing \)"),
        (meta_config, {"target_modules": " , "}, "found ' , ': no name"),
        (personal_config, {"target_modules": "to_q"}, "belongs to method 'lora': .* those of the Down"),
    ],
)
def test_modules_that_cannot_be_named_are_refused_with_the_settings(make, settings, told):
    """Bugs: Python's own error of an expression, once the weights were there; and beside a Down, which has its modules,
    those that were named were passed over in silence."""
    with pytest.raises(ConfigError, match=f"target_modules .*{told}"):
        make(**settings)


@pytest.mark.parametrize(("modules", "told"), [("no_such", "no_such"), (".*", "not supported")])
def test_a_plain_lora_on_modules_that_are_none_is_refused_as_ours(place, tmp_path, modules, told):
    """Bug: PEFT's own errors."""
    photo = str(place / "people" / "person-0" / "0.png")
    settings = {"pretrained_model_name_or_path": str(place / "base"), "instance_data_dir": photo, "method": "lora"}
    config = personal_config(**settings, output_dir=str(tmp_path / "ann"), target_modules=modules)
    with pytest.raises(ConfigError, match=f"expected target_modules that can be adapted, found: .*{told}"):
        personalize(config, progress=False)
    assert not (tmp_path / "ann").exists()


def test_a_trigger_that_no_caption_holds_is_told(place, tmp_path, recwarn):
    """Bug: nothing was said, and the person was learned by other words than the one that somebody then drew with."""
    photo = place / "people" / "person-0" / "0.png"
    own = tmp_path / "0.png"
    shutil.copy(photo, own)  # without its caption
    settings = {"pretrained_model_name_or_path": str(place / "base"), "down": str(place / "down"), "trigger": "sks"}
    config = personal_config(**settings, output_dir=str(tmp_path / "out"), instance_prompt="a {trigger} person")
    told = r"trigger 'sks' stands in no caption, .* write \{trigger\} into the captions, or into instance_prompt"
    with pytest.warns(UserWarning, match=told):
        personalize(replace(config, instance_data_dir=str(photo)), progress=False)
    recwarn.clear()
    for prompt in (config.instance_prompt, "a sks person"):
        personalize(replace(config, instance_data_dir=str(own), instance_prompt=prompt), progress=False)
    assert not [one for one in recwarn if "stands in no caption" in str(one.message)]
