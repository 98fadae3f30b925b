# SPDX-License-Identifier: Apache-2.0
"""Makes `META_LORA` known to PEFT; the only file that touches PEFT's registries.

PEFT offers no entry point for tuners from outside, and `register_peft_method` refuses a name that its `PeftType` enum
lacks. An enum cannot be extended, but PEFT only ever looks the type up in mappings by hash and equality, so an enum of
our own whose member equals the string "META_LORA" serves, without patching PEFT's."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from functools import partial, wraps
from typing import Any, Union

from peft import PeftConfig, PeftModel, load_peft_weights
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_MIXED_MODEL_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.tuners import mixed as package
from peft.tuners.mixed import model as mixed

PREFIX = "metalora_"


class MetaLoraType(str, Enum):
    """The PEFT type of this package, equal to the string that stands in `adapter_config.json`."""

    META_LORA = "META_LORA"


def register(config_cls: type, model_cls: type) -> None:
    """Enter the tuner into PEFT's mappings; calling it again changes nothing."""
    entries: list[tuple[Any, object]] = [
        (PEFT_TYPE_TO_CONFIG_MAPPING, config_cls),
        (PEFT_TYPE_TO_TUNER_MAPPING, model_cls),
        (PEFT_TYPE_TO_MIXED_MODEL_MAPPING, model_cls),
        (PEFT_TYPE_TO_PREFIX_MAPPING, PREFIX),
    ]
    for mapping, entry in entries:
        mapping[MetaLoraType.META_LORA] = entry


def register_mixed(
    config_cls: type, layer_cls: type, inject: Callable[..., None], replace: Callable[..., None]
) -> None:
    """Let PeftMixedModel take our adapters beside LoRA's and its kin; calling it again changes nothing.

    PEFT keeps the tuners it mixes in constants and `isinstance` chains, so that two methods of its MixedModel are
    wrapped: they hand our configs to `inject` and `replace` and leave all others alone.
    """
    names: Any = mixed
    if MetaLoraType.META_LORA in names.COMPATIBLE_TUNER_TYPES:
        return
    package.COMPATIBLE_TUNER_TYPES = names.COMPATIBLE_TUNER_TYPES = (
        *names.COMPATIBLE_TUNER_TYPES,
        MetaLoraType.META_LORA,
    )
    names.PREFIXES.append(PREFIX)
    names.Layers = (*names.Layers, layer_cls)
    names.Configs = Union[names.Configs, config_cls]  # noqa: UP007 - a type that is known only now
    injected, replaced = mixed.MixedModel.inject_adapter, mixed.MixedModel._create_and_replace

    def inject_adapter(self: Any, model: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        proceed = partial(injected, self, model, adapter_name, *args, **kwargs)
        if isinstance(self.peft_config[adapter_name], config_cls):
            inject(self, model, adapter_name, kwargs.get("state_dict"), proceed)
        else:
            proceed()

    def create_and_replace(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        (replace if isinstance(config, config_cls) else replaced)(self, config, *args, **kwargs)

    names.MixedModel.inject_adapter, names.MixedModel._create_and_replace = inject_adapter, create_and_replace


def register_loading(config_cls: type[Any], check: Callable[..., None]) -> None:
    """Let `load_adapter` check a file that takes the place of one of our adapters; calling it again changes nothing.

    PEFT reads its tensors alone: those of another Down, another scale or other modules would show somebody else.
    """
    loaded = PeftModel.load_adapter
    if getattr(loaded, "checks_meta_lora", False):
        return

    @wraps(loaded)
    def load_adapter(self: Any, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        known: Any = self.peft_config.get(adapter_name)
        if not isinstance(known, config_cls):
            return loaded(self, model_id, adapter_name, *args, **kwargs)
        first = known.awaits_file and known.origin["name"] == model_id
        vars(known)["awaits_file"] = False
        if first:
            return loaded(self, model_id, adapter_name, *args, **kwargs)
        hub, _ = self._split_kwargs(dict(kwargs))
        kind: Any = PEFT_TYPE_TO_CONFIG_MAPPING[PeftConfig._get_peft_type(model_id, **hub)]
        config = kind.from_pretrained(model_id, **hub)
        check(self, adapter_name, config, lambda: load_peft_weights(model_id, device="cpu", **hub))
        result = loaded(self, model_id, adapter_name, *args, **kwargs)
        known.take_place(config)
        return result

    load_adapter.checks_meta_lora = True  # type: ignore[attr-defined]
    PeftModel.load_adapter = load_adapter  # type: ignore[method-assign]
