# SPDX-License-Identifier: Apache-2.0
"""What a model holds of Meta-LoRA: its layers, their paths, its Downs and their fingerprints."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import AdapterNotFoundError, AdapterStateError, MissingDownError
from . import subject_index
from .down import DOWN, MID, MID_INIT, UP, DownSource, fingerprint
from .layer import MetaLoraLayer
from .subject_index import SubjectIndex, TokenSlots


def meta_layers(model: nn.Module) -> list[MetaLoraLayer]:
    """The Meta-LoRA layers of a model, without their paths."""
    return [layer for _, layer in _named_layers(model)]


class Seen:
    """What was seen of all Meta-LoRA layers of a model when they were last looked at.

    Attributes:
        layers: each with its name in the model, by a weak reference.
        indices: each index of subjects, with a layer that reads it, weakly too.
        merged: whether a layer is. disabled: whether one is.
    """

    def __init__(self, model: nn.Module) -> None:
        self._state = subject_index.state_of_layers
        found = list(_named_layers(model))
        self.layers = [(name, weakref.ref(layer)) for name, layer in found]
        self.indices = list({id(m.subject_index): (m.subject_index, weakref.ref(m)) for _, m in found}.values())
        self.merged = any(layer.merged for _, layer in found)
        self.disabled = any(layer.disable_adapters for _, layer in found)
        self._slots: dict[Any, int] = {}

    def holds(self, model: nn.Module) -> bool:
        """Whether it is still so. Layers come, go and change through this package; others take off all of them."""
        if self._state is not subject_index.state_of_layers or not self.layers:
            return False
        name, layer = self.layers[0]
        try:
            return model.get_submodule(name) is layer()
        except AttributeError:
            return False

    def homes(self) -> list[tuple[SubjectIndex, torch.device]]:
        """Each index of subjects, and where the layers are that read it."""
        return [(index, layer.adapter_device()) for index, known in self.indices if (layer := known()) is not None]

    def give_tables(self, tables: Mapping[str, TokenSlots]) -> None:
        """Let each layer have its table of tokens, by path, or an empty one; those that were given last they have."""
        if all(index.tables is tables and index.tables_state is self._state for index, _ in self.indices):
            return
        nobody = TokenSlots()
        for name, known in self.layers:
            if (layer := known()) is not None:
                layer.token_table = tables.get(module_path(name), nobody)
        for index, _ in self.indices:
            index.tables, index.tables_state = tables, self._state

    def slots(self) -> int:
        """The fewest slots of what a layer shows, a large number if none shows anything."""
        shown = tuple(index.shown for index, _ in self.indices)
        if shown not in self._slots:
            layers = [layer for _, reference in self.layers if (layer := reference()) is not None]
            self._slots[shown] = min((layer.active_slots() for layer in layers), default=1)
        return self._slots[shown]


_seen: weakref.WeakKeyDictionary[nn.Module, Seen] = weakref.WeakKeyDictionary()


def seen(model: nn.Module) -> Seen:
    """What a model's layers have in common, without a visit to them if nothing has changed since the last one.

    Of a module that was not adapted itself but holds adapted ones nothing is remembered: others may join them.
    """
    known = _seen.get(model)
    if known is None or not known.holds(model):
        known = Seen(model)
        if hasattr(model, "peft_config"):
            _seen[model] = known
    return known


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
    for path, layer, key in _with_down(model, name):
        mid, up = layer.mean_subject(key)
        state[f"{path}.{DOWN}"] = layer.metalora_down[key].detach()
        state[f"{path}.{MID_INIT}"] = layer.metalora_mid_init[key]
        state[f"{path}.{MID}"], state[f"{path}.{UP}"] = mid.unsqueeze(0), up.unsqueeze(0)
    return state


def _with_down(model: nn.Module, name: str) -> list[tuple[str, MetaLoraLayer, str]]:
    """The layers that hold a Down, with path and its key there; `name` and the error are those of `down_state`."""
    keys = ((path, layer, layer.down_key.get(name, name)) for path, layer in meta_lora_layers(model))
    found = [(path, layer, key) for path, layer, key in keys if key in layer.metalora_down]
    if not found:
        raise MissingDownError(f"The model holds no Down named {name!r}. Load one, or name an adapter that has one.")
    return found


def down_fingerprint(model: nn.Module, name: str) -> str:
    """Return the fingerprint of a Down on the model.

    One that was put there checked, and has not been written since, keeps that of its file in whatever precision the
    model holds it. Any other's is computed; what a configuration claims counts only if the tensors bear it out.

    Raises:
        MissingDownError: the model has no such Down.
    """
    layers = _with_down(model, name)
    downs = {f"{path}.{DOWN}": layer.metalora_down[key].detach() for path, layer, key in layers}
    known = {layer.known_fingerprint(key) for _, layer, key in layers}
    if len(known) == 1 and (mark := known.pop()) is not None:
        return mark
    found, claimed = fingerprint(downs), getattr(configs_of(model).get(layers[-1][2]), "down_fingerprint", None)
    for dtype in (torch.bfloat16, torch.float16) if claimed not in (None, found) else ():
        narrow = {path: down.to(dtype) for path, down in downs.items()}  # PEFT widens what it loads
        same = all(torch.equal(narrow[path].to(down.dtype), down) for path, down in downs.items())
        if same and fingerprint(narrow) == claimed:
            return str(claimed)
    return found


def meta_lora_layers(model: nn.Module) -> Iterator[tuple[str, MetaLoraLayer]]:
    """Yield (path, layer) for each Meta-LoRA layer; the path is the base model's, without PEFT's wrappers."""
    for name, layer in _named_layers(model):
        yield module_path(name), layer


def _named_layers(model: nn.Module) -> Iterator[tuple[str, MetaLoraLayer]]:
    """As `named_modules` has them, without a look at the dozen containers of factors in each."""
    left: list[tuple[str, nn.Module]] = [("", model)]
    seen = set()
    while left:
        name, module = left.pop()
        if module in seen:
            continue
        seen.add(module)
        children = [*module.named_children()]
        if isinstance(module, MetaLoraLayer):
            yield name, module
            children = [child for child in children if child[0] == "base_layer"]
        start = f"{name}." if name else ""
        left += [(start + own, child) for own, child in reversed(children)]


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
