# SPDX-License-Identifier: Apache-2.0
"""Space and encoder from photos to files: encode, teach a Down that exists to read, validate on the way, write, resume.

The Down stays what it is; a copy of it is written with its subject space and encoder beside it. See
`encoder_training` for what is trained on what. `meta_train` does the same as its second phase.
"""

from __future__ import annotations

import dataclasses
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..bases import Base
from ..bases.precision import choose_device, plain_defaults
from ..checkpoint.base_model import base_to_load
from ..checkpoint.writing import require_replaceable
from ..data import Subject, first_copies
from ..encoder import EncoderConfig, SubjectEncoder, SubjectSpace, make_encoder, save_reader
from ..errors import ConfigError
from ..files import require_apart
from ..hub.loading import load_down
from ..tuner import DownSource
from ..tuner.down import given, subject_config
from .encoder_training import EncoderTraining, EncoderTrainingConfig, PhotoPairs, Reads
from .engine.compiling import backend_of
from .engine.origin import Origin
from .engine.processes import Processes
from .engine.sharding import wants_shards
from .engine.slot_gradients import SlotGradients
from .engine.stacked import AdapterStack, RowGradients
from .engine.state import read_state, understanding, write_checkpoint
from .examples.batches import Examples
from .examples.reading import read_photos
from .examples.sources import training_subjects
from .injecting import inject, saying_what_is_left, take_off
from .leftovers import make_room, remove_older_checkpoints
from .preparing import check_places, prepare
from .stage_settings import TrainEncoderConfig, TrainingConfig
from .watching.held_out import HeldOut, hold_out, split_subjects
from .watching.of_an_encoder import EncoderValidation
from .watching.tracking import Trackers

# Zero-step R-FaceSim of people who were not trained on, by the number of those who were: the embedded domain, 8 photos
# each, 3,000 steps (`by_people` in benchmarks/results/convergence.json).
_BY_PEOPLE = {64: 0.36, 128: 0.04, 256: 0.54, 512: 0.66, 1024: 0.69, 4096: 0.70}
_FEW = 256  # people below which the curve is steep
# Numbers of a denoiser up to which the people of a step are stacked: its kernels are then so small that launching them
# one by one takes longer than they do. Above, the memory of the stacked pass, which keeps every activation, is missed.
_SMALL = 100_000_000


@plain_defaults()
def train_encoder(config: TrainEncoderConfig, *, progress: bool = True) -> Path:
    """Train a space and an encoder for a Down and write all three to `output_dir`.

    With `validation_steps` they are written as they were at the best score. Ctrl-C writes them as they are by then
    (nothing before the first step, nor in a run of several processes) and raises KeyboardInterrupt. With
    `checkpointing_steps`, a run that was killed goes on with `resume_from_checkpoint` as if nothing had happened.

    Returns:
        `output_dir`.

    Images that cannot be decoded, or show no face where one is needed, and people with one photo are left out, with a
    warning that names them.

    Raises:
        NoImagesError, NoCaptionError, MetadataError, TooFewImagesError: the photos cannot be used.
        BaseModelMismatchError, ConfigError, OutputExistsError: the base, the settings or the output cannot.
        TrainingError: the loss is not finite. WriteFailedError: the disk refuses; nothing is written.
        Everything that `hub.load_down` raises.
    """
    require_apart(config.output_dir, down=config.down)
    check_places(config)
    require_replaceable(config.output_dir, "meta", overwrite=config.overwrite)
    down = load_down(config.down, revision=config.down_revision, local_files_only=config.local_files_only)
    asked_base = config.pretrained_model_name_or_path
    base_name, revision = base_to_load(asked_base, config.revision, down.config, config.down, config.generic)
    config = dataclasses.replace(config, pretrained_model_name_or_path=base_name, revision=revision)
    require_apart(config.output_dir, pretrained_model_name_or_path=base_name)
    subjects, others = split_subjects(training_subjects(config), config)
    warn_of_few(subjects)
    device = choose_device(config.device)
    processes = Processes.of_environment(device)
    check_shares(config.subjects_per_batch, processes)
    encoder_config(config)  # refused before any work
    progress = progress and processes.is_main

    def look(base: Base, examples: Examples) -> Material:
        held = hold_out(base, others, config) if others else None
        return material_of(base, examples, subjects, held, config, progress=progress)

    base, _, material, origin = prepare(
        config, subjects, device, processes, look, down=down, held=others, progress=progress
    )
    assert material is not None
    save = partial(save_with_reader, config.output_dir, down, overwrite=config.overwrite)
    teach(base, down, material, config, config, origin, processes, save, progress=progress)
    return Path(config.output_dir)


def encoder_config(config: TrainEncoderConfig) -> EncoderConfig:
    """The encoder that settings ask for; raises ConfigError for one that cannot be."""
    return EncoderConfig(
        config.encoder,
        config.resolution,
        config.code_size,
        config.encoder_width,
        config.encoder_hidden,
        config.encoder_dropout,
        config.face_crop or "",
        config.face_margin,
        config.face_align,
    )


def check_shares(people: int, processes: Processes) -> None:
    """Raise ConfigError unless the people of a batch can be divided among the processes."""
    rows, rest = divmod(people, processes.count)
    if rest:
        raise ConfigError(
            f"expected a multiple of the {processes.count} processes, which share a batch, as the people in it, found "
            f"{people}: give {processes.count * max(1, rows)}"
        )


def warn_of_few(subjects: Sequence[Subject]) -> None:
    """Warn where so few people can be learned from that an encoder will not know others."""
    count = sum(len(subject.photos) > 1 for subject in subjects)
    if count < _FEW:
        curve = ", ".join(f"{score} after {people}" for people, score in _BY_PEOPLE.items())
        warnings.warn(
            f"{count} people: an encoder learns so few by heart and reads others badly (R-FaceSim of others in zero "
            f"steps on the embedded domain: {curve} people); give {_FEW} or more, or validation_steps: then what is "
            "written is the step that read others best",
            stacklevel=3,
        )


@dataclass(frozen=True)
class Material:
    """What an encoder is taught with.

    Attributes:
        encoder: untrained. reads: what it reads. examples: what people are judged by. pairs: of both.
        held: on whom it is validated, if on anybody. references: features of their reference photos.
    """

    encoder: SubjectEncoder
    pairs: PhotoPairs
    reads: Reads
    examples: Examples
    held: HeldOut | None
    references: Tensor | None


def material_of(
    base: Base,
    examples: Examples,
    subjects: Sequence[Subject],
    held: HeldOut | None,
    config: TrainEncoderConfig,
    *,
    progress: bool = True,
) -> Material:
    """Have an untrained encoder look at all photos, while the base's VAE is there.

    Args:
        examples: of `subjects`, all of one shape. held: on whom is validated.

    Raises:
        ConfigError: what an encoder cannot be. TooFewImagesError: nobody has two photos. As `encode_subjects`.
    """
    encoder = make_encoder(encoder_config(config), base.encode_images, config.seed)
    reads = read_photos(subjects, examples, encoder, config, progress=progress)
    sight = encoder.sight(config.face_crop)
    seen = None if held is None else encoder.source.features([sight(photo) for photo in held.references]).cpu()
    assert examples.photo is not None
    # A copy of a photo is no other photo to be judged by.
    same = torch.tensor(first_copies([photo for one in subjects for photo in one.photos]), device="cpu")
    pairs = PhotoPairs(
        dataclasses.replace(reads, photo=same[reads.photo]),
        examples,
        same[examples.photo],
        [one.name for one in subjects],
    )
    return Material(encoder, pairs, reads, examples, held, seen)


def teach(
    base: Base,
    down: DownSource,
    material: Material,
    config: TrainEncoderConfig,
    asked: TrainingConfig,
    origin: Origin,
    processes: Processes,
    save: Callable[[EncoderTraining, dict[str, Any]], None],
    *,
    progress: bool = True,
) -> None:
    """Train on a base without adapters, which it leaves so; the last that happens is that the main process saves.

    Args:
        asked: the settings that the user gave, which a checkpoint keeps; its folders are those of `config`.
        save: writes the result, given the run and its facts.

    Raises:
        As `train_encoder`.
    """
    device, rows = base.device, config.subjects_per_batch // processes.count
    trackers = Trackers(config, processes)
    stacked, why = stacks(base, config, processes)
    adapter = subject_config(
        down, num_slots=1 if stacked else rows, start="mean", down=config.down, inference_mode=False
    )
    with given(down):
        inject(base, adapter, "default", config)
    try:
        gradients: RowGradients | SlotGradients
        if stacked:
            gradients = RowGradients(base, AdapterStack(base.denoiser, rows))
        else:
            gradients = SlotGradients(base, "default", config.mixed_precision)
        if progress:
            taken = "stacked" if stacked else "by slots"
            tqdm.write(f"gradients of {rows} people a batch: {taken} ({why})", file=sys.stderr)
        space = SubjectSpace.around(down, config.code_size).ordered(gradients.names)
        reads = material.reads.to(device, features=stacked)
        examples = material.examples.to(device)
        run = EncoderTraining(
            gradients,
            space.to(device),
            material.encoder.to(device),
            material.pairs.to(device),
            reads,
            examples,
            EncoderTrainingConfig(
                steps=config.max_train_steps,
                targets=config.images_per_subject,
                learning_rate=config.learning_rate,
                space_learning_rate=config.space_learning_rate,
                warmup_steps=config.lr_warmup_steps,
                seed=config.seed,
                accumulation=config.gradient_accumulation_steps,
            ),
            record=stacked,
            processes=processes,
        )
        origin = {**origin, "Down": {config.down: down.fingerprint}}
        # Whatever their number, processes share one state.
        state = read_state(asked, origin=origin)
        if state is not None:
            with understanding(str(asked.resume_from_checkpoint)):
                run.load_state_dict(state)
        done = len(run.losses)
        if processes.is_main:
            make_room(asked, "meta", began=done)
        validation = None
        if material.held is not None and material.references is not None:
            validation = EncoderValidation(run, material.held, material.references, config, trackers, done)
            if state is not None:
                with understanding(str(asked.resume_from_checkpoint)):
                    validation.load_state_dict(state)
        try:
            trackers.start(done)
            alone = f"The Down in {config.down} is whole, but reads no photos" if asked is not config else None
            with saying_what_is_left(config, alone):
                _run(run, config, asked, origin, trackers, validation, progress=progress)
        except KeyboardInterrupt:
            if run.losses and processes.count == 1:  # the others may be gone already
                save(run, _facts(run, config, len(run.losses)))
            raise
        finally:
            trackers.finish()
        steps = len(run.losses)
        if validation is not None and validation.best.step:
            validation.best.restore()
            steps = validation.best.step
        if processes.is_main:
            with saying_what_is_left(config):
                save(run, _facts(run, config, steps))
            remove_older_checkpoints(asked, len(run.losses), began=done)
        processes.wait()
    finally:
        take_off(base, config)


def stacks(base: Base, config: TrainEncoderConfig, processes: Processes) -> tuple[bool, str]:
    """Whether the people of a step are stacked or held in slots, and why."""
    size = sum(parameter.numel() for parameter in base.denoiser.parameters())
    if size > _SMALL:
        return False, f"a base of {size / 1e6:.0f} M numbers, more than {_SMALL / 1e6:.0f} M"
    for asked, why in (
        (wants_shards(processes, config), "the base is divided over processes"),
        (config.gradient_checkpointing, "gradient_checkpointing"),
        (backend_of(config) is not None, "dynamo_backend"),
        (config.quantize != "none", "quantize"),
        (bool(base.host_looks), f"the host looks {base.host_looks}"),
        (config.mixed_precision == "fp16", "gradients in float16 are scaled"),
    ):
        if asked:
            return False, why
    return True, f"a base of {size / 1e6:.0f} M numbers, at most {_SMALL / 1e6:.0f} M"


def _run(
    run: EncoderTraining,
    config: TrainEncoderConfig,
    asked: TrainingConfig,
    origin: Origin,
    trackers: Trackers,
    validation: EncoderValidation | None,
    *,
    progress: bool,
) -> None:
    total, every = config.max_train_steps, config.checkpointing_steps
    with tqdm(
        total=total, initial=len(run.losses), desc="training the encoder", unit="step", disable=not progress
    ) as bar:
        for step in run.steps():
            bar.update()
            bar.set_postfix(loss=f"{step.loss:.4f}", refresh=False)
            trackers.step(step)
            if validation is not None:
                score = validation.look(step.number)
                if score is not None:
                    bar.set_postfix(loss=f"{step.loss:.4f}", score=f"{score:.4f}", refresh=False)
            if every and step.number % every == 0 and run.processes.is_main:
                seen = {} if validation is None else validation.state_dict()
                write_checkpoint(asked, step.number, {**run.state_dict(), **seen}, origin=origin)


def _facts(run: EncoderTraining, config: TrainEncoderConfig, steps: int) -> dict[str, Any]:
    """What a Down's configuration says of its encoder, which was taught for so many steps."""
    kept = "learning_rate", "space_learning_rate", "subjects_per_batch", "images_per_subject", "bad_versions", "seed"
    return {
        "encoder_subjects": len(run.pairs.people),
        "encoder_steps": steps,
        "encoder_recipe": {**{name: getattr(config, name) for name in kept}, **config.noise_levels},
    }


def save_with_reader(
    folder: str, down: DownSource, run: EncoderTraining, facts: dict[str, Any], *, overwrite: bool
) -> None:
    """Write a Down with its reader; raises as `save_reader`."""
    config = dataclasses.replace(down.config, facts={**(down.config.facts or {}), **facts})
    source = dataclasses.replace(down, config=config)
    save_reader(folder, run.space.rounded().cpu(), run.encoder.cpu(), source, overwrite=overwrite)
