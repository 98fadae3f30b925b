# SPDX-License-Identifier: Apache-2.0
"""Wan 2.1 and 2.2, text to video, with one transformer: 2.1 of 1.3 and 14 billion numbers, 2.2 TI2V of 5 billion.

Text: the last hidden states of UMT5, filled up with zeros, which the transformer sees. A photo is a clip of one frame:
latents of a video autoencoder, normalised channel by channel, which the transformer itself cuts into 2 x 2 patches.
Rectified flow. A clip has one stream of blocks, whose tokens are those of all frames, and looks at the text by
cross-attention: adapted by default are queries, keys, values and outputs of both attentions, and the feed-forward
layers. So what is learned from a photo is in every frame.

Of a clip in which each place has a time of its own (2.2 TI2V draws with those, to begin from a picture) a photo is the
case in which all are equal, and one time says so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..errors import BaseModelMismatchError
from .base import Text
from .qwen_image import QwenLatents


class Wan(QwenLatents):
    """`WanPipeline`.

    Raises:
        BaseModelMismatchError: a pipeline of two transformers.
    """

    pipeline_class = "WanPipeline"
    large_encoders = ("text_encoder",)
    target_modules = r"blocks\.\d+\.(attn[12]\.(to_q|to_k|to_v|to_out\.0)|ffn\.net\.(0\.proj|2))"

    def __init__(self, pipeline: Any, **options: Any) -> None:
        if getattr(pipeline, "transformer_2", None) is not None or pipeline.config.boundary_ratio is not None:
            raise BaseModelMismatchError(
                "expected a Wan pipeline of one transformer, found one of two, each for a part of the noise levels (as "
                "Wan 2.2 A14B has): give Wan 2.1 T2V or Wan 2.2 TI2V-5B"
            )
        super().__init__(pipeline, **options)

    @property
    def vae_scale_factor(self) -> int:
        return self.pipeline.vae_scale_factor_spatial

    @property
    def default_side(self) -> int:
        # Its own clips are no squares; of those one with as many pixels.
        height, width = (int(self.call_parameters[name].default) for name in ("height", "width"))
        return math.isqrt(height * width) // self.pixel_multiple * self.pixel_multiple

    @property
    def frames_per_second(self) -> int:
        # As their authors play them; no configuration says it, but that TI2V is the one that expands times.
        return 24 if self.pipeline.config.expand_timesteps else 16

    def latent_frames(self, num_frames: int | None) -> int:
        drawn = num_frames or int(self.call_parameters["num_frames"].default)
        return (drawn - 1) // self.pipeline.vae_scale_factor_temporal + 1

    def draw(self, **options: Any) -> Any:
        """As of other families: of clips of one frame that frame."""
        return [clip[0] for clip in self.clips(num_frames=1, **options)]

    def clips(self, **options: Any) -> Any:
        count = options.pop("num_images_per_prompt", 1)
        return self.pipeline(**{"output_type": "pil", **options}, num_videos_per_prompt=count).frames

    def text_of(self, prompts: Sequence[str]) -> Text:
        """`sequence` (n, length, d)."""
        sequence, _ = self.pipeline.encode_prompt(
            list(prompts),
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
            device=self.encoders_device,
        )
        return {"sequence": sequence}

    def time_shift(self, latents: Tensor) -> float:
        config = self.pipeline.scheduler.config
        return float(config["flow_shift"]) if "flow_shift" in config else super().time_shift(latents)

    def predict(self, noisy: Tensor, text: Text, times: Tensor) -> Tensor:
        dtype = self.dtype
        velocity = self.denoiser(
            hidden_states=noisy.unsqueeze(2).to(dtype),
            timestep=times * self.pipeline.scheduler.config.num_train_timesteps,
            encoder_hidden_states=text["sequence"].to(dtype),
            return_dict=False,
        )[0]
        return velocity.squeeze(2)
