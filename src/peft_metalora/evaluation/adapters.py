# SPDX-License-Identifier: Apache-2.0
"""The rivals as PEFT has them: one configuration a kind, and how it gets onto a denoiser."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from peft import LoHaConfig, LoKrConfig, LoraConfig, OFTConfig, PeftConfig, VeraConfig, get_peft_model
from torch import nn

from ..bases import Base
from ..training.injecting import inject
from ..training.stage_settings import TrainingConfig
from ..tuner import DownSource, MetaLoraConfig, set_warmup
from ..tuner.placing import remember

NAME = "default"


def adapter_config(
    kind: str, modules: Any, *, r: int = 1, block: int = 32, down: DownSource | None = None
) -> PeftConfig:
    """PEFT's configuration of a rival; its scale is 1 (alpha = r).

    Args:
        kind: lora, dora, loha, lokr, oft, vera or random-down.
        modules: what to adapt, as `target_modules` takes it.
        r: rank. block: size of OFT's blocks.
        down: gives "random-down" its ranks and modules.

    Raises:
        ValueError: another kind, or "random-down" without a Down.
    """
    if kind in ("lora", "dora"):
        return LoraConfig(r=r, lora_alpha=r, target_modules=modules, use_dora=kind == "dora")
    if kind == "loha":
        return LoHaConfig(r=r, alpha=r, target_modules=modules)
    if kind == "lokr":
        return LoKrConfig(r=r, alpha=r, target_modules=modules)
    if kind == "oft":
        return OFTConfig(r=0, oft_block_size=block, target_modules=modules, use_cayley_neumann=True)
    if kind == "vera":
        return VeraConfig(r=r, target_modules=modules, save_projection=False)
    if kind != "random-down" or down is None:
        raise ValueError(f"expected a kind of adapter, and a Down for 'random-down', found {kind!r} and {down}")
    return replace(down.config, down_fingerprint=None, inference_mode=False, num_slots=1)


def put_adapter(base: Base, adapter: PeftConfig, config: TrainingConfig) -> list[nn.Parameter]:
    """Put a rival on the denoiser, on its device; a Down that the adapter draws itself stays as drawn.

    Returns:
        The parameters that train.

    Raises:
        AdapterStateError and what else `training.injecting.inject` raises.
    """
    denoiser = base.denoiser
    if isinstance(adapter, VeraConfig):  # its projections live on PEFT's wrapper, which injection has none of
        remember(denoiser)
        denoiser.requires_grad_(False)
        get_peft_model(denoiser, adapter, adapter_name=NAME)
    else:
        inject(base, adapter, NAME, config)
    if isinstance(adapter, MetaLoraConfig) and adapter.stage == "meta":
        set_warmup(denoiser, True, NAME)
    denoiser.to(base.device)  # shared projections and index buffers may lie elsewhere
    return [parameter for parameter in denoiser.parameters() if parameter.requires_grad]
