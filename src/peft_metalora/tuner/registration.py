# SPDX-License-Identifier: Apache-2.0
"""Makes `META_LORA` known to PEFT; the only file that touches PEFT's registries.

PEFT offers no entry point for tuners from outside, and `register_peft_method` refuses a name that its `PeftType` enum
lacks. An enum cannot be extended, but PEFT only ever looks the type up in mappings by hash and equality, so an enum of
our own whose member equals the string "META_LORA" serves, without patching PEFT's."""

from __future__ import annotations

from enum import Enum
from typing import Any

from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_MIXED_MODEL_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)

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
