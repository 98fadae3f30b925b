# SPDX-License-Identifier: Apache-2.0
"""A class of somebody's own for a pipeline that no family here knows. It is code, which its user alone starts."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from ..errors import BaseModelMismatchError, ConfigError
from ..files import written_in
from .base import Base

_OWN = "pipeline_class", "target_modules"  # beside its abstract methods, what a class says


def base_class(generic: str | type[Base]) -> type[Base]:
    """The class that `module:Class` or `file.py:Class` names, or is.

    Raises:
        ConfigError: it cannot be imported, is no subclass of `Base`, or lacks what one has to say.
    """
    found: Any = _imported(generic) if isinstance(generic, str) else generic
    if not (isinstance(found, type) and issubclass(found, Base)):
        raise ConfigError(
            f"generic must be a subclass of FlowBase, DiffusionBase or Base of peft_metalora.bases, found {generic!r}, "
            "which is none"
        )
    missing = sorted({*found.__abstractmethods__, *(name for name in _OWN if not hasattr(found, name))})
    if missing:
        raise ConfigError(
            f"generic must be a class that says all of its pipeline, found {generic!r} without {', '.join(missing)}: "
            "add that to it"
        )
    return found


def named_class(base: Base) -> dict[str, str]:
    """What the facts of a Down or a subject say of the class that its base was seen through; of ours nothing."""
    own = type(base)
    ours = own.__module__.startswith(f"{__package__}.")
    return {} if ours else {"generic": f"{own.__module__}:{own.__qualname__}"}


def written_as(own: type[Base]) -> dict[str, str]:
    """What tells the class that a base is seen through from others, and one of somebody's own from itself after an
    edit."""
    return {"class": own.__qualname__, **written_in(own)}


def found_anywhere(generic: str) -> str:
    """The same name for a process in another folder: a file has its whole path."""
    place, _, attribute = generic.rpartition(":")
    return f"{Path(place).resolve()}:{attribute}" if place.endswith(".py") else generic


def _imported(name: str) -> Any:
    place, _, attribute = name.rpartition(":")
    try:
        return getattr(_run(Path(place)) if place.endswith(".py") else importlib.import_module(place), attribute)
    except Exception as error:  # whatever the module does
        raise ConfigError(
            f"generic must be module:Class or file.py:Class, found {name!r}: {type(error).__name__}: {error}"
        ) from error


def _run(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    known = sys.modules.setdefault(spec.name, module)  # where dataclasses and pickle look for what it defines
    try:
        spec.loader.exec_module(module)
    except BaseException:
        if known is module:  # as after an import that fails
            del sys.modules[spec.name]
        raise
    return module


def require_pipeline(cls: type[Base], pipeline: Any) -> None:
    """Check that a class was written for this pipeline, whose models may be hulls.

    Raises:
        BaseModelMismatchError: it names another pipeline, or models or modules that this one has not.
    """
    found = type(pipeline).__name__
    if cls.pipeline_class not in {one.__name__ for one in type(pipeline).__mro__}:
        raise BaseModelMismatchError(
            f"expected a {cls.pipeline_class}, which {cls.__name__} is for, found a {found}: give the class of that "
            "one as `generic`, or leave it out where the family is known"
        )
    for name in (cls.denoiser_name, "vae"):
        if not isinstance(getattr(pipeline, name, None), nn.Module):
            raise BaseModelMismatchError(
                f"expected a pipeline with a model {name!r}, as {cls.__name__} has it, found a {found} without: say in "
                "the class what it is called there"
            )
    denoiser = getattr(pipeline, cls.denoiser_name)
    try:
        adapted = any(re.fullmatch(cls.target_modules, path) for path, _ in denoiser.named_modules())
    except re.error as error:
        raise BaseModelMismatchError(
            f"expected a regular expression as target_modules of {cls.__name__}, found {cls.target_modules!r}: {error}"
        ) from error
    if not adapted:
        raise BaseModelMismatchError(
            f"expected modules of the {type(denoiser).__name__} that target_modules of {cls.__name__} names, found "
            f"none for {cls.target_modules!r}: take names from named_modules()"
        )
