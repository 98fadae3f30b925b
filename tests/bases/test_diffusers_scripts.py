# SPDX-License-Identifier: Apache-2.0
"""The loss of a batch is the one of diffusers' own training scripts, written here as they compute it.

The scripts are examples/dreambooth/train_dreambooth_lora_*.py of diffusers: flux, sdxl, sd3, flux2_klein, z_image,
qwen_image and krea2. The functions that they take from the library are taken from it here too. There is none for SD 1.5
(an older one, of the same loss as SDXL's) and FLUX.3.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, Flux2KleinPipeline, FluxPipeline, Krea2Pipeline, QwenImagePipeline
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3

from peft_metalora.bases import base_for
from pipelines_tiny import PIPELINES, tiny_flux_pipeline, tiny_sdxl_pipeline

PROMPTS = ["a photo of a person , smiling", "a red shirt", "a photo", "a person"]


def photos():
    return torch.rand(len(PROMPTS), 3, 16, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1


def batch(base):
    latents = base.encode_images(photos())
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1))
    return latents, base.encode_text(PROMPTS), noise


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


def sd3(pipe, pixels, noise, sigmas, timesteps):
    prompt_embeds, _, pooled_prompt_embeds, _ = pipe.encode_prompt(
        PROMPTS, None, None, do_classifier_free_guidance=False, max_sequence_length=16
    )
    config = pipe.vae.config
    model_input = (pipe.vae.encode(pixels).latent_dist.mode() - config.shift_factor) * config.scaling_factor
    model_pred = pipe.transformer(
        hidden_states=(1.0 - sigmas) * model_input + sigmas * noise,
        timestep=timesteps,
        encoder_hidden_states=prompt_embeds,
        pooled_projections=pooled_prompt_embeds,
        return_dict=False,
    )[0]
    return model_pred, model_input


def flux2(pipe, pixels, noise, sigmas, timesteps):
    prompt_embeds, text_ids = pipe.encode_prompt(PROMPTS, max_sequence_length=16)
    mean = pipe.vae.bn.running_mean.view(1, -1, 1, 1)
    std = torch.sqrt(pipe.vae.bn.running_var.view(1, -1, 1, 1) + pipe.vae.config.batch_norm_eps)
    model_input = Flux2KleinPipeline._patchify_latents(pipe.vae.encode(pixels).latent_dist.mode())
    model_input = (model_input - mean) / std
    model_input_ids = Flux2KleinPipeline._prepare_latent_ids(model_input)
    model_pred = pipe.transformer(
        hidden_states=Flux2KleinPipeline._pack_latents((1.0 - sigmas) * model_input + sigmas * noise),
        timestep=timesteps / 1000,
        guidance=None,
        encoder_hidden_states=prompt_embeds,
        txt_ids=text_ids,
        img_ids=model_input_ids,
        return_dict=False,
    )[0]
    return Flux2KleinPipeline._unpack_latents_with_ids(model_pred, model_input_ids), model_input


def z_image(pipe, pixels, noise, sigmas, timesteps):
    prompt_embeds, _ = pipe.encode_prompt(PROMPTS, do_classifier_free_guidance=False, max_sequence_length=16)
    config = pipe.vae.config
    model_input = (pipe.vae.encode(pixels).latent_dist.mode() - config.shift_factor) * config.scaling_factor
    noisy_model_input = ((1.0 - sigmas) * model_input + sigmas * noise).unsqueeze(2)
    model_pred = pipe.transformer(
        list(noisy_model_input.unbind(dim=0)), (1000 - timesteps) / 1000, prompt_embeds, return_dict=False
    )[0]
    return -torch.stack(model_pred, dim=0).squeeze(2), model_input


def of_a_video_vae(vae, pixels):
    """Latents (n, c, 1, h, w), as the scripts of Qwen-Image and Krea 2 make them."""
    mean = torch.tensor(vae.config.latents_mean).view(1, vae.config.z_dim, 1, 1, 1)
    inverse_std = 1.0 / torch.tensor(vae.config.latents_std).view(1, vae.config.z_dim, 1, 1, 1)
    return (vae.encode(pixels.unsqueeze(2)).latent_dist.mode() - mean) * inverse_std


def qwen_image(pipe, pixels, noise, sigmas, timesteps):
    prompt_embeds, prompt_embeds_mask = pipe.encode_prompt(PROMPTS, max_sequence_length=16)
    model_input, sigmas = of_a_video_vae(pipe.vae, pixels), sigmas.unsqueeze(2)
    bsz, channels, _, height, width = model_input.shape
    noisy_model_input = (1.0 - sigmas) * model_input + sigmas * noise.unsqueeze(2)
    model_pred = pipe.transformer(
        hidden_states=QwenImagePipeline._pack_latents(
            noisy_model_input.permute(0, 2, 1, 3, 4), bsz, channels, height, width
        ),
        encoder_hidden_states=prompt_embeds,
        encoder_hidden_states_mask=prompt_embeds_mask,
        timestep=timesteps / 1000,
        img_shapes=[(1, height // 2, width // 2)] * bsz,
        return_dict=False,
    )[0]
    factor = 2 ** len(pipe.vae.temperal_downsample)
    model_pred = QwenImagePipeline._unpack_latents(model_pred, height * factor, width * factor, factor)
    return model_pred.squeeze(2), model_input.squeeze(2)


def krea2(pipe, pixels, noise, sigmas, timesteps):
    prompt_embeds, prompt_embeds_mask = pipe.encode_prompt(PROMPTS, max_sequence_length=16)
    model_input = of_a_video_vae(pipe.vae, pixels).squeeze(2)
    bsz, channels, height, width = model_input.shape
    noisy_model_input = (1.0 - sigmas) * model_input + sigmas * noise
    patches = noisy_model_input.view(bsz, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    model_pred = pipe.transformer(
        hidden_states=patches.reshape(bsz, height // 2 * (width // 2), channels * 4),
        encoder_hidden_states=prompt_embeds,
        timestep=timesteps / 1000,
        position_ids=Krea2Pipeline.prepare_position_ids(prompt_embeds.shape[1], height // 2, width // 2, "cpu"),
        encoder_attention_mask=prompt_embeds_mask,
        return_dict=False,
    )[0]
    patches = model_pred.view(bsz, height // 2, width // 2, channels, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return patches.reshape(bsz, channels, height, width), model_input


@pytest.mark.parametrize("weighting_scheme", ["logit_normal", "none"])
@pytest.mark.parametrize("script", [sd3, flux2, z_image, qwen_image, krea2], ids=lambda script: script.__name__)
def test_flow_models(script, weighting_scheme):
    """Latents of photos, what the transformer is asked, and the loss."""
    pipe = PIPELINES[script.__name__]()
    base = base_for(pipe, weighting_scheme=weighting_scheme)
    ours, text, noise = batch(base)
    scheduler = copy.deepcopy(pipe.scheduler)
    u = compute_density_for_timestep_sampling(
        weighting_scheme=weighting_scheme,
        batch_size=len(PROMPTS),
        logit_mean=0.0,
        logit_std=1.0,
        mode_scale=1.29,
        generator=torch.Generator().manual_seed(5),
    )
    indices = (u * scheduler.config.num_train_timesteps).long()
    sigmas = scheduler.sigmas[indices].view(-1, 1, 1, 1)
    with torch.no_grad():
        model_pred, model_input = script(pipe, photos(), noise, sigmas, scheduler.timesteps[indices])
        found = base.loss(ours, text, noise, sigmas.flatten())
    torch.testing.assert_close(ours, model_input, rtol=1e-4, atol=1e-5)
    weighting = compute_loss_weighting_for_sd3(weighting_scheme=weighting_scheme, sigmas=sigmas)
    target = noise - model_input
    loss = torch.mean((weighting.float() * (model_pred - target) ** 2).reshape(len(target), -1), 1).mean()
    torch.testing.assert_close(found.mean(), loss, rtol=1e-5, atol=0)
    if not scheduler.config.use_dynamic_shifting:  # else the scripts leave out the shift that the pipeline draws with
        drawn = base.sample_times(model_input, torch.Generator().manual_seed(5))
        from_the_other_end = scheduler.sigmas[((1 - u) * scheduler.config.num_train_timesteps).long()]
        assert torch.allclose(drawn, from_the_other_end, atol=scheduler.config.shift * 1.5e-3)
