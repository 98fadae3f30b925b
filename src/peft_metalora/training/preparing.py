# SPDX-License-Identifier: Apache-2.0
"""What both stages do before the first step: load the base, encode what is seen, put everything in its place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from ..bases import Base, load_base
from ..bases.precision import choose_dtype
from ..data import Subject
from .engine.processes import Processes
from .engine.sharding import shard, wants_shards
from .examples.batches import Examples
from .examples.encoding import encode_subjects
from .settings import MetaTrainConfig, PersonalizeConfig

_HeldOut = TypeVar("_HeldOut")


def prepare(
    config: MetaTrainConfig | PersonalizeConfig,
    subjects: Sequence[Subject],
    device: torch.device,
    processes: Processes,
    encode_held_out: Callable[[Base], _HeldOut] | None,
    *,
    progress: bool = True,
) -> tuple[Base, Examples, _HeldOut | None]:
    """Load the base in the precision for `device` and encode the subjects on it.

    Afterwards the denoiser is on the device, or divided over the processes if the launcher asks for it; the VAE and the
    text encoders are there only if views are cut in every batch or validation draws pictures.

    Args:
        encode_held_out: gives what validation looks at; None: there is none.

    Returns:
        The base, its examples, and what `encode_held_out` gave.

    Raises:
        As `load_base`, `encode_subjects` and `shard`.
    """
    whole = not wants_shards(processes, config)
    base = load_base(
        config.pretrained_model_name_or_path,
        revision=config.revision,
        dtype=choose_dtype(config.mixed_precision, device),
        local_files_only=config.local_files_only,
        weighting_scheme=config.weighting_scheme,
        max_sequence_length=config.max_sequence_length,
    )
    base.place(device, encoders=True, denoiser=whole)
    examples = encode_subjects(base, subjects, config, config.views_per_image, progress=progress, skip_unreadable=True)
    held_out = None if encode_held_out is None else encode_held_out(base)
    draws = held_out is not None and bool(config.validation_prompt)
    base.place(device, encoders=draws, denoiser=whole, vae=not config.views_per_image)
    shard(base, device, processes, config)
    return base, examples, held_out
