# SPDX-License-Identifier: Apache-2.0
"""A subject as an ordinary LoRA, exactly: A = Mid @ Down, B = scaling * Up, alpha = rank, for every other tool.

The scale is folded into B, so that no reader can misread it. Nothing is approximated: a Meta-LoRA of rank r is a LoRA
of rank r (method: Meta-LoRA, arXiv 2503.22352; the fold is ours).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from peft.utils.other import get_pattern_key

from .files import save_tensors
from .tuner import MetaLoraConfig


class LoraPair(NamedTuple):
    """An ordinary LoRA on one module: a (r, d_in) and b (d_out, r); convolutions keep their kernel in a."""

    a: torch.Tensor
    b: torch.Tensor


def module_rank(config: MetaLoraConfig, module: str) -> int:
    """r2 of a module, its pattern considered."""
    return int(_from_pattern(config.rank_pattern, module, config.r))


def module_meta_rank(config: MetaLoraConfig, module: str) -> int:
    """r1 of a module, its pattern considered."""
    return int(_from_pattern(config.meta_rank_pattern, module, config.meta_r))


def module_scaling(config: MetaLoraConfig, module: str) -> float:
    """lora_alpha / r, or lora_alpha / sqrt(r), of a module."""
    rank = module_rank(config, module)
    alpha = _from_pattern(config.alpha_pattern, module, config.lora_alpha)
    return alpha / (math.sqrt(rank) if config.use_rslora else rank)


def _from_pattern(pattern: Mapping[str, float] | None, module: str, default: float) -> float:
    return pattern[key] if pattern and (key := get_pattern_key(list(pattern), module)) in pattern else default


def fold_subject(
    config: MetaLoraConfig, down: Mapping[str, torch.Tensor], subject: Mapping[str, torch.Tensor]
) -> dict[str, LoraPair]:
    """Fold each module's three factors into two.

    Args:
        config: the subject's.
        down: `{module}.metalora_down` (meta_r, d_in), or a convolution's (meta_r, d_in, kh, kw).
        subject: `{module}.metalora_mid` (1, r, meta_r) and `{module}.metalora_up` (1, d_out, r).

    Returns:
        A pair a module, in the order of the modules' names and in Mid's dtype; products are taken in float32 or better.
    """
    pairs = {}
    for module in sorted({name.rpartition(".")[0] for name in subject}):
        mid, up = subject[f"{module}.metalora_mid"][0], subject[f"{module}.metalora_up"][0]
        factor = down[f"{module}.metalora_down"].to(mid.device)
        wide = torch.promote_types(mid.dtype, torch.float32)
        a = (mid.to(wide) @ factor.flatten(1).to(wide)).reshape(mid.shape[0], *factor.shape[1:])
        b = (up.to(wide) * module_scaling(config, module)).reshape(*up.shape, *[1] * (factor.ndim - 2))
        pairs[module] = LoraPair(a.to(mid.dtype), b.to(mid.dtype))
    return pairs


def component_name(config: MetaLoraConfig) -> str:
    """The name that a diffusers pipeline gives the adapted model: "unet" or "transformer"."""
    return "unet" if "UNet" in (config.auto_mapping or {}).get("base_model_class", "") else "transformer"


def save_diffusers(path: Path, pairs: Mapping[str, LoraPair], component: str) -> None:
    """Write `pytorch_lora_weights.safetensors` for `pipe.load_lora_weights`; `component` is "unet" or "transformer"."""
    tensors = {}
    for module, pair in pairs.items():
        tensors[f"{component}.{module}.lora_A.weight"] = pair.a
        tensors[f"{component}.{module}.lora_B.weight"] = pair.b
    save_tensors(path, tensors)
