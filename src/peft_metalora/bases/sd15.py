# SPDX-License-Identifier: Apache-2.0
"""Stable Diffusion 1.5 (and 1.x, 2.x, which have its format).

Text: CLIP's last hidden states. Images: 4-channel latents. Adapted by default: attention and feed-forward layers of
the UNet's transformer blocks.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .base import Text
from .diffusion import DiffusionBase


class StableDiffusion15(DiffusionBase):
    """`StableDiffusionPipeline`."""

    pipeline_class = "StableDiffusionPipeline"

    def text_of(self, prompts: Sequence[str]) -> Text:
        """`sequence` (n, length, d)."""
        device = self.encoders_device
        sequence, _ = self.pipeline.encode_prompt(list(prompts), device, 1, False)
        return {"sequence": sequence}

    def predict(self, noisy: Tensor, text: Text, times: Tensor) -> Tensor:
        dtype = self.dtype
        return self.denoiser(
            noisy.to(dtype), times, encoder_hidden_states=text["sequence"].to(dtype), return_dict=False
        )[0]
