# SPDX-License-Identifier: Apache-2.0
"""Stable Diffusion 3 and 3.5.

Text: two CLIP encoders and T5 (which may be left out) in one sequence, and the CLIPs' pooled vectors. Rectified flow.
Adapted by default is what FLUX.1 has too: attention of both streams (3.5's second attention included) and their
feed-forward layers.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .base import FlowBase, Text


class StableDiffusion3(FlowBase):
    """`StableDiffusion3Pipeline`."""

    pipeline_class = "StableDiffusion3Pipeline"
    large_encoders = ("text_encoder_3",)
    target_modules = (
        r"transformer_blocks\.\d+\.(attn2?\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)"
        r"|ff(_context)?\.net\.(0\.proj|2))"
    )

    def _default_sequence_length(self) -> int:
        """Tokens of T5; the pipeline's own default is 256."""
        tokenizer = self.pipeline.tokenizer_3
        return 256 if tokenizer is None else min(256, tokenizer.model_max_length)

    def text_of(self, prompts: Sequence[str]) -> Text:
        """`sequence` (n, length, d) and `pooled` (n, d)."""
        device = self.encoders_device
        sequence, _, pooled, _ = self.pipeline.encode_prompt(
            list(prompts),
            None,
            None,
            device=device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
        )
        return {"sequence": sequence, "pooled": pooled}

    @property
    def pixel_multiple(self) -> int:
        return self.pipeline.vae_scale_factor * self.denoiser.config.patch_size

    def predict(self, noisy: Tensor, text: Text, times: Tensor) -> Tensor:
        dtype = self.dtype
        return self.denoiser(
            hidden_states=noisy.to(dtype),
            timestep=times * self.pipeline.scheduler.config.num_train_timesteps,
            encoder_hidden_states=text["sequence"].to(dtype),
            pooled_projections=text["pooled"].to(dtype),
            return_dict=False,
        )[0]
