# SPDX-License-Identifier: Apache-2.0
"""Every other family: the loss is the formula, encoding is the pipeline's, and both stages run."""

from __future__ import annotations

import inspect
import math
import re

import pytest
import torch

from peft_metalora import enable_meta_lora, hub
from peft_metalora.bases import FAMILIES, base_for
from peft_metalora.errors import BaseModelMismatchError, ConfigError, PipelineError
from peft_metalora.training.examples.batches import Examples
from peft_metalora.training.meta_train import meta_train_on
from peft_metalora.training.personalize import personalize_many
from peft_metalora.training.stage_2 import Personalization
from pipelines_tiny import (
    PIPELINES,
    tiny_flux2_pipeline,
    tiny_krea2_pipeline,
    tiny_qwen_image_pipeline,
    tiny_sd3_pipeline,
    tiny_sd15_pipeline,
    tiny_sdxl_pipeline,
    tiny_wan_pipeline,
    tiny_wan_transformer,
    tiny_z_image_pipeline,
)
from training_tiny import meta_config, personal_config

PROMPTS = ["a photo of a person , smiling", "a red shirt"]


@pytest.fixture(scope="module", params=PIPELINES)
def base(request):
    return base_for(PIPELINES[request.param]())


def encoded(base, width=24):
    generator = torch.Generator().manual_seed(0)
    latents = base.encode_images(torch.rand(2, 3, 16, width, generator=generator) * 2 - 1)
    return latents, base.encode_text(PROMPTS), torch.randn(latents.shape, generator=generator)


def alphas(scheduler, times):
    """Cumulative products of 1 - beta for the 'scaled_linear' schedule of Stable Diffusion, from its definition."""
    low, high = scheduler.config.beta_start**0.5, scheduler.config.beta_end**0.5
    betas = torch.linspace(low, high, scheduler.config.num_train_timesteps, dtype=torch.float32) ** 2
    return (1 - betas).cumprod(0)[times].view(-1, 1, 1, 1)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_stable_diffusion_15(prediction_type):
    base = base_for(tiny_sd15_pipeline(prediction_type=prediction_type))
    pipe, (latents, text, noise), times = base.pipeline, encoded(base), torch.tensor([10, 700])
    a = alphas(pipe.scheduler, times)
    sequence, _ = pipe.encode_prompt(PROMPTS, "cpu", 1, False)
    with torch.no_grad():
        output = pipe.unet(a.sqrt() * latents + (1 - a).sqrt() * noise, times, encoder_hidden_states=sequence).sample
    target = noise if prediction_type == "epsilon" else a.sqrt() * noise - (1 - a).sqrt() * latents
    expected = (output - target).square().mean((1, 2, 3))
    assert torch.allclose(base.loss(latents, text, noise, times), expected, rtol=1e-4)


def test_sdxl():
    base = base_for(tiny_sdxl_pipeline())
    pipe, (latents, text, noise), times = base.pipeline, encoded(base), torch.tensor([10, 700])
    a = alphas(pipe.scheduler, times)
    sequence, _, pooled, _ = pipe.encode_prompt(PROMPTS, do_classifier_free_guidance=False)
    time_ids = torch.tensor([[16.0, 24, 0, 0, 16, 24]] * 2)
    with torch.no_grad():
        output = pipe.unet(
            a.sqrt() * latents + (1 - a).sqrt() * noise,
            times,
            encoder_hidden_states=sequence,
            added_cond_kwargs={"text_embeds": pooled, "time_ids": time_ids},
        ).sample
    expected = (output - noise).square().mean((1, 2, 3))
    assert torch.allclose(base.loss(latents, text, noise, times), expected, rtol=1e-4)


def test_sd3():
    base = base_for(tiny_sd3_pipeline())
    pipe, (latents, text, noise), times = base.pipeline, encoded(base), torch.tensor([0.1, 0.8])
    t = times.view(-1, 1, 1, 1)
    sequence, _, pooled, _ = pipe.encode_prompt(
        PROMPTS, None, None, do_classifier_free_guidance=False, max_sequence_length=16
    )
    with torch.no_grad():
        velocity = pipe.transformer(
            (1 - t) * latents + t * noise, sequence, pooled_projections=pooled, timestep=1000 * times
        ).sample
    expected = (velocity - (noise - latents)).square().mean((1, 2, 3))
    assert torch.allclose(base.loss(latents, text, noise, times), expected, rtol=1e-4)
    assert base.time_shift(latents) == 3.0


def test_flux2():
    base = base_for(tiny_flux2_pipeline())
    pipe, (latents, text, noise), times = base.pipeline, encoded(base), torch.tensor([0.1, 0.8])
    t = times.view(-1, 1, 1, 1)
    sequence, text_ids = pipe.encode_prompt(PROMPTS, max_sequence_length=16)

    def tokens(x):
        return x.flatten(2).transpose(1, 2)

    with torch.no_grad():
        velocity = pipe.transformer(
            hidden_states=tokens((1 - t) * latents + t * noise),
            timestep=times,
            encoder_hidden_states=sequence,
            txt_ids=text_ids,
            img_ids=pipe._prepare_latent_ids(latents),
        ).sample
    expected = (velocity - tokens(noise - latents)).square().mean((1, 2))
    assert torch.allclose(base.loss(latents, text, noise, times), expected, rtol=1e-4)
    assert base.time_shift(torch.zeros(1, 16, 32, 32)) > math.exp(0.5)


def packed(x):
    """Tokens of 2 x 2 latents (n, h / 2 * w / 2, 4 c), written out."""
    n, c, h, w = x.shape
    return x.reshape(n, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(n, h // 2 * w // 2, 4 * c)


def test_z_image():
    base = base_for(tiny_z_image_pipeline())
    pipe, (latents, text, noise), times = base.pipeline, encoded(base), torch.tensor([0.1, 0.8])
    t = times.view(-1, 1, 1, 1)
    sequences, _ = pipe.encode_prompt(PROMPTS, do_classifier_free_guidance=False, max_sequence_length=16)
    assert len(sequences[0]) > len(sequences[1])
    noisy = ((1 - t) * latents + t * noise).unsqueeze(2)
    with torch.no_grad():
        back = pipe.transformer([*noisy], 1 - times, sequences).sample
    expected = (-torch.stack(back).squeeze(2) - (noise - latents)).square().mean((1, 2, 3))
    assert torch.allclose(base.loss(latents, text, noise, times), expected, rtol=1e-4)
    assert base.time_shift(latents) == 3.0


def test_qwen_image():
    base = base_for(tiny_qwen_image_pipeline())
    pipe, (latents, text, noise), times = base.pipeline, encoded(base), torch.tensor([0.1, 0.8])
    t = times.view(-1, 1, 1, 1)
    losses = base.loss(latents, text, noise, times)
    for row, prompt in enumerate(PROMPTS):
        sequence, mask = pipe.encode_prompt(prompt)
        assert mask is None, "what fills up a shorter prompt in a batch is not seen"
        with torch.no_grad():
            velocity = pipe.transformer(
                hidden_states=packed((1 - t) * latents + t * noise)[row : row + 1],
                timestep=times[row : row + 1],
                encoder_hidden_states=sequence,
                img_shapes=[[(1, 2, 3)]],
            ).sample
        expected = (velocity - packed(noise - latents)[row : row + 1]).square().mean()
        assert torch.allclose(losses[row], expected, rtol=1e-4)
    assert base.time_shift(torch.zeros(1, 4, 64, 64)) > math.exp(0.5)


def test_qwen_image_is_guided_without_a_negative_prompt():
    """Bug: what was drawn by a command had no guidance at all, for want of a negative prompt."""
    base = base_for(tiny_qwen_image_pipeline())

    def draw(**options):
        noise = torch.Generator().manual_seed(0)
        size = {"height": 16, "width": 16, "num_inference_steps": 1, "output_type": "pt"}
        return base.draw(prompt=["a red shirt"], generator=noise, **size, **options)

    guided = draw()
    assert torch.equal(guided, draw(guidance_scale=4.0))
    assert torch.equal(guided, draw(true_cfg_scale=4.0, negative_prompt=[" "]))
    assert not torch.allclose(guided, draw(guidance_scale=1.0), atol=1e-4)


@pytest.mark.parametrize("is_distilled", [False, True])
def test_krea2(is_distilled):
    base = base_for(tiny_krea2_pipeline(is_distilled=is_distilled))
    pipe, (latents, text, noise), times = base.pipeline, encoded(base), torch.tensor([0.1, 0.8])
    t = times.view(-1, 1, 1, 1)
    sequence, mask = pipe.encode_prompt(PROMPTS, max_sequence_length=16)
    ids = [(0, 0, 0)] * sequence.shape[1] + [(0, row, column) for row in range(2) for column in range(3)]
    with torch.no_grad():
        velocity = pipe.transformer(
            hidden_states=packed((1 - t) * latents + t * noise),
            encoder_hidden_states=sequence,
            timestep=times,
            position_ids=torch.tensor(ids),
            encoder_attention_mask=mask,
        ).sample
    expected = (velocity - packed(noise - latents)).square().mean((1, 2))
    assert torch.allclose(base.loss(latents, text, noise, times), expected, rtol=1e-4)
    small, large = (base.time_shift(torch.zeros(1, 4, side, side)) for side in (32, 128))
    assert math.isclose(large, math.exp(1.15)) if is_distilled else small < large
    assert math.isclose(small, large) == is_distilled


@pytest.mark.parametrize("ti2v", [False, True])
def test_wan(ti2v):
    base = base_for(tiny_wan_pipeline(ti2v=ti2v))
    pipe, (latents, text, noise), times = base.pipeline, encoded(base, 32), torch.tensor([0.1, 0.8])
    t = times.view(-1, 1, 1, 1)
    sequence, _ = pipe.encode_prompt(PROMPTS, do_classifier_free_guidance=False, max_sequence_length=16)
    noisy = ((1 - t) * latents + t * noise).unsqueeze(2)
    # As the pipeline calls it: where a picture may begin a clip, every token has its own time.
    told = (1000 * times)[:, None].expand(-1, noisy[0, 0, :, ::2, ::2].numel()) if ti2v else 1000 * times
    with torch.no_grad():
        velocity = pipe.transformer(noisy, told, sequence).sample
    expected = (velocity.squeeze(2) - (noise - latents)).square().mean((1, 2, 3))
    assert torch.allclose(base.loss(latents, text, noise, times), expected, rtol=1e-4)
    assert base.time_shift(latents) == 3.0
    assert base.pixel_multiple == (16 if ti2v else 8) and base.frames_per_second == (24 if ti2v else 16)


def test_wan_of_two_transformers_is_refused():
    pipe = tiny_wan_pipeline()
    pipe.register_modules(transformer_2=tiny_wan_transformer())
    with pytest.raises(BaseModelMismatchError, match=r"found one of two.* give Wan 2\.1 T2V or Wan 2\.2 TI2V-5B"):
        base_for(pipe)
    with pytest.raises(PipelineError, match="would be half shown"):
        enable_meta_lora(pipe)


def test_a_masked_loss_is_the_weighted_mean_and_nothing_outside_counts(base, monkeypatch):
    (latents, text, noise), generator = encoded(base), torch.Generator().manual_seed(1)
    times = base.sample_times(latents, generator)
    mask = torch.rand(2, 1, *latents.shape[-2:], generator=generator)
    mask[:, :, :, -1] = 0
    with torch.no_grad():
        said = base.predict(base.add_noise(latents, noise, times), text, times)
        errors = (said - base.target(latents, noise, times)).square().mean(1, keepdim=True)
        plain = base.loss(latents, text, noise, times)
        found = base.loss(latents, text, noise, times, mask)
        white = base.loss(latents, text, noise, times, torch.ones_like(mask))
        nothing = base.loss(latents, text, noise, times, torch.zeros_like(mask))
    expected = (errors * mask).sum((1, 2, 3)) / mask.sum((1, 2, 3))
    assert torch.allclose(plain, errors.mean((1, 2, 3)), rtol=1e-4)
    assert torch.allclose(found, expected, rtol=1e-4) and not torch.allclose(found, plain, rtol=1e-3)
    assert torch.allclose(white, plain, rtol=1e-5) and nothing.tolist() == [0, 0]
    said.requires_grad_()
    monkeypatch.setattr(base, "predict", lambda *args: said)
    base.loss(latents, text, noise, times, mask).sum().backward()
    assert not said.grad[..., -1].any() and said.grad[..., 0].abs().min() > 0


def test_latents_decode_to_what_the_vae_makes_of_the_image(base):
    """The pipeline's own decoding is the inverse of our encoding."""
    pixels = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    latents, vae = base.encode_images(pixels), base.pipeline.vae
    mean = vae.encode(pixels.unsqueeze(2) if getattr(vae.config, "latents_std", None) else pixels).latent_dist.mean
    if getattr(vae.config, "latents_std", None):  # as the decoding in `QwenImagePipeline`
        mean, values = mean.squeeze(2), (vae.config.latents_mean, vae.config.latents_std)
        middle, deviation = (torch.tensor(one).view(1, -1, 1, 1) for one in values)
        back = latents * deviation + middle
    elif hasattr(vae, "bn"):
        deviation = (vae.bn.running_var + vae.config.batch_norm_eps).sqrt().view(1, -1, 1, 1)
        back = base.pipeline._unpatchify_latents(latents * deviation + vae.bn.running_mean.view(1, -1, 1, 1))
    else:
        back = latents / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
    assert torch.allclose(back, mean, atol=1e-5)


def test_times_are_drawn_where_the_family_has_noise_levels(base):
    latents = base.encode_images(torch.zeros(1, 3, 16, 16)).expand(4000, -1, -1, -1)
    times = base.sample_times(latents, torch.Generator().manual_seed(0))
    if base.denoiser_name == "unet":
        assert times.dtype == torch.int64
        assert times.min() >= 0 and times.max() <= 999
        assert times.float().mean().item() == pytest.approx(500, abs=15)  # uniform
    else:
        assert times.min() > 0 and times.max() < 1


def test_a_shift_draws_more_noise_of_every_family(base, monkeypatch):
    latents = base.encode_images(torch.zeros(1, 3, 16, 16)).expand(1000, -1, -1, -1)

    def drawn(shift: float) -> torch.Tensor:
        monkeypatch.setattr(base, "shift", shift)
        times = base.sample_times(latents, torch.Generator().manual_seed(0))
        return times / 1000 if base.denoiser_name == "unet" else times

    t = drawn(1.0)
    assert torch.allclose(drawn(4.0), 4 * t / (1 + 3 * t), atol=4.1e-3 if base.denoiser_name == "unet" else 1e-6)


def test_default_targets_are_the_linears_that_work_on_tokens(base):
    linears = {name for name, module in base.denoiser.named_modules() if isinstance(module, torch.nn.Linear)}
    adapted = {name for name in linears if re.fullmatch(base.target_modules, name)}
    in_blocks = re.compile(r"(.*transformer_blocks|blocks|layers|noise_refiner)\.\d+\.(?!(.*norm|.*_mod\.|adaLN))")
    assert adapted == {name for name in linears if in_blocks.match(name)}
    assert adapted


def test_both_stages_and_the_pipeline(base, tmp_path):
    latents, text, _ = encoded(base)
    examples = Examples(latents.repeat(2, 1, 1, 1), text, torch.tensor([0, 1, 0, 1]), torch.tensor([0, 0, 1, 1]))
    result = meta_train_on(base, examples, meta_config(max_train_steps=3), progress=False)
    result.save(str(tmp_path / "down"))
    enable_meta_lora(base.pipeline).unload_meta_lora()
    down = hub.load_down(tmp_path / "down")
    config = personal_config(max_train_steps=2, down=str(tmp_path / "down"))
    run = personalize_many(base, examples, config, down, progress=False)
    run.save(tmp_path / "ann", slot=1)
    run.remove()
    one = Examples(latents, text, torch.tensor([0, 1]), torch.tensor([0, 0]))
    lora = Personalization(base, one, personal_config(max_train_steps=1, method="lora"))
    assert len(list(lora.steps())) == 1
    lora.save(tmp_path / "lora")
    lora.remove()

    def draw():
        options = {"max_sequence_length": 16} if base.takes_sequence_length else {}
        generator = torch.Generator().manual_seed(0)
        images = base.draw(
            prompt="a photo",
            height=16,
            width=16,
            num_inference_steps=2,
            output_type="pt",
            generator=generator,
            **options,
        )
        return torch.stack([*images])

    before = draw()
    base.pipeline.load_meta_lora(tmp_path / "ann")
    assert not torch.equal(draw(), before)
    base.pipeline.unload_meta_lora()
    assert torch.equal(draw(), before)
    base.pipeline.load_lora_weights(tmp_path / "lora")
    assert not torch.equal(draw(), before)
    base.pipeline.unload_lora_weights()


def test_an_image_that_names_no_size_has_the_pipelines_own(base, monkeypatch):
    """Bug: services of Z-Image and Krea 2 did not start without a resolution; the page took 512, estimates another."""
    asked = []

    def prepare_latents(*args, **kwargs):
        given = inspect.signature(prepare).bind(*args, **kwargs).arguments
        asked.append(given["height"] * given["width"])
        raise InterruptedError

    prepare = base.pipeline.prepare_latents
    monkeypatch.setattr(base.pipeline, "prepare_latents", prepare_latents)
    with pytest.raises(InterruptedError):
        base.draw(prompt=["a red shirt"], num_inference_steps=1)
    side, multiple = base.default_side, base.pixel_multiple
    assert side % multiple == 0
    # Clips are no squares.
    assert asked == [side**2] or (base.frames_per_second and 0 <= math.isqrt(*asked) - side < multiple)


def test_layers_that_run_prompts_together_are_refused():
    base = base_for(tiny_z_image_pipeline())
    before = [name for name, _ in base.denoiser.named_modules()]
    latents, text, _ = encoded(base)
    examples = Examples(latents, text, torch.tensor([0, 1]), torch.tensor([0, 1]))
    with pytest.raises(ConfigError, match=r"found cap_embedder\.1, which .* Leave it out"):
        meta_train_on(base, examples, meta_config(target_modules="to_q,cap_embedder.1"), progress=False)
    assert [name for name, _ in base.denoiser.named_modules()] == before


def test_every_family_is_tested_here():
    tested = {type(base_for(make())).__name__ for make in PIPELINES.values()}
    # In files of their own: one is modular, one has klein's transformer, one is not in diffusers 0.41.
    apart = {"Flux3", "Flux2Dev", "QwenImage21"}
    assert tested | apart == {name for _, name in FAMILIES.values()}


def test_models_that_predict_something_else_are_refused():
    with pytest.raises(BaseModelMismatchError, match="found 'sample'"):
        base_for(tiny_sd15_pipeline(prediction_type="sample"))
    with pytest.raises(ConfigError, match="weighting_scheme must be one of"):
        personal_config(weighting_scheme="cosine")
