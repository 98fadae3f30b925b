# SPDX-License-Identifier: Apache-2.0
"""A class of somebody's own for a base: the worked example is the family that it repeats; misfits are refused."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch

from peft_metalora.bases import FAMILIES, base_for, open_base
from peft_metalora.bases.generic import base_class
from peft_metalora.bases.parts import Parts
from peft_metalora.bases.z_image import ZImage
from peft_metalora.errors import BaseModelMismatchError, ConfigError, TrainingError
from pipelines_tiny import tiny_flux_pipeline, tiny_z_image_pipeline

EXAMPLE = f"{Path(__file__).parents[2] / 'examples' / 'z_image_base.py'}:ZImage"
PROMPTS = ["a photo of a person , smiling", "a red shirt"]


class Whatever(ZImage):
    """For the tests to change."""


def test_the_worked_example_is_the_family_that_it_repeats(monkeypatch):
    pipe = tiny_z_image_pipeline()
    family = base_for(pipe)
    monkeypatch.delitem(FAMILIES, "ZImagePipeline")
    with pytest.raises(BaseModelMismatchError, match=r"found ZImagePipeline: .* class of your own for it as `gen"):
        base_for(pipe)
    own = base_for(pipe, generic=EXAMPLE)
    assert type(own).__module__ == "z_image_base" and own.pixel_multiple == family.pixel_multiple
    latents = own.encode_images(torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1))
    times = own.sample_times(latents, torch.Generator().manual_seed(2))
    assert torch.equal(times, family.sample_times(latents, torch.Generator().manual_seed(2)))
    found, wanted = (one.loss(latents, one.encode_text(PROMPTS), noise, times) for one in (own, family))
    assert torch.equal(found, wanted) and wanted[0] != wanted[1]
    names = [name for name, _ in pipe.transformer.named_modules()]
    adapted, ours = ({name for name in names if re.fullmatch(one.target_modules, name)} for one in (own, family))
    assert adapted == ours


NAMES = {
    "nobody_such:Base": "found 'nobody_such:Base': ModuleNotFoundError: No module named 'nobody_such'",
    "json:Such": "AttributeError: module 'json' has no attribute 'Such'",
    "json": "module:Class or file.py:Class, found 'json'",
    "{home}/nowhere.py:Such": "FileNotFoundError: .*nowhere.py'",
    "{home}/broken.py:Such": "SyntaxError: .*broken.py, line 1",
    "json:JSONDecoder": "^generic must be a subclass of FlowBase, DiffusionBase or Base of peft_metalora.bases, found",
    "json:dumps": "found 'json:dumps', which is none",
    "peft_metalora.bases:FlowBase": "without pipeline_class, predict, target_modules, text_of: add that to it",
}


@pytest.mark.parametrize("name", NAMES)
def test_a_name_without_a_class_is_refused_before_a_file_of_the_base_is_read(name, tmp_path, monkeypatch):
    monkeypatch.setattr(Parts, "pipeline", lambda *_: pytest.fail("a base is opened"))
    (tmp_path / "broken.py").write_text("class Such(:")
    with pytest.raises(ConfigError, match=NAMES[name]):
        open_base(tmp_path / "base", generic=name.format(home=tmp_path))


MISFITS = {
    "denoiser_name": ("unet", "a model 'unet', as Whatever has it, found a ZImagePipeline without"),
    "target_modules": (
        "blocks.*",
        "the ZImageTransformer2DModel that target_modules of Whatever names, found none for",
    ),
    "pipeline_class": ("KreaPipeline", "a KreaPipeline, which Whatever is for, found a ZImagePipeline: give the class"),
    "regular expression": ("to_(q", "a regular expression as target_modules of Whatever, found 'to_.q': missing"),
}


@pytest.mark.parametrize("what", MISFITS)
def test_a_class_that_does_not_fit_its_pipeline_is_refused_before_weights_are_read(what, tmp_path, monkeypatch):
    value, message = MISFITS[what]
    monkeypatch.setattr(Whatever, what if hasattr(ZImage, what) else "target_modules", value)
    monkeypatch.setattr(Parts, "bring", lambda *_: pytest.fail("weights are loaded"))
    tiny_z_image_pipeline().save_pretrained(tmp_path)
    with pytest.raises(BaseModelMismatchError, match=message):
        open_base(tmp_path, generic=Whatever)


def test_a_pipeline_without_an_autoencoder_is_refused():
    pipe = tiny_z_image_pipeline()
    pipe.vae = None
    with pytest.raises(BaseModelMismatchError, match="a model 'vae', as Whatever has it"):
        base_for(pipe, generic=Whatever)


def test_a_class_for_another_pipeline_is_refused_and_a_named_one_is_asked_first():
    with pytest.raises(
        BaseModelMismatchError, match="expected a ZImagePipeline, which ZImage is for, found a FluxPipe"
    ):
        base_for(tiny_flux_pipeline(), generic=EXAMPLE)
    assert type(base_for(tiny_z_image_pipeline(), generic=Whatever)) is Whatever


def test_another_shape_than_the_latents_is_refused(monkeypatch):
    """Torch would have made a mean of both: such shapes are brought to one."""
    base = base_for(tiny_z_image_pipeline(), generic=Whatever)
    predict = base.predict
    monkeypatch.setattr(base, "predict", lambda *given: predict(*given).unsqueeze(2))
    latents = torch.zeros(1, 4, 4, 4)
    with pytest.raises(TrainingError, match=r"Whatever.predict to give \(1, 4, 4, 4\), .* found \(1, 4, 1, 4, 4"):
        base.loss(latents, base.encode_text(PROMPTS[:1]), latents, torch.ones(1))


def test_a_pipeline_that_is_newer_than_diffusers_is_refused(tmp_path):
    """Bug: it was a traceback."""
    tiny_z_image_pipeline().save_pretrained(tmp_path)
    index = tmp_path / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "_class_name": "NewPipeline"}))
    with pytest.raises(BaseModelMismatchError, match="the installed diffusers has no NewPipeline, but a newer one may"):
        open_base(tmp_path, generic=Whatever)


def test_a_file_may_hold_dataclasses_and_shadows_no_module(tmp_path):
    """Bug: dataclasses look for their module by its name."""
    (tmp_path / "json.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "from peft_metalora.bases.z_image import ZImage\n@dataclass\nclass Rows:\n    count: int\n"
        "class Own(ZImage):\n    rows = Rows(1)\n"
    )
    assert base_class(f"{tmp_path / 'json.py'}:Own").rows.count == 1
    assert sys.modules["json"] is json


def test_a_file_that_fails_leaves_no_module(tmp_path):
    """Bug: it stayed half made under its name, where dataclasses and pickle looked when it had been corrected."""
    (tmp_path / "half_made.py").write_text("raise ValueError('not yet')")
    with pytest.raises(ConfigError, match="not yet"):
        base_class(f"{tmp_path}/half_made.py:Own")
    assert "half_made" not in sys.modules
