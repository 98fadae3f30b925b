# SPDX-License-Identifier: Apache-2.0
"""Downs and subjects on a stock diffusers pipeline object: load, choose, delete, and undo to the last bit.

`enable_meta_lora(pipe)` gives one pipeline object a class with `MetaLoraLoaderMixin`; no diffusers class is changed.
The adapters sit on the denoiser (`pipe.transformer` or `pipe.unet`) as PEFT adapters do, beside ordinary LoRAs.
"""

from __future__ import annotations

import functools
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.lora_base import _func_optionally_disable_offloading
from peft import inject_adapter_in_model
from peft.functional import delete_adapter, set_adapter
from torch import nn

from . import checkpoint, hub
from .base_model import check_fits
from .config_file import read_config
from .errors import AdapterNotFoundError, AdapterStateError, PipelineError
from .tuner import DownSource, MetaLoraConfig, MetaLoraLayer, down_fingerprint, down_state
from .tuner.subjects import meta_lora_layers

Pipeline = TypeVar("Pipeline", bound=DiffusionPipeline)


def enable_meta_lora(pipe: Pipeline) -> Pipeline:
    """Give a pipeline object the methods of `MetaLoraLoaderMixin`; calling it again changes nothing.

    Args:
        pipe: any diffusers pipeline whose denoiser is `pipe.transformer` or `pipe.unet`.

    Returns:
        The same object, its class now a subclass of what it was, of the same name.

    Raises:
        PipelineError: there is no denoiser to adapt.
    """
    if not isinstance(pipe, MetaLoraLoaderMixin):
        _denoiser(pipe)
        pipe.__class__ = _enabled(type(pipe))
    return pipe


@functools.cache
def _enabled(cls: type) -> type:
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return type(cls.__name__, (MetaLoraLoaderMixin, cls), names)


class MetaLoraLoaderMixin:
    """Methods for Downs and subjects, named as diffusers names those for LoRA; inherit it before a pipeline class."""

    def load_meta_lora(
        self,
        path_or_repo: str | os.PathLike[str],
        adapter_name: str | None = None,
        *,
        subfolder: str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
    ) -> str:
        """Load a Down or a subject, from a local folder or the Hub; a subject brings its Down, once per model.

        A subject becomes the active adapter. A Down is added without being active, so that it changes no image;
        `set_adapters` with its name shows the mean of the subjects it was trained on.

        Args:
            adapter_name: by default the last part of the path or repository.
            subfolder: and the rest, as huggingface_hub takes them.

        Returns:
            The adapter's name.

        Raises:
            BaseModelMismatchError: it was made for another base model.
            AdapterStateError: the name is taken.
            Everything that `load_down` and `load_subject` raise. The pipeline is then as it was.
        """
        at = hub.locate(
            path_or_repo,
            subfolder=subfolder,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            force_download=force_download,
        )
        model = _denoiser(self)
        name = adapter_name or _free_name(model, at)
        if name in getattr(model, "peft_config", {}):
            raise AdapterStateError(
                f"expected a new adapter name, found {name!r}, which this pipeline has already. "
                "Choose another one, or delete_adapters it first."
            )
        folder = hub.fetch(at)
        if read_config(folder).stage == "meta":
            down = checkpoint.load_down(folder)
            check_fits(model, down, name=str(path_or_repo))
            self._install(down.config, down.tensors, name, down.fingerprint, active=False)
        else:

            def find(config: MetaLoraConfig, place: Any) -> DownSource:
                return _on_model(model, config.down_fingerprint) or hub.find_down(config, at, place)

            subject = checkpoint.load_subject(folder, find_down=find)
            check_fits(model, subject.down, name=str(path_or_repo))
            self._install_subject(subject, name)
        return name

    def _install_subject(self, subject: checkpoint.SubjectSource, name: str) -> None:
        with hub.given(subject.down):
            self._install(subject.config, subject.tensors, name, subject.down.fingerprint, active=True)

    def _install(
        self, config: MetaLoraConfig, tensors: Mapping[str, torch.Tensor], name: str, fingerprint: str, active: bool
    ) -> None:
        model = _denoiser(self)
        before = _active_adapters(model)
        _remember(model)
        with _offload_paused(self):
            try:
                _inject(model, config, name)
                _copy_factors(model, tensors, name)
                _activate(model, [name] if active else before)
                model.peft_config[name].down_fingerprint = fingerprint  # type: ignore[union-attr]
            except BaseException:
                _remove_adapter(model, name)
                if not _meta_layers(model):
                    _restore(model)
                else:
                    _activate(model, before)
                raise

    def unload_meta_lora(self) -> None:
        """Remove every Down and subject: the denoiser's modules, flags and weights are what they were, bit for bit.

        Ordinary LoRAs stay.
        """
        model = _denoiser(self)
        with _offload_paused(self):
            _restore(model)

    def save_meta_lora(self, folder: str | os.PathLike[str], adapter_name: str, **options: Any) -> None:
        """Write an adapter as a Down or a subject; the options are those of `save_down` and `save_subject`.

        Raises:
            AdapterNotFoundError: there is no such adapter.
        """
        model = _denoiser(self)
        is_down = _require(model, adapter_name).stage == "meta"
        save = checkpoint.save_down if is_down else checkpoint.save_subject
        save(folder, model, adapter_name, **options)

    def set_adapters(
        self,
        adapter_names: str | Sequence[str],
        adapter_weights: float | Sequence[float | None] | None = None,
    ) -> None:
        """Make these adapters active and no others; a weight multiplies an adapter's output.

        Raises:
            AdapterNotFoundError: an adapter that is not loaded.
            AdapterStateError: the number of weights is not that of the names.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        weights = list(adapter_weights) if isinstance(adapter_weights, Sequence) else [adapter_weights] * len(names)
        model = _denoiser(self)
        known = getattr(model, "peft_config", {})
        ours = [name for name in names if isinstance(known.get(name), MetaLoraConfig)]
        if len(weights) != len(names):
            raise AdapterStateError(
                f"expected {len(names)} weights for {names}, found {len(weights)}. Give one for each."
            )
        if len(ours) < len(names) and hasattr(super(), "set_adapters"):
            super().set_adapters(names, weights)  # type: ignore[misc]
            return
        for name in names:
            _require(model, name)
        _activate(model, names)
        for name, weight in zip(names, weights, strict=True):
            for layer in _meta_layers(model):
                layer.set_scale(name, 1.0 if weight is None else float(weight))

    def get_active_adapters(self) -> list[str]:
        """Names of the adapters that take part in the next image."""
        return _active_adapters(_denoiser(self))

    def get_list_adapters(self) -> dict[str, list[str]]:
        """Names of all loaded adapters, by the component that holds them, as diffusers lists them."""
        listed: dict[str, list[str]] = {}
        if hasattr(super(), "get_list_adapters"):
            listed = dict(super().get_list_adapters())  # type: ignore[misc]
        component, model = _named_denoiser(self)
        names = list(getattr(model, "peft_config", {}))
        return {**listed, component: names} if names else listed

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """Delete adapters; a Down that only they used goes with them, and after the last one the denoiser is restored.

        Raises:
            AdapterNotFoundError: an adapter that is not loaded.
            AdapterStateError: a Down whose subjects are still loaded. Nothing has been deleted then.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        model = _denoiser(self)
        known = getattr(model, "peft_config", {})
        others = [name for name in names if name in known and not isinstance(known[name], MetaLoraConfig)]
        ours = [name for name in names if name not in others]
        for name in ours:
            _require(model, name)
            users = {user for layer in _meta_layers(model) for user in layer.subjects_of(name)} - set(ours)
            if users:
                raise AdapterStateError(
                    f"expected no subject on the Down {name!r}, found {', '.join(sorted(users))}. Delete them first."
                )
        if others and hasattr(super(), "delete_adapters"):
            super().delete_adapters(others)  # type: ignore[misc]
        with _offload_paused(self):
            for name in sorted(ours, key=lambda name: known[name].stage == "meta"):
                _remove_adapter(model, name)
            if not any(isinstance(config, MetaLoraConfig) for config in getattr(model, "peft_config", {}).values()):
                _restore(model)

    def disable_meta_lora(self) -> None:
        """Make every image the base model's until `enable_meta_lora`, ordinary LoRAs aside."""
        for layer in _meta_layers(_denoiser(self)):
            layer.enable_adapters(False)

    def enable_meta_lora(self) -> None:
        """Undo `disable_meta_lora`."""
        for layer in _meta_layers(_denoiser(self)):
            layer.enable_adapters(True)


# The denoiser and its adapters


def _named_denoiser(pipe: Any) -> tuple[str, nn.Module]:
    for component in ("transformer", "unet"):
        model = getattr(pipe, component, None)
        if isinstance(model, nn.Module):
            return component, getattr(model, "_orig_mod", model)
    raise PipelineError(
        f"expected a pipeline with a denoiser named transformer or unet, found a {type(pipe).__name__}. "
        "Put the adapter on its model with model.add_adapter(MetaLoraConfig(...)) instead."
    )


def _denoiser(pipe: Any) -> nn.Module:
    return _named_denoiser(pipe)[1]


def _meta_layers(model: nn.Module) -> list[MetaLoraLayer]:
    return [module for module in model.modules() if isinstance(module, MetaLoraLayer)]


def _require(model: nn.Module, name: str) -> MetaLoraConfig:
    configs = getattr(model, "peft_config", {})
    if not isinstance(configs.get(name), MetaLoraConfig):
        raise AdapterNotFoundError(
            f"expected a loaded Down or subject, found no {name!r} among {sorted(configs) or 'no adapters'}. "
            "Load it with load_meta_lora."
        )
    return configs[name]


def _free_name(model: nn.Module, at: hub.Location) -> str:
    wanted = re.sub(r"[^A-Za-z0-9_-]+", "-", os.path.basename(os.path.normpath(at.subfolder or at.name))).strip("-")
    taken = getattr(model, "peft_config", {})
    names = (f"{wanted or 'adapter'}{f'-{count}' if count else ''}" for count in range(len(taken) + 1))
    return next(name for name in names if name not in taken)


def _on_model(model: nn.Module, fingerprint: str | None) -> DownSource | None:
    """The Down of this fingerprint if the model has it already, in the model's own precision."""
    for key in sorted({key for layer in _meta_layers(model) for key in layer.metalora_down}):
        if down_fingerprint(model, key) == fingerprint:
            owner = next(name for layer in _meta_layers(model) for name, used in layer.down_key.items() if used == key)
            return DownSource(model.peft_config[owner], down_state(model, key), str(fingerprint))
    return None


def _inject(model: nn.Module, config: MetaLoraConfig, name: str) -> None:
    if hasattr(model, "_hf_peft_config_loaded"):
        model._hf_peft_config_loaded = True
    with warnings.catch_warnings():
        # PEFT warns of a second adapter on a model, which is what a pipeline's user asks for.
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
        inject_adapter_in_model(config, model, name)
    for layer in _meta_layers(model):
        layer.set_requires_grad(name, False)


@torch.no_grad()
def _copy_factors(model: nn.Module, tensors: Mapping[str, torch.Tensor], name: str) -> None:
    for path, layer in meta_lora_layers(model):
        if name not in layer.metalora_mid:
            continue
        layer.metalora_mid[name].copy_(tensors[f"{path}.metalora_mid"])
        layer.metalora_up[name].copy_(tensors[f"{path}.metalora_up"])
        if layer.stage[name] == "meta":
            layer.metalora_down[name].copy_(tensors[f"{path}.metalora_down"])
            layer.metalora_mid_init[name].copy_(tensors[f"{path}.metalora_mid_init"])


def _active_adapters(model: nn.Module) -> list[str]:
    names: dict[str, None] = {}
    for module in model.modules():
        if hasattr(module, "base_layer") and hasattr(module, "active_adapters"):
            names.update(dict.fromkeys(module.active_adapters))
    known = getattr(model, "peft_config", {})
    return [name for name in names if name in known]


def _activate(model: nn.Module, names: list[str]) -> None:
    set_adapter(model, names, inference_mode=True)


def _remove_adapter(model: nn.Module, name: str) -> None:
    if name in getattr(model, "peft_config", {}):
        delete_adapter(model, name, prefix="metalora_")
        model.peft_config.pop(name, None)  # type: ignore[union-attr]


_BEFORE = "_meta_lora_before"


def _remember(model: nn.Module) -> None:
    """Keep what injection changes beside the modules: the base's trainability and diffusers' flag."""
    if not _meta_layers(model) and _BEFORE not in vars(model):
        flags = {id(parameter): parameter.requires_grad for parameter in model.parameters()}
        vars(model)[_BEFORE] = (flags, getattr(model, "_hf_peft_config_loaded", None), hasattr(model, "peft_config"))


def _restore(model: nn.Module) -> None:
    """Put the base layers back where they were, and forget that there were adapters of ours."""
    for path, module in list(model.named_modules()):
        if isinstance(module, MetaLoraLayer):
            if module.merged:
                module.unmerge()
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, module.base_layer)
    configs = getattr(model, "peft_config", {})
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


@contextmanager
def _offload_paused(pipe: Any) -> Iterator[None]:
    """Take offload hooks off while modules are exchanged, and put them back, as diffusers' own loaders do."""
    model_offload, sequential_offload, group_offload = _func_optionally_disable_offloading(pipe)
    try:
        yield
    finally:
        if model_offload:
            pipe.enable_model_cpu_offload()
        elif sequential_offload:
            pipe.enable_sequential_cpu_offload()
        elif group_offload:
            from diffusers.hooks.group_offloading import _maybe_remove_and_reapply_group_offloading

            _maybe_remove_and_reapply_group_offloading(_denoiser(pipe))
