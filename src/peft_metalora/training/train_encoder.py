# SPDX-License-Identifier: Apache-2.0
"""The second phase of meta-training from photos to files: a Down that exists learns to read photos.

The Down stays what it is; a copy of it is written with its subject space and encoder beside it. See
`encoder_training` for what is trained on what.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..bases import load_base
from ..bases.precision import choose_device, choose_dtype
from ..checkpoint.artefacts import require_replaceable, write_artefact
from ..checkpoint.base_model import check_fits
from ..data import Subject, read_subjects
from ..data.degrade import make_worse
from ..encoder import EncoderConfig, SubjectEncoder, SubjectSpace, make_encoder, save_reader
from ..errors import ConfigError
from ..files import require_apart
from ..hub.loading import load_down
from ..tuner.down import given, subject_config
from .encoder_training import EncoderTraining, EncoderTrainingConfig, PhotoPairs, Reads
from .engine.slot_gradients import SlotGradients
from .examples.encoding import encode_subjects
from .injecting import inject, take_off
from .stage_settings import PersonalizeConfig, TrainEncoderConfig

_FEW = 256  # people


def train_encoder(config: TrainEncoderConfig, *, progress: bool = True) -> Path:
    """Train a space and an encoder for a Down and write all three; nothing is written before the end.

    Returns:
        `output_dir`.

    Raises:
        NoImagesError, NoCaptionError, TooFewImagesError, UnreadableImageError: the photos cannot be used.
        BaseModelMismatchError, ConfigError, OutputExistsError: the base, the settings or the output cannot.
        TrainingError: the loss is not finite. WriteFailedError: the disk refuses.
        Everything that `hub.load_down` raises.
    """
    of_encoder = EncoderConfig(
        config.encoder, config.resolution, config.code_size, config.width, config.hidden, config.dropout
    )
    of_training = EncoderTrainingConfig(
        steps=config.max_train_steps,
        targets=config.images_per_subject,
        learning_rate=config.learning_rate,
        space_learning_rate=config.space_learning_rate,
        warmup_steps=config.lr_warmup_steps,
        seed=config.seed,
    )
    require_apart(config.output_dir, down=config.down, train_data_dir=config.train_data_dir)
    require_replaceable(config.output_dir, "meta", overwrite=config.overwrite)
    down = load_down(config.down, revision=config.down_revision, local_files_only=config.local_files_only)
    base_name = config.pretrained_model_name_or_path or down.config.base_model_name_or_path
    if base_name is None:
        raise ConfigError(f"{config.down} names no base model: give pretrained_model_name_or_path")
    subjects = read_subjects(config.train_data_dir)
    if len(subjects) < _FEW:
        warnings.warn(
            f"{len(subjects)} people: an encoder learns so few by heart and reads others badly; give {_FEW} or more",
            stacklevel=2,
        )
    device = choose_device(config.device)
    base = load_base(
        base_name,
        revision=config.revision,
        dtype=choose_dtype(config.mixed_precision, device),
        local_files_only=config.local_files_only,
    )
    check_fits(base.denoiser, down, name=config.down)
    base.place(device, encoders=True)
    settings = PersonalizeConfig(
        pretrained_model_name_or_path=base_name,
        output_dir=config.output_dir,
        resolution=config.resolution,
        instance_prompt=config.instance_prompt,
        random_flip=config.random_flip,
        cache_dir=config.cache_dir,
        gradient_checkpointing=config.gradient_checkpointing,
        mixed_precision=config.mixed_precision,
        seed=config.seed,
        down=config.down,
    )
    examples = encode_subjects(base, subjects, settings, config.views_per_image, progress=progress).to(device)
    encoder = make_encoder(of_encoder, base.encode_images, config.seed).to(device)
    reads = read_photos_of(subjects, encoder, config.bad_versions, config.seed, progress=progress).to(device)
    photo = torch.arange(len(examples)) // config.views_per_image
    pairs = PhotoPairs(reads, examples, photo, [subject.name for subject in subjects])
    base.place(device, encoders=False)
    rows = min(config.subjects_per_batch, len(pairs.people))
    adapter = subject_config(down, num_slots=rows, start="mean", down=config.down, inference_mode=False)
    with given(down):
        inject(base, adapter, "default", settings)
    try:
        gradients = SlotGradients(base, "default", config.mixed_precision)
        space = SubjectSpace.around(down, config.code_size).to(device)
        run = EncoderTraining(gradients, space, encoder, pairs, reads, examples, of_training)
        for _ in tqdm(run.steps(), total=config.max_train_steps, desc="training the encoder", disable=not progress):
            pass
    finally:
        take_off(base, settings)
    path = Path(config.output_dir)
    facts = {**(down.config.facts or {}), "encoder_subjects": len(pairs.people), "encoder_steps": run.steps_done}
    down.config.facts = facts
    down.config.down_fingerprint = down.fingerprint
    write_artefact(path, down.config, down.tensors, overwrite=config.overwrite)
    return save_reader(path, space.rounded().cpu(), encoder.cpu())


def read_photos_of(
    subjects: Sequence[Subject], encoder: SubjectEncoder, bad_versions: int, seed: int, *, progress: bool = True
) -> Reads:
    """What an encoder sees of every photo: as it is, and made worse in several ways.

    Args:
        bad_versions: of each photo; the good one stands as often in the result as all of them.

    Raises:
        UnreadableImageError: a file that is no image. NoFaceError: a photo without the face that the source needs.
    """
    features: list[Tensor] = []
    people: list[int] = []
    photos: list[int] = []
    number = 0
    source = random.Random(seed)
    for person, subject in enumerate(tqdm(subjects, desc="reading", unit="person", disable=not progress)):
        for photo in subject.photos:
            image = photo.load()
            seen = encoder.source.features([image, *(make_worse(image, source) for _ in range(bad_versions))]).cpu()
            rows = torch.cat([seen[:1].expand(max(1, bad_versions), *seen.shape[1:]), seen[1:]])
            features.append(rows)
            people += [person] * len(rows)
            photos += [number] * len(rows)
            number += 1
    return Reads(torch.cat(features), torch.tensor(people), torch.tensor(photos))
