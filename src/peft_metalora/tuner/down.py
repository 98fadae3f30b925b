# SPDX-License-Identifier: Apache-2.0
"""How a layer holds Downs, what identifies one, what stands on one, and how the tuner gets one that is not there yet.

The tuner knows no files: whoever does installs a loader with `set_down_loader`, and the tuner calls it with the
subject's config."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import MissingDownError
from .config import MetaLoraConfig
from .ranks import exceptions, ranks_of, scale_of

DOWN, MID_INIT, MID, UP = "metalora_down", "metalora_mid_init", "metalora_mid", "metalora_up"
MAGNITUDE = "metalora_magnitude"
DOWN_PARTS = (DOWN, MID_INIT, MID, UP)
"""What a Down's file holds of each module: Mid and Up are the mean subject of stage 1."""


def modules_in(tensors: Iterable[str]) -> list[str]:
    """The paths of the modules that factors belong to, in order, by the names of these: `{module}.metalora_mid`."""
    return sorted({name.rpartition(".")[0] for name in tensors})


@dataclass(frozen=True)
class DownSource:
    """A Down that has been read but not put on a model yet.

    `tensors` holds, for every adapted module, `{module}.metalora_down` (meta_r, d_in), `.metalora_mid_init`
    (r, meta_r), and the mean subject of stage 1: `.metalora_mid` (1, r, meta_r), `.metalora_up` (1, d_out, r).
    """

    config: MetaLoraConfig
    tensors: dict[str, Tensor]
    fingerprint: str

    def named(self, fingerprint: str) -> DownSource | None:
        """Itself, where it is the Down of this fingerprint."""
        return self if fingerprint == self.fingerprint else None


def subject_config(source: DownSource, *, r: int | None = None, **changes: Any) -> MetaLoraConfig:
    """The configuration of a subject on a Down: its modules, ranks and scales, one slot, whatever `changes` says else.

    Args:
        source: the Down.
        r: another rank than the Down's, for each module without a rank of its own in `rank_pattern`. The scaling of
            every module stays what it is with the Down's rank: lora_alpha and alpha_pattern follow.
        changes: fields of `MetaLoraConfig`; a lora_alpha among them is taken as it is.

    Raises:
        ConfigError: a value that cannot be.
    """
    before = source.config
    own: dict[str, Any] = {"stage": "subject", "num_slots": 1, "r": before.r if r is None else r}
    own |= {"down_fingerprint": source.fingerprint, "facts": None, "init_weights": True, "lora_dropout": 0.0}
    own |= {"format_version": 1, "space_fingerprint": None, "encoder_fingerprint": None}  # the Down's
    config = dataclasses.replace(before, **own | changes)
    if config.r == before.r or "lora_alpha" in changes:
        return config

    def kept(alpha: float, old: int, new: int) -> float:
        return alpha * scale_of(1, old, before.use_rslora) / scale_of(1, new, config.use_rslora)

    alphas = {}
    for module in modules_in(source.tensors):
        of_down = ranks_of(before, module)
        alphas[module] = kept(of_down.lora_alpha, of_down.r, ranks_of(config, module).r)
    common = kept(before.lora_alpha, before.r, config.r)
    return dataclasses.replace(config, lora_alpha=common, alpha_pattern=exceptions(alphas, common))


class Downs(nn.ParameterDict):
    """The Downs of a layer: parameters of the adapters that train them, buffers where subjects brought them.

    As in PEFT's VeRA, what is given and shared is no parameter: no optimiser, cast or count of those takes it for one.
    """

    def give(self, key: str, down: Tensor) -> None:
        """Put a Down under `key` that never trains."""
        self.register_buffer(key, down)
        self._keys[key] = None


_given: ContextVar[DownSource | None] = ContextVar("_given", default=None)


@contextmanager
def given(down: DownSource | None) -> Iterator[None]:
    """Within the block, a subject that names this Down gets this one: PEFT's injection has no argument for it."""
    token = _given.set(down)
    try:
        yield
    finally:
        _given.reset(token)


DownLoader = Callable[[MetaLoraConfig], DownSource]
_loader: DownLoader | None = None


def set_down_loader(loader: DownLoader | None) -> None:
    """Install the function that reads the Down a config names by path or repository; None removes it."""
    global _loader
    _loader = loader


FileCheck = Callable[[MetaLoraConfig, nn.Module], None]
_check: FileCheck | None = None


def set_file_check(check: FileCheck | None) -> None:
    """Install the function that checks the files a config was read from before it is added; None removes it."""
    global _check
    _check = check


def check_files(config: MetaLoraConfig, model: nn.Module) -> None:
    """Check the files that `config` was read from against a model, if it was and if a check is installed."""
    if _check is not None and config.origin is not None and _given.get() is None:  # what is given has been checked
        _check(config, model)


def load_down_source(config: MetaLoraConfig) -> DownSource:
    """The Down that `config` names: the one that is given, or else read by the installed loader.

    Raises:
        MissingDownError: the config names none, or no loader is installed.
    """
    down = _given.get()
    if down is not None and down.fingerprint == config.down_fingerprint:
        return down
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
    return digest_of({key: tensor for key, tensor in tensors.items() if key.endswith(f".{DOWN}")})


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """Return the sha256 (hex) over sorted name, shape, dtype and bytes of tensors."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().to("cpu").contiguous()
        digest.update(f"{name}|{tuple(tensor.shape)}|{tensor.dtype}|".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
