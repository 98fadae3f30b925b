# SPDX-License-Identifier: Apache-2.0
"""diffusers' own ways to save and publish never take a person along, and a fused person becomes a plain pipeline."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from peft.functional import set_adapter
from safetensors.torch import load_file

from artefacts_tiny import write_subjects
from families_tiny import picture
from peft_metalora import enable_meta_lora, errors
from peft_metalora.tuner.on_model import meta_layers
from pipelines_tiny import tiny_flux_pipeline

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    """A Down and two subjects in a folder, and the image of each and of the base."""
    folder, pipe = tmp_path_factory.mktemp("people"), tiny_flux_pipeline()
    images = {None: picture(pipe, "flux", (0,))}
    write_subjects(folder, pipe.transformer, "ann", "bob", lora_alpha=16, target_modules=["to_q", "to_v", "proj_out"])
    for name in ("ann", "bob"):
        set_adapter(pipe.transformer, name)
        images[name] = picture(pipe, "flux", (0,))
    return folder, images


@pytest.fixture
def pipe():
    return enable_meta_lora(tiny_flux_pipeline())


def near(pipe, image):
    return np.abs(picture(pipe, "flux", (0,)) - image).max() < TOLERANCE


def loaded(pipe, folder, how):
    match how:
        case "a subject":
            pipe.load_meta_lora(folder / "ann")
        case "a Down":
            pipe.load_meta_lora(folder / "faces")
        case _:
            pipe.add_subject(folder / "ann")
    return pipe


@pytest.mark.parametrize("how", ["a subject", "a Down", "add_subject"])
def test_a_pipeline_with_a_person_is_not_saved_whole(people, pipe, tmp_path, how):
    """Bug: `save_pretrained` wrote the person's tensors into the base model's files, which nobody could load."""
    loaded(pipe, people[0], how)
    with pytest.raises(errors.AdapterStateError, match=r"Use save_meta_lora.*unload_meta_lora\(keep_fused=True\)"):
        pipe.save_pretrained(tmp_path / "all")
    assert not (tmp_path / "all").exists()
    with pytest.raises(errors.AdapterStateError, match="save_meta_lora"):
        pipe.transformer.save_pretrained(tmp_path / "model")
    with pytest.raises(errors.AdapterStateError, match="save_meta_lora"):
        FluxPipeline.from_pipe(pipe).save_pretrained(tmp_path / "shared")
    assert not [*tmp_path.rglob("transformer/diffusion_pytorch_model*")]
    pipe.unload_meta_lora()
    pipe.save_pretrained(tmp_path / "all")
    pipe.transformer.save_pretrained(tmp_path / "model")
    assert near(FluxPipeline.from_pretrained(tmp_path / "all"), people[1][None])


@pytest.mark.parametrize("what", ["pipeline", "save_pretrained", "shared pipeline", "model"])
def test_a_person_is_not_pushed_with_the_pipeline(people, pipe, tmp_path, monkeypatch, what):
    """Bug: `pipe.push_to_hub` uploaded the person's tensors, publicly."""
    sent = []
    monkeypatch.setattr("diffusers.utils.hub_utils.create_repo", lambda repo, **_: _Repo(repo))
    monkeypatch.setattr("diffusers.pipelines.pipeline_utils.create_repo", lambda repo, **_: _Repo(repo))
    monkeypatch.setattr("diffusers.models.modeling_utils.create_repo", lambda repo, **_: _Repo(repo))
    monkeypatch.setattr("diffusers.utils.hub_utils.upload_folder", lambda **given: sent.append(given))
    pipe.load_meta_lora(people[0] / "ann")
    with pytest.raises(errors.AdapterStateError, match="push_subject"):
        match what:
            case "pipeline":
                pipe.push_to_hub("ann/everything")
            case "save_pretrained":
                pipe.save_pretrained(str(tmp_path / "all"), push_to_hub=True)
            case "shared pipeline":
                FluxPipeline.from_pipe(pipe).push_to_hub("ann/everything")
            case _:
                pipe.transformer.push_to_hub("ann/everything")
    assert not sent


class _Repo:
    def __init__(self, repo):
        self.repo_id = repo


@pytest.mark.parametrize("verb", ["unload_meta_lora", "unload_lora_weights"])
def test_a_fused_person_becomes_a_plain_pipeline(people, pipe, tmp_path, verb):
    """Bug: there was no road from a fused person to a pipeline that stock diffusers loads."""
    folder, images = people
    pipe.load_meta_lora(folder / "bob")
    pipe.load_meta_lora(folder / "ann")
    keys = tiny_flux_pipeline().transformer.state_dict().keys()
    pipe.fuse_meta_lora()
    if verb == "unload_meta_lora":
        pipe.unload_meta_lora(keep_fused=True)
    else:
        pipe.unload_lora_weights()  # diffusers' way
    assert not meta_layers(pipe.transformer) and pipe.get_list_adapters() == {}
    assert pipe.transformer.state_dict().keys() == keys
    assert near(pipe, images["ann"])
    pipe.save_pretrained(tmp_path / "plain")
    again = FluxPipeline.from_pretrained(tmp_path / "plain")
    again.set_progress_bar_config(disable=True)
    assert near(again, images["ann"])
    written = load_file(tmp_path / "plain" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert written.keys() == keys


def test_nothing_fused_cannot_be_kept(people, pipe):
    """Bug: as above; the road must not throw a person away who was never fused."""
    pipe.load_meta_lora(people[0] / "ann")
    with pytest.raises(errors.AdapterStateError, match="fuse_meta_lora first"):
        pipe.unload_meta_lora(keep_fused=True)
    assert near(pipe, people[1]["ann"])
    pipe.fuse_meta_lora()
    pipe.unload_meta_lora()
    assert near(pipe, people[1][None]), "by default all is as it was"


def test_models_save_as_before_once_others_took_the_person_off(people, pipe, tmp_path):
    """Bug: as above; what refuses to save must not outlive the person."""
    pipe.load_meta_lora(people[0] / "ann")
    pipe.transformer.unload_lora()
    pipe.transformer.save_pretrained(tmp_path / "model")
    assert not any("metalora" in key for key in load_file(tmp_path / "model/diffusion_pytorch_model.safetensors"))
    assert torch.equal(
        load_file(tmp_path / "model/diffusion_pytorch_model.safetensors")["proj_out.weight"],
        tiny_flux_pipeline().transformer.proj_out.weight,
    )
