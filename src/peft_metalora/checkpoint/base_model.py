# SPDX-License-Identifier: Apache-2.0
"""The base model that a Down was made for: which to load, and whether a model is it, by name and by shapes."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import nn

from ..errors import BaseModelMismatchError, ConfigError, NonFiniteError
from ..settings import shown
from ..tuner import MetaLoraConfig
from ..tuner.base_layers import base_of, factor_shape
from ..tuner.down import DOWN, UP, modules_in
from ..tuner.on_model import module_path
from .untrusted import TensorEntry

PREFIX = "base_model.model."
REPO_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")

# Repositories of one architecture, of which one was distilled or tuned from another: adapters go from one to the other.
_TWINS = (
    {"black-forest-labs/FLUX.2-klein-base-4B", "black-forest-labs/FLUX.2-klein-4B"},
    {"black-forest-labs/FLUX.2-klein-base-9B", "black-forest-labs/FLUX.2-klein-9B"},
    {"krea/Krea-2-Raw", "krea/Krea-2-Turbo"},
    {"Tongyi-MAI/Z-Image", "Tongyi-MAI/Z-Image-Turbo"},
)


class _Down(Protocol):
    """A Down that has been read, or one of which only the header has."""

    @property
    def config(self) -> MetaLoraConfig: ...

    @property
    def tensors(self) -> Mapping[str, torch.Tensor | TensorEntry]: ...


def check_fits(model: nn.Module, source: _Down, *, name: str = "this Down") -> None:
    """Check that a Down was made for this base model: its modules are there, with these inputs and outputs.

    The model's name is compared as well when the Down names a Hub repository and the model knows one: it is the base
    that the Down was trained on, or one that it says it fits, which a warning says.

    Raises:
        BaseModelMismatchError
    """
    wanted, has = source.config.base_model_name_or_path, base_model_name(model)
    if has and os.path.isfile(os.path.join(has, "config.json")):  # a folder such as base/transformer, no repository
        has = None
    if wanted and has and wanted != has and REPO_ID.fullmatch(wanted) and REPO_ID.fullmatch(has):
        others = fits_of(source.config)
        if has not in others:
            told = f", or on {' or '.join(others)}, which it says it fits" if others else ""
            # By its name, as a copy of a repository often lies in a folder that is called like it.
            hint = f" If {has} is a folder of yours and no copy of that repository, write ./{has}." * os.path.isdir(has)
            raise BaseModelMismatchError(
                f"{name}: expected the base model {wanted}, found {has}. Load it on the base that it was trained on"
                f"{told}.{hint}"
            )
        warnings.warn(f"{name} was trained on {wanted} and says that it fits {has}", stacklevel=2)
    layers = _base_layers(model)
    modules = modules_in(source.tensors)
    absent = [module for module in modules if module not in layers]
    if absent:
        raise BaseModelMismatchError(
            f"{name}: expected a base model{f' ({wanted})' if wanted else ''} with the module {absent[0]}, "
            f"found a {type(model).__name__} without. Load it on the base that it was trained on."
        )
    for module in modules:
        _check_layer(
            layers[module], module, source.tensors, f"{name}: expected a base model{f' ({wanted})' if wanted else ''}"
        )


def fits_of(config: MetaLoraConfig) -> list[str]:
    """The other base models that a Down says it fits."""
    named = (config.facts or {}).get("fits")
    return [one for one in named if isinstance(one, str) and REPO_ID.fullmatch(one)] if isinstance(named, list) else []


def require_class(config: MetaLoraConfig, generic: object, name: str) -> None:
    """Check that a class is named for the base of a Down or a subject that was made with one of somebody's own.

    What reads or trains with another is told other latents and losses. The name in the file is shown, never imported.

    Raises:
        ConfigError
    """
    made_with = (config.facts or {}).get("generic")
    if made_with is not None and generic is None:
        raise ConfigError(
            f"{name}: expected the class that it was made with, {shown(made_with)}, as `generic`, found none: get that "
            "code, and name it if you trust it, for a Down's files start none by themselves"
        )


def with_twins(base: str | None, fits: Iterable[str] = ()) -> list[str]:
    """The other bases that a Down of this base fits: those that are named, and the known twins of the base."""
    return sorted({*fits, *(one for twins in _TWINS if base in twins for one in twins)} - {base or ""})


def check_layers(model: nn.Module, tensors: Mapping[str, torch.Tensor | TensorEntry], name: str) -> None:
    """Check that the factors of a Down or a subject have the inputs and outputs of those of their layers that are here.

    Raises:
        BaseModelMismatchError
    """
    layers = _base_layers(model)
    for module in modules_in(tensors):
        if module in layers:
            _check_layer(layers[module], module, tensors, f"{name}: expected a base model")


def require_held(model: nn.Module, tensors: Mapping[str, torch.Tensor], name: str) -> None:
    """Check that factors which fill adapters of the model's layers are numbers there, too.

    Raises:
        NonFiniteError: one that the dtype cannot hold.
    """
    layers = _base_layers(model)
    for key, tensor in tensors.items():
        weight = getattr(layers.get(key.rpartition(".")[0]), "weight", None)
        # Where weights have fewer bits still, factors have not.
        dtype = torch.float16 if getattr(weight, "dtype", None) == torch.float16 else torch.float32
        if not torch.isfinite(tensor.to(dtype)).all():
            raise NonFiniteError(
                f"{name}: expected numbers that {dtype} can hold in {key}, found more than that. Load the base model "
                "in bfloat16 or float32, or fetch the file again."
            )


def _base_layers(model: nn.Module) -> dict[str, Any]:
    """What there is without tuners, by its path in the bare model."""
    return {module_path(path): base_of(module) for path, module in model.named_modules()}


def _check_layer(layer: nn.Module, module: str, tensors: Mapping[str, torch.Tensor | TensorEntry], told: str) -> None:
    down, up, found = tensors.get(f"{module}.{DOWN}"), tensors.get(f"{module}.{UP}"), _shape(layer)
    outputs = found[:1] if up is None else (up.shape[1],)
    expected = (*outputs, *(found[1:] if down is None else down.shape[1:]))
    if found != expected:
        raise BaseModelMismatchError(
            f"{told} whose {module} is {expected}, found {found} (outputs, inputs). Load it on the base that it was "
            "trained on."
        )


def _shape(base: nn.Module) -> tuple[int, ...]:
    """(outputs, inputs), or (outputs, inputs, kernel...) of a linear layer or a convolution; () of anything else."""
    try:
        row, outputs = factor_shape(base)
    except AttributeError:
        return ()
    return (outputs, *row)


def base_to_load(
    given: str | None, revision: str | None, config: MetaLoraConfig, name: str, generic: object
) -> tuple[str, str | None]:
    """The base model that was asked for, or the one that a Down or a subject called `name` was made for; its revision.

    Raises:
        ConfigError: neither says. As `require_class`.
    """
    require_class(config, generic, name)
    if given:
        return given, revision
    if not config.base_model_name_or_path:
        raise ConfigError(f"{name} names no base model: give pretrained_model_name_or_path")
    return config.base_model_name_or_path, revision or config.revision


def bare_model(model: Any) -> Any:
    """The model itself, out of a PeftModel and torch.compile's wrapper."""
    model = getattr(model, "_orig_mod", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def base_model_name(model: nn.Module) -> str | None:
    """The repository id or path that a diffusers or transformers model was loaded from."""
    inner = bare_model(model)
    name = getattr(getattr(inner, "config", None), "_name_or_path", None) or getattr(inner, "name_or_path", None)
    return name if isinstance(name, str) and name else None
