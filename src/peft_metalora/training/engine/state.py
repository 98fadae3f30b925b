# SPDX-License-Identifier: Apache-2.0
"""The state of a run on disk: one safetensors file, written atomically, from which the run goes on bit for bit.

Tensors go into the file's body, everything else (dicts, lists, numbers, strings) as JSON into its header; there is no
pickle. What the state means is known to the stage that wrote it.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ...errors import ArtefactNotFoundError, ConfigError, CorruptFileError
from ...files import write_tensors
from ..settings import TrainingConfig
from .processes import ALONE, Processes

STATE_FILE = "training_state.safetensors"
_HEADER = "training_state"
_FOLDER = re.compile(r"checkpoint-(\d+)")
# May differ between a run and the one that goes on with it.
_FREE = {"output_dir", "device", "cache_dir", "local_files_only", "checkpointing_steps", "resume_from_checkpoint"} | {
    "report_to",
    "logging_dir",
    "tracker_project_name",
}


def checkpoint_folder(output_dir: str, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return Path(output_dir) / f"checkpoint-{step}"


def write_state(folder: Path, state: dict[str, Any], config: TrainingConfig, processes: Processes = ALONE) -> None:
    """Write a state and the settings it belongs to; raises WriteFailedError, and then the old file is unchanged."""
    tensors: dict[str, torch.Tensor] = {}
    plain = _pack({"state": state, "config": asdict(config)}, tensors)
    write_tensors(folder / _file_name(processes), tensors, {_HEADER: json.dumps(plain)})


def read_state(config: TrainingConfig, processes: Processes = ALONE) -> dict[str, Any] | None:
    """The state that `resume_from_checkpoint` names: a checkpoint's folder, or 'latest' (None if there is none yet).

    Raises:
        ArtefactNotFoundError: no state in the folder. CorruptFileError: it cannot be read.
        ConfigError: the run that wrote it had other settings.
    """
    if config.resume_from_checkpoint is None:
        return None
    if config.resume_from_checkpoint == "latest":
        # A killed run may have left the last checkpoint of some of its processes only.
        steps = processes.common(_steps(Path(config.output_dir), _file_name(processes)))
        if not steps:
            return None
        path = checkpoint_folder(config.output_dir, max(steps)) / _file_name(processes)
    else:
        path = Path(config.resume_from_checkpoint) / _file_name(processes)
    if not path.is_file():
        raise ArtefactNotFoundError(
            f"expected {path.name} in {path.parent}, found none: give a checkpoint folder of this run, or 'latest'"
        )
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no iterator)
            content = _unpack(json.loads(file.metadata()[_HEADER]), tensors)
        state, before = content["state"], content["config"]
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise CorruptFileError(
            f"expected the state of a run in {path}, found something else ({error}): resume from an earlier checkpoint"
        ) from error
    now = asdict(config)
    changed = sorted(name for name in now.keys() - _FREE if now[name] != before.get(name))
    if changed:
        raise ConfigError(
            f"expected the settings of the run that wrote {path.parent}, found other values of {', '.join(changed)}: "
            "give the same, or start anew without resume_from_checkpoint"
        )
    return state


def _file_name(processes: Processes) -> str:
    """Each process writes the state of its own subjects."""
    return STATE_FILE if processes.is_main else f"training_state-{processes.rank}.safetensors"


def _steps(output_dir: Path, file: str) -> set[int]:
    """Steps of the checkpoint folders that hold a file."""
    folders = ((path, _FOLDER.fullmatch(path.name)) for path in output_dir.glob("checkpoint-*"))
    return {int(match[1]) for path, match in folders if match and (path / file).is_file()}


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


def _unpack(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if not isinstance(value, list):
        return value
    kind, content = value
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: _unpack(item, tensors) for key, item in content}
    items = [_unpack(item, tensors) for item in content]
    return tuple(items) if kind == "tuple" else items
