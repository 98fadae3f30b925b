# SPDX-License-Identifier: Apache-2.0
"""Stage 2 from photos to files: encode, train a subject (`Personalization`), stop by itself, write, resume."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .. import hub
from ..bases import Base, open_base
from ..bases.generic import named_class
from ..bases.precision import choose_device, choose_dtype, plain_defaults
from ..checkpoint.base_model import base_to_load, check_fits
from ..checkpoint.reader_files import READER_FILES
from ..checkpoint.space import CodeSource
from ..checkpoint.writing import require_replaceable, save_read_subject
from ..data import Photo, Subject
from ..encoder.reader import Reader, load_reader, no_encoder
from ..errors import ConfigError
from ..files import require_apart
from ..hub.loading import HubOptions, folder_of
from ..tuner import DownSource
from .engine.origin import photos_of
from .engine.processes import Processes
from .engine.state import checkpoint_folders, read_state, understanding, write_checkpoint
from .examples.batches import Examples
from .examples.sources import check_instance_source, instance_subject, name_of
from .injecting import saying_what_is_left
from .leftovers import make_room, remove_older_checkpoints
from .preparing import check_places, prepare
from .stage_2 import Personalization, called, check_rank
from .stage_settings import PersonalizeConfig
from .watching.of_a_subject import Validation, held_out, looked_at
from .watching.tracking import Trackers


@plain_defaults()
def personalize(config: PersonalizeConfig, *, progress: bool = True) -> Path:
    """Stage 2 from an image, a folder of images or a data set of one subject: trains and writes `output_dir`.

    On a Down with an encoder the subject starts as it is read from the images, unless `start` says otherwise, and
    training ends by itself.

    Ctrl-C writes the subject as it is by then (nothing before the first step) and raises KeyboardInterrupt. With
    `checkpointing_steps`, a run that was killed goes on with `resume_from_checkpoint` as if nothing had happened.

    Returns:
        The folder that was written: a subject, or a plain LoRA that diffusers loads.

    Of several images, those that cannot be decoded, or show no face where one is needed, are left out, with a warning
    that names them.

    Raises:
        NoImagesError, NoCaptionError, UnreadableImageError, MetadataError: the data cannot be used.
        CheckpointError: the Down cannot be read, or belongs to another base model, or has no encoder to start from.
        BaseModelMismatchError, NoTargetModulesError, ConfigError: the base or the settings cannot be used.
        OutputExistsError: something else, or somebody else, lies in output_dir.
        TrainingError: the loss is not finite. WriteFailedError: the disk refuses; nothing is written.
    """
    check_instance_source(config)
    check_places(config)
    if config.method == "meta-lora" and config.down is None:
        raise ConfigError("method 'meta-lora' needs a Down, found none: give down=, or method 'lora'")
    if config.method == "lora" and not config.pretrained_model_name_or_path:
        raise ConfigError("method 'lora' needs a base model, found none: give pretrained_model_name_or_path")
    subject = instance_subject(config)
    name = name_of(config, subject)
    kind = "subject" if config.method == "meta-lora" else None
    require_replaceable(config.output_dir, kind, name, overwrite=config.overwrite)
    for place in checkpoint_folders(config.output_dir).values():
        require_replaceable(place, kind, name, overwrite=config.overwrite)
    device = choose_device(config.device)
    processes = Processes.of_environment(device)
    progress = progress and processes.is_main
    down, folder = _down_of(config)
    config = config.settled(folder is not None)
    if down is not None:
        asked = config.pretrained_model_name_or_path
        base_name, revision = base_to_load(asked, config.revision, down.config, str(config.down), config.generic)
        config = replace(config, pretrained_model_name_or_path=base_name, revision=revision)
        require_apart(config.output_dir, pretrained_model_name_or_path=base_name)
    if config.max_train_steps == 0 and down is not None and folder is not None:
        if processes.is_main:
            _write_as_read(config, subject, name, down, folder, device)
        processes.wait()
        return Path(config.output_dir)
    trackers = Trackers(config, processes)
    if down is not None:
        check_rank(config, down)
    held = [looked_at(subject, config)] if config.validation_steps else []
    look = partial(_beside, subject, held, config, down, folder, processes, device)
    base, examples, beside, origin = prepare(
        config, [subject], device, processes, look, down=down, held=held, progress=progress
    )
    others, read = beside or (None, [])
    run = Personalization(base, examples, config, down, processes, read)
    validation = Validation(run, *others, trackers) if others is not None else None
    if down is not None:
        origin["Down"] = {str(config.down): down.fingerprint}
        if read:  # how far somebody may move is a share of where they were read
            reader = down.config.space_fingerprint, down.config.encoder_fingerprint
            origin["reader of the Down"] = {str(config.down): " ".join(map(str, reader))}
    if others is not None:
        origin["validation photos"] = photos_of([Subject("of validation", others[0])])
    state = read_state(config, origin=origin, extendable=config.has_constant_rate)
    if state is not None:
        with understanding(str(config.resume_from_checkpoint)):
            run.load_state_dict(state["run"])
            if validation is not None:
                validation.best.load_state_dict(state["best"])
    began = run.steps_done
    if processes.is_main:
        make_room(config, kind, name, began=began)
    save = partial(run.save, subject_name=name)
    output, total, every = Path(config.output_dir), config.max_train_steps, config.checkpointing_steps
    doing = f"stage 2: learning the {kind or 'LoRA'}"
    bar = tqdm(total=total, initial=run.steps_done, desc=doing, unit="step", disable=not progress)
    with bar, saying_what_is_left(config):
        try:
            trackers.start(run.steps_done)
            for step in run.steps():
                bar.update()
                bar.set_postfix(loss=f"{step.loss:.4f}", refresh=False)
                trackers.step(step)
                if validation is not None and validation.look(step.number):
                    bar.set_postfix(loss=f"{step.loss:.4f}", best=f"{validation.best.score:.4f}", refresh=False)
                    if validation.best.finished:
                        break
                if every and step.number % every == 0 and processes.is_main:
                    best = validation.best.state_dict() if validation is not None else None
                    state = {"run": run.state_dict(), "best": best}
                    write_checkpoint(config, step.number, state, origin=origin, beside=save)
        except KeyboardInterrupt:
            if run.steps_done and processes.is_main:
                save(output)
            raise
        finally:
            trackers.finish()
    done = run.steps_done
    if validation is not None:
        validation.use_best()
    if processes.is_main:
        with saying_what_is_left(config):
            save(output)
        remove_older_checkpoints(config, done, began=began)
    processes.wait()
    return output


def _down_of(config: PersonalizeConfig) -> tuple[DownSource | None, Path | None]:
    """The Down, and where it lies if a subject may start from what its encoder reads.

    Raises:
        ArtefactNotFoundError: it is to, and there is no encoder. As `hub.load_down`.
    """
    if config.method != "meta-lora" or config.down is None:
        return None, None
    options: HubOptions = {"revision": config.down_revision, "local_files_only": config.local_files_only}
    down = hub.load_down(config.down, **options)
    reads = down.config.encoder_fingerprint is not None
    if config.start == "encoder" and not reads:
        raise no_encoder(config.down)
    if not reads or config.start not in (None, "encoder"):
        return down, None
    return down, folder_of(config.down, READER_FILES, **options)


def _beside(
    subject: Subject,
    held: Sequence[Subject],
    config: PersonalizeConfig,
    down: DownSource | None,
    folder: Path | None,
    processes: Processes,
    device: torch.device,
    base: Base,
    examples: Examples,
) -> tuple[tuple[list[Photo], Examples] | None, list[CodeSource]]:
    """What is needed beside the examples: what validation looks at, and the subject as it is read."""
    others = held_out(base, held[0], config) if held else None
    if down is None or folder is None:
        return others, []
    reader, code = _read(base, [subject.photos[number] for number in examples.photos()], config, down, folder)
    code = code.to(device)
    if not processes.is_main:  # one start for all, to the last bit
        code.zero_()
    processes.sum_([code])
    return others, [reader.subject(code.cpu(), down)]


def _read(
    base: Base, photos: Sequence[Photo], config: PersonalizeConfig, down: DownSource, folder: Path
) -> tuple[Reader, Tensor]:
    """The reader of a Down, and the code (k,) that it reads off photos of one person."""
    reader = load_reader(folder, down, base.encode_images, config.face_model)
    crop = (config.face_crop, config.face_margin, config.face_align) if config.face_crop else ()
    codes, _ = reader.codes([photos], reader.encoder.sight(*crop), skip_unusable=True)
    return reader, codes[0]


def _write_as_read(
    config: PersonalizeConfig, subject: Subject, name: str | None, down: DownSource, folder: Path, device: torch.device
) -> None:
    """No steps: the subject is written as it is read, which needs of the base its VAE alone."""
    base = open_base(
        config.pretrained_model_name_or_path,
        revision=config.revision,
        dtype=choose_dtype(config.mixed_precision, device),
        local_files_only=config.local_files_only,
        generic=config.generic,
    )
    check_fits(base.denoiser, down, name=str(config.down))
    base.place(device, encoders=False, denoiser=False, vae=True)
    reader, code = _read(base, subject.photos, config, down, folder)
    person = reader.subject(
        code,
        down,
        down=config.down,
        down_revision=config.down_revision,
        base_model_name_or_path=config.pretrained_model_name_or_path,
        revision=config.revision,
        subject_name=name,
    )
    make_room(config, "subject", name)
    facts = {
        **called(config),
        **named_class(base),
        "steps": 0,
        "recipe": {"start": config.start, "trainable_parameters": 0},
    }
    save_read_subject(config.output_dir, person, facts=facts, overwrite=config.overwrite)
    remove_older_checkpoints(config, 0)


@plain_defaults()
def personalize_many(
    base: Base,
    examples: Examples,
    config: PersonalizeConfig,
    down: DownSource,
    *,
    read: Sequence[CodeSource] = (),
    progress: bool = True,
) -> Personalization:
    """Learn all subjects of `examples` at once, each in its slot, on a base that is loaded already; writes nothing.

    Args:
        read: each subject as the Down's encoder reads it (`Reader.codes`), to start from there.

    Returns:
        The finished run: `set_slots` shows a subject, `save(folder, slot)` writes one, `remove()` takes all off.

    Raises:
        As `Personalization`; TrainingError when the loss is not finite. The denoiser is then as it was.
    """
    run = Personalization(base, examples, config, down, read=read)
    try:
        doing, total = f"stage 2: learning {run.num_subjects} subjects", run.config.max_train_steps
        for _ in tqdm(run.steps(), total=total, desc=doing, unit="step", disable=not progress):
            pass
    except BaseException:
        run.remove()
        raise
    base.denoiser.eval()
    return run
