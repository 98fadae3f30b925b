# SPDX-License-Identifier: Apache-2.0
"""Downs and subjects on a stock diffusers pipeline object: load, choose, delete, and undo to the last bit.

`enable_meta_lora(pipe)` gives one pipeline object a class with `MetaLoraLoaderMixin`; no diffusers class is changed.
The adapters sit on the denoiser (`pipe.transformer` or `pipe.unet`) as PEFT adapters do, beside ordinary LoRAs.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.lora_base import _func_optionally_disable_offloading
from torch import nn

from . import checkpoint, hub
from .base_model import check_fits
from .config_file import read_config
from .errors import AdapterStateError, PipelineError
from .injection import (
    activate,
    active_adapters,
    configs_of,
    copy_factors,
    down_on_model,
    inject,
    meta_layers,
    remember,
    remove_adapter,
    require_adapter,
    restore,
    settle,
)
from .tuner import DownSource, MetaLoraConfig

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
        kind: Any = type(pipe)
        pipe.__class__ = _enabled(kind)
    return pipe


@functools.cache
def _enabled(cls: Any) -> type:
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
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name) or hasattr(nn.ParameterDict, name):
            raise AdapterStateError(
                f"expected an adapter name of letters, digits, '_' and '-', found {name!r}, which torch cannot hold or "
                "keeps for itself. Choose another one."
            )
        if name in configs_of(model):
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
                return down_on_model(model, config.down_fingerprint) or hub.find_down(config, at, place)

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
        before = active_adapters(model)
        remember(model)
        with _offload_paused(self):
            try:
                inject(model, config, name)
                copy_factors(model, tensors, name)
                activate(model, [name] if active else before)
                configs_of(model)[name].down_fingerprint = fingerprint
            except BaseException:
                remove_adapter(model, name)
                settle(model, before)
                raise

    def unload_meta_lora(self) -> None:
        """Remove every Down and subject: the denoiser's modules, flags and weights are what they were, bit for bit.

        Ordinary LoRAs stay.
        """
        model = _denoiser(self)
        with _offload_paused(self):
            restore(model)

    def save_meta_lora(self, folder: str | os.PathLike[str], adapter_name: str, **options: Any) -> None:
        """Write an adapter as a Down or a subject; the options are those of `save_down` and `save_subject`.

        Raises:
            AdapterNotFoundError: there is no such adapter.
        """
        model = _denoiser(self)
        is_down = require_adapter(model, adapter_name).stage == "meta"
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
        if len(weights) != len(names):
            raise AdapterStateError(
                f"expected {len(names)} weights for {names}, found {len(weights)}. Give one for each."
            )
        everywhere = {name for listed in self.get_list_adapters().values() for name in listed}
        ordinary = everywhere - {n for n, config in configs_of(model).items() if isinstance(config, MetaLoraConfig)}
        for name in set(names) - ordinary:
            require_adapter(model, name)
        if ordinary & set(names):
            super().set_adapters(names, weights)  # type: ignore[misc]
            return
        activate(model, names)
        for name, weight in zip(names, weights, strict=True):
            for layer in meta_layers(model):
                layer.set_scale(name, 1.0 if weight is None else float(weight))

    def get_active_adapters(self) -> list[str]:
        """Names of the adapters that take part in the next image."""
        return active_adapters(_denoiser(self))

    def get_list_adapters(self) -> dict[str, list[str]]:
        """Names of all loaded adapters, by the component that holds them, as diffusers lists them."""
        listed: dict[str, list[str]] = {}
        if hasattr(super(), "get_list_adapters"):
            listed = dict(super().get_list_adapters())  # type: ignore[misc]
        component, model = _named_denoiser(self)
        names = list(configs_of(model))
        return {**listed, component: names} if names else listed

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """Delete adapters; a Down that only they used goes with them, and after the last one the denoiser is restored.

        Raises:
            AdapterNotFoundError: an adapter that is not loaded.
            AdapterStateError: a Down whose subjects are still loaded. Nothing has been deleted then.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        model = _denoiser(self)
        known = configs_of(model)
        others = [name for name in names if name in known and not isinstance(known[name], MetaLoraConfig)]
        ours = [name for name in names if name not in others]
        for name in ours:
            require_adapter(model, name)
            users = {user for layer in meta_layers(model) for user in layer.subjects_of(name)} - set(ours)
            if users:
                raise AdapterStateError(
                    f"expected no subject on the Down {name!r}, found {', '.join(sorted(users))}. Delete them first."
                )
        if others and hasattr(super(), "delete_adapters"):
            super().delete_adapters(others)  # type: ignore[misc]
        with _offload_paused(self):
            active = [name for name in active_adapters(model) if name not in ours]
            for name in sorted(ours, key=lambda name: known[name].stage == "meta"):
                remove_adapter(model, name)
            settle(model, active)

    def disable_meta_lora(self) -> None:
        """Make every image the base model's until `enable_meta_lora`, ordinary LoRAs aside."""
        for layer in meta_layers(_denoiser(self)):
            layer.enable_adapters(False)

    def enable_meta_lora(self) -> None:
        """Undo `disable_meta_lora`."""
        for layer in meta_layers(_denoiser(self)):
            layer.enable_adapters(True)


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


def _free_name(model: nn.Module, at: hub.Location) -> str:
    wanted = re.sub(r"[^A-Za-z0-9_-]+", "-", os.path.basename(os.path.normpath(at.subfolder or at.name))).strip("-")
    taken = configs_of(model)
    names = (f"{wanted or 'adapter'}{f'-{count}' if count else ''}" for count in range(len(taken) + 2))
    return next(name for name in names if name not in taken and not hasattr(nn.ParameterDict, name))


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
