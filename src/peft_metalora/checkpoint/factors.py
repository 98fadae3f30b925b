# SPDX-License-Identifier: Apache-2.0
"""The factor tensors of Downs and subjects: ranks and scales by module, and files checked before they are read."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..errors import (
    ForeignKeysError,
    MissingKeysError,
    NonFiniteError,
    RankMismatchError,
    ShapeMismatchError,
    TensorDtypeError,
)
from ..files import save_tensors
from ..tuner import DownSource, MetaLoraConfig
from ..tuner.down import DOWN, DOWN_PARTS, MAGNITUDE, MID, MID_INIT, UP, digest_of, modules_in
from ..tuner.ranks import ranks_of
from .base_model import PREFIX
from .config_file import CONFIG_FILE, config_json, parse_config
from .untrusted import DTYPES, FURTHER_DTYPES, TensorEntry, TensorFile, open_tensors, parse_json, require_safe_file

WEIGHTS_FILE = "adapter_model.safetensors"
_PLACES = "base_model_name_or_path", "revision", "down", "down_revision"
CONFIG_KEY = "adapter_config"
"""In the header of the tensors' file: the configuration that it was written with."""
SUBJECT_PARTS = (MID, UP)
_ALL_PARTS = {*DOWN_PARTS, MAGNITUDE}


@dataclass(frozen=True)
class SubjectSource:
    """A subject that has been read and checked, with the Down it stands on.

    Attributes:
        config: its configuration, with `target_modules` an expression that names each module.
        tensors: `{module}.metalora_mid` (1, r, meta_r) and `{module}.metalora_up` (1, d_out, r), on the CPU.
        down: the Down whose fingerprint the subject names.
    """

    config: MetaLoraConfig
    tensors: dict[str, torch.Tensor]
    down: DownSource


class FactorFile:
    """The open file of a Down's or a subject's tensors, its header checked against the configuration.

    Attributes:
        entries: by the names that the tensors have in a source, without PEFT's prefix.

    Args:
        others: whether tensors of other kinds may lie in the file, as PEFT saves them along; they are passed over.

    Raises:
        MissingKeysError, ForeignKeysError, RankMismatchError, ShapeMismatchError, TensorDtypeError: it is not what the
            config says.
    """

    def __init__(self, file: TensorFile, config: MetaLoraConfig, *, others: bool = False) -> None:
        self._file, self.path = file, file.path
        entries = dict(file.header.entries)
        if others:
            entries = {name: entry for name, entry in entries.items() if name.rpartition(".")[2] in _ALL_PARTS}
        _check_header(entries, config, DOWN_PARTS if config.stage == "meta" else SUBJECT_PARTS, file.path)
        self.entries = {name.removeprefix(PREFIX): entry for name, entry in entries.items()}

    def read(self) -> dict[str, torch.Tensor]:
        """All tensors, on the CPU; raises CorruptFileError, and NonFiniteError for NaN or infinity."""
        names = [entry.name for entry in self.entries.values()]
        tensors = {name.removeprefix(PREFIX): tensor for name, tensor in self._file.read(names).items()}
        require_finite(tensors, self.path)
        return tensors


def require_finite(tensors: Mapping[str, torch.Tensor], where: str | os.PathLike[str]) -> None:
    """Raise NonFiniteError where a tensor holds NaN or infinity."""
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise NonFiniteError(
                f"{where}: expected finite numbers in {name}, found NaN or infinity. The training diverged or the file "
                "is damaged: use an earlier one, or fetch it again."
            )


@contextmanager
def open_weights(folder: Path, *, others: bool = False) -> Iterator[TensorFile]:
    """Open the tensors' file in a folder; raises as `untrusted.open_tensors`.

    Args:
        others: whether modules that PEFT saved along may lie in it, of dtypes that no factor has.
    """
    path = folder / WEIGHTS_FILE
    if not path.exists() and (folder / "adapter_model.bin").exists():
        require_safe_file(folder / "adapter_model.bin")
    with open_tensors(path, FURTHER_DTYPES if others else DTYPES) as file:
        yield file


def config_of(file: TensorFile, beside: MetaLoraConfig) -> MetaLoraConfig:
    """The configuration that belongs to a tensors' file: the one beside it, or the copy in its header if they differ.

    They differ between the two renames of a save, and after one that was killed there. Where base and Down lie is not
    in the copy, since it changes when an artefact is pushed; the file beside still knows it.
    """
    copy = file.header.metadata.get(CONFIG_KEY)
    if copy is None:
        return beside
    written = parse_config(parse_json(copy, file.path, "configuration in the header"), file.path)
    if written.tensors_digest == beside.tensors_digest:
        return beside
    same_down = written.down_fingerprint == beside.down_fingerprint
    known: dict[str, Any] = {name: getattr(beside, name) for name in (_PLACES if same_down else _PLACES[:2])}
    return replace(written, **known)


def save_factors(path: Path, config: MetaLoraConfig, tensors: Mapping[str, torch.Tensor]) -> MetaLoraConfig:
    """Write the tensors of an artefact in place, with a copy of its configuration in the header.

    Returns:
        The configuration to write beside it, which says by a hash that it belongs to these tensors.
    """
    config = replace(config, tensors_digest=digest_of(tensors))
    nowhere: dict[str, Any] = dict.fromkeys(_PLACES)
    save_tensors(
        path,
        {PREFIX + name: tensor for name, tensor in tensors.items()},
        {CONFIG_KEY: config_json(replace(config, **nowhere)).decode()},
    )
    return config


def _check_header(
    entries: Mapping[str, TensorEntry], config: MetaLoraConfig, parts: tuple[str, ...], path: Path
) -> None:
    shapes = {name.removeprefix(PREFIX): entry.shape for name, entry in entries.items()}
    if len(shapes) != len(entries):
        raise ForeignKeysError(
            f"{path}: expected each tensor once, found some with and without {PREFIX}. Save it again."
        )
    for entry in entries.values():
        if entry.dtype not in DTYPES.values():
            raise TensorDtypeError(
                f"{path}: expected {entry.name} in {', '.join(DTYPES)}, found {entry.dtype}. Save it in one of those."
            )
    modules: dict[str, dict[str, tuple[int, ...]]] = defaultdict(dict)
    for name, shape in shapes.items():
        module, _, part = name.rpartition(".")
        if (part not in parts and not (part == MAGNITUDE and config.use_dora)) or not module:
            raise ForeignKeysError(
                f"{path}: expected tensors named {listed(parts)}, found {name}. Save it again without it."
            )
        modules[module][part] = shape
    if not modules:
        raise MissingKeysError(f"{path}: expected tensors named {listed(parts)}, found none. Save it again.")
    for module, found in modules.items():
        needed = (*parts, MAGNITUDE) if config.use_dora and config.stage == "subject" else parts
        missing = [part for part in needed if part not in found]
        if missing:
            raise MissingKeysError(
                f"{path}: expected {listed(parts)} in {module}, found no {listed(missing)}. Save it again."
            )
        _check_shapes(module, found, config, path)


def check_ranks(shapes: Mapping[str, tuple[int, ...]], config: MetaLoraConfig, path: Path) -> None:
    """Check the shapes of Mids and Ups by name against the ranks of a configuration; raises as `FactorFile`."""
    modules: dict[str, dict[str, tuple[int, ...]]] = defaultdict(dict)
    for name, shape in shapes.items():
        module, _, part = name.rpartition(".")
        modules[module][part] = shape
    for module, found in modules.items():
        _check_shapes(module, found, config, path)


def _check_shapes(module: str, found: Mapping[str, tuple[int, ...]], config: MetaLoraConfig, path: Path) -> None:
    rank, meta_rank, *_ = ranks_of(config, module)
    mid, up, down = found[MID], found[UP], found.get(DOWN)
    if len(mid) != 3 or len(up) != 3 or mid[0] != config.num_slots or up[0] != config.num_slots:
        raise _bad_shape(path, module, f"Mid and Up with {config.num_slots} slots", f"{mid} and {up}")
    if down is not None and len(down) not in (2, 3, 4, 5):
        raise _bad_shape(path, module, "Down (meta_r, d_in) or a convolution's", str(down))
    if mid[1] != rank or up[2] != rank or mid[2] != meta_rank or (down is not None and down[0] != meta_rank):
        raise RankMismatchError(
            f"{path}: expected r={rank} and meta_r={meta_rank} in {module}, as {CONFIG_FILE} says, found Mid {mid}, "
            f"Up {up}{f', Down {down}' if down else ''}. Fetch both files again, from one place."
        )
    if MAGNITUDE in found and found[MAGNITUDE] != up[:2]:
        raise _bad_shape(path, module, f"the magnitudes of shape {up[:2]}", str(found[MAGNITUDE]))
    if MID_INIT in found and found[MID_INIT] != mid[1:]:
        raise _bad_shape(path, module, f"the Mid start of shape {mid[1:]}", str(found[MID_INIT]))


def _bad_shape(path: Path | str, module: str, expected: str, found: str) -> ShapeMismatchError:
    return ShapeMismatchError(f"{path}: expected {expected} in {module}, found {found}. Fetch or save the file again.")


def listed(names: Iterable[str], limit: int = 3) -> str:
    """The first names in order and how many more there are, for a message."""
    names = sorted(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def check_subject_on_down(
    subject: Mapping[str, torch.Tensor | TensorEntry],
    down: Mapping[str, torch.Tensor],
    path: str | os.PathLike[str],
) -> None:
    """Check that a subject, or the header of its file, has the modules and the shapes of its Down.

    Raises:
        MissingKeysError, ForeignKeysError, RankMismatchError, ShapeMismatchError
    """
    mine, its = {*modules_in(subject)}, {*modules_in(down)}
    if its - mine:
        raise MissingKeysError(
            f"{path}: expected the modules of its Down, found no {listed(its - mine)}. Save it again."
        )
    if mine - its:
        raise ForeignKeysError(
            f"{path}: expected the modules of its Down alone, found {listed(mine - its)}. Save it again."
        )
    for module in mine:
        meta_rank = down[f"{module}.{DOWN}"].shape[0]
        if subject[f"{module}.{MID}"].shape[2] != meta_rank:
            raise RankMismatchError(
                f"{path}: expected meta_r={meta_rank} in {module}, as its Down has, found "
                f"{subject[f'{module}.{MID}'].shape[2]}. Use the Down that the subject was trained on."
            )
        mean = down.get(f"{module}.{UP}")
        if mean is not None and mean.shape[1] != subject[f"{module}.{UP}"].shape[1]:
            raise _bad_shape(
                str(path),
                module,
                f"Up with {mean.shape[1]} outputs",
                str(tuple(subject[f"{module}.{UP}"].shape)),
            )
