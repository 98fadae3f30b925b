# SPDX-License-Identifier: Apache-2.0
"""What both stages do around the loop: load the base, put an adapter on, make an optimiser, take it off."""

from __future__ import annotations

import torch
from peft import PeftConfig
from torch import nn

from ..bases import Base
from ..errors import AdapterStateError
from ..tuner.placing import remember, restore
from .settings import TrainingConfig


def targets(base: Base, config: TrainingConfig) -> list[str] | str:
    """The modules to adapt, as PEFT takes them."""
    if config.target_modules is None:
        return base.target_modules
    if any(sign in config.target_modules for sign in r"\^$*+?()[]{}|"):
        return config.target_modules
    return [name.strip() for name in config.target_modules.split(",")]


def inject(base: Base, adapter: PeftConfig, name: str, config: TrainingConfig) -> list[nn.Parameter]:
    """Put an adapter on the denoiser, whose own weights are frozen; its factors are float32.

    Returns:
        The parameters that train.

    Raises:
        AdapterStateError: the denoiser has adapters already.
        NoTargetModulesError, ConfigError and what else the tuner raises; the denoiser is then as it was.
    """
    denoiser = base.denoiser
    if getattr(denoiser, "peft_config", None):
        raise AdapterStateError(
            f"expected a denoiser without adapters, found {', '.join(denoiser.peft_config)}: unload them first"
        )
    remember(denoiser)
    denoiser.requires_grad_(False)
    before = set(denoiser.parameters())
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            denoiser.add_adapter(adapter, adapter_name=name)
    except BaseException:
        restore(denoiser, every=True)
        raise
    own = [parameter for parameter in denoiser.parameters() if parameter not in before]
    for parameter in own:
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if config.gradient_checkpointing:
        denoiser.enable_gradient_checkpointing()
    denoiser.train()
    return [parameter for parameter in own if parameter.requires_grad]
