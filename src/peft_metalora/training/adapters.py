# SPDX-License-Identifier: Apache-2.0
"""What both stages do around the loop: load the base, put an adapter on, make an optimiser, take it off."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ..errors import AdapterStateError, ConfigError
from .bases import Base
from .settings import TrainingConfig


def choose_device(name: str | None) -> torch.device:
    """The device of that name, or this process's GPU if there is one, or the CPU."""
    gpu = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    return torch.device(name or (gpu if torch.cuda.is_available() else "cpu"))


def choose_dtype(mixed_precision: str, device: torch.device) -> torch.dtype:
    """Precision of the frozen base."""
    if mixed_precision == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[mixed_precision]


def autocast(mixed_precision: str, device: torch.device, *, adapter_casts: bool = False) -> Any:
    """Context for a forward pass.

    Args:
        adapter_casts: the adapter brings its float32 factors to the precision of the base by itself, as Meta-LoRA does
            and PEFT's LoRA does not. In bfloat16 nothing is then left for autocast to do: the base runs as pipelines
            run it, and its norms hand on two bytes a number instead of four.
    """
    dtype = choose_dtype(mixed_precision, device)
    native = dtype == torch.float32 or (dtype == torch.bfloat16 and adapter_casts)
    return nullcontext() if native else torch.autocast(device.type, dtype)


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
    denoiser.requires_grad_(False)
    before = set(denoiser.parameters())
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            denoiser.add_adapter(adapter, adapter_name=name)
    except BaseException:
        eject(denoiser)
        raise
    own = [parameter for parameter in denoiser.parameters() if parameter not in before]
    for parameter in own:
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if config.gradient_checkpointing:
        denoiser.enable_gradient_checkpointing()
    denoiser.train()
    return [parameter for parameter in own if parameter.requires_grad]


def eject(denoiser: Any) -> None:
    """Take every adapter off the denoiser: its modules are the ones it had before."""
    for path, module in list(denoiser.named_modules()):
        if isinstance(module, BaseTunerLayer):
            parent, _, name = path.rpartition(".")
            setattr(denoiser.get_submodule(parent), name, module.get_base_layer())
    denoiser.__dict__.pop("peft_config", None)
    if hasattr(denoiser, "_hf_peft_config_loaded"):
        denoiser._hf_peft_config_loaded = False
    denoiser.eval()


@contextmanager
def set_aside(denoiser: Any) -> Iterator[None]:
    """Take the adapters off for the length of a `with` block; then the same layers are back in their places."""
    layers = {path: module for path, module in denoiser.named_modules() if isinstance(module, BaseTunerLayer)}
    kept = "peft_config", "_hf_peft_config_loaded"
    flags = {name: vars(denoiser)[name] for name in kept if name in vars(denoiser)}
    training = denoiser.training
    eject(denoiser)
    try:
        yield
    finally:
        eject(denoiser)
        for path, layer in layers.items():
            parent, _, name = path.rpartition(".")
            setattr(denoiser.get_submodule(parent), name, layer)
        vars(denoiser).update(flags)
        denoiser.train(training)


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


def optimizer_options(cls: type[Optimizer], config: TrainingConfig, device: torch.device) -> dict[str, Any]:
    """Keyword arguments of every optimiser of a run."""
    fused = {"fused": True} if cls in _FUSED and device.type == "cuda" else {}
    return {"lr": config.learning_rate, "weight_decay": config.weight_decay, **fused}


def make_scheduler(optimizer: Optimizer, config: TrainingConfig, steps: int) -> LRScheduler:
    """diffusers' learning-rate schedule of that name, warm-up included."""
    name = config.lr_scheduler
    if name == "constant" and config.lr_warmup_steps:
        name = "constant_with_warmup"
    return get_scheduler(name, optimizer, num_warmup_steps=config.lr_warmup_steps, num_training_steps=steps)
