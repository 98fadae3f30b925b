# SPDX-License-Identifier: Apache-2.0
"""The PEFT tuner: configuration, layers, model and their registration with PEFT. torch and peft only."""

from .config import MetaLoraConfig
from .down import DownSource, fingerprint, set_down_loader
from .layer import MetaLoraLayer
from .linear import Linear
from .model import MetaLoraModel, fold, reset_slots, set_warmup, subject_state, unfold, write_subject
from .plan import down_fingerprint, down_state
from .registration import MetaLoraType, register
from .subjects import set_subjects, subjects

__all__ = [
    "DownSource",
    "Linear",
    "MetaLoraConfig",
    "MetaLoraLayer",
    "MetaLoraModel",
    "MetaLoraType",
    "down_fingerprint",
    "down_state",
    "fingerprint",
    "fold",
    "register",
    "reset_slots",
    "set_down_loader",
    "set_subjects",
    "set_warmup",
    "subject_state",
    "subjects",
    "unfold",
    "write_subject",
]

register(MetaLoraConfig, MetaLoraModel)
