# SPDX-License-Identifier: Apache-2.0
"""Meta-LoRA (https://arxiv.org/abs/2503.22352) for PEFT and diffusers: a shared Down, tiny subjects.

Importing the package makes the tuner known to PEFT (`PeftModel.from_pretrained` then reads its folders), at once or as
soon as PEFT is imported, and nothing else: torch, diffusers and face models are imported by the names that need them,
when they are used.
"""

from __future__ import annotations

import importlib.abc
import sys
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any

from .errors import MetaLoraError

if TYPE_CHECKING:
    from torch import nn

    from . import tuner
    from .tuner import MetaLoraConfig, MetaLoraModel
    from .tuner.down import DownSource

__version__ = "0.1.0"

# Where each lazy name lives; `tests/test_architecture.py` keeps this, `__all__` and the modules in agreement.
_LAZY = {
    "DownResult": "training.stage_1",
    "DownSource": "tuner",
    "GenerateConfig": "commands.generate",
    "MetaLoraConfig": "tuner",
    "MetaLoraLayer": "tuner",
    "MetaLoraModel": "tuner",
    "MetaTrainConfig": "training.stage_settings",
    "Personalization": "training.stage_2",
    "PersonalizeConfig": "training.stage_settings",
    "Projection": "lora.projection",
    "SubjectSource": "checkpoint",
    "SubjectTable": "pipelines",
    "add_weighted_subject": "tuner",
    "checkpoint": "",
    "data": "",
    "demo": "",
    "down_from_loras": "lora.collection",
    "down_state": "tuner",
    "enable_meta_lora": "pipelines",
    "errors": "",
    "export_subject": "lora.export",
    "fingerprint": "tuner",
    "fold": "tuner",
    "generate": "commands.generate",
    "hub": "",
    "load_down": "hub",
    "load_subject": "hub",
    "meta_train": "training.meta_train",
    "metrics": "",
    "personalize": "training.personalize",
    "personalize_many": "training.personalize",
    "pipelines": "",
    "project": "lora.projection",
    "pull": "hub",
    "push_down": "hub",
    "push_subject": "hub",
    "save_down": "checkpoint",
    "save_subject": "checkpoint",
    "set_slots": "tuner",
    "subject_state": "tuner",
    "to_lora": "tuner",
    "training": "",
    "tuner": "",
    "unfold": "tuner",
    "using_slots": "tuner",
    "write_subject": "tuner",
}

__all__ = [
    "DownResult",
    "DownSource",
    "GenerateConfig",
    "MetaLoraConfig",
    "MetaLoraError",
    "MetaLoraLayer",
    "MetaLoraModel",
    "MetaTrainConfig",
    "Personalization",
    "PersonalizeConfig",
    "Projection",
    "SubjectSource",
    "SubjectTable",
    "__version__",
    "add_weighted_subject",
    "checkpoint",
    "data",
    "demo",
    "down_from_loras",
    "down_state",
    "enable_meta_lora",
    "errors",
    "export_subject",
    "fingerprint",
    "fold",
    "generate",
    "hub",
    "load_down",
    "load_subject",
    "meta_train",
    "metrics",
    "personalize",
    "personalize_many",
    "pipelines",
    "project",
    "pull",
    "push_down",
    "push_subject",
    "save_down",
    "save_subject",
    "set_slots",
    "subject_state",
    "to_lora",
    "training",
    "tuner",
    "unfold",
    "using_slots",
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


def _check_files(config: MetaLoraConfig, model: nn.Module) -> None:
    """Check what PEFT's own verbs are about to load, before they change a model."""
    from .hub.loading import check_origin

    check_origin(config, model)


class _After(importlib.abc.MetaPathFinder):
    """Does something once a module has been imported, by whomever."""

    def __init__(self, name: str, action: Callable[[], object]) -> None:
        self._name, self._action = name, action

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname != self._name or self not in sys.meta_path:
            return None
        # Those behind it alone: another of this kind would ask this one.
        finds = (getattr(finder, "find_spec", None) for finder in sys.meta_path[sys.meta_path.index(self) + 1 :])
        spec = next((found for find in finds if find and (found := find(fullname, path, target))), None)
        loader: Any = spec and spec.loader
        if loader is not None:
            run = loader.exec_module

            def run_and_act(module: ModuleType) -> None:
                run(module)
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                self._action()

            loader.exec_module = run_and_act
        return spec


def _after(name: str, action: Callable[[], object]) -> None:
    if name in sys.modules:
        action()
    else:
        sys.meta_path.insert(0, _After(name, action))


def _fill_hooks() -> None:
    tuner = importlib.import_module(".tuner", __name__)
    tuner.set_down_loader(_load_down)
    tuner.set_file_check(_check_files)


def _register() -> None:
    if f"{__name__}.tuner" not in sys.modules:  # else it is being imported, and does the same
        importlib.import_module(".tuner", __name__)


_after(f"{__name__}.tuner", _fill_hooks)
_after("peft", _register)
