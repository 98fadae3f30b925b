# SPDX-License-Identifier: Apache-2.0
"""Adapters on a bare model: put on, filled, chosen, taken off, and the model put back as it was, module by module.

Works on any nn.Module (a diffusers model above all); knows neither files nor pipelines.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft import inject_adapter_in_model
from peft.functional import delete_adapter, set_adapter
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..errors import AdapterNotFoundError, NonFiniteError
from .config import MetaLoraConfig
from .down import DOWN_PARTS, MAGNITUDE, MID, UP, DownSource, given
from .functional import using_slots
from .layer import MetaLoraLayer
from .on_model import configs_of, meta_layers, meta_lora_layers, seen
from .registration import PREFIX
from .subject_index import layers_changed


def require_adapter(model: nn.Module, name: str, among: Mapping[str, Any] | None = None) -> MetaLoraConfig:
    """The configuration of a Down or subject on the model.

    Args:
        among: those of its configurations that may be meant; by default all.

    Raises:
        AdapterNotFoundError: there is none.
    """
    known = configs_of(model) if among is None else among
    if not isinstance(config := known.get(name), MetaLoraConfig):
        raise AdapterNotFoundError(
            f"expected a loaded Down or subject, found no {name!r} among {sorted(known) or 'no adapters'}. "
            "Give the name of one of them, or load it with load_meta_lora."
        )
    return config


def inject(model: nn.Module, config: MetaLoraConfig, name: str, down: DownSource | None = None) -> None:
    """Put an adapter's layers on the model, nothing of it trainable; a subject's stand on `down`."""
    remember(model)
    if hasattr(model, "_hf_peft_config_loaded"):
        model._hf_peft_config_loaded = True  # type: ignore[assignment]
    # Of tensors that are made in inference mode torch counts no writes.
    with warnings.catch_warnings(), given(down), torch.inference_mode(False):
        # PEFT warns of a second adapter on a model, which is what a pipeline's user asks for.
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
        inject_adapter_in_model(config, model, name)
    for layer in meta_layers(model):
        layer.set_requires_grad(name, False)


@torch.no_grad()
def copy_factors(model: nn.Module, tensors: Mapping[str, torch.Tensor], name: str) -> None:
    """Fill an adapter's factors, keyed as `load_down` and `load_subject` give them.

    Raises:
        NonFiniteError: a number that the model's dtype cannot hold.
    """
    for path, layer in meta_lora_layers(model):
        if name not in layer.metalora_mid:
            continue
        parts = DOWN_PARTS if layer.stage[name] == "meta" else (MID, UP)
        for part in (*parts, MAGNITUDE) if f"{path}.{MAGNITUDE}" in tensors else parts:
            target = getattr(layer, part)[name]
            value = tensors[f"{path}.{part}"].to(target.dtype)
            if not torch.isfinite(value).all():
                raise NonFiniteError(
                    f"expected numbers that {value.dtype} can hold in {path}.{part}, found more than that. Load the "
                    "base model in bfloat16 or float32."
                )
            target.copy_(value)


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


def fold_active(model: nn.Module) -> None:
    """Fold the active adapters of one slot, and no others.

    A layer folds in its first pass by itself, but a graph keeps to what it finds when it is compiled.
    """
    for layer in meta_layers(model):
        names = [name for name in layer.active_adapters if name in layer.metalora_mid]
        for name in set(layer.metalora_folded) - set(names):
            layer.unfold(name)
        for name in names:
            if len(layer.metalora_mid[name]) == 1 and not layer.is_folded(name):
                layer.fold(name)


@contextmanager
def choice_kept(model: nn.Module) -> Iterator[None]:
    """Leave active what is active, and training what trains, while adapters come in a `with` block."""
    names = active_adapters(model)
    before = {id(layer): layer._active_adapter for layer in _tuner_layers(model).values()}
    yield
    for layer in _tuner_layers(model).values():
        layer._active_adapter = before.get(id(layer), names)
    layers_changed()


@contextmanager
def chosen_or_as_before(layers: Iterable[Any]) -> Iterator[None]:
    """Where a `with` block that chooses adapters and their weights fails, these layers of any method are as before.

    diffusers goes from layer to layer, and may find only on the way what it does not take.
    """
    before = [(layer, layer._active_adapter, {**getattr(layer, "scaling", {})}) for layer in layers]
    try:
        yield
    except BaseException:
        for layer, active, scaling in before:
            layer._active_adapter = active
            getattr(layer, "scaling", {}).update(scaling)
        layers_changed()
        raise


@contextmanager
def shown_alone(model: nn.Module, name: str | None) -> Iterator[None]:
    """For the length of a `with` block our layers show this adapter, or none, in slot 0; then what they showed before.

    What other methods' layers show, what is merged and what trains is not touched; `activate` would change all of it.
    """
    indices = [index for index, _ in seen(model).homes()]
    before = [(index, index.shown, index.by_tokens) for index in indices]
    for index in indices:
        index.shown, index.by_tokens = () if name is None else (name,), False
    try:
        with using_slots(model, None) if indices else nullcontext():
            yield
    finally:
        for index, shown, by_tokens in before:
            index.shown, index.by_tokens = shown, by_tokens


def remove_adapters(model: nn.Module, names: Iterable[str], active: list[str]) -> None:
    """Delete those of our adapters that the model has, in this order; then `active` are the active ones.

    Layers that hold none any more are taken off, and after the last adapter of ours the model is restored.
    """
    for name in names:
        if name in configs_of(model):
            with warnings.catch_warnings():
                # PEFT says which adapter it makes active instead, which is decided here.
                warnings.filterwarnings("ignore", message="Adapter .* was active which is now deleted")
                delete_adapter(model, name, prefix=PREFIX)
            configs_of(model).pop(name, None)
    if any(isinstance(config, MetaLoraConfig) for config in configs_of(model).values()):
        _put_back(model, [layer for layer in meta_layers(model) if not layer.metalora_mid])
        if active_adapters(model) != active:
            activate(model, active)
    else:
        restore(model)


def remove_other_methods(model: nn.Module) -> None:
    """Take off what other methods adapt, ordinary LoRAs above all; what of it is merged stays in the weights."""
    for path, layer in reversed(_tuner_layers(model).items()):
        if not isinstance(layer, MetaLoraLayer):
            _put(model, path, layer.base_layer)
    configs = configs_of(model)
    for name in [name for name, config in configs.items() if not isinstance(config, MetaLoraConfig)]:
        del configs[name]


_BEFORE = "_meta_lora_before"


@dataclass(frozen=True)
class _Before:
    """What adapters and their training change of a model beside its modules; parameters and modules by `id`."""

    trainable: dict[int, bool]
    training: dict[int, bool]
    checkpointing: bool


def remember(model: nn.Module) -> None:
    """Keep what `restore` gives back, unless it is kept already; to be called before the first adapter comes."""
    if not meta_layers(model) and _BEFORE not in vars(model):
        vars(model)[_BEFORE] = _Before(
            {id(parameter): parameter.requires_grad for parameter in model.parameters()},
            {id(module): module.training for module in model.modules()},
            getattr(model, "is_gradient_checkpointing", False),
        )


def restore(model: nn.Module, *, every: bool = False) -> None:
    """Take our adapters off, or with `every` those of every method: modules, weights and flags are as they were."""
    _put_back(model, [layer for layer in _tuner_layers(model).values() if every or isinstance(layer, MetaLoraLayer)])
    configs = configs_of(model)
    for name in [name for name, config in configs.items() if every or isinstance(config, MetaLoraConfig)]:
        del configs[name]
    if not configs:
        vars(model).pop("peft_config", None)
        if hasattr(model, "_hf_peft_config_loaded"):
            model._hf_peft_config_loaded = False  # type: ignore[assignment]
    before: _Before | None = vars(model).pop(_BEFORE, None)
    if before is None:
        return
    for parameter in model.parameters():
        parameter.requires_grad_(before.trainable.get(id(parameter), parameter.requires_grad))
    for module in model.modules():
        module.training = before.training.get(id(module), module.training)
    if getattr(model, "is_gradient_checkpointing", False) and not before.checkpointing:
        cast(Any, model).disable_gradient_checkpointing()


@contextmanager
def set_aside(model: nn.Module) -> Iterator[None]:
    """Take all adapters off for the length of a `with` block; then the same layers are back in their places.

    The model is in inference mode meanwhile. Adapters that come in the block are gone after it.
    """
    layers, training = _tuner_layers(model), model.training
    kept = {name: vars(model).pop(name) for name in ("peft_config", _BEFORE) if name in vars(model)}
    loaded = getattr(model, "_hf_peft_config_loaded", None)
    restore(model, every=True)
    model.eval()
    try:
        yield
    finally:
        restore(model, every=True)
        for path, layer in layers.items():
            _put(model, path, layer)
        layers_changed()
        vars(model).update(kept)
        if loaded is not None:
            model._hf_peft_config_loaded = loaded
        model.train(training)


def _tuner_layers(model: nn.Module) -> dict[str, Any]:
    return {path: module for path, module in model.named_modules() if isinstance(module, BaseTunerLayer)}


def _put_back(model: nn.Module, layers: Iterable[Any]) -> None:
    """Replace layers by the modules inside them, their weights unmerged."""
    gone = {id(layer) for layer in layers}
    for path, layer in reversed(_tuner_layers(model).items()):  # those inside others first
        if id(layer) in gone:
            if layer.merged:
                layer.unmerge()
            _put(model, path, layer.base_layer)
    layers_changed()


def _put(model: nn.Module, path: str, module: Any) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
