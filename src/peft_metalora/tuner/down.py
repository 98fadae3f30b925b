# SPDX-License-Identifier: Apache-2.0
"""How a layer holds Downs, what identifies one, and how the tuner gets one that is not on the model yet.

The tuner knows no files: whoever does installs a loader with `set_down_loader`, and the tuner calls it with the
subject's config."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import MissingDownError
from .config import MetaLoraConfig

DOWN, MID_INIT, MID, UP = "metalora_down", "metalora_mid_init", "metalora_mid", "metalora_up"
MAGNITUDE = "metalora_magnitude"


@dataclass(frozen=True)
class DownSource:
    """A Down that has been read but not put on a model yet.

    `tensors` holds, for every adapted module, `{module}.metalora_down` (meta_r, d_in), `.metalora_mid_init`
    (r, meta_r), and the mean subject of stage 1: `.metalora_mid` (1, r, meta_r), `.metalora_up` (1, d_out, r).
    """

    config: MetaLoraConfig
    tensors: dict[str, Tensor]
    fingerprint: str


class Downs(nn.ParameterDict):
    """The Downs of a layer: parameters of the adapters that train them, buffers where subjects brought them.

    As in PEFT's VeRA, what is given and shared is no parameter: no optimiser, cast or count of those takes it for one.
    """

    def give(self, key: str, down: Tensor) -> None:
        """Put a Down under `key` that never trains."""
        self.register_buffer(key, down)
        self._keys[key] = None


DownLoader = Callable[[MetaLoraConfig], DownSource]
_loader: DownLoader | None = None


def set_down_loader(loader: DownLoader | None) -> None:
    """Install the function that reads the Down a config names by path or repository; None removes it."""
    global _loader
    _loader = loader


FileCheck = Callable[[MetaLoraConfig], None]
_check: FileCheck | None = None


def set_file_check(check: FileCheck | None) -> None:
    """Install the function that checks the files a config was read from before it is added; None removes it."""
    global _check
    _check = check


def check_files(config: MetaLoraConfig) -> None:
    """Check the files that `config` was read from, if it was and if a check is installed."""
    if _check is not None and config.origin is not None:
        _check(config)


def load_down_source(config: MetaLoraConfig) -> DownSource:
    """Read the Down that `config` names.

    Raises:
        MissingDownError: the config names none, or no loader is installed.
    """
    if config.down is None:
        raise MissingDownError(
            "stage 'subject' needs a Down, and the config names none. Give down=<repository id, folder, or name of a "
            "stage 'meta' adapter on this model>, or load the Down on this model first."
        )
    if _loader is None:
        raise MissingDownError(
            f"The Down {config.down!r} is no adapter of this model and no loader for files is installed. "
            "Import peft_metalora (it installs one), or load the Down on this model first."
        )
    return _loader(config)


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """Return the sha256 (hex) of the Down tensors in `tensors`: sorted name, shape, dtype and bytes of each.

    Keys that do not end in `.metalora_down` are ignored, so a whole Down file gives the same value as its Down part.
    """
    digest = hashlib.sha256()
    for name in sorted(key for key in tensors if key.endswith(f".{DOWN}")):
        tensor = tensors[name].detach().to("cpu").contiguous()
        digest.update(f"{name}|{tuple(tensor.shape)}|{tensor.dtype}|".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


_given: ContextVar[DownSource | None] = ContextVar("_given", default=None)


@contextmanager
def given(down: DownSource) -> Iterator[None]:
    """Within the block, a subject that names this Down gets it as it was read, from wherever that was."""
    token = _given.set(down)
    try:
        yield
    finally:
        _given.reset(token)
