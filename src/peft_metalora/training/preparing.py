# SPDX-License-Identifier: Apache-2.0
"""What all training does before the first step: load the base, encode what is seen, put everything in its place."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch

from ..bases import Base, load_base
from ..bases.precision import choose_dtype
from ..checkpoint.artefacts import what_else
from ..data import Subject
from ..errors import ConfigError
from ..files import require_apart, require_writable
from .engine.origin import Origin, base_of, photos_of
from .engine.processes import Processes
from .engine.sharding import shard, wants_shards
from .engine.state import checkpoint_folders
from .examples.batches import Examples
from .examples.encoding import encode_subjects
from .stage_settings import (
    ENCODER_FOLDER,
    INPUTS,
    VALIDATION_FOLDER,
    MetaTrainConfig,
    PersonalizeConfig,
    TrainEncoderConfig,
    TrainingConfig,
)

_More = TypeVar("_More")


def check_places(config: MetaTrainConfig | PersonalizeConfig | TrainEncoderConfig) -> None:
    """Check where a run writes, before any work.

    Raises:
        ConfigError: over, or into, what it reads. WriteFailedError: where it cannot.
    """
    inputs = {name: getattr(config, name, None) for name in INPUTS}
    output = Path(config.output_dir)
    places = [output]
    if config.validation_steps:
        places.append(output / VALIDATION_FOLDER)
    if config.report_to:
        places.append(output / config.logging_dir)
    if config.cache_dir is not None:
        places.append(Path(config.cache_dir))
        if os.path.realpath(config.cache_dir) == os.path.realpath(output):
            raise ConfigError(
                f"expected cache_dir apart from output_dir, found {config.cache_dir!r} for both: a run's output is "
                f"given away whole, so keep the cache in a folder of its own, for example {str(output / 'cache')!r}"
            )
    require_apart(output, resume_from_checkpoint=config.resume_from_checkpoint)
    for place in places:
        require_apart(place, **inputs)
        require_writable(place)


def make_room(config: TrainingConfig, stage: str | None, subject_name: str | None = None) -> None:
    """Remove what a run for somebody else, or of another kind, left in an output folder that is to be replaced.

    Args:
        stage, subject_name: as of `require_replaceable`.
    """
    output, checkpoints = Path(config.output_dir), checkpoint_folders(config.output_dir).values()
    if not config.overwrite or all(what_else(place, stage, subject_name) is None for place in (output, *checkpoints)):
        return
    of_runs = VALIDATION_FOLDER, config.logging_dir, ENCODER_FOLDER
    for place in (*checkpoints, *(output / name for name in of_runs)):
        if output.resolve() in place.resolve().parents:
            shutil.rmtree(place, ignore_errors=True)


def prepare(
    config: MetaTrainConfig | PersonalizeConfig | TrainEncoderConfig,
    subjects: Sequence[Subject],
    device: torch.device,
    processes: Processes,
    encode_more: Callable[[Base, Examples], _More] | None,
    *,
    progress: bool = True,
) -> tuple[Base, Examples, _More | None, Origin]:
    """Load the base in the precision for `device` and encode the subjects on it.

    Afterwards the denoiser is on the device, or divided over the processes if the launcher asks for it; the VAE and the
    text encoders are there only if views are cut in every batch or validation draws pictures.

    Args:
        encode_more: called while VAE and text encoders are there, for what is needed beside the examples.

    Returns:
        The base, its examples, what `encode_more` gave, and, if there are to be checkpoints, what all is made from.

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
    origin: Origin = {}
    if config.checkpointing_steps is not None or config.resume_from_checkpoint is not None:
        origin["base model"] = {config.pretrained_model_name_or_path: base_of(base)}
        origin["photos"] = photos_of(subjects, getattr(config, "balance_by", None))
    base.place(device, encoders=True, denoiser=whole)
    examples = encode_subjects(base, subjects, config, config.views_per_image, progress=progress, skip_unreadable=True)
    more = None if encode_more is None else encode_more(base, examples)
    draws = bool(config.validation_steps and config.validation_prompt)
    base.place(device, encoders=draws, denoiser=whole, vae=not config.views_per_image)
    shard(base, device, processes, config)
    return base, examples, more, origin
