# SPDX-License-Identifier: Apache-2.0
"""What of a diffusers pipeline the adapters sit on, and who may change it when: locks, and offloading kept away."""

from __future__ import annotations

import functools
import inspect
import itertools
import os
import re
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar, cast

from accelerate.hooks import AlignDevicesHook, remove_hook_from_module
from diffusers import ModelMixin
from diffusers.hooks.group_offloading import (
    _GROUP_OFFLOADING,
    _get_top_level_group_offload_hook,
    _maybe_remove_and_reapply_group_offloading,
)
from diffusers.loaders.lora_base import _func_optionally_disable_offloading
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..errors import AdapterStateError, PipelineError
from ..tuner.on_model import configs_of, meta_lora_layers, seen


def named_denoiser(pipe: Any) -> tuple[str, nn.Module]:
    """The model of a pipeline that denoises, out of torch.compile's wrapper, with the name of the component.

    It is `pipe.transformer` or `pipe.unet`, or else the one ModelMixin among the components that is asked with a time.

    Raises:
        PipelineError: there is none, or there are several.
    """
    if isinstance(getattr(pipe, "transformer_2", None), nn.Module):
        raise PipelineError(
            f"expected a pipeline of one denoiser, found a {type(pipe).__name__} of two transformers, each for a part "
            "of the noise levels (as Wan 2.2 A14B has), where a person on one would be half shown. Use a base of one, "
            "such as Wan 2.2 TI2V-5B or Wan 2.1 T2V."
        )
    for component in ("transformer", "unet"):
        model = getattr(pipe, component, None)
        if isinstance(model, nn.Module):
            return component, getattr(model, "_orig_mod", model)
    parts = {name: getattr(part, "_orig_mod", part) for name, part in getattr(pipe, "components", {}).items()}
    found = {name: part for name, part in parts.items() if isinstance(part, ModelMixin) and _takes_a_time(part)}
    if len(found) != 1:
        raise PipelineError(
            "expected a pipeline with a denoiser: a transformer, a unet, or one other model that takes a time, found a "
            f"{type(pipe).__name__} with {', '.join(found) or 'none'}. Put the adapter on its model with "
            "model.add_adapter(MetaLoraConfig(...)) instead."
        )
    return next(iter(found.items()))


def _takes_a_time(model: nn.Module) -> bool:
    """Whether a model denoises; a ControlNet is asked with a time as well, but serves a denoiser."""
    names = inspect.signature(model.forward).parameters
    return any(name.startswith("timestep") for name in names) and "ControlNet" not in type(model).__name__


def denoiser(pipe: Any) -> nn.Module:
    """As `named_denoiser`, without the name."""
    return named_denoiser(pipe)[1]


@contextmanager
def uncompiled(pipe: Any) -> Iterator[None]:
    """Within the block components stand on the pipeline without torch.compile's wrapper, under which diffusers' verbs
    for LoRAs pass them over without a word."""
    own = vars(pipe)
    wrapped = {name: part for name, part in own.items() if isinstance(part, nn.Module) and hasattr(part, "_orig_mod")}
    own.update({name: part._orig_mod for name, part in wrapped.items()})
    try:
        yield
    finally:
        own.update(wrapped)


def adapted_parts(pipe: Any) -> list[nn.Module]:
    """The components with adapters among those that diffusers can adapt, and the denoiser."""
    found = [denoiser(pipe), *(getattr(pipe, name, None) for name in getattr(pipe, "_lora_loadable_modules", ()))]
    parts = {id(part): part for part in (getattr(part, "_orig_mod", part) for part in found)}
    return [part for part in parts.values() if isinstance(part, nn.Module) and configs_of(part)]


def tuner_layers(part: nn.Module) -> list[Any]:
    """The layers of any method on a component."""
    return [module for module in part.modules() if isinstance(module, BaseTunerLayer)]


def refuse_fused(layers: Iterable[Any]) -> None:
    """Raise AdapterStateError if something is fused: it would show in every image, or PEFT take it out, for good."""
    if fused := sorted({name for layer in layers for name in layer.merged_adapters}):
        raise AdapterStateError(
            f"expected base weights with nothing fused into them, found {', '.join(fused)}. Use unfuse_meta_lora (or "
            "diffusers' unfuse_lora) first."
        )


def all_layers(pipe: Any) -> list[Any]:
    """The layers of any method on all components."""
    return [layer for part in adapted_parts(pipe) for layer in tuner_layers(part)]


_locks: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()
_books: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()
_coming: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()
_guard = threading.Lock()


def lock_of(model: nn.Module) -> AbstractContextManager[object]:
    """Held while a model generates and while its adapters change, so that neither happens during the other."""
    with _guard:
        return _locks.setdefault(model, threading.RLock())


def books_of(model: nn.Module) -> AbstractContextManager[object]:
    """Held for moments, to know or change who is in which table; whoever needs `lock_of` too takes that first."""
    with _guard:
        return _books.setdefault(model, threading.RLock())


@contextmanager
def name_kept(model: nn.Module, name: str) -> Iterator[None]:
    """Within the block, which `lock_of` is held for, a name is an adapter's that is not on the model yet."""
    with books_of(model):
        _coming[model] = name
    try:
        yield
    finally:
        with books_of(model):
            del _coming[model]


def is_adapter(model: nn.Module, name: str) -> bool:
    """Whether an adapter of the model has this name, or one that is coming; to be asked under `books_of`."""
    return name in configs_of(model) or _coming.get(model) == name


Method = TypeVar("Method", bound=Callable[..., Any])


def while_idle(method: Method) -> Method:
    """Let a method run inside `self._idle()`: what it changes never gets into an image that another thread draws."""

    @functools.wraps(method)
    def alone(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self._idle():
            return method(self, *args, **kwargs)

    return cast(Method, alone)


def free_name(taken: Callable[[str], bool], path: str | os.PathLike[str]) -> str:
    """A name after a path or repository that an adapter can have and nobody has yet."""
    last = os.path.basename(os.path.normpath(path))
    wanted = re.sub(r"[^A-Za-z0-9_-]+", "-", last).strip("-")
    names = (f"{wanted or 'adapter'}{f'-{count}' if count else ''}" for count in itertools.count())
    return next(name for name in names if not taken(name) and not hasattr(nn.ParameterDict, name))


@contextmanager
def offload_paused(pipe: Any) -> Iterator[None]:
    """Take offload hooks off while modules or base weights are exchanged; put them back as they were, same device.

    Raises:
        PipelineError: group offloading to disk.
    """
    model = denoiser(pipe)
    own_factors(model)
    if (hook := _get_top_level_group_offload_hook(model)) is not None:
        _refuse_disk(hook)
    model_offload, sequential_offload, group_offload = _func_optionally_disable_offloading(pipe)
    if sequential_offload or group_offload:
        for part in _factor_containers(model):
            part.to("cpu")  # where new factors are made beside them
    try:
        yield
    finally:
        if model_offload:
            pipe.enable_model_cpu_offload(device=pipe._offload_device)
        elif sequential_offload:
            pipe.enable_sequential_cpu_offload(device=pipe._offload_device)
        elif group_offload:
            _maybe_remove_and_reapply_group_offloading(model)
        own_factors(model)


def own_factors(model: nn.Module) -> None:
    """Keep adapters on the device that sequential and leaf-level group offloading compute on.

    Those hooks wait for a call of the module that holds a parameter, and the containers of factors are never called:
    their weights would stay where they are parked, without data even. Blocks and models move with what is in them.

    Raises:
        PipelineError: group offloading to disk.
    """
    if not _hooks_around_factors(model):
        return
    for part in _factor_containers(model):
        hooks = vars(part)
        if isinstance(hook := hooks.get("_hf_hook"), AlignDevicesHook):
            remove_hook_from_module(part)
            part.to(hook.execution_device)
        registry: Any = hooks.get("_diffusers_hook")
        if registry is not None and (hook := registry.get_hook(_GROUP_OFFLOADING)) is not None:
            _refuse_disk(hook)
            hook.group.onload_()
            if hook.group.stream is not None:
                hook.group.stream.synchronize()
            registry.remove_hook(_GROUP_OFFLOADING, recurse=False)


def _hooks_around_factors(model: nn.Module) -> bool:
    """Whether there may be offloading: it hooks every layer or none, so that the first and the last one are asked,
    with what is around and in them."""
    layers = seen(model).layers
    for name, known in (*layers[:1], *layers[-1:]):
        around = [model]
        for child in name.split("."):
            around.append(around[-1].get_submodule(child))
        layer = known()
        for part in (*around, *(() if layer is None else _parts(layer))):
            registry: Any = vars(part).get("_diffusers_hook")  # the first image leaves an empty one on the model
            if "_hf_hook" in vars(part) or (registry is not None and registry.hooks):
                return True
    return False


def refresh_offload(model: nn.Module) -> None:
    """After factors were overwritten in place: renew the pinned copies that block-level offloading by streams keeps."""
    if not _hooks_around_factors(model):
        return
    hook = _get_top_level_group_offload_hook(model)
    if hook is not None and hook.config.stream is not None:
        _maybe_remove_and_reapply_group_offloading(model)
        own_factors(model)


def _refuse_disk(hook: Any) -> None:
    if hook.config.offload_to_disk_path:
        raise PipelineError(
            "expected group offloading to host memory, found offload_to_disk_path: diffusers reads its files again by "
            "name, whatever adapters came meanwhile. Leave out offload_to_disk_path."
        )


def _factor_containers(model: nn.Module) -> Iterator[nn.Module]:
    for _, layer in meta_lora_layers(model):
        yield from _parts(layer)


def _parts(layer: nn.Module) -> Iterator[nn.Module]:
    for name, part in layer.named_children():
        if name not in ("base_layer", "metalora_kept"):  # weights that unfusing needs may stay parked
            yield part
