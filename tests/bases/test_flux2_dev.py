# SPDX-License-Identifier: Apache-2.0
"""FLUX.2 dev: klein's transformer with guidance and another text encoder; loss, both stages, commands from disk."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import Flux2Pipeline

from from_photos import from_photos_to_pictures
from peft_metalora.bases import base_for, open_base
from peft_metalora.cli import main
from pipelines_tiny import tiny_flux2_dev_pipeline

PROMPTS = ["a photo of a person", "a red shirt"]


def test_the_loss_is_that_of_diffusers_script():
    """examples/dreambooth/train_dreambooth_lora_flux2.py at guidance 1, as it is for a distilled FLUX."""
    pipe = tiny_flux2_dev_pipeline()
    base = base_for(pipe)
    pixels = torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found, text, sigmas = base.encode_images(pixels), base.encode_text(PROMPTS), torch.tensor([0.1, 0.8])
    assert base.max_sequence_length == 512 and base.default_side == 128 * pipe.vae_scale_factor
    noise = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
    prompt_embeds, text_ids = pipe.encode_prompt(PROMPTS, max_sequence_length=512)
    mean = pipe.vae.bn.running_mean.view(1, -1, 1, 1)
    std = torch.sqrt(pipe.vae.bn.running_var.view(1, -1, 1, 1) + pipe.vae.config.batch_norm_eps)
    with torch.no_grad():
        model_input = (Flux2Pipeline._patchify_latents(pipe.vae.encode(pixels).latent_dist.mode()) - mean) / std
        t = sigmas.view(-1, 1, 1, 1)
        ids = Flux2Pipeline._prepare_latent_ids(model_input)
        model_pred = pipe.transformer(
            hidden_states=Flux2Pipeline._pack_latents((1 - t) * model_input + t * noise),
            timestep=sigmas,
            guidance=torch.ones(2),
            encoder_hidden_states=prompt_embeds,
            txt_ids=text_ids,
            img_ids=ids,
            return_dict=False,
        )[0]
        ours = base.loss(found, text, noise, sigmas)
    model_pred = Flux2Pipeline._unpack_latents_with_ids(model_pred, ids)
    torch.testing.assert_close(found, model_input, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours, (model_pred - (noise - model_input)).square().mean((1, 2, 3)), rtol=1e-4, atol=0)


@pytest.mark.filterwarnings("ignore:.*people. an encoder learns so few by heart")
def test_from_photos_to_pictures(tmp_path):
    """Bug: without torchvision, which text needs none of, a base whose tokenizer is a processor did not open."""
    tiny_flux2_dev_pipeline().save_pretrained(tmp_path / "base")
    index = tmp_path / "base" / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "tokenizer": ["transformers", "PixtralProcessor"]}))
    held = "--quantize", "int8", "--resolution", "32", "--max_sequence_length", "8"
    from_photos_to_pictures(tmp_path, *held)
    assert len(list((tmp_path / "images").iterdir())) == 2
    out = str(tmp_path / "ann.safetensors")
    assert main(["export", "--subject", str(tmp_path / "ann"), "--format", "comfyui", "--output", out]) == 0
    assert type(open_base(tmp_path / "base")).__name__ == "Flux2Dev"
