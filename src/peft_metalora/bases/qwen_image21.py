# SPDX-License-Identifier: Apache-2.0
"""Qwen-Image 2.1.

Text: the last hidden states of Qwen3-VL behind a template. Images: latents of an autoencoder for clips that has a
channel for what is opaque, one frame, normalised channel by channel; each is a token. Rectified flow. Text and image
share one stream of blocks, in which the text is told the time 0: adapted by default are attention and feed-forward
layers of these. All blocks share one modulation, which sees the time only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .base import Text
from .qwen_image import QwenImage


class QwenImage21(QwenImage):
    """`QwenImage21Pipeline`."""

    pipeline_class = "QwenImage21Pipeline"
    target_modules = r"transformer_blocks\.\d+\.(attn\.(to_q|to_k|to_v|to_out\.0)|img_mlp\.(proj|gate_layer|out))"
    host_looks = "where the image's tokens are"

    def _default_sequence_length(self) -> int:
        return min(512, self.pipeline.processor.tokenizer.model_max_length)

    def draw(self, **options: Any) -> Any:
        """As of Qwen-Image, without the channel for what is opaque."""
        images = super().draw(**options)
        if isinstance(images, Tensor):
            return images[:, :3]
        if isinstance(images[0], Image.Image):
            return [image.convert("RGB") for image in images]
        return images[..., :3]

    def latents_of(self, pixels: Tensor) -> Tensor:
        return super().latents_of(F.pad(pixels, (0, 0, 0, 0, 0, 1), value=1.0))  # a photo is opaque

    def text_of(self, prompts: Sequence[str]) -> Text:
        """As of Qwen-Image."""
        sequence, mask, _ = self.pipeline.encode_prompt(list(prompts), device=self.encoders_device)
        if mask is None:
            mask = torch.ones(sequence.shape[:2], device=sequence.device)
        return {"sequence": sequence, "mask": mask.bool()}

    @property
    def token_side(self) -> int:
        return self.vae_scale_factor

    def tokens(self, latents: Tensor) -> int:
        return latents.shape[-2] * latents.shape[-1]

    def predict(self, noisy: Tensor, text: Text, times: Tensor) -> Tensor:
        n, _, height, width = noisy.shape
        dtype, sequence = self.dtype, text["sequence"].to(self.dtype)
        length, places = sequence.shape[1], height * width // 4  # of 2 x 2 tokens each
        velocity = self.denoiser(
            hidden_states=noisy.flatten(2).transpose(1, 2).to(dtype),
            timestep=times.to(dtype),
            encoder_hidden_states=sequence,
            encoder_hidden_states_mask=text["mask"],
            img_shapes=[[(1, height, width)]] * n,
            img_mask=self.once(
                ("places", length, places, noisy.device), lambda: (torch.arange(length + places) >= length)[None]
            ).expand(n, -1),
            return_dict=False,
        )[0]
        return velocity[:, -height * width :].transpose(1, 2).unflatten(2, (height, width))
