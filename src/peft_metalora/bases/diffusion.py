# SPDX-License-Identifier: Apache-2.0
"""Noise prediction in discrete time (DDPM, arXiv 2006.11239): what Stable Diffusion 1.5, 2.1 and SDXL share."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DDPMScheduler
from torch import Tensor

from ..errors import BaseModelMismatchError
from .base import Base

# Of a UNet: self- and cross-attention, and the feed-forward layers beside them. Convolutions are left alone: they hold
# texture, and their Down would be nine times as wide.
UNET_TARGETS = r".*\.transformer_blocks\.\d+\.(attn[12]\.(to_q|to_k|to_v|to_out\.0)|ff\.net\.(0\.proj|2))"


class DiffusionBase(Base):
    """x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise; predicted is the noise, or v (arXiv 2202.00512), as the model says."""

    denoiser_name = "unet"
    target_modules = UNET_TARGETS
    default_weighting = "none"

    def __init__(self, pipeline: Any, **options: Any) -> None:
        super().__init__(pipeline, **options)
        # The pipeline's own scheduler samples; this one only knows the noise levels.
        self.schedule = DDPMScheduler.from_config(pipeline.scheduler.config)
        self.prediction = self.schedule.config.prediction_type
        if self.prediction not in ("epsilon", "v_prediction"):
            raise BaseModelMismatchError(
                f"expected a model that predicts 'epsilon' or 'v_prediction', found {self.prediction!r}: choose another"
            )

    def sample_times(self, latents: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw timesteps (n,) int64, uniform by default."""
        count = self.schedule.config.num_train_timesteps
        return (self.density(latents, generator) * count).long().clamp(max=count - 1)

    def add_noise(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        return self.schedule.add_noise(latents, noise, times)

    def target(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        return noise if self.prediction == "epsilon" else self.schedule.get_velocity(latents, noise, times)
