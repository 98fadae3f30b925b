# SPDX-License-Identifier: Apache-2.0
"""What each family's tiny pipeline is adapted in and draws; prompts come as embeddings, not as text."""

from __future__ import annotations

import torch
from diffusers import DiffusionPipeline

from pipelines_tiny import PIPELINES

FAMILIES = tuple(PIPELINES)
# The layers that people train, by the names diffusers gives them.
TARGETS = {
    "sd15": ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj"],
    "sdxl": ["to_q", "to_k", "to_v", "to_out.0", "proj_in"],
    "sd3": ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "ff.net.2"],
    "flux": ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_v_proj", "proj_mlp", "proj_out", "norm1.linear"],
    "flux2": ["to_q", "to_k", "to_v", "to_out.0", "to_qkv_mlp_proj", "single_transformer_blocks.0.attn.to_out"],
    "z_image": ["to_q", "to_k", "to_v", "to_out.0", "feed_forward.w1", "feed_forward.w2"],
    "qwen_image": ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "img_mlp.net.2"],
    "krea2": ["attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.to_gate", "ff.down"],
    "wan": ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"],
}


def tiny_pipeline(family: str, seed: int = 0) -> DiffusionPipeline:
    """A random pipeline of a family, the same for a seed."""
    return PIPELINES[family](seed)


def denoiser(pipe: DiffusionPipeline) -> torch.nn.Module:
    """Its UNet or transformer."""
    return pipe.unet if hasattr(pipe, "unet") else pipe.transformer


def picture(pipe: DiffusionPipeline, family: str, rows: tuple[int, ...] = (0,), images: int = 1, **options):
    """Small images (n, h, w, 3) in [0, 1] in two steps; row k has fixed embeddings and noise wherever it stands.

    Of a family that draws clips, clips of five frames (n, 5, h, w, 3).

    Args:
        rows: which fixed prompts. images: how many of each, with noise of their own.
    """
    texts = _texts(denoiser(pipe).config, family, rows)
    noise = [torch.Generator().manual_seed(10 * row + image) for row in rows for image in range(images)]
    settings = {"num_inference_steps": 2, "height": 32, "width": 32, "output_type": "np", "generator": noise}
    if family == "wan":
        return pipe(**texts, num_videos_per_prompt=images, num_frames=5, **{**settings, **options}).frames
    return pipe(**texts, num_images_per_prompt=images, **{**settings, **options}).images


def _texts(config, family: str, rows: tuple[int, ...]) -> dict:
    """The pipeline's arguments for what the fixed prompts say, and for its negative where it draws with one."""
    generator = torch.Generator().manual_seed(3)
    if family == "krea2":
        words = torch.randn(8, 4, config["num_text_layers"], config["text_hidden_dim"], generator=generator)[list(rows)]
        mask = torch.ones(words.shape[:2], dtype=torch.bool)
        texts = {"prompt_embeds": words, "negative_prompt_embeds": torch.zeros_like(words)}
        return texts | {"prompt_embeds_mask": mask, "negative_prompt_embeds_mask": mask}
    if family == "z_image":
        words = [*torch.randn(8, 4, config["cap_feat_dim"], generator=generator)[list(rows)]]
        return {"prompt_embeds": words, "negative_prompt_embeds": [torch.zeros_like(row) for row in words]}
    width = config.get("cross_attention_dim") or config.get("joint_attention_dim") or config["text_dim"]
    words = torch.randn(8, 4, width, generator=generator)[list(rows)]
    pooled = torch.randn(8, config.get("pooled_projection_dim", 16), generator=generator)[list(rows)]
    texts = {"prompt_embeds": words}
    if family in ("sd15", "sdxl", "sd3", "wan"):
        texts["negative_prompt_embeds"] = torch.zeros_like(words)
    if family in ("sdxl", "sd3"):
        texts |= {"pooled_prompt_embeds": pooled, "negative_pooled_prompt_embeds": torch.zeros_like(pooled)}
    if family == "flux":
        texts["pooled_prompt_embeds"] = pooled
    if family == "qwen_image":
        texts["prompt_embeds_mask"] = torch.ones(words.shape[:2], dtype=torch.bool)
    return texts
