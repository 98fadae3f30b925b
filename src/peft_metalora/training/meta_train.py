# SPDX-License-Identifier: Apache-2.0
"""Stage 1 from photos to files: encode, train a Down (`MetaTraining`), validate and write on the way, resume."""

from __future__ import annotations

from functools import partial

from tqdm.auto import tqdm

from ..bases import Base
from ..bases.precision import choose_device
from ..checkpoint import require_replaceable
from .engine.origin import Origin
from .engine.processes import Processes
from .engine.state import checkpoint_folder, read_state, understanding, write_state
from .examples.batches import Examples
from .examples.sources import training_subjects
from .injecting import saying_what_is_left, take_off
from .preparing import check_places, make_room, prepare
from .stage_1 import DownResult, MetaTraining
from .stage_settings import MetaTrainConfig
from .watching.of_a_down import DownValidation, encode_held_out, split_subjects
from .watching.tracking import Trackers


def meta_train_on(base: Base, examples: Examples, config: MetaTrainConfig, *, progress: bool = True) -> DownResult:
    """Stage 1 on examples in memory; writes nothing. The denoiser must be where training is to happen.

    Raises:
        As `MetaTraining`; TrainingError when the loss is not finite.
    """
    run = MetaTraining(base, examples, config)
    try:
        _run(run, progress)
    except BaseException:
        take_off(base, config)
        raise
    return run.finish()


def meta_train(config: MetaTrainConfig, *, progress: bool = True) -> DownResult:
    """Stage 1 from a folder or a data set of subjects: trains a Down and writes it to `output_dir`.

    Ctrl-C writes the Down as it is by then (nothing before the first step, nor in a run of several processes) and
    raises KeyboardInterrupt. With `checkpointing_steps`, a run that was killed goes on with `resume_from_checkpoint`
    as if nothing had happened.

    Returns:
        The result that was written.

    Images that cannot be decoded, or show no face where one is needed, are left out, with a warning that names them.

    Raises:
        NoImagesError, NoCaptionError, MetadataError: the data cannot be used.
        BaseModelMismatchError, NoTargetModulesError, ConfigError: the base or the settings cannot.
        OutputExistsError: a subject or another adapter lies in output_dir.
        TrainingError: the loss is not finite. WriteFailedError: the disk refuses; nothing is written.
    """
    check_places(config)
    require_replaceable(config.output_dir, "meta", overwrite=config.overwrite)
    subjects = training_subjects(config)
    device = choose_device(config.device)
    processes = Processes.of_environment(device)
    progress = progress and processes.is_main
    trackers = Trackers(config, processes)
    subjects, others = split_subjects(subjects, config)
    look = partial(encode_held_out, subjects=others, config=config, progress=progress) if others else None
    base, examples, held, origin = prepare(config, subjects, device, processes, look, progress=progress)
    run = MetaTraining(base, examples, config, processes)
    state = read_state(config, processes, origin, extendable=run.extendable)
    if state is not None:
        with understanding(str(config.resume_from_checkpoint)):
            run.load_state_dict(state)
    elif processes.is_main:
        make_room(config, "meta")
    done = len(run.losses)
    validation = DownValidation(run, held, trackers, done) if held is not None else None
    try:
        trackers.start(done)
        with saying_what_is_left(config):
            _run(run, progress, trackers, validation, origin)
    except KeyboardInterrupt:
        if run.losses and processes.count == 1:  # the others may be gone already
            run.finish().save(
                config.output_dir, config.pretrained_model_name_or_path, config.revision, overwrite=config.overwrite
            )
        raise
    finally:
        trackers.finish()
    result = run.finish()
    if processes.is_main:
        result.save(
            config.output_dir, config.pretrained_model_name_or_path, config.revision, overwrite=config.overwrite
        )
    processes.wait()
    return result


def _run(
    run: MetaTraining,
    progress: bool,
    trackers: Trackers | None = None,
    validation: DownValidation | None = None,
    origin: Origin | None = None,
) -> None:
    """Train; with an `origin`, write checkpoints."""
    total, done = run.config.max_train_steps, len(run.losses)
    every = run.config.checkpointing_steps if origin is not None else None
    with tqdm(total=total, initial=done, desc="meta-training", unit="step", disable=not progress) as bar:
        for step in run.steps():
            bar.update()
            bar.set_postfix(loss=f"{step.loss:.4f}", refresh=False)
            if trackers is not None:
                trackers.step(step)
            if validation is not None:
                validation.look(step.number)
            if every and step.number % every == 0:
                folder = checkpoint_folder(run.config.output_dir, step.number)
                write_state(folder, run.state_dict(), run.config, run.processes, origin)
