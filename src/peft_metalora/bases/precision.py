# SPDX-License-Identifier: Apache-2.0
"""On which device and in which precision a base model runs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from ..errors import ConfigError


def choose_device(name: str | None) -> torch.device:
    """The device of that name, or this process's GPU if there is one, or the CPU.

    Raises:
        ConfigError: there is no such device here.
    """
    gpu = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    device = device_called(name or (gpu if torch.cuda.is_available() else "cpu"))
    try:
        torch.empty(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(f"device must be one that is here, found {name!r}: {_first_line(error)}") from error
    return device


def device_called(name: str) -> torch.device:
    """A device that may be elsewhere; raises ConfigError for a name that no device has."""
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device must be 'cpu', 'cuda', 'cuda:1' or the like, found {name!r}") from error


def choose_dtype(mixed_precision: str, device: torch.device) -> torch.dtype:
    """Precision of the frozen base."""
    if mixed_precision == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[mixed_precision]


@contextmanager
def plain_defaults() -> Iterator[None]:
    """Context in which a tensor is float32 on the CPU unless somebody says otherwise, whatever a script has set.

    Training counts on it in many places, PyTorch's optimisers among them.
    """
    dtype = torch.get_default_dtype()
    if dtype == torch.float32 and torch.get_default_device().type == "cpu":
        yield  # a context of a device would make every call a little slower
        return
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(dtype)


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]


def autocast(mixed_precision: str, device: torch.device, *, adapter_casts: bool = False) -> Any:
    """Context for a forward pass.

    Args:
        adapter_casts: the adapter brings its float32 factors to the precision of the base by itself, as Meta-LoRA does
            and PEFT's LoRA does not. In bfloat16 nothing is then left for autocast to do: the base runs as pipelines
            run it, and its norms hand on two bytes a number instead of four.
    """
    dtype = choose_dtype(mixed_precision, device)
    native = dtype == torch.float32 or (dtype == torch.bfloat16 and adapter_casts)
    return nullcontext() if native else torch.autocast(device.type, dtype)
