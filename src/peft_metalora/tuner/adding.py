# SPDX-License-Identifier: Apache-2.0
"""An adapter comes to a model, all of it or nothing: planned, put on by PEFT, bound to its Down.

The plan (which modules match, which ranks they get, which Down a subject is bound to) is made before the model is
touched, so that a config that cannot work leaves no trace; what fails later is taken back."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _ExcludedModule, _maybe_include_all_linear_layers
from peft.utils.constants import DUMMY_TARGET_MODULES
from peft.utils.error import NoMatchingPeftModuleError
from torch import Tensor, nn

from ..errors import (
    AdapterStateError,
    ConfigError,
    FingerprintMismatchError,
    MissingDownError,
    NoTargetModulesError,
    RankMismatchError,
    ShapeMismatchError,
)
from .base_layers import CONVOLUTIONS, base_of, check_supported, factor_shape, quantization_backend
from .config import MetaLoraConfig
from .conv import Conv
from .down import DOWN, DOWN_PARTS, MAGNITUDE, MID, MID_INIT, UP, DownSource, check_files, load_down_source
from .layer import MetaLoraLayer, subjects_aside
from .linear import Linear
from .on_model import configs_of, down_fingerprint, layers_of, meta_lora_layers, module_path
from .ranks import Ranks, ranks_of
from .registration import PREFIX
from .subject_index import SubjectIndex, layers_changed

ASIDE = " (replaced)"
"""Ends the name of an adapter that goes when its successor is there: no subject may come to stand on its Down."""


class NoTargetError(NoTargetModulesError, NoMatchingPeftModuleError):
    """No module matched; also an instance of what PEFT raises for this."""


@dataclass
class Plan:
    """What an injection will do. `ranks`: by module. `key`: of the Down in each layer."""

    key: str
    ranks: dict[str, Ranks] = field(default_factory=dict)
    source: DownSource | None = None
    fingerprint: str | None = None

    def factors(self, path: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Down, its Mid start, mean Mid and mean Up of one module, from the source."""
        tensors = self.source.tensors if self.source is not None else {}
        down, mid_init = tensors[f"{path}.{DOWN}"], tensors[f"{path}.{MID_INIT}"]
        return down, mid_init, tensors[f"{path}.{MID}"].mean(0), tensors[f"{path}.{UP}"].mean(0)


def plan_injection(
    tuner: BaseTuner,
    model: nn.Module,
    config: MetaLoraConfig,
    adapter_name: str,
    state_dict: dict[str, Tensor] | None,
) -> Plan:
    """Match, check and resolve everything an injection needs; see `MetaLoraModel` for what is raised."""
    if "." in adapter_name:
        raise AdapterStateError(f"An adapter name cannot hold a dot, got {adapter_name!r}. Use a dash or underscore.")
    if any(adapter_name in layer.metalora_mid for _, layer in meta_lora_layers(model)):
        raise AdapterStateError(f"The model already has an adapter {adapter_name!r}. Choose another name.")
    targets = _matched_modules(tuner, model, config, state_dict)
    ranks = {}
    for key, module in targets.items():
        check_supported(model, key, module)
        if config.use_dora and len(factor_shape(base_of(module))[0]) > 1:
            raise ConfigError(
                f"use_dora is for linear layers, and {key!r} is a convolution. Leave it out, or use_dora."
            )
        ranks[key] = ranks_of(config, key)
    plan = Plan(adapter_name, ranks)
    if config.stage == "subject":
        _resolve_down(model, config, plan, targets)
    elif config.inference_mode:  # of one that trains a stored hash would soon be wrong
        plan.fingerprint = config.down_fingerprint
    return plan


def _matched_modules(
    tuner: BaseTuner, model: nn.Module, config: MetaLoraConfig, state_dict: dict[str, Tensor] | None
) -> dict[str, nn.Module]:
    trial = copy.copy(config)
    trial = tuner._prepare_adapter_config(trial, BaseTuner.get_model_config(model))
    if trial.target_modules == DUMMY_TARGET_MODULES:
        return {}
    trial = cast(MetaLoraConfig, _maybe_include_all_linear_layers(trial, model))
    named = None
    if state_dict is not None:
        named = {key.rsplit(f".{PREFIX}", 1)[0].removeprefix("_orig_mod.") for key in state_dict}
    inside = "."  # the last tuner layer; what belongs to it comes right after it
    matched: dict[str, nn.Module] = {}
    excluded = unmatched = False
    for key, module in model.named_modules():
        if not key or key.startswith(inside):
            continue
        if isinstance(module, BaseTunerLayer):
            inside = f"{key}."
        if named is not None:  # PEFT hands over the key of a compiled model without its wrapper then
            key = key.removeprefix("_orig_mod.")
        found = tuner._check_target_module_exists(trial, key) if named is None else key in named
        if found:
            matched[key] = module
        elif isinstance(found, _ExcludedModule):
            excluded = True
        else:
            unmatched = True
    if not matched:
        what = f"Target modules {trial.target_modules} not found in the base model"
        if excluded:  # in PEFT's words, as all of these
            what = "No modules were targeted for adaptation. This might be caused by a combination of mismatched"
            what = f"{what if unmatched else 'All modules were excluded, of'} target modules {trial.target_modules}"
        raise NoTargetError(
            f"{what} (exclude_modules={config.exclude_modules}, modules_to_save={config.modules_to_save}, "
            f"layers_to_transform={config.layers_to_transform}). Compare them with "
            "[name for name, _ in model.named_modules()]."
        )
    return matched


def _resolve_down(model: nn.Module, config: MetaLoraConfig, plan: Plan, targets: dict[str, nn.Module]) -> None:
    """Find the Down of a subject, on the model or through the loader, and check that it fits each target."""
    wanted = config.down_fingerprint
    on_model = {key for _, layer in meta_lora_layers(model) for key in layer.metalora_down if not key.endswith(ASIDE)}
    marks = {key: down_fingerprint(model, key) for key in sorted(on_model)} if wanted or config.down else {}
    named = config.down in on_model and not str(config.down).startswith("fp-")
    if wanted and wanted in marks.values():
        plan.key = next(key for key, mark in marks.items() if mark == wanted)
        plan.fingerprint = wanted
    elif named:
        plan.key, plan.fingerprint = str(config.down), marks[str(config.down)]
    else:
        plan.source = load_down_source(config)
        plan.fingerprint = plan.source.fingerprint
        same = [key for key, mark in marks.items() if mark == plan.fingerprint]
        plan.key = same[0] if same else f"fp-{plan.fingerprint[:16]}"
    if wanted and plan.fingerprint != wanted:
        raise FingerprintMismatchError(
            f"The subject was trained with the Down {wanted[:12]}..., but {config.down!r} is "
            f"{str(plan.fingerprint)[:12]}.... Load the Down it names, or train the subject again."
        )
    layers = dict(meta_lora_layers(model))
    lacking = [
        key
        for key in targets
        if module_path(key) not in layers or plan.key not in layers[module_path(key)].metalora_down
    ]
    if lacking and plan.source is None:
        if config.down is None or named:
            raise MissingDownError(
                f"The Down {plan.key!r} has no factor for {lacking[0]!r} ({len(lacking)} of {len(targets)} targets "
                "lack one). A subject can adapt only modules that its Down was trained on."
            )
        plan.source = load_down_source(config)
    for key, module in targets.items():
        path = module_path(key)
        if key in lacking:
            shapes = _source_shapes(plan.source, path)
        else:
            layer = layers[path]
            shapes = tuple(layer.metalora_down[plan.key].shape), tuple(layer.metalora_mid_init[plan.key].shape)
        _check_fit(config, plan.ranks[key], key, module, *shapes)


def _source_shapes(source: DownSource | None, path: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    tensors = source.tensors if source is not None else {}
    missing = [part for part in DOWN_PARTS if f"{path}.{part}" not in tensors]
    if missing:
        raise MissingDownError(
            f"The Down holds no {missing[0]} for {path!r}. A subject can adapt only modules that its Down was trained "
            "on, and the Down must belong to this base model."
        )
    return tuple(tensors[f"{path}.{DOWN}"].shape), tuple(tensors[f"{path}.{MID_INIT}"].shape)


def _check_fit(
    config: MetaLoraConfig,
    ranks: Ranks,
    key: str,
    module: nn.Module,
    down: tuple[int, ...],
    mid_init: tuple[int, ...],
) -> None:
    r, meta_r = ranks.r, ranks.meta_r
    if down[0] != meta_r:
        raise RankMismatchError(
            f"The Down has rank {down[0]} at {key!r}, the config says meta_r={meta_r}. Set meta_r={down[0]}."
        )
    needed = (meta_r, *factor_shape(base_of(module))[0])
    if down != needed:
        raise ShapeMismatchError(
            f"The Down's factor for {key!r} has shape {down}, this model needs {needed}. "
            "It belongs to another base model."
        )
    if config.start != "fresh" and mid_init[0] != r:
        raise RankMismatchError(
            f"start={config.start!r} needs the rank of the Down's Mid, {mid_init[0]} at {key!r}, but r={r}. "
            f"Set r={mid_init[0]}, or start='fresh' (a control, less like the person)."
        )


@contextmanager
def predecessor_aside(model: nn.Module, adapter_name: str) -> Iterator[None]:
    """Replace an adapter of that name, as PEFT's tuners do when a model is adapted again, once the new one is there.

    Raises:
        AdapterStateError: it is merged, others use its Down, or it is of another method.
    """
    configs = configs_of(model)
    if adapter_name not in configs:
        yield
        return
    before, aside = configs[adapter_name], f"{adapter_name}{ASIDE}"
    layers = [layer for _, layer in meta_lora_layers(model) if adapter_name in layer.metalora_mid]
    users = sorted({user for layer in layers for user in layer.subjects_of(adapter_name)})
    merged = any(adapter_name in layer.merged_adapters for layer in layers)
    if not layers or users or merged:
        reason = f"{', '.join(map(repr, users))} use(s) its Down" if users else "merged" if merged else "no Meta-LoRA"
        raise AdapterStateError(
            f"The model already has an adapter {adapter_name!r}, which cannot be replaced ({reason}). Choose another "
            "name."
        )
    warnings.warn(f"The model already has an adapter {adapter_name!r}. It is replaced by a new one.", stacklevel=4)
    for layer in layers:
        layer.rename_adapter(adapter_name, aside)
    try:
        yield
    except BaseException:
        for layer in layers:
            layer.rename_adapter(aside, adapter_name)
        configs[adapter_name] = before
        raise
    for layer in layers:
        layer.delete_adapter(aside)


def inject_all_or_nothing(
    tuner: Any, model: nn.Module, adapter_name: str, state_dict: dict[str, Tensor] | None, proceed: Callable[[], None]
) -> None:
    """Check an injection, let PEFT do it (`proceed`), then bind the new adapter to its Down and start it."""
    config: MetaLoraConfig = tuner.peft_config[adapter_name]
    before: _Before | None = None
    try:
        check_files(config, model)
        plan = tuner._plan = plan_injection(tuner, model, config, adapter_name, state_dict)
        tuner._index = next((layer.subject_index for _, layer in meta_lora_layers(model)), None) or SubjectIndex()
        with subjects_aside([layer for _, layer in meta_lora_layers(model)]):
            before = _Before(model)
            proceed()
        for path, layer in meta_lora_layers(model):
            if adapter_name not in layer.metalora_mid:
                continue
            if plan.source is not None and plan.key not in layer.metalora_down:
                layer.bind_down(plan.key, *plan.factors(path), plan.source.fingerprint)
            if config.stage == "subject" and not layer.metalora_mid[adapter_name].is_meta and config.init_weights:
                layer.start_slots(adapter_name, config.start)
        for _, layer in meta_lora_layers(model):
            layer.sync_down()
    except BaseException:
        if before is not None:
            before.bring_back(adapter_name)
        tuner.peft_config.pop(adapter_name, None)
        # diffusers sets this flag before it injects; a model left with it could not take another adapter.
        if getattr(model, "_hf_peft_config_loaded", False) and not hasattr(model, "peft_config"):
            model._hf_peft_config_loaded = False  # type: ignore[assignment]
        raise
    finally:
        vars(tuner).pop("_plan", None)
    config.down_fingerprint = plan.fingerprint
    config.__dict__["awaits_file"] = config.origin is not None


def check_loaded_over(model: Any, adapter_name: str, config: PeftConfig, read: Callable[[], dict[str, Tensor]]) -> None:
    """Check that a file can take the place of an adapter: all of it, on the same Down, with the same scale.

    Args:
        model: PEFT's. config: the file's. read: gives its tensors.

    Raises:
        AdapterStateError: it is of another method, has other factors or another scale, or brings a Down in the place of
            one that subjects use.
        FingerprintMismatchError: a subject on another Down.
        What the check of files raises.
    """
    other = "Load it under another name, and delete_adapter the one that it shall replace."
    if not isinstance(config, MetaLoraConfig):
        raise AdapterStateError(f"{adapter_name!r} is a Meta-LoRA adapter, the file is of {config.peft_type}. {other}")
    layers = layers_of(model, adapter_name)
    if users := layers[0][1].subjects_of(adapter_name):
        raise AdapterStateError(f"{', '.join(map(repr, users))} use(s) the Down of {adapter_name!r}. {other}")
    check_files(config, model.base_model.model)
    found = {}
    for key, tensor in read().items():
        path, inside, part = key.rpartition(f".{PREFIX}")
        if inside:
            found[f"{module_path(path)}.{PREFIX}{part}"] = tuple(tensor.shape)
    wanted = {}
    for path, layer in layers:
        for part in (MID, UP, MAGNITUDE, *((DOWN, MID_INIT) if layer.stage[adapter_name] == "meta" else ())):
            if adapter_name in (factors := getattr(layer, part)):
                wanted[f"{path}.{part}"] = tuple(factors[adapter_name].shape)
    if found != wanted:
        first = min(key for key in {*found, *wanted} if found.get(key) != wanted.get(key))
        raise AdapterStateError(
            f"The file has {found.get(first, 'no tensor')} for {first}, {adapter_name!r} has "
            f"{wanted.get(first, 'no tensor')}: one cannot take the place of the other. {other}"
        )
    if config.stage == "subject" and config.down_fingerprint != (mark := down_fingerprint(model, adapter_name)):
        raise FingerprintMismatchError(
            f"The subject was trained with the Down {str(config.down_fingerprint)[:12]}..., {adapter_name!r} stands on "
            f"{mark[:12]}.... {other}"
        )
    for path, layer in layers:
        scale, now = ranks_of(config, path).scaling, layer._full_scale(adapter_name)
        if not math.isclose(scale, now):
            raise AdapterStateError(
                f"The file has the scale {scale:g} at {path!r}, {adapter_name!r} has {now:g}. {other}"
            )


class _Before:
    """What an injection changes, to take it back half way: modules exchanged, an adapter in layers, what trains."""

    def __init__(self, model: nn.Module) -> None:
        layers: list[Any] = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
        self._active = [(layer, layer._active_adapter) for layer in layers]
        inside = {id(part) for layer in layers if isinstance(layer, MetaLoraLayer) for part in _containers(layer)}
        self._children = [(module, dict(module._modules)) for module in model.modules() if id(module) not in inside]
        self._trains = [(parameter, parameter.requires_grad) for parameter in model.parameters()]

    def bring_back(self, adapter_name: str) -> None:
        for module, children in self._children:
            module._modules.clear()
            module._modules.update(children)
        for layer, active in self._active:
            layer._active_adapter = active
            if isinstance(layer, MetaLoraLayer):
                layer.forget_adapter(adapter_name)
        for parameter, trains in self._trains:
            parameter.requires_grad_(trains)
        layers_changed()


def _containers(layer: MetaLoraLayer) -> Iterator[nn.Module]:
    for name, child in layer.named_children():
        if name != "base_layer":
            yield from child.modules()


def replace_target(
    tuner: Any,
    config: MetaLoraConfig,
    adapter_name: str,
    target: nn.Module,
    target_name: str,
    parent: nn.Module,
    current_key: str,
) -> None:
    """Add the adapter to a layer of ours, or put one in the place of a base layer."""
    plan: Plan = tuner._plan
    own: Any = target
    while isinstance(own, BaseTunerLayer) and not isinstance(own, MetaLoraLayer):  # a LoRA that came after us
        own = cast(Any, own).base_layer
    if isinstance(own, MetaLoraLayer):
        own.update_layer(adapter_name, config, plan.ranks[current_key], plan.key)
        return
    layer = create_layer(tuner.model, target, tuner._index)
    layer._active_adapter = tuner.active_adapter
    layer.update_layer(adapter_name, config, plan.ranks[current_key], plan.key)
    if adapter_name not in tuner.active_adapters:
        layer.requires_grad_(False)
    tuner._replace_module(parent, target_name, layer, target)


def create_layer(model: nn.Module, target: nn.Module, index: SubjectIndex) -> MetaLoraLayer:
    """Wrap a base layer that `check_supported` has accepted."""
    base = base_of(target)
    kind: type[MetaLoraLayer] = Conv if isinstance(base, CONVOLUTIONS) else Linear
    return kind(target, index, quantization_backend(model, base))
