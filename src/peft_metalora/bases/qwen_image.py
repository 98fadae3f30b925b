# SPDX-License-Identifier: Apache-2.0
"""Qwen-Image.

Text: the last hidden states of Qwen2.5-VL behind a template. Images: latents of a video autoencoder, one frame,
normalised channel by channel, 2 x 2 of them packed into a token. Rectified flow. Adapted by default, as in FLUX.1:
attention and feed-forward layers of both streams; the modulation layers see the time only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .base import FlowBase, Text, send


class QwenLatents(FlowBase):
    """Bases with Qwen-Image's autoencoder, which is one for clips."""

    def latents_of(self, pixels: Tensor) -> Tensor:
        vae = self.pipeline.vae
        latents = vae.encode(pixels.unsqueeze(2)).latent_dist.mode().squeeze(2)
        mean, deviation = (
            torch.tensor(values, dtype=latents.dtype).view(1, -1, 1, 1)
            for values in (vae.config.latents_mean, vae.config.latents_std)
        )
        return (latents - send(mean, latents.device)) / send(deviation, latents.device)

    @property
    def pixel_multiple(self) -> int:
        return 2 * self.vae_scale_factor


class QwenImage(QwenLatents):
    """`QwenImagePipeline`."""

    pipeline_class = "QwenImagePipeline"
    large_encoders = ("text_encoder",)
    target_modules = (
        r"transformer_blocks\.\d+\.(attn\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)"
        r"|(img|txt)_mlp\.net\.(0\.proj|2))"
    )

    def draw(self, **options: Any) -> Any:
        """As of any base; guidance takes a negative prompt here, and an empty one stands in for none."""
        if not self.denoiser.config.get("guidance_embeds"):
            guidance, prompt = options.pop("guidance_scale", None), options["prompt"]
            if guidance is not None:
                options.setdefault("true_cfg_scale", guidance)
            if options.get("true_cfg_scale", self.call_parameters["true_cfg_scale"].default) > 1:
                options.setdefault("negative_prompt", " " if isinstance(prompt, str) else [" "] * len(prompt))
        return super().draw(**options)

    def text_of(self, prompts: Sequence[str]) -> Text:
        """`sequence` (n, longest, d), and `mask` (n, longest), which is false where a shorter prompt is filled up."""
        sequence, mask = self.pipeline.encode_prompt(
            list(prompts), device=self.encoders_device, max_sequence_length=self.max_sequence_length
        )
        if mask is None:
            mask = torch.ones(sequence.shape[:2], device=sequence.device)
        return {"sequence": sequence, "mask": mask.bool()}

    def predict(self, noisy: Tensor, text: Text, times: Tensor) -> Tensor:
        n, channels, height, width = noisy.shape
        dtype, factor = self.dtype, self.pipeline.vae_scale_factor
        guidance = None
        if self.denoiser.config.guidance_embeds:
            guidance = torch.ones(n, device=noisy.device)
        velocity = self.denoiser(
            hidden_states=self.pipeline._pack_latents(noisy, n, channels, height, width).to(dtype),
            timestep=times.to(dtype),
            guidance=guidance,
            encoder_hidden_states=text["sequence"].to(dtype),
            encoder_hidden_states_mask=text["mask"],
            img_shapes=[[(1, height // 2, width // 2)]] * n,
            return_dict=False,
        )[0]
        return self.pipeline._unpack_latents(velocity, height * factor, width * factor, factor).squeeze(2)
