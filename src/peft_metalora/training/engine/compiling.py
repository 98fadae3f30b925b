# SPDX-License-Identifier: Apache-2.0
"""torch.compile of a denoiser in training: its repeated blocks, each a graph of its own that all of a kind share.

Blocks compile in seconds where a whole denoiser takes minutes, and a subject in another slot is another number in a
tensor, never another graph.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from ...errors import ConfigError
from ..stage_settings import TrainingConfig


def backend_of(config: TrainingConfig) -> str | None:
    """The backend of torch.compile that the settings, or else accelerate's launcher, ask for; None: do not compile.

    Raises:
        ConfigError: there is no such backend.
    """
    name = (config.dynamo_backend or os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no")).lower()
    if name == "no":
        return None
    known = torch.compiler.list_backends(exclude_tags=())
    if name not in known:
        raise ConfigError(f"dynamo_backend must be 'no' or one of {', '.join(map(repr, known))}, found {name!r}")
    return name


def compile_blocks(denoiser: Any, config: TrainingConfig) -> None:
    """Compile the denoiser's repeated blocks, without graph breaks; they compile when first called, adapter and all.

    Raises:
        ConfigError: there is no such backend, or diffusers does not say which blocks the denoiser repeats.
    """
    backend = backend_of(config)
    if backend is None:
        return
    repeated = set(getattr(denoiser, "_repeated_blocks", None) or ())
    # Names of base classes too: a block that is divided over processes has a class of FSDP's own.
    blocks = [module for module in denoiser.modules() if repeated & {cls.__name__ for cls in type(module).__mro__}]
    if not blocks:
        raise ConfigError(
            f"expected a denoiser that says which blocks it repeats, to compile them, found {type(denoiser).__name__}: "
            "use dynamo_backend 'no'"
        )
    options = {"mode": os.environ["ACCELERATE_DYNAMO_MODE"]} if "ACCELERATE_DYNAMO_MODE" in os.environ else {}
    for block in blocks:
        block.compile(backend=backend, fullgraph=True, **options)


def uncompile(denoiser: Any, config: TrainingConfig) -> None:
    """Undo `compile_blocks`."""
    if backend_of(config) is not None:
        for module in denoiser.modules():
            module._compiled_call_impl = None


def eagerly(config: TrainingConfig) -> AbstractContextManager[Any]:
    """Context in which compiled blocks run as they are written: validation asks for shapes and modes of its own."""
    return nullcontext() if backend_of(config) is None else torch.compiler.set_stance("force_eager")
