# SPDX-License-Identifier: Apache-2.0
"""FLUX.1 (dev, schnell and models of their format, such as the embedded demo base).

Text: CLIP's pooled vector and T5's sequence. Images: 16-channel latents (any number works), 2 x 2 of them packed into
a token. Rectified flow; the guidance-distilled dev model is trained at guidance 1, as diffusers' script does, so that
the adapter learns the data and not the data after guidance.

Adapted by default is every linear of the transformer's blocks that works on tokens: queries, keys, values and output
projections of both streams, and the feed-forward layers (in the single blocks: proj_mlp and proj_out). Attention
alone moves where features go; what a face looks like is written by the feed-forward layers too. The modulation
layers (norm*.linear) see time and pooled text only and are left alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .base import FlowBase, Text

_ATTENTION = r"attn\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)"


class Flux1(FlowBase):
    """`FluxPipeline`."""

    pipeline_class = "FluxPipeline"
    large_encoders = ("text_encoder_2",)
    target_modules = (
        rf"transformer_blocks\.\d+\.({_ATTENTION}|ff(_context)?\.net\.(0\.proj|2))"
        rf"|single_transformer_blocks\.\d+\.({_ATTENTION}|proj_mlp|proj_out)"
    )
    guidance = 1.0

    def _default_sequence_length(self) -> int:
        return min(512, self.pipeline.tokenizer_2.model_max_length)

    def text_of(self, prompts: Sequence[str]) -> Text:
        """`sequence` (n, length, d) from T5, `pooled` (n, d) from CLIP."""
        device = self.encoders_device
        sequence, pooled, _ = self.pipeline.encode_prompt(
            list(prompts), device=device, max_sequence_length=self.max_sequence_length
        )
        return {"sequence": sequence, "pooled": pooled}

    @property
    def pixel_multiple(self) -> int:
        return 2 * self.pipeline.vae_scale_factor

    def predict(self, noisy: Tensor, text: Text, times: Tensor) -> Tensor:
        n, channels, height, width = noisy.shape
        dtype = self.dtype
        packed = self.pipeline._pack_latents(noisy, n, channels, height, width).to(dtype)
        image_ids = self.once(
            ("image ids", height, width, noisy.device, dtype),
            lambda: self.pipeline._prepare_latent_image_ids(n, height // 2, width // 2, "cpu", dtype),
        )
        guidance = None
        if self.denoiser.config.guidance_embeds:
            guidance = torch.full((n,), self.guidance, device=noisy.device, dtype=torch.float32)
        velocity = self.denoiser(
            hidden_states=packed,
            timestep=times.to(dtype),
            guidance=guidance,
            pooled_projections=text["pooled"].to(dtype),
            encoder_hidden_states=text["sequence"].to(dtype),
            txt_ids=torch.zeros(text["sequence"].shape[1], 3, device=noisy.device, dtype=dtype),
            img_ids=image_ids,
            return_dict=False,
        )[0]
        # The pipeline's unpacking counts in pixels.
        factor = self.pipeline.vae_scale_factor
        return self.pipeline._unpack_latents(velocity, height * factor, width * factor, factor)
