# SPDX-License-Identifier: Apache-2.0
"""Tiny models and helpers that the tuner's tests share."""

from __future__ import annotations

import copy

import torch
from diffusers import FluxTransformer2DModel
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from peft_metalora.tuner import DownSource, MetaLoraConfig, down_fingerprint, down_state
from peft_metalora.tuner.on_model import meta_lora_layers


class Mlp(nn.Module):
    """Two linear layers, 12 -> 16 -> 10."""

    def __init__(self) -> None:
        super().__init__()
        self.lin0 = nn.Linear(12, 16)
        self.lin1 = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin1(torch.relu(self.lin0(x)))


def mlp(seed: int = 0) -> Mlp:
    torch.manual_seed(seed)
    return Mlp().eval()


def flux(seed: int = 0) -> FluxTransformer2DModel:
    """One double and one single block, two heads of 16."""
    torch.manual_seed(seed)
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        axes_dims_rope=(4, 6, 6),
    ).eval()


def flux_inputs(batch: int = 2) -> dict[str, Tensor]:
    """What a pipeline gives `flux`: six image tokens and three of text."""
    torch.manual_seed(1)
    return {
        "hidden_states": torch.randn(batch, 6, 4),
        "encoder_hidden_states": torch.randn(batch, 3, 8),
        "pooled_projections": torch.randn(batch, 8),
        "timestep": torch.rand(batch),
        "img_ids": torch.zeros(6, 3),
        "txt_ids": torch.zeros(3, 3),
    }


def config(**settings) -> MetaLoraConfig:
    """r=2, meta_r=4 on both layers, with an Up that is not zero, unless told otherwise."""
    return MetaLoraConfig(
        **{"r": 2, "meta_r": 4, "target_modules": ["lin0", "lin1"], "init_weights": False, **settings}
    )


def adapted(base: nn.Module | None = None, **settings) -> PeftModel:
    return get_peft_model(copy.deepcopy(base) if base is not None else mlp(), config(**settings)).eval()


def randomise(model: nn.Module, seed: int = 1) -> nn.Module:
    """Give every slot of every adapter its own Mid and Up."""
    generator = torch.Generator().manual_seed(seed)
    for _, layer in meta_lora_layers(model):
        for factors in (layer.metalora_mid, layer.metalora_up):
            for factor in factors.values():
                factor.data.copy_(torch.randn(factor.shape, generator=generator) * 0.3)
    return model


def down_source(model: nn.Module, name: str = "default") -> DownSource:
    """The Down of a model as a loader would return it."""
    tensors = {key: value.clone() for key, value in down_state(model, name).items()}
    return DownSource(model.peft_config[name], tensors, down_fingerprint(model, name))


def layer_of(model: nn.Module, path: str = "lin0"):
    return dict(meta_lora_layers(model))[path]
