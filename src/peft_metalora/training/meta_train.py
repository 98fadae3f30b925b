# SPDX-License-Identifier: Apache-2.0
"""Stage 1 from photos to files: encode, train a Down (`MetaTraining`), validate and write on the way, resume.

With `encoder` there is a second phase: the Down is there, and `train_encoder` teaches it to read. Its checkpoints,
validation and logs lie in `output_dir/encoder`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from tqdm.auto import tqdm

from ..bases import Base
from ..bases.precision import choose_device, plain_defaults
from ..checkpoint import require_replaceable
from ..data import Subject
from ..hub.loading import load_down
from ..tuner.placing import set_aside
from .encoder_training import EncoderTraining
from .engine.origin import Origin
from .engine.processes import Processes
from .engine.state import (
    STATE_FILE,
    is_of_this_run,
    last_checkpoint,
    named_folder,
    read_state,
    understanding,
    write_checkpoint,
)
from .examples.batches import Examples
from .examples.encoding import encode_subjects
from .examples.fresh import FreshExamples
from .examples.sources import training_subjects
from .examples.views import ViewCutter
from .injecting import saying_what_is_left, take_off
from .leftovers import make_room, remove_older_checkpoints, remove_second_phase
from .preparing import check_places, prepare
from .stage_1 import DownResult, MetaTraining, plan
from .stage_settings import ENCODER_FOLDER, MetaTrainConfig, TrainEncoderConfig, second_phase
from .train_encoder import Material, check_shares, encoder_config, material_of, save_with_reader, teach, warn_of_few
from .watching.held_out import HeldOut, hold_out, split_subjects
from .watching.of_a_down import DownValidation, encode_held_out
from .watching.tracking import Trackers


@plain_defaults()
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


@plain_defaults()
def meta_train(config: MetaTrainConfig, *, progress: bool = True) -> DownResult:
    """Stage 1 from a folder or a data set of subjects: trains a Down and writes it to `output_dir`.

    With `encoder` the Down is then taught to read photos, and written again with its subject space and encoder.

    Ctrl-C writes what there is by then (nothing before the first step, nor in a run of several processes) and raises
    KeyboardInterrupt. With `checkpointing_steps`, a run that was killed goes on with `resume_from_checkpoint` as if
    nothing had happened, in the phase that it was in.

    Returns:
        The result that was written.

    Images that cannot be decoded, or show no face where one is needed, are left out, with a warning that names them.

    Raises:
        NoImagesError, NoCaptionError, MetadataError, TooFewImagesError: the data cannot be used.
        BaseModelMismatchError, NoTargetModulesError, ConfigError: the base or the settings cannot.
        OutputExistsError: a subject or another adapter lies in output_dir.
        TrainingError: the loss is not finite. WriteFailedError: the disk refuses; nothing is written.
    """
    check_places(config)
    require_replaceable(config.output_dir, "meta", overwrite=config.overwrite)
    subjects, others = split_subjects(training_subjects(config), config)
    teaching = None
    if config.encoder is not None:
        teaching = second_phase(config, config.output_dir, str(Path(config.output_dir, ENCODER_FOLDER)))
        warn_of_few(subjects)
    device = choose_device(config.device)
    processes = Processes.of_environment(device)
    # Refused before any work.
    plan(config, len(subjects), processes, [one.tags[tag] for one in subjects] if (tag := config.balance_by) else None)
    if teaching is not None:
        check_shares(teaching.subjects_per_batch, processes)
        encoder_config(teaching)
    progress = progress and processes.is_main
    trackers = Trackers(config, processes)
    look = partial(_encode_more, subjects, others, config, teaching, progress)
    base, examples, more, origin = prepare(config, subjects, device, processes, look, held=others, progress=progress)
    assert more is not None
    (held, material), went_on = more, _checkpoint_of_second_phase(config, origin)
    if went_on is None:
        result = _stage_1(base, examples, held, config, origin, processes, trackers, progress)
        if teaching is None:
            return result
    assert teaching is not None and material is not None
    down = load_down(config.output_dir)
    if went_on is not None:
        result = DownResult.of(base.denoiser, down)
    facts = dict(result.facts)

    def save(run: EncoderTraining, of_encoder: dict[str, object]) -> None:
        save_with_reader(config.output_dir, down, run, of_encoder, overwrite=config.overwrite)
        facts.update(of_encoder)

    asked = replace(config, output_dir=teaching.output_dir, resume_from_checkpoint=went_on)
    with set_aside(base.denoiser):
        teach(base, down, material, teaching, asked, origin, processes, save, progress=progress)
    return replace(result, facts=facts)


def _encode_more(
    subjects: Sequence[Subject],
    others: Sequence[Subject],
    config: MetaTrainConfig,
    teaching: TrainEncoderConfig | None,
    progress: bool,
    base: Base,
    examples: Examples,
) -> tuple[tuple[HeldOut, Examples] | None, Material | None]:
    """What validation looks at, and what an encoder is taught with."""
    held = encode_held_out(base, others, config, progress=progress) if others else None
    if teaching is None:
        return held, None
    # An encoder's batches mix people, and nothing that it reads or is judged by is mirrored.
    mixes, mirrored = len(set(examples.shapes())) > 1, config.random_flip
    if mirrored and not mixes and isinstance(examples, FreshExamples):
        examples = replace(examples, cutter=ViewCutter(base, teaching))
    elif mirrored or mixes:
        views = max(1, config.views_per_image)
        examples = encode_subjects(base, subjects, teaching, views, progress=progress, skip_unreadable=True)
    judging = hold_out(base, others, teaching) if others and mirrored else held and held[0]
    return held, material_of(base, examples, subjects, judging, teaching, progress=progress)


def _checkpoint_of_second_phase(config: MetaTrainConfig, origin: Origin) -> str | None:
    """The checkpoint of the second phase that the run goes on from; None: it is in stage 1, or starts."""
    if config.encoder is None or config.resume_from_checkpoint is None:
        return None
    folder = named_folder(config)
    if folder is not None:
        return str(folder) if folder.absolute().parent.name == ENCODER_FOLDER else None

    def is_ours(folder: Path | None) -> bool:
        return folder is not None and is_of_this_run(folder / STATE_FILE, config, origin)

    place = str(Path(config.output_dir, ENCODER_FOLDER))
    folder = last_checkpoint(place, fits=is_ours) or last_checkpoint(place)
    # An older run's, beside which this one was killed in stage 1.
    if folder is not None and not is_ours(folder) and last_checkpoint(config.output_dir, fits=is_ours) is not None:
        return None
    return None if folder is None else str(folder)


def _stage_1(
    base: Base,
    examples: Examples,
    held: tuple[HeldOut, Examples] | None,
    config: MetaTrainConfig,
    origin: Origin,
    processes: Processes,
    trackers: Trackers,
    progress: bool,
) -> DownResult:
    """Train a Down, or go on with it, and write it."""
    run = MetaTraining(base, examples, config, processes)
    state = read_state(config, processes, origin, extendable=run.extendable)
    if state is not None:
        with understanding(str(config.resume_from_checkpoint)):
            run.load_state_dict(state)
    done = len(run.losses)
    if processes.is_main:
        make_room(config, "meta", began=done)
    validation = DownValidation(run, *held, trackers, done) if held is not None else None
    save = partial(
        DownResult.save,
        folder=config.output_dir,
        base_model=config.pretrained_model_name_or_path,
        base_revision=config.revision,
        overwrite=config.overwrite,
    )
    try:
        trackers.start(done)
        with saying_what_is_left(config):
            _run(run, progress, trackers, validation, origin)
    except KeyboardInterrupt:
        if run.losses and processes.count == 1:  # the others may be gone already
            save(run.finish())
        raise
    finally:
        trackers.finish()
    result = run.finish()
    if processes.is_main:
        with saying_what_is_left(config):
            save(result)
        remove_older_checkpoints(config, len(run.losses), began=done)
        # What taught the older Down to read cannot go on with this one.
        remove_second_phase(Path(config.output_dir), config.logging_dir)
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
    with tqdm(total=total, initial=done, desc="stage 1: training the Down", unit="step", disable=not progress) as bar:
        for step in run.steps():
            bar.update()
            bar.set_postfix(loss=f"{step.loss:.4f}", refresh=False)
            if trackers is not None:
                trackers.step(step)
            if validation is not None:
                validation.look(step.number)
            if every and step.number % every == 0:
                write_checkpoint(run.config, step.number, run.state_dict(), run.processes, origin)
