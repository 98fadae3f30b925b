# SPDX-License-Identifier: Apache-2.0
"""FLUX.1: the loss is the formula, text and images are encoded as the pipeline does."""

from __future__ import annotations

import math
import re

import pytest
import torch

from peft_metalora import enable_meta_lora
from peft_metalora.bases import base_for, load_base
from peft_metalora.errors import BaseModelMismatchError
from pipelines_tiny import tiny_flux_pipeline

PROMPTS = ["a photo of a person , smiling", "a red shirt"]


@pytest.fixture(scope="module", params=[False, True], ids=["schnell", "dev"])
def base(request):
    return base_for(tiny_flux_pipeline(guidance_embeds=request.param))


def batch(base, n=2):
    generator = torch.Generator().manual_seed(0)
    latents = base.encode_images(torch.rand(n, 3, 16, 24, generator=generator) * 2 - 1)
    return latents, base.encode_text(PROMPTS[:n]), torch.randn(latents.shape, generator=generator)


def test_loss_equals_the_formula(base):
    latents, text, noise = batch(base)
    times = torch.tensor([0.2, 0.9])
    loss = base.loss(latents, text, noise, times)

    pipe, t = base.pipeline, times.view(-1, 1, 1, 1)
    height, width = latents.shape[-2:]

    def tokens(x):
        return pipe._pack_latents(x, 2, 4, height, width)

    ids = pipe._prepare_latent_image_ids(2, height // 2, width // 2, "cpu", torch.float32)
    with torch.no_grad():
        velocity = pipe.transformer(
            hidden_states=tokens((1 - t) * latents + t * noise),
            timestep=times,
            guidance=torch.ones(2) if pipe.transformer.config.guidance_embeds else None,
            encoder_hidden_states=text["sequence"],
            pooled_projections=text["pooled"],
            img_ids=ids,
            txt_ids=torch.zeros(text["sequence"].shape[1], 3),
        ).sample
    expected = (velocity - tokens(noise - latents)).square().mean((1, 2))
    assert loss.shape == (2,)
    assert torch.allclose(loss, expected, rtol=1e-5)


def test_text_is_what_the_pipeline_encodes(base):
    text = base.encode_text(PROMPTS)
    sequence, pooled, _ = base.pipeline.encode_prompt(PROMPTS, max_sequence_length=16)
    assert base.max_sequence_length == 16
    assert torch.equal(text["sequence"], sequence)
    assert torch.equal(text["pooled"], pooled)
    assert not text["sequence"].requires_grad


def test_latents_decode_to_what_the_vae_makes_of_the_image(base):
    pixels = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    vae = base.pipeline.vae
    latents = base.encode_images(pixels)
    assert latents.shape == (1, 4, 4, 4)
    back = latents / vae.config.scaling_factor + vae.config.shift_factor
    assert torch.allclose(back, vae.encode(pixels).latent_dist.mean, atol=1e-6)


def test_prompts_have_the_trained_length_whatever_else_the_pipeline_can_do(base):
    before = base.takes_sequence_length
    enable_meta_lora(base.pipeline)
    assert before and base.takes_sequence_length


def test_times_are_shifted_as_the_scheduler_shifts():
    base = base_for(tiny_flux_pipeline())
    latents = torch.zeros(4000, 4, 16, 16)
    generator = torch.Generator().manual_seed(0)
    times = base.sample_times(latents, generator)
    assert times.min() > 0 and times.max() < 1
    assert times.median().item() == pytest.approx(0.5, abs=0.02)  # sigmoid of a normal variable
    base.pipeline.scheduler.register_to_config(shift=3.0)
    assert base.sample_times(latents, generator).median().item() == pytest.approx(0.75, abs=0.02)
    base.pipeline.scheduler.register_to_config(use_dynamic_shifting=True)
    assert base.time_shift(torch.zeros(1, 4, 32, 32)) == pytest.approx(math.exp(0.5))  # 256 tokens
    uniform = base_for(tiny_flux_pipeline(), weighting_scheme="none").sample_times(latents, generator)
    assert uniform.std().item() == pytest.approx(12**-0.5, abs=0.01)


def test_a_shift_that_is_asked_for_draws_what_a_scheduler_of_that_shift_would():
    """It stood in two scripts, which wrote it into the scheduler that also draws."""
    latents = torch.zeros(100, 4, 16, 16)
    asked, of_the_scheduler = base_for(tiny_flux_pipeline(), shift=4.0), base_for(tiny_flux_pipeline())
    of_the_scheduler.pipeline.scheduler.register_to_config(shift=4.0)
    drawn = [one.sample_times(latents, torch.Generator().manual_seed(0)) for one in (asked, of_the_scheduler)]
    assert torch.equal(*drawn)
    assert asked.pipeline.scheduler.config.shift == 1.0
    asked.pipeline.scheduler.register_to_config(use_dynamic_shifting=True)
    assert torch.equal(asked.sample_times(latents, torch.Generator().manual_seed(0)), drawn[0])


def test_default_targets_are_the_linears_of_the_blocks(base):
    names = {
        name
        for name, module in base.denoiser.named_modules()
        if isinstance(module, torch.nn.Linear) and re.fullmatch(base.target_modules, name)
    }
    everything = {
        name
        for name, module in base.denoiser.named_modules()
        if isinstance(module, torch.nn.Linear) and "transformer_blocks." in name and "norm" not in name
    }
    assert names == everything
    assert "proj_out" not in names


def test_a_pipeline_of_no_known_family_is_refused(tmp_path):
    with pytest.raises(BaseModelMismatchError, match="found dict"):
        base_for({})
    with pytest.raises(BaseModelMismatchError, match="expected a diffusers pipeline"):
        load_base(tmp_path, local_files_only=True)
