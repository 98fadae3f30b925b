# SPDX-License-Identifier: Apache-2.0
"""The PEFT tuner: configuration, layers, model and their registration with PEFT. torch and peft only."""

from . import adding, convert, model, registration
from .combine import add_weighted_subject
from .config import MetaLoraConfig
from .convert import to_lora
from .down import DownSource, fingerprint, set_down_loader, set_file_check
from .functional import (
    fold,
    reset_slots,
    set_merge_backup,
    set_slots,
    set_token_slots,
    set_warmup,
    subject_state,
    unfold,
    using_slots,
    write_subject,
)
from .layer import MetaLoraLayer
from .linear import Linear
from .model import MetaLoraModel
from .on_model import down_fingerprint, down_state
from .registration import MetaLoraType
from .subject_index import TokenSlots
from .variants import init_down_from_data, lora_plus_groups

__all__ = [
    "DownSource",
    "Linear",
    "MetaLoraConfig",
    "MetaLoraLayer",
    "MetaLoraModel",
    "MetaLoraType",
    "TokenSlots",
    "add_weighted_subject",
    "down_fingerprint",
    "down_state",
    "fingerprint",
    "fold",
    "init_down_from_data",
    "lora_plus_groups",
    "reset_slots",
    "set_down_loader",
    "set_file_check",
    "set_merge_backup",
    "set_slots",
    "set_token_slots",
    "set_warmup",
    "subject_state",
    "to_lora",
    "unfold",
    "using_slots",
    "write_subject",
]

registration.register(MetaLoraConfig, MetaLoraModel)
registration.register_loading(MetaLoraConfig, adding.check_loaded_over)
registration.register_mixed(MetaLoraConfig, MetaLoraLayer, model.inject_all_or_nothing, model.replace_target)
convert.register_lora_conversion()
