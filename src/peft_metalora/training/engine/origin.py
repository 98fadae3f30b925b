# SPDX-License-Identifier: Apache-2.0
"""What a run is made from beside its settings, as hashes: base, photos with their captions, Down, code of one's own.

A checkpoint keeps these in place of paths. The run goes on from wherever the same things lie by then, nobody reads in
it where a person's photos are, and what has changed meanwhile is named.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import torch

from ...bases import Base
from ...data import Subject
from ...errors import NoImagesError, UnreadableImageError
from ...files import written_in
from ...metrics.by_name import code_of
from ..stage_settings import TrainingConfig

Origin = dict[str, dict[str, str]]
"""Kind ('photos') to hash by name ('ann'), in the order in which the run takes them."""
CODE = "code"
"""The kind that is told when it differs, and not refused: whether an edit changes anything, no hash knows."""

# A retrained base differs nearly everywhere, so that a few numbers of each tensor tell it apart from its origin.
_SAMPLE = 64


def photos_of(subjects: Sequence[Subject], tag: str | None = None) -> dict[str, str]:
    """A hash of each subject's photos, masks and captions, and of a tag of theirs."""
    return {subject.name: _hash([subject.tags.get(tag or ""), *map(_photo, subject.photos)]) for subject in subjects}


def code_of_settings(base: Base, config: TrainingConfig) -> dict[str, str]:
    """A hash of the code of somebody's own that examples and losses come from, by the setting that names it."""
    found = {"generic": written_in(type(base))}
    for name in ("face_crop", "face_model", "encoder"):
        found[name] = code_of((getattr(config, name, None) or "").removeprefix("face:"))
    return {name: _hash(code) for name, code in found.items() if code}


class BaseDigest:
    """A hash of a base: names, shapes and some numbers of its models, in whatever precision they are held.

    Each model is to be seen while it is there, and before it is divided over processes: the encoders, then the
    denoiser.
    """

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def see(self, base: Base, *names: str) -> None:
        """Take in models of the pipeline."""
        for name in names:
            module = getattr(base.pipeline, name, None)
            for key, tensor in module.state_dict().items() if isinstance(module, torch.nn.Module) else ():
                self._digest.update(f"{name}.{key}|{tuple(tensor.shape)}|".encode())
                # What a quantiser made has a layout of its own, which may differ from device to device.
                plain = type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.is_floating_point()
                if plain and not tensor.is_meta:
                    some = tensor.detach().reshape(-1)[:_SAMPLE].to("cpu", torch.float32).bfloat16()
                    self._digest.update(some.view(torch.int16).numpy().tobytes())

    def __str__(self) -> str:
        return self._digest.hexdigest()


def _photo(photo: Any) -> list[Any]:
    try:
        content = hashlib.sha256(photo.read()).hexdigest()
        mask = None if photo.mask is None else hashlib.sha256(photo.mask.read_bytes()).hexdigest()
    except (NoImagesError, UnreadableImageError, OSError):  # left out of the run, too
        return [None, photo.caption]
    return [content, mask, photo.caption]


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
