# SPDX-License-Identifier: Apache-2.0
"""Both stages of training: `meta_train` makes a Down, `personalize` a subject (or, as the baseline, a plain LoRA)."""

from __future__ import annotations

import importlib
from typing import Any

_LAZY = {
    "MetaTrainConfig": "settings",
    "PersonalizeConfig": "settings",
    "meta_train": "meta_train",
    "personalize": "personalize",
}

__all__ = sorted(_LAZY)


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # A file and its function share a name, and importing the file would set the attribute to it: the function stays.
    value = getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    globals()[name] = value
    return value
