# SPDX-License-Identifier: Apache-2.0
"""The PEFT tuner: configuration, layers, model and their registration with PEFT. torch and peft only."""

from .combine import add_weighted_subject
from .config import MetaLoraConfig
from .convert import register_lora_conversion, to_lora
from .down import DownSource, fingerprint, set_down_loader
from .layer import MetaLoraLayer
from .linear import Linear
from .model import (
    MetaLoraModel,
    fold,
    inject_all_or_nothing,
    replace_target,
    reset_slots,
    set_merge_backup,
    set_warmup,
    subject_state,
    unfold,
    write_subject,
)
from .plan import down_fingerprint, down_state
from .registration import MetaLoraType, register, register_mixed
from .subjects import set_subjects, subjects
from .variants import init_down_from_data, lora_plus_groups

__all__ = [
    "DownSource",
    "Linear",
    "MetaLoraConfig",
    "MetaLoraLayer",
    "MetaLoraModel",
    "MetaLoraType",
    "add_weighted_subject",
    "down_fingerprint",
    "down_state",
    "fingerprint",
    "fold",
    "init_down_from_data",
    "lora_plus_groups",
    "register",
    "reset_slots",
    "set_down_loader",
    "set_merge_backup",
    "set_subjects",
    "set_warmup",
    "subject_state",
    "subjects",
    "to_lora",
    "unfold",
    "write_subject",
]

register(MetaLoraConfig, MetaLoraModel)
register_mixed(MetaLoraConfig, MetaLoraLayer, inject_all_or_nothing, replace_target)
register_lora_conversion()
