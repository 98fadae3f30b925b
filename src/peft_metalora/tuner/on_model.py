# SPDX-License-Identifier: Apache-2.0
"""What a model holds of Meta-LoRA: its layers, their paths, its Downs and their fingerprints."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import AdapterNotFoundError, AdapterStateError, MissingDownError
from .down import DOWN, MID, MID_INIT, UP, DownSource, fingerprint
from .layer import MetaLoraLayer


def meta_layers(model: nn.Module) -> list[MetaLoraLayer]:
    """The Meta-LoRA layers of a model, without their paths."""
    return [module for module in model.modules() if isinstance(module, MetaLoraLayer)]


def configs_of(model: nn.Module) -> dict[str, Any]:
    """PEFT's configurations of a model by adapter name, those of other methods too; empty where there are none."""
    return getattr(model, "peft_config", {})


def down_on_model(model: nn.Module, fingerprint: str | None) -> DownSource | None:
    """The Down of this fingerprint if the model has it already, in the model's own precision."""
    for key in sorted({key for layer in meta_layers(model) for key in layer.metalora_down}):
        if down_fingerprint(model, key) == fingerprint:
            owner = next(name for layer in meta_layers(model) for name, used in layer.down_key.items() if used == key)
            return DownSource(configs_of(model)[owner], down_state(model, key), str(fingerprint))
    return None


def know_down(model: nn.Module, name: str, fingerprint: str) -> None:
    """Remember the fingerprint of a stage 'meta' adapter that was just filled with a Down that had been checked."""
    for layer in meta_layers(model):
        if name in layer.metalora_down:
            layer.know_down(name, fingerprint)


def down_state(model: nn.Module, name: str) -> dict[str, Tensor]:
    """Return the tensors of a Down on the model: `{module}.metalora_down`, `.metalora_mid_init`, and the mean
    subject as `.metalora_mid` (1, r, meta_r) and `.metalora_up` (1, d_out, r).

    Args:
        name: a stage 'meta' adapter, a subject (its Down is meant) or the key of a Down.

    Raises:
        MissingDownError: the model has no such Down.
    """
    state: dict[str, Tensor] = {}
    for path, layer in meta_lora_layers(model):
        key = layer.down_key.get(name, name)
        if key not in layer.metalora_down:
            continue
        mid, up = layer.mean_subject(key)
        state[f"{path}.{DOWN}"] = layer.metalora_down[key].detach()
        state[f"{path}.{MID_INIT}"] = layer.metalora_mid_init[key]
        state[f"{path}.{MID}"], state[f"{path}.{UP}"] = mid.unsqueeze(0), up.unsqueeze(0)
    if not state:
        raise MissingDownError(f"The model holds no Down named {name!r}. Load one, or name an adapter that has one.")
    return state


def down_fingerprint(model: nn.Module, name: str) -> str:
    """Return the fingerprint of a Down on the model.

    One that was put there checked, and has not been written since, keeps that of its file in whatever precision the
    model holds it. Any other's is computed; what a configuration claims counts only if the tensors bear it out.

    Raises:
        MissingDownError: the model has no such Down.
    """
    downs: dict[str, Tensor] = {}
    key, known = name, set()
    for path, layer in meta_lora_layers(model):
        key = layer.down_key.get(name, name)
        if key in layer.metalora_down:
            downs[f"{path}.{DOWN}"] = layer.metalora_down[key].detach()
            known.add(layer.known_fingerprint(key))
    if not downs:
        raise MissingDownError(f"The model holds no Down named {name!r}. Load one, or name an adapter that has one.")
    if len(known) == 1 and (mark := known.pop()) is not None:
        return mark
    found, claimed = fingerprint(downs), getattr(configs_of(model).get(key), "down_fingerprint", None)
    for dtype in (torch.bfloat16, torch.float16) if claimed not in (None, found) else ():
        narrow = {path: down.to(dtype) for path, down in downs.items()}  # PEFT widens what it loads
        same = all(torch.equal(narrow[path].to(down.dtype), down) for path, down in downs.items())
        if same and fingerprint(narrow) == claimed:
            return str(claimed)
    return found


def meta_lora_layers(model: nn.Module) -> Iterator[tuple[str, MetaLoraLayer]]:
    """Yield (path, layer) for each Meta-LoRA layer; the path is the base model's, without PEFT's wrappers."""
    for name, module in model.named_modules():
        if isinstance(module, MetaLoraLayer):
            yield module_path(name), module


def layers_of(model: nn.Module, adapter_name: str) -> list[tuple[str, MetaLoraLayer]]:
    """The layers that hold an adapter, with their paths; raises AdapterNotFoundError when none does."""
    layers = [(path, layer) for path, layer in meta_lora_layers(model) if adapter_name in layer.metalora_mid]
    if not layers:
        known = sorted({name for _, layer in meta_lora_layers(model) for name in layer.metalora_mid})
        raise AdapterNotFoundError(
            f"The model has no Meta-LoRA adapter {adapter_name!r}. It has: {', '.join(known) or 'none'}."
        )
    return layers


def require_slot(layer: MetaLoraLayer, adapter_name: str, slot: int) -> None:
    """Raise AdapterStateError when an adapter of this layer has no such slot."""
    slots = layer.metalora_mid[adapter_name].shape[0]
    if isinstance(slot, bool) or not isinstance(slot, int) or not 0 <= slot < slots:
        raise AdapterStateError(f"Adapter {adapter_name!r} has {slots} slot(s), 0 to {slots - 1}; got {slot!r}.")


_WRAPPERS = {"_fsdp_wrapped_module", "_orig_mod", "base_layer"}


def module_path(name: str) -> str:
    """Return a module's name in the bare base model: no PEFT, FSDP or compile wrappers in it."""
    name = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
    return name.removeprefix("base_model.").removeprefix("model.") if name.startswith("base_model.model.") else name
