# SPDX-License-Identifier: Apache-2.0
"""FLUX.1-dev's transformer with random weights and its inputs at 512 x 512 px, for benchmarks of layers and serving."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
SHAPES: dict[str, Any] = {
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
}
SMALL: dict[str, Any] = {
    **SHAPES,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 16,
    "axes_dims_rope": (4, 6, 6),
}


def with_random_weights(make: Callable[[], Any], dtype: torch.dtype, device: torch.device) -> Any:
    """A frozen model with small weights that are the same for a device, made there and in that dtype at once."""
    with init_empty_weights(include_buffers=False):  # buffers hold positions and the like
        model: nn.Module = make()
    generator = torch.Generator(device).manual_seed(0)
    for module in model.modules():
        for name, hull in module._parameters.items():
            if hull is not None:
                filled = torch.empty(hull.shape, dtype=dtype, device=device).normal_(std=0.005, generator=generator)
                module._parameters[name] = nn.Parameter(filled, requires_grad=False)
    return model.to(device, dtype)


class Flux:
    """The model in bf16 on a GPU, or a toy of its kind in float32 on the CPU; `model` is frozen and in eval mode."""

    def __init__(self, small: bool, **changes: Any) -> None:
        self.small = small
        self.device = torch.device("cpu" if small else "cuda")
        self.dtype = torch.float32 if small else torch.bfloat16
        self.config = {**(SMALL if small else SHAPES), **changes}
        self.image_tokens, self.text_tokens = (16, 8) if small else (1024, 512)
        torch.manual_seed(0)
        torch.set_default_dtype(self.dtype)
        with self.device:
            self.model = FluxTransformer2DModel(**self.config).eval().requires_grad_(False)
        torch.set_default_dtype(torch.float32)

    def twin(self) -> Any:
        """A second model on the same weights."""
        with torch.device("meta"):
            model = FluxTransformer2DModel(**self.config).eval()
        model.load_state_dict(self.model.state_dict(), assign=True)
        return model.requires_grad_(False)

    def inputs(self, batch: int) -> dict[str, Tensor]:
        """Random latents and text of a batch."""

        def noise(*shape: int) -> Tensor:
            return torch.randn(*shape, device=self.device, dtype=self.dtype)

        return {
            "hidden_states": noise(batch, self.image_tokens, self.config["in_channels"]),
            "encoder_hidden_states": noise(batch, self.text_tokens, self.config["joint_attention_dim"]),
            "pooled_projections": noise(batch, self.config["pooled_projection_dim"]),
            "timestep": torch.full((batch,), 0.5, device=self.device, dtype=self.dtype),
            "guidance": torch.full((batch,), 3.5, device=self.device, dtype=self.dtype),
            "img_ids": torch.zeros(self.image_tokens, 3, device=self.device, dtype=self.dtype),
            "txt_ids": torch.zeros(self.text_tokens, 3, device=self.device, dtype=self.dtype),
        }

    def forward(self, model: Any, batch: int) -> Callable[[], object]:
        """A forward pass of one batch, without autograd."""
        inputs = self.inputs(batch)

        def run() -> None:
            with torch.no_grad():
                model(**inputs, return_dict=False)

        return run
