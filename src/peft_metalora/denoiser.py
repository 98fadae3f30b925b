# SPDX-License-Identifier: Apache-2.0
"""What of a diffusers pipeline the adapters sit on, and how its offloading is kept out of the way meanwhile."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from diffusers.loaders.lora_base import _func_optionally_disable_offloading
from torch import nn

from . import hub
from .errors import PipelineError


def named_denoiser(pipe: Any) -> tuple[str, nn.Module]:
    """A pipeline's transformer or UNet, out of torch.compile's wrapper, with the name of the component.

    Raises:
        PipelineError: it has neither.
    """
    for component in ("transformer", "unet"):
        model = getattr(pipe, component, None)
        if isinstance(model, nn.Module):
            return component, getattr(model, "_orig_mod", model)
    raise PipelineError(
        f"expected a pipeline with a denoiser named transformer or unet, found a {type(pipe).__name__}. "
        "Put the adapter on its model with model.add_adapter(MetaLoraConfig(...)) instead."
    )


def denoiser(pipe: Any) -> nn.Module:
    """As `named_denoiser`, without the name."""
    return named_denoiser(pipe)[1]


def free_name(taken: Collection[str], at: hub.Location) -> str:
    """A name after a path or repository that an adapter can have and nobody has yet."""
    wanted = re.sub(r"[^A-Za-z0-9_-]+", "-", os.path.basename(os.path.normpath(at.subfolder or at.name))).strip("-")
    names = (f"{wanted or 'adapter'}{f'-{count}' if count else ''}" for count in range(len(taken) + 2))
    return next(name for name in names if name not in taken and not hasattr(nn.ParameterDict, name))


@contextmanager
def offload_paused(pipe: Any) -> Iterator[None]:
    """Take offload hooks off while modules are exchanged, and put them back, as diffusers' own loaders do."""
    model_offload, sequential_offload, group_offload = _func_optionally_disable_offloading(pipe)
    try:
        yield
    finally:
        if model_offload:
            pipe.enable_model_cpu_offload()
        elif sequential_offload:
            pipe.enable_sequential_cpu_offload()
        elif group_offload:
            from diffusers.hooks.group_offloading import _maybe_remove_and_reapply_group_offloading

            _maybe_remove_and_reapply_group_offloading(denoiser(pipe))
