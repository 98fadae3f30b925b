# SPDX-License-Identifier: Apache-2.0
"""What older runs left in an output folder: pictures, scores, logs and checkpoints, perhaps of somebody else.

A folder holds what its last save wrote (docs/format.md), and may be given away whole. What is removed here is known by
its name as a run's own: whatever else lies there is somebody's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from ..checkpoint.writing import what_else
from .engine.state import checkpoint_folders, goes_on_in_place, is_of_a_run, remove_checkpoint
from .stage_settings import ENCODER_FOLDER, VALIDATION_FOLDER, TrainingConfig

_PICTURES = re.compile(r"\d{5,}(-\d{2,})?\.png|scores\.jsonl")
_LOGS = re.compile(r"events\.out\.tfevents\..*|hparams\.yml")
_LOGGING = "logs"


def make_room(config: TrainingConfig, stage: str | None, subject_name: str | None = None, *, began: int = 0) -> None:
    """Remove what an older run left, for one that starts anew, or goes on from a checkpoint that lies elsewhere.

    Pictures, scores and logs go. Checkpoints stay until the new result is there (`remove_older_checkpoints`), because
    the older run may be gone on with; those for somebody else, or of another kind, are to be replaced, and go at once.

    Args:
        stage, subject_name: as of `require_replaceable`.
        began: steps that the run has behind it.
    """
    if began and goes_on_in_place(config):
        return
    output = Path(config.output_dir)
    places = (output, *checkpoint_folders(config.output_dir).values())
    if config.overwrite and any(what_else(place, stage, subject_name) for place in places):
        remove_run(output, config.logging_dir)
    else:
        # Runs of other names there are to be compared.
        _remove_sights(output, str(Path(config.logging_dir, config.tracker_project_name)))


def remove_older_checkpoints(config: TrainingConfig, done: int, *, began: int = 0) -> None:
    """Remove checkpoints that are none of a run that has just written its result after `done` steps.

    Args:
        began: steps that the run had behind it when it went on.
    """
    every, in_place = config.checkpointing_steps, bool(began) and goes_on_in_place(config)

    def is_older(number: int) -> bool:
        own = number > began and every is not None and number % every == 0
        return number > done or not (in_place or own)

    _remove_checkpoints(Path(config.output_dir), is_older)


def remove_run(output: Path, logging_dir: str = _LOGGING) -> None:
    """Remove all that a run leaves beside its result."""
    remove_second_phase(output, logging_dir)
    _remove_sights(output, logging_dir)
    _remove_checkpoints(output, lambda _: True)


def remove_second_phase(output: Path, logging_dir: str) -> None:
    """Remove what a run left that taught the Down in this folder to read."""
    _remove_sights(output / ENCODER_FOLDER, logging_dir)
    _remove_checkpoints(output / ENCODER_FOLDER, lambda _: True)
    with suppress(OSError):  # not there, or not empty
        (output / ENCODER_FOLDER).rmdir()


def _remove_sights(output: Path, logging_dir: str) -> None:
    _remove_files(output, (output / VALIDATION_FOLDER).glob("*"), _PICTURES)
    _remove_files(output, (output / logging_dir).rglob("*"), _LOGS)


def _remove_checkpoints(output: Path, which: Callable[[int], bool]) -> None:
    for number, place in checkpoint_folders(str(output)).items():
        if which(number) and is_of_a_run(place):
            with suppress(OSError):
                remove_checkpoint(place)


def _remove_files(output: Path, found: Iterable[Path], ours: re.Pattern[str]) -> None:
    """Remove files inside an output folder by their names, and folders that are empty then."""
    files = [path for path in found if ours.fullmatch(path.name) and output.resolve() in path.resolve().parents]
    for path in files:
        path.unlink(missing_ok=True)
    for folder in sorted(
        {parent for path in files for parent in path.parents if output in parent.parents}, reverse=True
    ):
        with suppress(OSError):  # not empty
            folder.rmdir()
