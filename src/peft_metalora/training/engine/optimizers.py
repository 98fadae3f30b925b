# SPDX-License-Identifier: Apache-2.0
"""Optimisers and schedules by name."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ...errors import ConfigError
from ..stage_settings import StageConfig

SHORT_NAMES = {
    "adamw": "AdamW",
    "adafactor": "Adafactor",
    "sgd": "SGD",
    "adamw8bit": "bitsandbytes.optim:AdamW8bit",
    "prodigy": "prodigyopt:Prodigy",
}
"""Names of diffusers' and other trainers for optimisers."""


def optimizer_class(name: str) -> type[Optimizer]:
    """An optimiser by name: a short name in any case, a class of torch.optim, or `module:Class`.

    Raises:
        ConfigError: there is none of that name, or its package is missing.
    """
    module, _, attribute = SHORT_NAMES.get(name.lower(), name).rpartition(":")
    try:
        found = getattr(importlib.import_module(module or "torch.optim"), attribute)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if error.name != package:
            raise
        raise ConfigError(
            f"expected the package of the optimizer {name!r}, found none: pip install {package}"
        ) from error
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"optimizer must be a class of torch.optim or module:Class of an installed package, found {name!r}: {error}"
        ) from error
    if not (isinstance(found, type) and issubclass(found, Optimizer)):
        raise ConfigError(f"optimizer must be a torch.optim.Optimizer, found {name!r}")
    return found


_FUSED = torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD
"""Optimisers with one kernel for all of a step on a GPU: a fraction of the launches and of the memory moved."""


def optimizer_options(cls: type[Optimizer], config: StageConfig, device: torch.device) -> dict[str, Any]:
    """Keyword arguments of every optimiser of a run.

    Raises:
        ConfigError: the class does not take them, or makes no step from dense gradients alone.
    """
    fused = {"fused": True} if cls in _FUSED and device.type == "cuda" else {}
    options: dict[str, Any] = {"lr": config.learning_rate, "weight_decay": config.weight_decay, **fused}
    trial = nn.Parameter(torch.zeros(2, 2, device=device))
    trial.grad = torch.zeros_like(trial)
    try:
        cls([trial], **options).step()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"optimizer must take lr and weight_decay and make steps from gradients alone, found {config.optimizer!r}: "
            f"{error}"
        ) from error
    return options


def make_scheduler(optimizer: Optimizer, config: StageConfig, steps: int) -> LRScheduler:
    """diffusers' learning-rate schedule of that name, warm-up included."""
    name = config.lr_scheduler
    if name == "constant" and config.lr_warmup_steps:
        name = "constant_with_warmup"
    return get_scheduler(name, optimizer, num_warmup_steps=config.lr_warmup_steps, num_training_steps=steps)


def restore_scheduler(scheduler: LRScheduler, state: dict[str, Any]) -> None:
    """Take up a `state_dict`, of it only what a schedule keeps: `load_state_dict` would replace its methods, too."""
    own = scheduler.state_dict()
    scheduler.load_state_dict({name: state[name] for name in own if isinstance(state.get(name), type(own[name]))})
