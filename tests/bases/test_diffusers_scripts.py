# SPDX-License-Identifier: Apache-2.0
"""The loss of a batch is the one of diffusers' own training scripts, written here as they compute it.

The scripts are examples/dreambooth/train_dreambooth_lora_flux.py and train_dreambooth_lora_sdxl.py of diffusers; the
functions that they take from the library are taken from it here too.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, FluxPipeline
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3

from peft_metalora.bases import base_for
from pipelines_tiny import tiny_flux_pipeline, tiny_sdxl_pipeline

PROMPTS = ["a photo of a person , smiling", "a red shirt", "a photo", "a person"]


def batch(base):
    generator = torch.Generator().manual_seed(0)
    latents = base.encode_images(torch.rand(len(PROMPTS), 3, 16, 24, generator=generator) * 2 - 1)
    return latents, base.encode_text(PROMPTS), torch.randn(latents.shape, generator=generator)


@pytest.mark.parametrize("weighting_scheme", ["logit_normal", "none"])
@pytest.mark.parametrize("guidance_embeds", [False, True], ids=["schnell", "dev"])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flux1(weighting_scheme, guidance_embeds, shift):
    pipe = tiny_flux_pipeline(guidance_embeds=guidance_embeds)
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, shift=shift)
    base = base_for(pipe, weighting_scheme=weighting_scheme)
    model_input, _, noise = batch(base)
    bsz, channels, height, width = model_input.shape
    scheduler = copy.deepcopy(pipe.scheduler)
    prompt_embeds, pooled_prompt_embeds, text_ids = pipe.encode_prompt(PROMPTS, max_sequence_length=16)

    u = compute_density_for_timestep_sampling(
        weighting_scheme=weighting_scheme,
        batch_size=bsz,
        logit_mean=0.0,
        logit_std=1.0,
        mode_scale=1.29,
        generator=torch.Generator().manual_seed(5),
    )
    indices = (u * scheduler.config.num_train_timesteps).long()
    timesteps = scheduler.timesteps[indices]
    sigmas = scheduler.sigmas[indices].view(-1, 1, 1, 1)
    noisy_model_input = (1.0 - sigmas) * model_input + sigmas * noise
    vae_scale_factor = 2 ** (len(pipe.vae.config.block_out_channels) - 1)
    guidance = torch.tensor([1.0]).expand(bsz) if guidance_embeds else None
    with torch.no_grad():
        model_pred = pipe.transformer(
            hidden_states=FluxPipeline._pack_latents(noisy_model_input, bsz, channels, height, width),
            timestep=timesteps / 1000,
            guidance=guidance,
            pooled_projections=pooled_prompt_embeds,
            encoder_hidden_states=prompt_embeds,
            txt_ids=text_ids,
            img_ids=FluxPipeline._prepare_latent_image_ids(bsz, height // 2, width // 2, "cpu", torch.float32),
            return_dict=False,
        )[0]
        ours = base.loss(model_input, base.encode_text(PROMPTS), noise, sigmas.flatten())
    model_pred = FluxPipeline._unpack_latents(
        model_pred, height * vae_scale_factor, width * vae_scale_factor, vae_scale_factor
    )
    weighting = compute_loss_weighting_for_sd3(weighting_scheme=weighting_scheme, sigmas=sigmas)
    target = noise - model_input
    loss = torch.mean((weighting.float() * (model_pred.float() - target.float()) ** 2).reshape(bsz, -1), 1).mean()
    assert torch.allclose(ours.mean(), loss, rtol=1e-5)

    # The same noise levels are drawn: the script counts them from the noisy end, in steps of a thousandth.
    drawn = base.sample_times(model_input, torch.Generator().manual_seed(5))
    from_the_other_end = scheduler.sigmas[((1 - u) * scheduler.config.num_train_timesteps).long()]
    assert torch.allclose(drawn, from_the_other_end, atol=shift * 1.5e-3)


def test_sdxl():
    pipe = tiny_sdxl_pipeline()
    base = base_for(pipe)
    model_input, text, noise = batch(base)
    noise_scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    timesteps = torch.randint(
        0, noise_scheduler.config.num_train_timesteps, (len(PROMPTS),), generator=torch.Generator().manual_seed(5)
    )
    prompt_embeds, _, pooled_prompt_embeds, _ = pipe.encode_prompt(PROMPTS, do_classifier_free_guidance=False)
    original_size, crop_top_left, target_size = (16, 24), (0, 0), (16, 24)
    add_time_ids = torch.tensor([list(original_size + crop_top_left + target_size)] * len(PROMPTS))
    with torch.no_grad():
        model_pred = pipe.unet(
            noise_scheduler.add_noise(model_input, noise, timesteps),
            timesteps,
            prompt_embeds,
            added_cond_kwargs={"time_ids": add_time_ids, "text_embeds": pooled_prompt_embeds},
            return_dict=False,
        )[0]
        ours = base.loss(model_input, text, noise, timesteps)
    loss = F.mse_loss(model_pred.float(), noise.float(), reduction="mean")
    assert torch.allclose(ours.mean(), loss, rtol=1e-5)
