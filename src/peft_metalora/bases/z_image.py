# SPDX-License-Identifier: Apache-2.0
"""Z-Image (base and Turbo).

Text: the last but one hidden states of Qwen3, as long as the prompt is. Images: FLUX.1's latents. Rectified flow, whose
transformer is told 1 - t and predicts the way back to the noise. Image and text share one stream of blocks: adapted by
default are attention and feed-forward layers of these, and of the two blocks that refine image tokens alone before; the
two that refine text tokens see no image and are left alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import FlowBase, Text


class ZImage(FlowBase):
    """`ZImagePipeline`."""

    pipeline_class = "ZImagePipeline"
    large_encoders = ("text_encoder",)
    ragged_layers = r"cap_embedder\..*"
    host_looks = "how long each prompt is"
    target_modules = r"(noise_refiner|layers)\.\d+\.(attention\.(to_q|to_k|to_v|to_out\.0)|feed_forward\.(w1|w2|w3))"

    def text_of(self, prompts: Sequence[str]) -> Text:
        """`sequence` (n, longest, d), filled up with zeros, and `length` (n,)."""
        found, _ = self.pipeline.encode_prompt(
            list(prompts),
            device=self.encoders_device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
        )
        lengths = torch.tensor([len(one) for one in found], device=found[0].device)
        longest = max(len(one) for one in found)
        return {
            "sequence": torch.stack([F.pad(one, (0, 0, 0, longest - len(one))) for one in found]),
            "length": lengths,
        }

    @property
    def pixel_multiple(self) -> int:
        return 2 * self.pipeline.vae_scale_factor

    def predict(self, noisy: Tensor, text: Text, times: Tensor) -> Tensor:
        dtype = self.dtype
        rows = zip(text["sequence"].to(dtype), text["length"].tolist(), strict=True)
        back = self.denoiser(
            list(noisy.to(dtype).unsqueeze(2)), 1 - times, [row[:length] for row, length in rows], return_dict=False
        )[0]
        return -torch.stack(list(back)).squeeze(2)
