# SPDX-License-Identifier: Apache-2.0
"""Downs and subjects on a stock diffusers pipeline object: load, choose, delete, and undo to the last bit.

`enable_meta_lora(pipe)` gives one pipeline object a class with `MetaLoraLoaderMixin`; no diffusers class is changed.
The adapters sit on the denoiser (`pipe.transformer` or `pipe.unet`) as PEFT adapters do, beside ordinary LoRAs.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Sequence
from typing import Any, TypeVar

from diffusers import DiffusionPipeline
from torch import nn
from typing_extensions import Unpack

from .. import checkpoint
from ..checkpoint.factors import SubjectSource
from ..errors import AdapterStateError
from ..hub.loading import HubOptions, load
from ..tuner import DownSource, MetaLoraConfig
from ..tuner.on_model import configs_of, down_on_model, know_down, meta_layers
from ..tuner.placing import (
    activate,
    active_adapters,
    copy_factors,
    inject,
    remove_adapters,
    require_adapter,
    restore,
)
from .calling import PerSampleMixin
from .denoiser import books_of, denoiser, free_name, named_denoiser, offload_paused, while_idle
from .table import tables_of

Pipeline = TypeVar("Pipeline", bound=DiffusionPipeline)


def enable_meta_lora(pipe: Pipeline) -> Pipeline:
    """Give a pipeline object the methods of `MetaLoraLoaderMixin`; calling it again changes nothing.

    Args:
        pipe: any diffusers pipeline with a denoiser: `pipe.transformer`, `pipe.unet`, or the only model that takes a
            time.

    Returns:
        The same object, its class now a subclass of what it was, of the same name.

    Raises:
        PipelineError: there is no denoiser to adapt.
    """
    if not isinstance(pipe, MetaLoraLoaderMixin):
        denoiser(pipe)
        kind: Any = type(pipe)
        pipe.__class__ = _enabled(kind)
    return pipe


@functools.cache
def _enabled(cls: Any) -> type:
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return type(cls.__name__, (MetaLoraLoaderMixin, cls), names)


class MetaLoraLoaderMixin(PerSampleMixin):
    """Methods for Downs and subjects, named as diffusers names those for LoRA; inherit it before a pipeline class."""

    @while_idle
    def load_meta_lora(
        self, path_or_repo: str | os.PathLike[str], adapter_name: str | None = None, **hub: Unpack[HubOptions]
    ) -> str:
        """Load a Down or a subject, from a local folder or the Hub; a subject brings its Down, once per model.

        A subject becomes the active adapter. A Down is added without being active, so that it changes no image;
        `set_adapters` with its name shows the mean of the subjects it was trained on.

        Args:
            adapter_name: by default the last part of the path or repository.
            hub: huggingface_hub's `subfolder`, `revision`, `token`, `cache_dir`, `local_files_only`, `force_download`.

        Returns:
            The adapter's name.

        Raises:
            BaseModelMismatchError: it was made for another base model.
            AdapterStateError: the name is taken.
            Everything that `hub.load` raises. The pipeline is then as it was.
        """
        model = denoiser(self)
        name = self._new_name(model, adapter_name, path_or_repo, hub.get("subfolder"))
        source = load(path_or_repo, model=model, known_down=functools.partial(down_on_model, model), **hub)
        self._install(source, name)
        return name

    def _new_name(
        self, model: nn.Module, wanted: str | None, path_or_repo: str | os.PathLike[str], subfolder: str | None
    ) -> str:
        taken = {
            *configs_of(model),
            *(own for table in tables_of(model).values() for own in table.names() if table.is_own(own)),
        }
        name = wanted or free_name(taken, path_or_repo, subfolder)
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name) or hasattr(nn.ParameterDict, name):
            raise AdapterStateError(
                f"expected an adapter name of letters, digits, '_' and '-', found {name!r}, which torch cannot hold or "
                "keeps for itself. Choose another one."
            )
        if name in taken:
            raise AdapterStateError(
                f"expected a new adapter name, found {name!r}, which this pipeline has already. "
                "Choose another one, or delete_adapters it first (evict it, if add_subject brought it)."
            )
        return name

    def _install(self, source: DownSource | SubjectSource, name: str) -> None:
        """Put it on the denoiser, a subject as the active adapter, or leave all as it was."""
        model = denoiser(self)
        down = source if isinstance(source, DownSource) else source.down
        before = active_adapters(model)
        with offload_paused(self):
            try:
                inject(model, source.config, name, down)
                copy_factors(model, source.tensors, name)
                activate(model, before if source is down else [name])
                if source is down:
                    know_down(model, name, down.fingerprint)
            except BaseException:
                remove_adapters(model, [name], before)
                raise

    @while_idle
    def unload_meta_lora(self) -> None:
        """Remove every Down and subject: the denoiser's modules, flags and weights are what they were, bit for bit.

        Ordinary LoRAs stay.
        """
        model = denoiser(self)
        with offload_paused(self):
            restore(model)
        tables_of(model).clear()

    @while_idle
    def save_meta_lora(self, folder: str | os.PathLike[str], adapter_name: str, **options: Any) -> None:
        """Write an adapter as a Down or a subject; the options are those of `save_down` and `save_subject`.

        Raises:
            AdapterNotFoundError: there is no such adapter.
        """
        model = denoiser(self)
        is_down = require_adapter(model, adapter_name).stage == "meta"
        save = checkpoint.save_down if is_down else checkpoint.save_subject
        save(folder, model, adapter_name, **options)

    @while_idle
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
        model = denoiser(self)
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
        return active_adapters(denoiser(self))

    def get_list_adapters(self) -> dict[str, list[str]]:
        """Names of all loaded adapters, by the component that holds them, as diffusers lists them."""
        listed: dict[str, list[str]] = {}
        if hasattr(super(), "get_list_adapters"):
            listed = dict(super().get_list_adapters())  # type: ignore[misc]
        component, model = named_denoiser(self)
        hidden = {table.adapter_name for table in tables_of(model).values()}
        names = [name for name in configs_of(model) if name not in hidden]
        return {
            **{name: found for name, found in listed.items() if name != component},
            **({component: names} if names else {}),
        }

    @while_idle
    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """Delete adapters; a Down that only they used goes with them, and after the last one the denoiser is restored.

        Raises:
            AdapterNotFoundError: an adapter that is not loaded.
            AdapterStateError: a Down whose subjects are still loaded. Nothing has been deleted then.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        model = denoiser(self)
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
        tables = tables_of(model)
        with books_of(model):
            for fingerprint, table in list(tables.items()):
                table.evict([name for name in ours if name in table])
                if not table.names():
                    # A table that holds nobody goes with the adapters that filled it.
                    ours.append(tables.pop(fingerprint).adapter_name)
        with offload_paused(self):
            active = [name for name in active_adapters(model) if name not in ours]
            remove_adapters(model, sorted(ours, key=lambda name: known[name].stage == "meta"), active)

    @while_idle
    def fuse_meta_lora(self, adapter_names: str | Sequence[str] | None = None, safe_fusing: bool = False) -> None:
        """Add adapters to the base weights, for the base's own speed; `unfuse_meta_lora` restores those to the bit.

        Args:
            adapter_names: by default the active ones.
            safe_fusing: refuse a sum that holds NaN or infinity.

        Raises:
            AdapterNotFoundError: an adapter that is not loaded.
            AdapterStateError: something is fused already, or nothing is to be.
            NonFiniteError: what `safe_fusing` found. Nothing is fused then.
        """
        model = denoiser(self)
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names or active_adapters(model))
        names = [name for name in names if adapter_names or isinstance(configs_of(model)[name], MetaLoraConfig)]
        for name in names:
            require_adapter(model, name)
        layers = meta_layers(model)
        if not names or any(layer.merged for layer in layers):
            found = "nothing active" if not names else "adapters that are fused already"
            raise AdapterStateError(
                f"expected adapters to fuse, found {found}. Use set_adapters or unfuse_meta_lora first."
            )
        with offload_paused(self):
            try:
                for layer in layers:
                    layer.merge(safe_merge=safe_fusing, adapter_names=names)
            except BaseException:
                self._unfuse(layers)
                raise

    @while_idle
    def unfuse_meta_lora(self) -> None:
        """Undo `fuse_meta_lora`: the base weights are what they were, bit for bit."""
        with offload_paused(self):
            self._unfuse(meta_layers(denoiser(self)))

    def _unfuse(self, layers: list[Any]) -> None:
        for layer in layers:
            if layer.merged:
                layer.unmerge()

    @while_idle
    def disable_meta_lora(self) -> None:
        """Make every image the base model's until `enable_meta_lora`, ordinary LoRAs aside."""
        for layer in meta_layers(denoiser(self)):
            layer.enable_adapters(False)

    @while_idle
    def enable_meta_lora(self) -> None:
        """Undo `disable_meta_lora`."""
        for layer in meta_layers(denoiser(self)):
            layer.enable_adapters(True)
