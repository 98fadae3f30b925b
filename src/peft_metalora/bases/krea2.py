# SPDX-License-Identifier: Apache-2.0
"""Krea 2 (Raw and Turbo).

Text: hidden states of twelve layers of Qwen3-VL at every token, which the transformer itself fuses. Images: latents as
Qwen-Image's, packed as there. Rectified flow. Image and text share one stream of blocks, whose attention has a gate:
adapted by default are queries, keys, values, gates and outputs, and the feed-forward layers; the blocks that fuse the
text see no image and are left alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from .base import Text
from .qwen_image import QwenLatents

_DISTILLED_MU = 1.15  # the pipeline's own, whatever the size of the image


class Krea2(QwenLatents):
    """`Krea2Pipeline`."""

    pipeline_class = "Krea2Pipeline"
    large_encoders = ("text_encoder",)
    target_modules = r"transformer_blocks\.\d+\.(attn\.(to_q|to_k|to_v|to_gate|to_out\.0)|ff\.(gate|up|down))"

    def text_of(self, prompts: Sequence[str]) -> Text:
        """`sequence` (n, length, layers, d) and `mask` (n, length), true where there is a token."""
        sequence, mask = self.pipeline.encode_prompt(
            list(prompts), device=self.encoders_device, max_sequence_length=self.max_sequence_length
        )
        return {"sequence": sequence, "mask": mask}

    def time_shift(self, latents: Tensor) -> float:
        return math.exp(_DISTILLED_MU) if self.pipeline.config.is_distilled else super().time_shift(latents)

    def predict(self, noisy: Tensor, text: Text, times: Tensor) -> Tensor:
        n, channels, height, width = noisy.shape
        pipeline, dtype, side = self.pipeline, self.dtype, self.pipeline.patch_size
        sequence = text["sequence"].to(dtype)
        velocity = self.denoiser(
            hidden_states=pipeline._pack_latents(noisy, n, channels, height, width).to(dtype),
            encoder_hidden_states=sequence,
            timestep=times.to(dtype),
            position_ids=self.once(
                ("ids", sequence.shape[1], height, width, noisy.device),
                lambda: pipeline.prepare_position_ids(sequence.shape[1], height // side, width // side, "cpu"),
            ),
            encoder_attention_mask=text["mask"],
            return_dict=False,
        )[0]
        factor = pipeline.vae_scale_factor
        return pipeline._unpack_latents(velocity, height * factor, width * factor).squeeze(2)
