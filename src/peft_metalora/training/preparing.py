# SPDX-License-Identifier: Apache-2.0
"""What all training does before the first step: load the base, encode what is seen, put everything in its place."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch

from ..bases import Base, open_base
from ..bases.generic import named_class
from ..bases.memory import COMPILED, CPU, DIVIDED, DRAWING, UNCHECKPOINTED, require_supported
from ..bases.precision import choose_dtype
from ..bases.streaming import blocks_of
from ..checkpoint.base_model import check_fits
from ..data import TRIGGER_MARK, Subject, first_copies
from ..errors import ConfigError, NoImagesError, UnreadableImageError
from ..files import require_apart, require_writable
from ..metrics import face_embedder
from ..metrics.face_crop import FaceCrop
from ..tuner import DownSource
from .engine.compiling import backend_of
from .engine.optimizers import optimizer_class, optimizer_options
from .engine.origin import CODE, BaseDigest, Origin, code_of_settings, photos_of
from .engine.processes import Processes
from .engine.sharding import shard, wants_shards
from .engine.state import check_resumable, last_checkpoint
from .examples.batches import Examples
from .examples.encoding import caption_of, encode_subjects
from .examples.views import shapes_of
from .stage_settings import (
    ENCODER_FOLDER,
    INPUTS,
    VALIDATION_FOLDER,
    MetaTrainConfig,
    PersonalizeConfig,
    StageConfig,
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


def _check_helpers(
    config: MetaTrainConfig | PersonalizeConfig | TrainEncoderConfig, device: torch.device, processes: Processes
) -> None:
    """Check that what else a run needs is there: detector, judge, optimiser, and the checkpoint to go on from.

    Raises:
        As `FaceCrop`, `face_embedder`, `optimizer_options` and `check_resumable`.
    """
    teaches = isinstance(config, MetaTrainConfig) and config.encoder is not None
    if not (teaches and last_checkpoint(str(Path(config.output_dir, ENCODER_FOLDER)))):  # then in which phase it was
        check_resumable(config, processes)
    if isinstance(config, StageConfig):
        optimizer_options(optimizer_class(config.optimizer), config, device)
    if config.face_crop is not None:
        FaceCrop(config.face_crop, config.face_margin, config.face_align)
    if config.validation_embedder is not None:
        face_embedder(config.validation_embedder, "validation_embedder")


def _check_photos(config: TrainingConfig, subjects: Sequence[Subject], held: Sequence[Subject]) -> None:
    """Check that photos have captions and, of one subject, that a photo can be decoded; warn of a trigger that none
    has, and of known held-out ones.

    Raises:
        NoCaptionError, ConfigError: as `caption_of`. UnreadableImageError, NoImagesError: no photo can be.
    """
    for subject in (*subjects, *held):
        for photo in subject.photos:
            caption_of(photo, config)
    word = config.trigger
    if word and not any(word in caption_of(photo, config) for subject in subjects for photo in subject.photos):
        warnings.warn(
            f"trigger {word!r} stands in no caption, so that nobody is learned by that word: write {TRIGGER_MARK} into "
            "the captions, or into instance_prompt, which photos with a caption of their own do not take",
            stacklevel=3,
        )
    if len(subjects) != 1:  # minutes, of many
        _warn_of_known(subjects, held)
        return
    for photo in subjects[0].photos:
        try:
            photo.load()
        except (NoImagesError, UnreadableImageError):
            if photo is subjects[0].photos[-1]:
                raise
        else:
            return


def _warn_of_known(subjects: Sequence[Subject], held: Sequence[Subject]) -> None:
    """Warn where photos of held-out people are trained on, whose scores then say nothing of people who are not."""
    trained = [photo for one in subjects for photo in one.photos]
    watched = [(one.name, photo) for one in held for photo in one.photos]
    same = first_copies([*trained, *(photo for _, photo in watched)])[len(trained) :] if watched else []
    known = [name for (name, _), first in zip(watched, same, strict=True) if first < len(trained)]
    if known:
        names = ", ".join(list(dict.fromkeys(known))[:5])
        warnings.warn(
            f"{len(known)} photos that validation looks at are trained on, too ({names}): "
            "scores are better than those of people who are not. Hold out others, or take these photos out of the "
            "training data",
            stacklevel=3,
        )


def _check_denoiser(base: Base, config: TrainingConfig) -> None:
    """Check that a denoiser, which may be one that no family knows, does what is asked of it.

    Raises:
        ConfigError: it does not compute blocks again, or names none that could be streamed.
    """
    kind = type(base.denoiser)
    if config.gradient_checkpointing and not getattr(kind, "_supports_gradient_checkpointing", False):
        raise ConfigError(f"gradient_checkpointing needs a denoiser that can, found a {kind.__name__}: leave it out")
    if config.offload == "group" and not blocks_of(base.denoiser):
        raise ConfigError(
            f"offload 'group' needs a denoiser that names its blocks, found a {kind.__name__}: leave it out"
        )


def prepare(
    config: MetaTrainConfig | PersonalizeConfig | TrainEncoderConfig,
    subjects: Sequence[Subject],
    device: torch.device,
    processes: Processes,
    encode_more: Callable[[Base, Examples], _More] | None,
    *,
    down: DownSource | None = None,
    held: Sequence[Subject] = (),
    progress: bool = True,
) -> tuple[Base, Examples, _More | None, Origin]:
    """Load the base in the precision for `device`, part by part, and encode the subjects on it.

    First VAE and text encoders are there, then the denoiser, on the device or divided over the processes if the
    launcher asks for it; VAE and text encoders stay only if views are cut in every batch or validation draws pictures.

    Args:
        encode_more: called while VAE and text encoders are there, for what is needed beside the examples.
        down: that the base has to fit, which is seen before any weight is loaded.
        held: whom validation looks at, for `encode_more`.

    Returns:
        The base, its examples, what `encode_more` gave, and, if there are to be checkpoints, what all is made from.

    Raises:
        As `require_supported`, `_check_photos`, `_check_helpers`, `open_base`, `_check_denoiser`, `check_fits`,
        `encode_subjects` and `shard`.
    """
    whole = not wants_shards(processes, config)
    if not whole and config.mixed_precision == "fp16":
        raise ConfigError("mixed_precision 'fp16' needs a base that is whole on each device, found one that is divided")
    draws = bool(config.validation_steps and config.validation_prompt)
    circumstances = {
        CPU: device.type == "cpu",
        COMPILED: backend_of(config) is not None,
        DIVIDED: not whole,
        DRAWING: draws,
        UNCHECKPOINTED: not config.gradient_checkpointing,
    }
    require_supported(config, "train", *(name for name, holds in circumstances.items() if holds))
    _check_photos(config, subjects, held)
    _check_helpers(config, device, processes)
    base = open_base(
        config.pretrained_model_name_or_path,
        revision=config.revision,
        dtype=choose_dtype(config.mixed_precision, device),
        local_files_only=config.local_files_only,
        memory=config,
        generic=config.generic,
        weighting_scheme=config.weighting_scheme,
        shift=config.shift,
        max_sequence_length=config.max_sequence_length,
    )
    _check_denoiser(base, config)
    shapes_of(base, config)
    if down is not None:
        check_fits(base.denoiser, down, name=str(getattr(config, "down", None) or "this Down"))
    origin: Origin = {}
    digest = BaseDigest()
    with_origin = config.checkpointing_steps is not None or config.resume_from_checkpoint is not None
    base.place(device, encoders=True, denoiser=False)
    if with_origin:
        digest.see(base, *base.encoder_names)
        origin["class of the base"] = {one: one for one in named_class(base).values()}
        origin[CODE] = code_of_settings(base, config)
        origin["photos"] = photos_of(subjects, getattr(config, "balance_by", None))
    examples = encode_subjects(base, subjects, config, config.views_per_image, progress=progress, skip_unreadable=True)
    more = None if encode_more is None else encode_more(base, examples)
    base.place(device, encoders=draws, denoiser=whole, vae=not config.views_per_image)
    base.load_denoiser()
    if with_origin:
        digest.see(base, base.denoiser_name)
        origin["base model"] = {config.pretrained_model_name_or_path: str(digest)}
    shard(base, device, processes, config)
    return base, examples, more, origin
