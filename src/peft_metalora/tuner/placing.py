# SPDX-License-Identifier: Apache-2.0
"""Adapters on a bare model: put on, filled, chosen, taken off, and the model put back as it was, module by module.

Works on any nn.Module (a diffusers model above all); knows neither files nor pipelines.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft import inject_adapter_in_model
from peft.functional import delete_adapter, set_adapter
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..errors import AdapterNotFoundError
from .config import MetaLoraConfig
from .down import DOWN, MAGNITUDE, MID, MID_INIT, UP, DownSource, given
from .layer import MetaLoraLayer
from .on_model import configs_of, meta_layers, meta_lora_layers
from .registration import PREFIX


def require_adapter(model: nn.Module, name: str) -> MetaLoraConfig:
    configs = configs_of(model)
    if not isinstance(configs.get(name), MetaLoraConfig):
        raise AdapterNotFoundError(
            f"expected a loaded Down or subject, found no {name!r} among {sorted(configs) or 'no adapters'}. "
            "Load it with load_meta_lora."
        )
    return configs[name]


def inject(model: nn.Module, config: MetaLoraConfig, name: str, down: DownSource | None = None) -> None:
    """Put an adapter's layers on the model, nothing of it trainable; a subject's stand on `down`."""
    if hasattr(model, "_hf_peft_config_loaded"):
        model._hf_peft_config_loaded = True  # type: ignore[assignment]
    with warnings.catch_warnings(), given(down):
        # PEFT warns of a second adapter on a model, which is what a pipeline's user asks for.
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
        inject_adapter_in_model(config, model, name)
    for layer in meta_layers(model):
        layer.set_requires_grad(name, False)


@torch.no_grad()
def copy_factors(model: nn.Module, tensors: Mapping[str, torch.Tensor], name: str) -> None:
    """Fill an adapter's factors, keyed as `load_down` and `load_subject` give them."""
    for path, layer in meta_lora_layers(model):
        if name not in layer.metalora_mid:
            continue
        layer.metalora_mid[name].copy_(tensors[f"{path}.{MID}"])
        layer.metalora_up[name].copy_(tensors[f"{path}.{UP}"])
        if f"{path}.{MAGNITUDE}" in tensors:
            layer.metalora_magnitude[name].copy_(tensors[f"{path}.{MAGNITUDE}"])
        if layer.stage[name] == "meta":
            layer.metalora_down[name].copy_(tensors[f"{path}.{DOWN}"])
            layer.metalora_mid_init[name].copy_(tensors[f"{path}.{MID_INIT}"])


def active_adapters(model: nn.Module) -> list[str]:
    """Names of the active adapters of any kind."""
    names: dict[str, None] = {}
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            names.update(dict.fromkeys(module.active_adapters))
    known = configs_of(model)
    return [name for name in names if name in known]


def activate(model: nn.Module, names: list[str]) -> None:
    """Make these adapters active, and no others, without making them trainable."""
    set_adapter(model, names, inference_mode=True)


def remove_adapter(model: nn.Module, name: str) -> None:
    """Delete an adapter if the model has it; its layers stay (see `settle`)."""
    if name in configs_of(model):
        with warnings.catch_warnings():
            # PEFT says which adapter it makes active instead; the callers decide that themselves.
            warnings.filterwarnings("ignore", message="Adapter .* was active which is now deleted")
            delete_adapter(model, name, prefix=PREFIX)
        configs_of(model).pop(name, None)


_BEFORE = "_meta_lora_before"


def remember(model: nn.Module) -> None:
    """Keep what injection changes beside the modules: the base's trainability and diffusers' flag."""
    if not meta_layers(model) and _BEFORE not in vars(model):
        flags = {id(parameter): parameter.requires_grad for parameter in model.parameters()}
        vars(model)[_BEFORE] = (flags, getattr(model, "_hf_peft_config_loaded", None), hasattr(model, "peft_config"))


def settle(model: nn.Module, active: list[str]) -> None:
    """After adapters went: activate what was active, take off layers that hold nothing, restore all after the last."""
    if any(isinstance(config, MetaLoraConfig) for config in configs_of(model).values()):
        _put_back(model, [layer for layer in meta_layers(model) if not layer.metalora_mid])
        activate(model, active)
    else:
        restore(model)


def restore(model: nn.Module) -> None:
    """Put the base layers back where they were, and forget that there were adapters of ours."""
    _put_back(model, meta_layers(model))
    configs = configs_of(model)
    for name in [name for name, config in configs.items() if isinstance(config, MetaLoraConfig)]:
        del configs[name]
    flags, loaded, had_config = vars(model).pop(_BEFORE, ({}, None, True))
    for parameter in model.parameters():
        if id(parameter) in flags:
            parameter.requires_grad_(flags[id(parameter)])
    if not configs and hasattr(model, "peft_config") and not had_config:
        del model.peft_config
        if loaded is not None:
            model._hf_peft_config_loaded = loaded


def _put_back(model: nn.Module, layers: list[MetaLoraLayer]) -> None:
    """Replace layers of ours by the base layers inside them, their weights unmerged."""
    gone = {id(layer) for layer in layers}
    for path, module in list(model.named_modules()):
        if id(module) in gone:
            layer = cast(MetaLoraLayer, module)
            if layer.merged:
                layer.unmerge()
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, layer.base_layer)


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
