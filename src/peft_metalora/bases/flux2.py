# SPDX-License-Identifier: Apache-2.0
"""FLUX.2 klein and FLUX.2 dev.

Text: hidden states of three layers of Qwen3 (klein) or Mistral 3 (dev). Images: latents whose 2 x 2 patches are
channels already, normalised by the VAE's running statistics. Rectified flow; dev is guidance-distilled and trained at
guidance 1, as FLUX.1's is. Adapted by default: attention and feed-forward layers of both streams; in the single blocks
these are one projection in and one out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from torch import Tensor

from .base import FlowBase, Text

# The pipeline's shift also depends on the number of sampling steps; it is taken at the default number.
_SAMPLING_STEPS = 50


class Flux2Klein(FlowBase):
    """`Flux2KleinPipeline`."""

    pipeline_class = "Flux2KleinPipeline"
    large_encoders = ("text_encoder",)
    target_modules = (
        r"transformer_blocks\.\d+\.(attn\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)"
        r"|ff(_context)?\.linear_(in|out))|single_transformer_blocks\.\d+\.attn\.(to_qkv_mlp_proj|to_out)"
    )

    def text_of(self, prompts: Sequence[str]) -> Text:
        """`sequence` (n, length, d)."""
        device = self.encoders_device
        sequence, _ = self.pipeline.encode_prompt(
            list(prompts), device=device, max_sequence_length=self.max_sequence_length
        )
        return {"sequence": sequence}

    def latents_of(self, pixels: Tensor) -> Tensor:
        return self.pipeline._encode_vae_image(pixels, generator=None)

    @property
    def pixel_multiple(self) -> int:
        return 2 * self.pipeline.vae_scale_factor

    def tokens(self, latents: Tensor) -> int:
        return latents.shape[-2] * latents.shape[-1]

    def time_shift(self, latents: Tensor) -> float:
        if not self.pipeline.scheduler.config.get("use_dynamic_shifting", False):
            return super().time_shift(latents)
        return math.exp(compute_empirical_mu(self.tokens(latents), _SAMPLING_STEPS))

    def predict(self, noisy: Tensor, text: Text, times: Tensor) -> Tensor:
        pipeline, dtype = self.pipeline, self.dtype
        sequence = text["sequence"].to(dtype)
        guidance = None
        if self.denoiser.config.guidance_embeds:
            guidance = torch.ones(len(noisy), device=noisy.device)
        velocity = self.denoiser(
            hidden_states=pipeline._pack_latents(noisy).to(dtype),
            timestep=times.to(dtype),
            guidance=guidance,
            encoder_hidden_states=sequence,
            txt_ids=self.once(
                ("text ids", sequence.shape[:2], noisy.device), lambda: pipeline._prepare_text_ids(sequence)
            ),
            img_ids=self.once(("image ids", noisy.shape, noisy.device), lambda: pipeline._prepare_latent_ids(noisy)),
            return_dict=False,
        )[0]
        return velocity.transpose(1, 2).reshape(noisy.shape)


class Flux2Dev(Flux2Klein):
    """`Flux2Pipeline`."""

    pipeline_class = "Flux2Pipeline"

    def _default_sequence_length(self) -> int:
        return int(self.pipeline.tokenizer_max_length)
