# SPDX-License-Identifier: Apache-2.0
"""Which adapters show: Downs and subjects on a denoiser, ordinary LoRAs on every component that diffusers adapts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import nn

from ..errors import AdapterNotFoundError, AdapterStateError
from ..tuner import MetaLoraConfig, MetaLoraLayer
from ..tuner.on_model import configs_of, meta_layers
from ..tuner.placing import activate, active_adapters, chosen_or_as_before, fold_active, require_adapter
from .calling import PerSampleMixin
from .denoiser import (
    adapted_parts,
    all_layers,
    denoiser,
    named_denoiser,
    refuse_fused,
    tuner_layers,
    uncompiled,
    while_idle,
)
from .table import loaded_configs, tables_of

_DISPLACED = "_meta_lora_displaced"


def require_loaded(model: nn.Module, name: str) -> MetaLoraConfig:
    """The configuration of a Down or subject that was loaded as an adapter; the one of a table's slots is no one's.

    Raises:
        AdapterNotFoundError: there is none.
    """
    if any(table.is_own(name) for table in tables_of(model).values()):
        raise AdapterNotFoundError(
            f"expected a loaded Down or subject, found {name!r} in the table of slots alone. Show it with subjects= or "
            "regions=, let it go with the table's evict, or load_meta_lora it under another name."
        )
    return require_adapter(model, name, loaded_configs(model))


def choose(pipe: Any, names: list[str]) -> None:
    """Make these adapters active on every component, and no others."""
    for part in adapted_parts(pipe):
        activate(part, names)
    fold_active(denoiser(pipe))


def displace_ordinary(pipe: Any) -> None:
    """Keep in mind which ordinary LoRAs are active, before a subject takes their place; see `give_back`."""
    for part in adapted_parts(pipe):
        if ordinary := _ordinary(part):
            vars(part)[_DISPLACED] = ordinary


def give_back(pipe: Any) -> None:
    """As the last adapter of ours goes: the ordinary LoRAs that subjects displaced are active, if no other one is."""
    for part in adapted_parts(pipe):
        names = [name for name in vars(part).pop(_DISPLACED, ()) if name in configs_of(part)]
        if names and not _ordinary(part):
            for layer in tuner_layers(part):
                if not isinstance(layer, MetaLoraLayer):
                    layer.set_adapter(names, inference_mode=True)


def _ordinary(part: nn.Module) -> list[str]:
    """The active adapters that are not ours."""
    configs = configs_of(part)
    return [name for name in active_adapters(part) if not isinstance(configs[name], MetaLoraConfig)]


class ChoosingMixin(PerSampleMixin):
    """Choose among loaded adapters, by the names that diffusers gives to these methods."""

    @while_idle
    def set_adapters(
        self,
        adapter_names: str | Sequence[str],
        adapter_weights: float | Sequence[float | None] | None = None,
    ) -> None:
        """Make these adapters active and no others, in all components; a weight multiplies an adapter's output.

        Until it is given another one, the weight of a subject holds in calls with `subjects=` and `regions=` too.

        Raises:
            AdapterNotFoundError: an adapter that is not loaded.
            AdapterStateError: weights that are no numbers, or not as many as names; a name twice; something is fused.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        weights = list(adapter_weights) if isinstance(adapter_weights, Sequence) else [adapter_weights] * len(names)
        model = denoiser(self)
        if len(weights) != len(names):
            raise AdapterStateError(
                f"expected {len(names)} weights for {names}, found {len(weights)}. Give one for each."
            )
        if len({*names}) < len(names):
            raise AdapterStateError(f"expected each adapter once, found {names}. Give one weight for each.")
        ordinary = self._loaded() - {n for n, config in configs_of(model).items() if isinstance(config, MetaLoraConfig)}
        for name in set(names) - ordinary:
            require_loaded(model, name)
        refuse_fused(all_layers(self))
        ours = [weight for name, weight in zip(names, weights, strict=True) if name not in ordinary]
        if strange := [one for one in ours if not (one is None or (isinstance(one, Real) and math.isfinite(one)))]:
            raise AdapterStateError(f"expected a finite number as the weight of an adapter, found {strange[0]!r}.")
        if ordinary & set(names):
            with chosen_or_as_before(all_layers(self)), uncompiled(self):
                super().set_adapters(names, weights)  # type: ignore[misc]
            for layer in meta_layers(model):  # which diffusers lets train
                layer.set_adapter(names, inference_mode=True)
            fold_active(model)
            return
        choose(self, names)
        for name, weight in zip(names, weights, strict=True):
            for layer in meta_layers(model):
                layer.set_scale(name, 1.0 if weight is None else float(weight))

    def _loaded(self) -> set[str]:
        return {name for listed in self.get_list_adapters().values() for name in listed}

    def get_active_adapters(self) -> list[str]:
        """Names of the adapters that take part in the next image."""
        return active_adapters(denoiser(self))

    def get_list_adapters(self) -> dict[str, list[str]]:
        """Names of all loaded adapters, by the component that holds them, as diffusers lists them."""
        listed: dict[str, list[str]] = {}
        if hasattr(super(), "get_list_adapters"):
            listed = dict(super().get_list_adapters())  # type: ignore[misc]
        component, model = named_denoiser(self)
        names = [*loaded_configs(model)]
        return {
            **{name: found for name, found in listed.items() if name != component},
            **({component: names} if names else {}),
        }

    @while_idle
    def set_lora_device(self, adapter_names: str | Sequence[str], device: torch.device | str | int) -> None:
        """Move adapters to another device, ordinary LoRAs included; a Down goes with the last of its users.

        Raises:
            AdapterNotFoundError: an adapter that is not loaded.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        loaded = self._loaded()
        for name in names:
            if name not in loaded:
                raise AdapterNotFoundError(
                    f"expected a loaded adapter to move, found {name!r}. Loaded are {sorted(loaded) or 'none'}."
                )
        for layer in meta_layers(denoiser(self)):
            layer.move_adapters(names, torch.device(device))
        if hasattr(super(), "set_lora_device"):
            with uncompiled(self):
                super().set_lora_device(names, device)  # type: ignore[misc]

    @while_idle
    def disable_lora(self) -> None:
        """As diffusers: no adapter shows until `enable_lora`, of any method."""
        with uncompiled(self):
            super().disable_lora()  # type: ignore[misc]

    @while_idle
    def enable_lora(self) -> None:
        """Undo `disable_lora`."""
        with uncompiled(self):
            super().enable_lora()  # type: ignore[misc]

    @while_idle
    def disable_meta_lora(self) -> None:
        """Make every image the base model's until `enable_meta_lora`, ordinary LoRAs aside; what is fused comes out."""
        layers = meta_layers(denoiser(self))
        if any(layer.merged for layer in layers):  # a pass could not take it out of weights that are parked
            self.unfuse_meta_lora()  # type: ignore[attr-defined]
        for layer in layers:
            layer.enable_adapters(False)

    @while_idle
    def enable_meta_lora(self) -> None:
        """Undo `disable_meta_lora`."""
        for layer in meta_layers(denoiser(self)):
            layer.enable_adapters(True)
