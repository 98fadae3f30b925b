# SPDX-License-Identifier: Apache-2.0
"""Families of base models, one file each; `base_for` finds the one that a pipeline belongs to."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch

from ..errors import BaseModelMismatchError
from .base import Base, FlowBase, Text, send
from .diffusion import DiffusionBase
from .generic import base_class, require_pipeline
from .memory import Memory
from .parts import Parts

# Pipeline class -> (file beside this one, class in it); loaded when a pipeline of that class is.
FAMILIES = {
    "Flux2KleinPipeline": ("flux2", "Flux2Klein"),
    "Flux2Pipeline": ("flux2", "Flux2Dev"),
    "Flux3ModularPipeline": ("flux3", "Flux3"),
    "FluxPipeline": ("flux1", "Flux1"),
    "Krea2Pipeline": ("krea2", "Krea2"),
    "QwenImage21Pipeline": ("qwen_image21", "QwenImage21"),
    "QwenImagePipeline": ("qwen_image", "QwenImage"),
    "StableDiffusion3Pipeline": ("sd3", "StableDiffusion3"),
    "StableDiffusionPipeline": ("sd15", "StableDiffusion15"),
    "StableDiffusionXLPipeline": ("sdxl", "StableDiffusionXL"),
    "WanPipeline": ("wan", "Wan"),
    "ZImagePipeline": ("z_image", "ZImage"),
}

__all__ = ["FAMILIES", "Base", "DiffusionBase", "FlowBase", "Text", "base_for", "load_base", "open_base", "send"]


def base_for(pipeline: Any, *, generic: str | type[Base] | None = None, **options: Any) -> Base:
    """See a pipeline as something that can be trained.

    Args:
        generic: a class of somebody's own for this pipeline, or its name (`module:Class`, `file.py:Class`), instead of
            the family that is known.
        options: as `Base` takes them.

    Raises:
        BaseModelMismatchError: no family knows this pipeline, or `generic` is for another one.
        ConfigError: `generic` is no such class.
    """
    if generic is not None:
        own = base_class(generic)
        require_pipeline(own, pipeline)
        return own(pipeline, **options)
    for cls in type(pipeline).__mro__:
        if cls.__name__ in FAMILIES:
            file, name = FAMILIES[cls.__name__]
            return getattr(importlib.import_module(f".{file}", __name__), name)(pipeline, **options)
    raise BaseModelMismatchError(
        f"expected a pipeline of one of {', '.join(sorted(FAMILIES))}, found {type(pipeline).__name__}: train on one "
        "of those, or give a class of your own for it as `generic`"
    )


def open_base(
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    local_files_only: bool = False,
    memory: Memory | None = None,
    generic: str | type[Base] | None = None,
    **options: Any,
) -> Base:
    """A pipeline of a folder or a repository whose models are hulls: `Base.place` loads those that are needed.

    Args:
        memory: how weights are held, and where they wait.
        generic: as `base_for`. options: as `Base` takes them.

    Raises:
        BaseModelMismatchError: there is no pipeline, or no family knows it.
        ConfigError: as `base_for`.
    """
    generic = None if generic is None else base_class(generic)
    parts = Parts(name_or_path, revision=revision, dtype=dtype, local_files_only=local_files_only, memory=memory)
    base = base_for(parts.pipeline(), generic=generic, parts=parts, **options)
    parts.quantized = (base.denoiser_name, *base.large_encoders)
    return base


def load_base(name_or_path: str | Path, *, device: torch.device | str = "cpu", **options: Any) -> Base:
    """Load a pipeline from a folder or a repository, on the CPU, with nothing in it to train.

    Args:
        device: where it will compute. options: as `open_base` takes them.

    Raises:
        BaseModelMismatchError: there is no pipeline, or no family knows it.
    """
    base = open_base(name_or_path, **options)
    base.load(device)
    return base
