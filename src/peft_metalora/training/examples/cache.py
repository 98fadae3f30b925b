# SPDX-License-Identifier: Apache-2.0
"""Encoded photos and captions on disk, so that a second run needs neither VAE nor text encoders.

A file's name is a hash of everything its content depends on: the encoder's weights, the code of somebody's own base
class, the photo's bytes, the settings. Nothing is ever out of date; a folder may be shared by runs and processes, and
deleted at any time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ...files import write_tensors
from ...tuner.down import digest_of

# A retrained encoder differs nearly everywhere, so that a few numbers of each tensor tell it apart from its origin.
_SAMPLE = 64
# Of an autoencoder: latents are scaled by them, and no weight knows them.
_SCALES = "scaling_factor", "shift_factor", "latents_mean", "latents_std"
_KEY = "made_from"  # in a file's metadata


class Cache:
    """Tensors by what they were made from.

    Args:
        folder: made when first written to; None: nothing is kept.
    """

    def __init__(self, folder: str | None) -> None:
        self.folder = None if folder is None else Path(folder)

    def get(self, made_from: dict[str, Any], make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """What `make` gives, from the folder if it is there.

        Args:
            made_from: plain JSON that determines the result.

        Raises:
            WriteFailedError: the folder cannot be written.
        """
        if self.folder is None:
            return _as_read(make())
        name = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()
        path = self.folder / name[:2] / f"{name}.safetensors"
        tensors = _read(path, name)
        if tensors is None:
            tensors = _as_read(make())
            write_tensors(path, tensors, {_KEY: _key(name, tensors)})
        return tensors


def _as_read(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same in the layout of a file: convolutions round otherwise on what they left in one of their own."""
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def _read(path: Path, name: str) -> dict[str, Tensor] | None:
    """What the file of that name holds; None if it is not there, damaged, or was put there by something else."""
    with suppress(OSError, SafetensorError, MemoryError, RuntimeError):
        if path.is_file():
            with safe_open(path, "pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no iterator)
                key = (file.metadata() or {}).get(_KEY)
            if key == _key(name, tensors) and all(torch.isfinite(one).all() for one in tensors.values()):
                return tensors
    return None


def _key(name: str, tensors: dict[str, Tensor]) -> str:
    return hashlib.sha256(json.dumps([name, digest_of(tensors)]).encode()).hexdigest()


def identity(*modules: nn.Module | None) -> str:
    """A hash of models: their classes, how an autoencoder scales latents, and some numbers of each of their tensors."""
    digest = hashlib.sha256()
    for module in modules:
        if module is None:
            continue
        config = getattr(module, "config", None)
        scales = [getattr(config, name, "") for name in _SCALES]
        digest.update(f"{type(module).__name__}|{scales}|".encode())
        for name, tensor in module.state_dict().items():
            digest.update(f"{name}|{tuple(tensor.shape)}|{tensor.dtype}|".encode())
            sample = tensor.detach().flatten()[:_SAMPLE].to("cpu", torch.float64)
            digest.update(sample.numpy().tobytes())
    return digest.hexdigest()


def content_hash(content: bytes) -> str:
    """Hash of a file's bytes."""
    return hashlib.sha256(content).hexdigest()
