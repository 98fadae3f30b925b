# SPDX-License-Identifier: Apache-2.0
"""Tiny random pipelines of each family that files are exported for; prompts come as embeddings, not as text."""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers import (
    AutoencoderKLFlux2,
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)

from pipelines_tiny import tiny_vae

WIDTH = 16


def sd15() -> StableDiffusionPipeline:
    """Two levels, cross-attention in the first and the middle, as SD 1.5 has it."""
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=2,
    )
    return StableDiffusionPipeline(
        vae=tiny_vae(),
        text_encoder=None,
        tokenizer=None,
        unet=unet,
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl() -> StableDiffusionXLPipeline:
    """Cross-attention in the second level, two transformer layers deep, and pooled text, as SDXL has it."""
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        cross_attention_dim=WIDTH,
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + WIDTH,
    )
    return StableDiffusionXLPipeline(
        vae=tiny_vae(),
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
        unet=unet,
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        add_watermarker=False,
    )


def sd3() -> StableDiffusion3Pipeline:
    """Two joint blocks; the last has no text output, as in SD3."""
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        caption_projection_dim=16,
        pooled_projection_dim=WIDTH,
        pos_embed_max_size=16,
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=tiny_vae(),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        text_encoder_3=None,
        tokenizer_3=None,
    )


def flux() -> FluxPipeline:
    """One double and one single block."""
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=False,
        axes_dims_rope=(2, 2, 4),
    )
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=tiny_vae(),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=transformer,
    )


def flux2() -> Flux2KleinPipeline:
    """One double and one single block, whose single block is one fused projection, as in FLUX.2 klein."""
    transformer = Flux2Transformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        timestep_guidance_channels=8,
        axes_dims_rope=(2, 2, 2, 2),
        guidance_embeds=False,
    )
    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        mid_block_add_attention=False,
    )
    return Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        transformer=transformer,
        is_distilled=True,
    )


FAMILIES: dict[str, Callable[[], DiffusionPipeline]] = {
    "sd15": sd15,
    "sdxl": sdxl,
    "sd3": sd3,
    "flux": flux,
    "flux2": flux2,
}
# The layers that people train, by the names diffusers gives them.
TARGETS = {
    "sd15": ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj"],
    "sdxl": ["to_q", "to_k", "to_v", "to_out.0", "proj_in"],
    "sd3": ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "ff.net.2"],
    "flux": ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_v_proj", "proj_mlp", "proj_out", "norm1.linear"],
    "flux2": ["to_q", "to_k", "to_v", "to_out.0", "to_qkv_mlp_proj", "single_transformer_blocks.0.attn.to_out"],
}


def tiny_pipeline(family: str, seed: int = 0) -> DiffusionPipeline:
    """A random pipeline of a family, the same for a seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipe = FAMILIES[family]()
    pipe.set_progress_bar_config(disable=True)
    for module in pipe.components.values():
        if isinstance(module, torch.nn.Module):
            module.eval().requires_grad_(False)
    return pipe


def denoiser(pipe: DiffusionPipeline) -> torch.nn.Module:
    """Its UNet or transformer."""
    return pipe.unet if hasattr(pipe, "unet") else pipe.transformer


def picture(pipe: DiffusionPipeline, family: str, rows: tuple[int, ...] = (0,), images: int = 1, **options):
    """Small images (n, h, w, 3) in [0, 1] in two steps; row k has fixed embeddings and noise wherever it stands.

    Args:
        rows: which fixed prompts. images: how many of each, with noise of their own.
    """
    generator = torch.Generator().manual_seed(3)
    words = torch.randn(8, 4, WIDTH, generator=generator)[list(rows)]
    pooled = torch.randn(8, WIDTH, generator=generator)[list(rows)]
    texts = {"prompt_embeds": words}
    if family in ("sd15", "sdxl", "sd3"):
        texts["negative_prompt_embeds"] = torch.zeros_like(words)
    if family in ("sdxl", "sd3"):
        texts |= {"pooled_prompt_embeds": pooled, "negative_pooled_prompt_embeds": torch.zeros_like(pooled)}
    if family == "flux":
        texts["pooled_prompt_embeds"] = pooled
    noise = [torch.Generator().manual_seed(10 * row + image) for row in rows for image in range(images)]
    settings = {"num_inference_steps": 2, "height": 32, "width": 32, "output_type": "np", "generator": noise}
    return pipe(**texts, num_images_per_prompt=images, **{**settings, **options}).images
