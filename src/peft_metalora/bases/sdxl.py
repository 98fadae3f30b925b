# SPDX-License-Identifier: Apache-2.0
"""Stable Diffusion XL.

Text: the penultimate hidden states of two CLIP encoders side by side, and the second one's pooled vector. The UNet is
also told the image's size before scaling, its crop and its size: training says "uncropped, of this size" for every
view, which is what one asks for when generating. Adapted by default: as in Stable Diffusion 1.5.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .base import Text
from .diffusion import DiffusionBase


class StableDiffusionXL(DiffusionBase):
    """`StableDiffusionXLPipeline`."""

    pipeline_class = "StableDiffusionXLPipeline"

    def text_of(self, prompts: Sequence[str]) -> Text:
        """`sequence` (n, length, d) and `pooled` (n, d)."""
        device = self.encoders_device
        sequence, _, pooled, _ = self.pipeline.encode_prompt(
            list(prompts), device=device, do_classifier_free_guidance=False
        )
        return {"sequence": sequence, "pooled": pooled}

    def predict(self, noisy: Tensor, text: Text, times: Tensor) -> Tensor:
        dtype = self.dtype
        size = [side * self.pipeline.vae_scale_factor for side in noisy.shape[-2:]]
        time_ids = self.once(
            ("time ids", *size, noisy.device, dtype), lambda: torch.tensor([*size, 0, 0, *size], dtype=dtype)
        )
        return self.denoiser(
            noisy.to(dtype),
            times,
            encoder_hidden_states=text["sequence"].to(dtype),
            added_cond_kwargs={
                "text_embeds": text["pooled"].to(dtype),
                "time_ids": time_ids.expand(len(noisy), -1),
            },
            return_dict=False,
        )[0]
