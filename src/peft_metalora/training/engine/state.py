# SPDX-License-Identifier: Apache-2.0
"""The state of a run on disk: one safetensors file, written atomically, from which the run goes on bit for bit.

Tensors go into the file's body, everything else (dicts, lists, numbers, strings) as JSON into its header; there is no
pickle, and no path of the machine. What the state means is known to the stage that wrote it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ...checkpoint.config_file import CONFIG_FILE
from ...checkpoint.factors import WEIGHTS_FILE
from ...checkpoint.folded import FOLD_FILE
from ...errors import ArtefactNotFoundError, ConfigError, CorruptFileError, MetaLoraError
from ...files import going_on, write_tensors
from ...tuner.down import digest_of
from ..stage_settings import INPUTS, OUTPUTS, HeldOutConfig, TrainingConfig
from .origin import CODE, Origin
from .processes import ALONE, Processes

STATE_FILE = "training_state.safetensors"
_CPU_STATE, _GPU_STATE = 5056, 16  # bytes of a generator
_HEADER, _DIGEST = "training_state", "training_state_sha256"
_FOLDER = re.compile(r"checkpoint-([1-9][0-9]*)")
# What runs write into a checkpoint; the last is what a killed write leaves.
_STATES = "training_state*.safetensors"
_OTHERS = (CONFIG_FILE, WEIGHTS_FILE, FOLD_FILE, ".training_state*.tmp")
# May differ between a run and the one that goes on with it: where things lie (`Origin` says what they are), and what
# leaves every number as it is, or as exact.
_FREE = {*INPUTS, *OUTPUTS, "revision", "down_revision", "local_files_only"} | {
    "dataset_config_name", "image_column", "caption_column", "subject_column", "checkpointing_steps", "report_to",
    "checkpoints_total_limit", "tracker_project_name", "device", "gradient_checkpointing", "offload", "dynamo_backend",
    "overwrite", "fits",
}  # fmt: skip


def checkpoint_folder(output_dir: str, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return Path(output_dir) / f"checkpoint-{step}"


def checkpoint_folders(output_dir: str) -> dict[int, Path]:
    """The folders of checkpoints that lie in an output folder, whole or not, a run's or not, by step."""
    folders = ((path, _FOLDER.fullmatch(path.name)) for path in Path(output_dir).glob("checkpoint-*"))
    return {int(match[1]): path for path, match in folders if match}


def is_of_a_run(folder: Path) -> bool:
    """Whether a run wrote a checkpoint's folder: other trainers call theirs alike."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    return any(folder.glob(_STATES)) or set(folder.iterdir()) == set(_written(folder))


def remove_checkpoint(folder: Path) -> None:
    """Remove what a run wrote into a checkpoint's folder, and the folder if nothing else lies there; raises OSError."""
    for path in _written(folder):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    if not any(folder.iterdir()):
        folder.rmdir()


def _written(folder: Path) -> list[Path]:
    return [path for name in (_STATES, *_OTHERS) for path in folder.glob(name)]


def last_checkpoint(
    output_dir: str, up_to: float = math.inf, fits: Callable[[Path], bool] = lambda _: True
) -> Path | None:
    """The newest checkpoint of an output folder that fits, none after step `up_to`; None: there is none."""
    found = {step: path for step, path in _with_file(output_dir, STATE_FILE).items() if step <= up_to and fits(path)}
    return found[max(found)] if found else None


def write_state(
    folder: Path,
    state: dict[str, Any],
    config: TrainingConfig,
    processes: Processes = ALONE,
    origin: Origin | None = None,
) -> None:
    """Write a state and what it belongs to; raises WriteFailedError, and then the old file is unchanged."""
    tensors: dict[str, torch.Tensor] = {}
    plain = _pack(
        {
            "state": state,
            "config": {name: value for name, value in asdict(config).items() if name not in _FREE},
            "processes": processes.count,
            "origin": {kind: list(hashes.values()) for kind, hashes in (origin or {}).items()},
        },
        tensors,
    )
    text = json.dumps(plain)
    write_tensors(folder / _file_name(processes), tensors, {_HEADER: text, _DIGEST: _hash(text, tensors)})


def write_checkpoint(
    config: TrainingConfig,
    step: int,
    state: dict[str, Any],
    processes: Processes = ALONE,
    origin: Origin | None = None,
    beside: Callable[[Path], object] | None = None,
) -> None:
    """Write the checkpoint of a step, and remove the oldest where `checkpoints_total_limit` asks for it.

    Where the disk refuses, the run goes on, as its result may still fit: a warning says so, older checkpoints stay, and
    nothing of this one does.

    Args:
        state, processes, origin: as `write_state` takes them.
        beside: writes into the folder what lies beside the state.
    """
    folder, wrote, whole = checkpoint_folder(config.output_dir, step), False, False
    try:
        with going_on():
            write_state(folder, state, config, processes, origin)
            wrote = True
            if beside is not None:
                beside(folder)
            whole = True
        whole = bool(processes.common({step} if whole else set()))
    except Exception:
        _take_back(folder, processes, wrote)
        raise
    if not whole:
        _take_back(folder, processes, wrote)
    elif processes.is_main:
        _keep_newest(config, step)


def _take_back(folder: Path, processes: Processes, wrote: bool) -> None:
    """Remove what this process wrote of a checkpoint; one of an older run that it did not touch stays."""
    with suppress(OSError):  # not there, or not empty: another process is at it, or it is not ours alone
        if wrote and processes.count == 1:
            remove_checkpoint(folder)
        elif wrote:
            (folder / _file_name(processes)).unlink(missing_ok=True)
        folder.rmdir()


def _keep_newest(config: TrainingConfig, step: int) -> None:
    limit, found = config.checkpoints_total_limit, checkpoint_folders(config.output_dir)
    own = sorted(number for number, folder in found.items() if number <= step and is_of_a_run(folder))
    for number in own[:-limit] if limit is not None else []:
        try:
            remove_checkpoint(found[number])
        except OSError as error:
            warnings.warn(
                f"expected to remove the old checkpoint {found[number]}, found: {error}. The run goes on; remove it",
                stacklevel=3,
            )


def read_state(
    config: TrainingConfig,
    processes: Processes = ALONE,
    origin: Origin | None = None,
    *,
    extendable: bool = False,
) -> dict[str, Any] | None:
    """The state that `resume_from_checkpoint` names: a checkpoint's folder (its path, or its name in `output_dir`), or
    'latest' (None if there is none yet): of this run, where there are older ones' beside it.

    Args:
        origin: what the run is made from now.
        extendable: whether another `max_train_steps` would have left the steps so far as they are.

    Raises:
        ArtefactNotFoundError: no state in the folder. CorruptFileError: it cannot be read.
        ConfigError: the run that wrote it had other settings, another origin or another number of processes.
    """

    def fits(folder: Path) -> bool:
        return is_of_this_run(folder / _file_name(processes), config, origin, processes, extendable=extendable)

    path = state_file(config, processes, fits)
    if path is None:
        return None
    folder, own = path.parent, path.with_name(_file_name(processes))
    content = _read(path)
    with understanding(path):
        count, before = content["processes"], dict(content["config"])
        state, origin_before = content["state"], {kind: list(hashes) for kind, hashes in content["origin"].items()}
    if count != processes.count:
        raise ConfigError(
            f"expected the {count} process(es) of the run that wrote {folder}, each of which keeps its own subjects, "
            f"found {processes.count}: start as many, or start anew without resume_from_checkpoint"
        )
    if path != own:
        if config.resume_from_checkpoint == "latest":  # killed before every process had written its first
            return None
        raise ArtefactNotFoundError(f"expected {own.name} in {folder}, found only other processes' files: take another")
    _check(folder, before, origin_before, config, origin, extendable)
    _warn_of_edits(folder, origin_before.get(CODE, []), (origin or {}).get(CODE, {}))
    return state


def is_of_this_run(
    file: Path,
    config: TrainingConfig,
    origin: Origin | None,
    processes: Processes = ALONE,
    *,
    extendable: bool = False,
) -> bool:
    """Whether a run like this one wrote a state, as its header has it. One that cannot be read counts, so that
    `read_state` says what is wrong with it."""
    try:
        with understanding(file):
            content = _header(file)
            before = {kind: list(hashes) for kind, hashes in content["origin"].items()}
            _check(file.parent, content["config"], before, config, origin, extendable)
            return bool(content["processes"] == processes.count)
    except ConfigError:
        return False
    except CorruptFileError:
        return True


def check_resumable(config: TrainingConfig, processes: Processes = ALONE) -> None:
    """Check, before any work, that there is a state to go on from, and that its settings are these.

    Raises:
        As `read_state`, which then looks at all of it.
    """
    path = state_file(config, processes, lambda folder: is_of_this_run(folder / STATE_FILE, config, {}, processes))
    if path is not None:
        with understanding(path):
            _check_settings(path.parent, _header(path)["config"], config, extendable=True)


def _header(file: Path) -> dict[str, Any]:
    """A state without its tensors."""
    with safe_open(file, "pt") as opened:
        return dict(_unpack(json.loads(opened.metadata()[_HEADER]), None))


def state_file(
    config: TrainingConfig, processes: Processes = ALONE, fits: Callable[[Path], bool] = lambda _: True
) -> Path | None:
    """The file that `resume_from_checkpoint` means for this process: its own, or else the main one's.

    Args:
        fits: of which folders 'latest' is one, if there are any.

    Raises:
        ArtefactNotFoundError: neither is in the folder.
    """
    folder = _wanted_folder(config, processes, fits)
    if folder is None:
        return None
    own = folder / _file_name(processes)
    path = own if own.is_file() else folder / STATE_FILE
    if not path.is_file():
        raise ArtefactNotFoundError(
            f"expected {own.name} in {folder}, found none: give a checkpoint folder of this run, its name in "
            "output_dir, or 'latest'"
        )
    return path


@contextmanager
def understanding(path: Path | str) -> Iterator[None]:
    """Context in which a state is taken apart; what Python or torch say of one that makes no sense becomes ours.

    Raises:
        CorruptFileError
    """
    try:
        yield
    except (MetaLoraError, torch.OutOfMemoryError):
        raise
    except (
        SafetensorError, OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError,
        MemoryError,
    ) as error:  # fmt: skip
        raise CorruptFileError(
            f"expected the state of a run in {path}, found something else ({type(error).__name__}: {error}): resume "
            "from an earlier checkpoint"
        ) from error


def named_folder(config: TrainingConfig) -> Path | None:
    """The folder that `resume_from_checkpoint` names; None where it names none, or the 'latest'."""
    wanted = config.resume_from_checkpoint
    if wanted is None or wanted == "latest":
        return None
    return Path(wanted) if Path(wanted).exists() else Path(config.output_dir, wanted)


def goes_on_in_place(config: TrainingConfig) -> bool:
    """Whether a run that goes on does so where its checkpoint lies, so that what lies there is its own."""
    folder = named_folder(config)
    return folder is None or os.path.realpath(folder.parent) == os.path.realpath(config.output_dir)


def _wanted_folder(config: TrainingConfig, processes: Processes, fits: Callable[[Path], bool]) -> Path | None:
    if config.resume_from_checkpoint != "latest":
        return named_folder(config)
    file = _file_name(processes)
    # A killed run may have left the last checkpoint of some of its processes only.
    found = _with_file(config.output_dir, file)
    steps = processes.common(set(found))
    own = processes.common({step for step in steps if fits(found[step])}) or steps
    if own and max(own) < max(steps) and processes.is_main:
        warnings.warn(
            f"going on from {found[max(own)]}: {found[max(steps)]} is of another run, with other settings or photos",
            stacklevel=2,
        )
    return found[max(own)] if own else last_checkpoint(config.output_dir)


def _read(path: Path) -> dict[str, Any]:
    with understanding(path), safe_open(path, "pt") as file:
        header = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no iterator)
        if header[_DIGEST] != _hash(header[_HEADER], tensors):
            raise ValueError("not as it was written")
        return dict(_unpack(json.loads(header[_HEADER]), tensors))


def _hash(text: str, tensors: Mapping[str, torch.Tensor]) -> str:
    return hashlib.sha256(f"{text}|{digest_of(tensors)}".encode()).hexdigest()


def check_steps(done: Any, steps: int) -> None:
    """Check that a run of `steps` steps can go on after `done`.

    Raises:
        ConfigError: it is to end before. ValueError: that is no number of steps.
    """
    if not isinstance(done, int) or done < 0:
        raise ValueError(f"{done!r} steps")
    if done > steps:
        raise ConfigError(
            f"expected max_train_steps of at least the {done} steps that the checkpoint has behind it, found "
            f"{steps}: raise it, or resume from an earlier checkpoint"
        )


def started(seconds: Any) -> float:
    """When a run would have started, by `time.perf_counter`, that has taken so many seconds; raises ValueError."""
    if not isinstance(seconds, (int, float)) or not 0 <= seconds < math.inf:
        raise ValueError(f"{seconds!r} seconds")
    return time.perf_counter() - seconds


def restore_generator(generator: torch.Generator, state: torch.Tensor) -> None:
    """Take up the state of a generator.

    Raises:
        ConfigError: it is one of the other kind of device. What torch raises of one that makes no sense.
    """
    kinds = {_CPU_STATE: "a CPU", _GPU_STATE: "a GPU"}
    then, now = kinds.get(state.numel()), kinds.get(generator.get_state().numel())
    if then is not None and now is not None and then != now:
        raise ConfigError(
            f"expected {then}, on which the run of the checkpoint drew its random numbers, found {now}, which draws "
            "others: choose another device, or start anew without resume_from_checkpoint"
        )
    generator.set_state(state.cpu())


def _check(
    folder: Path,
    before: Mapping[str, Any],
    origin_before: Mapping[str, list[str]],
    config: TrainingConfig,
    origin: Origin | None,
    extendable: bool,
) -> None:
    _check_settings(folder, before, config, extendable)
    for kind, hashes in (origin or {}).items():
        if kind == CODE:
            continue
        _check_origin(folder, kind, origin_before.get(kind, []), hashes)


def _check_settings(folder: Path, before: Mapping[str, Any], config: TrainingConfig, extendable: bool) -> None:
    free = {"max_train_steps"} if extendable else set()
    default = {one.name: None if one.default is MISSING else one.default for one in fields(config)}
    changed = {
        name: (before.get(name, default[name]), now)
        for name, now in sorted(asdict(config).items())
        # Runs over many do not notice that they are looked at.
        if name not in _FREE | free and not (isinstance(config, HeldOutConfig) and name.startswith("validation_"))
    }
    changed = {name: (then, now) for name, (then, now) in changed.items() if then != now}
    if changed:
        told = "; ".join(f"{name} was {then!r} and is {now!r}" for name, (then, now) in changed.items())
        hint = ""
        if "max_train_steps" in changed:
            hint = (
                " More steps go on from a checkpoint at a constant rate, in stage 1 if all subjects share one bucket."
            )
        raise ConfigError(
            f"expected the settings of the run that wrote {folder}, found other values of {', '.join(changed)} "
            f"({told}): give the same, or start anew without resume_from_checkpoint.{hint}"
        )


def _check_origin(folder: Path, kind: str, before: list[str], now: Mapping[str, str]) -> None:
    if list(now.values()) == before:
        return
    if len(now) != len(before):
        told = f"{len(before)} then and {len(now)} now"
    else:
        other = [name for (name, found), then in zip(now.items(), before, strict=True) if found != then]
        told = ", ".join(other[:5]) + (f" and {len(other) - 5} more" if len(other) > 5 else "")
    raise ConfigError(
        f"expected the {kind} of the run that wrote {folder}, from wherever they are read, found others ({told}): give "
        "the same, or start anew without resume_from_checkpoint"
    )


def _warn_of_edits(folder: Path, before: list[str], now: Mapping[str, str]) -> None:
    edited = [name for (name, found), then in zip(now.items(), before, strict=False) if found != then]
    if edited:
        warnings.warn(
            f"the code that {', '.join(edited)} names is not what it was when {folder} was written. The run goes on "
            "with what it is now; if that changes latents, captions or losses, start anew without "
            "resume_from_checkpoint",
            stacklevel=3,
        )


def _file_name(processes: Processes) -> str:
    """Each process writes the state of its own subjects."""
    return STATE_FILE if processes.is_main else f"training_state-{processes.rank}.safetensors"


def _with_file(output_dir: str, file: str) -> dict[int, Path]:
    return {step: path for step, path in checkpoint_folders(output_dir).items() if (path / file).is_file()}


def _pack(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """A value as JSON can hold it: containers are tagged lists, tensors are names."""
    if isinstance(value, torch.Tensor):
        name = str(len(tensors))
        tensors[name] = value
        return ["tensor", name]
    if isinstance(value, dict):
        return ["dict", [[key, _pack(item, tensors)] for key, item in value.items()]]
    if isinstance(value, (list, tuple)):
        return [type(value).__name__, [_pack(item, tensors) for item in value]]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ConfigError(
        f"expected optimiser state of tensors, numbers, strings and containers, found {type(value).__name__}: "
        "choose another optimiser, or do without checkpoints"
    )


def _unpack(value: Any, tensors: Mapping[str, torch.Tensor] | None) -> Any:
    """Without `tensors` each of them is None."""
    if not isinstance(value, list):
        return value
    kind, content = value
    if kind == "tensor":
        return None if tensors is None else tensors[content]
    if kind == "dict":
        return {key: _unpack(item, tensors) for key, item in content}
    items = [_unpack(item, tensors) for item in content]
    return tuple(items) if kind == "tuple" else items
