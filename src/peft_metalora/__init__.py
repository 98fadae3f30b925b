# SPDX-License-Identifier: Apache-2.0
"""Meta-LoRA (https://arxiv.org/abs/2503.22352) for PEFT and diffusers: a shared Down, tiny subjects.

Importing the package makes the tuner known to PEFT (`PeftModel.from_pretrained` then reads its folders) and nothing
else: diffusers, transformers' pipelines and face models are imported by the names that need them, when they are used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from . import tuner
from .errors import MetaLoraError
from .tuner import MetaLoraConfig, MetaLoraModel

if TYPE_CHECKING:
    from .tuner.down import DownSource

__version__ = "0.1.0"

# Where each lazy name lives; `tests/test_architecture.py` keeps this, `__all__` and the modules in agreement.
_LAZY = {
    "DownSource": "tuner",
    "MetaTrainConfig": "training.settings",
    "PersonalizeConfig": "training.settings",
    "add_weighted_subject": "tuner",
    "checkpoint": "",
    "data": "",
    "demo": "",
    "down_state": "tuner",
    "enable_meta_lora": "pipelines",
    "errors": "",
    "export_subject": "lora.export",
    "fingerprint": "tuner",
    "fold": "tuner",
    "hub": "",
    "init_down_from_data": "tuner",
    "load_down": "hub",
    "load_subject": "hub",
    "lora_plus_groups": "tuner",
    "meta_train": "training.meta_train",
    "metrics": "",
    "personalize": "training.personalize",
    "pipelines": "",
    "project": "lora.projection",
    "pull": "hub",
    "push_down": "hub",
    "push_subject": "hub",
    "reset_slots": "tuner",
    "save_down": "checkpoint",
    "save_subject": "checkpoint",
    "set_merge_backup": "tuner",
    "set_subjects": "tuner",
    "set_warmup": "tuner",
    "subject_state": "tuner",
    "subjects": "tuner",
    "to_lora": "tuner",
    "training": "",
    "unfold": "tuner",
    "write_subject": "tuner",
}

__all__ = [
    "DownSource",
    "MetaLoraConfig",
    "MetaLoraError",
    "MetaLoraModel",
    "MetaTrainConfig",
    "PersonalizeConfig",
    "__version__",
    "add_weighted_subject",
    "checkpoint",
    "data",
    "demo",
    "down_state",
    "enable_meta_lora",
    "errors",
    "export_subject",
    "fingerprint",
    "fold",
    "hub",
    "init_down_from_data",
    "load_down",
    "load_subject",
    "lora_plus_groups",
    "meta_train",
    "metrics",
    "personalize",
    "pipelines",
    "project",
    "pull",
    "push_down",
    "push_subject",
    "reset_slots",
    "save_down",
    "save_subject",
    "set_merge_backup",
    "set_subjects",
    "set_warmup",
    "subject_state",
    "subjects",
    "to_lora",
    "training",
    "tuner",
    "unfold",
    "write_subject",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if not _LAZY[name]:
        return importlib.import_module(f".{name}", __name__)
    value = getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__


def _load_down(config: MetaLoraConfig) -> DownSource:
    """Bring the Down that a configuration names; the tuner itself knows nothing about files."""
    from .hub.loading import resolve_down

    return resolve_down(config)


def _check_files(config: MetaLoraConfig) -> None:
    """Check what PEFT's own verbs are about to load, before they change a model."""
    from .hub.loading import check_origin

    check_origin(config)


tuner.set_down_loader(_load_down)
tuner.set_file_check(_check_files)
