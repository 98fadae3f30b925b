# SPDX-License-Identifier: Apache-2.0
"""Downs and subjects in local folders (docs/format.md), read with every check that needs no model.

Both are PEFT adapter folders. A *Down* holds, per module, `metalora_down`, `metalora_mid_init` (the Mid that every
subject starts from), and the mean `metalora_mid` and `metalora_up` of stage 1; beside it may lie what it reads photos
with. A *subject* holds `metalora_mid` and `metalora_up`, or a code of its Down's subject space alone, and names its
Down by reference and fingerprint. Nothing here knows the network: `hub` finds folders, this module reads them, and
`writing` writes them. Nothing here changes a model either: what comes back has been read and checked in full.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import (
    ArtefactNotFoundError,
    ConfigFormatError,
    CorruptFileError,
    FingerprintMismatchError,
    MissingDownError,
    UnsafeNameError,
    WrongKindError,
)
from ..files import EMBEDDED
from ..tuner import DownSource, MetaLoraConfig, fingerprint
from ..tuner.down import modules_in
from ..tuner.ranks import whole_paths
from .base_model import REPO_ID, check_layers, require_held
from .config_file import CONFIG_FILE, check_values, check_version, read_config
from .factors import (
    SUBJECT_PARTS,
    WEIGHTS_FILE,
    FactorFile,
    SubjectSource,
    check_ranks,
    check_subject_on_down,
    config_of,
    open_weights,
)
from .folded import FOLD_FILE
from .reader_files import READER_FILES
from .space import CODE_FILE, CodeSource, SubjectCode, SubjectSpace, load_code, load_space

MAIN_FILES = (WEIGHTS_FILE, CODE_FILE)
"""What holds an artefact itself, one of the two: of an older save the other goes once the new one is there."""
SIDE_FILES = (FOLD_FILE, *READER_FILES)
"""What is made from the tensors and lies beside them: of an older save it goes before another takes its place."""


class Artefact:
    """A Down or a subject in a local folder: its configuration is read and its header checked, its tensors are not yet.

    Attributes:
        folder: where it lies. config: as the file says it, with every check that needs no model.
        tensors: by name, what the header says of each; nothing of a subject that is a code.
        code: of a subject that is one.
    """

    def __init__(self, folder: Path, config: MetaLoraConfig, file: FactorFile | SubjectCode) -> None:
        self.folder, self.config, self._file = folder, config, file
        self.code = file if isinstance(file, SubjectCode) else None
        self.tensors = file.entries if isinstance(file, FactorFile) else {}

    @property
    def is_down(self) -> bool:
        """Whether it is a Down."""
        return self.config.stage == "meta"

    def down(self, expected_fingerprint: str | None = None, known: DownSource | None = None) -> DownSource:
        """Read it as a Down; raises as `load_down`.

        Args:
            known: a Down on a model; if it is this one, its tensors are not read again.
        """
        require_stage(self.config, "meta", self.folder)
        if known is not None and known.fingerprint == self.config.down_fingerprint:
            return dataclasses.replace(known, config=_canonical(self.config, known.tensors))
        assert isinstance(self._file, FactorFile)  # only subjects are codes
        tensors = self._file.read()
        found = fingerprint(tensors)
        for expected in (self.config.down_fingerprint, expected_fingerprint):
            if expected is not None and expected != found:
                raise FingerprintMismatchError(
                    f"{self.folder}: expected the Down {expected[:16]}…, found {found[:16]}…. "
                    "Load the Down that the subject was trained on (its adapter_config.json names it)."
                )
        if self.config.num_slots > 1:  # a run of stage 1 that PEFT saved: its people are nobody's business
            tensors = {name: _mean(name, tensor) for name, tensor in tensors.items()}
        config = dataclasses.replace(_canonical(self.config, tensors), num_slots=1)
        return DownSource(config=config, tensors=tensors, fingerprint=found)

    def subject(self, down: DownSource, find_space: Callable[[], SubjectSpace]) -> SubjectSource:
        """Read it as a subject on `down`, which its header is compared with first; raises as `load_down`.

        Args:
            find_space: gives the subject space of its Down, for a subject that is a code.
        """
        require_stage(self.config, "subject", self.folder)
        if down.fingerprint != self.config.down_fingerprint:
            raise FingerprintMismatchError(
                f"{self.folder}: expected to stand on the Down {str(self.config.down_fingerprint)[:16]}…, found "
                f"{down.fingerprint[:16]}…. Give it the Down that it names: {self.config.down}."
            )
        here = os.path.abspath(self.folder)
        if isinstance(self._file, SubjectCode):
            space = find_space()
            check_ranks(dict(space.layout), self.config, self.folder)
            return CodeSource(_canonical(self.config, dict(space.layout)).read_from(here), self._file, space, down)
        check_subject_on_down(self.tensors, down.tensors, self.folder)
        tensors = self._file.read()
        return SubjectSource(_canonical(self.config, tensors).read_from(here), tensors, down)


@contextmanager
def open_artefact(folder: str | os.PathLike[str]) -> Iterator[Artefact]:
    """Open what lies in a local folder, for `Artefact.down` or `Artefact.subject`; raises as `load_down`."""
    path = Path(folder)
    config = read_config(path)
    if main_file(config) == CODE_FILE:
        code = load_code(path)
        yield Artefact(path, _config_of_code(code, config, path), code)
        return
    with open_weights(path) as file:
        config = config_of(file, config)
        if config.stage == "subject" and config.down_fingerprint is None:
            raise ConfigFormatError(
                f"{path}: expected down_fingerprint in {CONFIG_FILE}, found none. Save the subject again."
            )
        yield Artefact(path, config, FactorFile(file, config))


def main_file(config: MetaLoraConfig) -> str:
    """The file that holds what a configuration says it does: factors, or the code of a subject."""
    is_code = config.stage == "subject" and config.space_fingerprint is not None
    return CODE_FILE if is_code else WEIGHTS_FILE


def _config_of_code(code: SubjectCode, beside: MetaLoraConfig, path: Path) -> MetaLoraConfig:
    """The configuration of a code: the one beside it, or what the code says of itself if that is another save's."""
    if beside.use_dora:
        raise ConfigFormatError(
            f"{path}: expected a code of a subject without DoRA, found use_dora, whose magnitudes no code holds. Save "
            "the whole subject."
        )
    own: dict[str, Any] = {"down_fingerprint": code.down_fingerprint, "space_fingerprint": code.space_fingerprint}
    if code.digest != beside.tensors_digest:  # a save was killed between its two files
        own |= {"subject_name": code.subject_name, "tensors_digest": code.digest, "facts": None}
        return dataclasses.replace(beside, **own)
    for name, found in own.items():
        if getattr(beside, name) != found:
            raise FingerprintMismatchError(
                f"{path}: expected a code with the {name} {str(getattr(beside, name))[:16]}… of {CONFIG_FILE}, found "
                f"{str(found)[:16]}…. Fetch both files again, from one place."
            )
    return beside


def load_down(folder: str | os.PathLike[str], *, expected_fingerprint: str | None = None) -> DownSource:
    """Read a Down from a local folder, with every check that needs no model.

    Args:
        folder: a folder that `save_down` or PEFT's `save_pretrained` wrote.
        expected_fingerprint: what a subject says its Down is.

    Returns:
        Down, the shared Mid start and the mean Mid and Up, keyed by `{module}.metalora_down` and so on.

    Raises:
        WrongKindError: the folder holds a subject or another adapter.
        FingerprintMismatchError: it is another Down than the one that was asked for.
        ArtefactNotFoundError, ConfigFormatError, FormatVersionError, CorruptFileError, PickleRefusedError,
        UnsafeNameError, MissingKeysError, ForeignKeysError, RankMismatchError, ShapeMismatchError, TensorDtypeError,
        NonFiniteError: the file is not what the format says.
    """
    with open_artefact(folder) as found:
        return found.down(expected_fingerprint)


def space_for(config: MetaLoraConfig, folder: Path, down: DownSource) -> SubjectSpace:
    """The subject space that a code needs, out of the folder of its Down.

    Args:
        config: of the subject that is a code. down: the Down, read from there or known already.

    Raises:
        ArtefactNotFoundError: the Down there has no space. FingerprintMismatchError: it has another one.
        As `load_space`.
    """
    there, wanted = read_config(folder), str(config.space_fingerprint)
    if there.space_fingerprint is None:
        raise ArtefactNotFoundError(
            f"{folder}: expected a Down with the subject space {wanted[:16]}… (format version 2), as the subject is a "
            f"code of it, found one of version {there.format_version} without. Take the Down that the photo was read "
            "with, or the whole subject."
        )
    if there.space_fingerprint != wanted:
        raise FingerprintMismatchError(
            f"{folder}: expected a Down with the subject space {wanted[:16]}…, as the subject is a code of it, found "
            f"{there.space_fingerprint[:16]}…. Take the Down that the photo was read with, or read the photo again."
        )
    return load_space(folder, down, wanted)


def check_files(folder: Path, config: MetaLoraConfig, model: nn.Module) -> None:
    """Check the files of an adapter that PEFT is about to load on a model, its configuration read already.

    Further trained modules, biases and embeddings that PEFT saved along are left to PEFT: the format knows factors
    alone. The file's expression for the modules, which could be made slow, is replaced by their names.

    Raises:
        As `load_down`.
    """
    if main_file(config) == CODE_FILE:
        raise WrongKindError(
            f"{folder}: expected a subject with Mid and Up, found a code alone, which PEFT's own verbs cannot expand. "
            "Load it with pipe.load_meta_lora or peft_metalora.load_subject, or save it whole (whole=True)."
        )
    check_version(config.format_version, folder / CONFIG_FILE)
    check_values(config.to_dict(), folder / CONFIG_FILE, expressions=True)
    with open_weights(folder, others=True) as file:
        if config_of(file, config) is not config:
            raise CorruptFileError(
                f"{folder}: expected a configuration and tensors of one save, found those of two: a save was killed "
                "between them. Load it with peft_metalora.load_subject or load_down, which can, and save it again."
            )
        factors = FactorFile(file, config, others=True)
        check_layers(model, factors.entries, str(folder))
        tensors = factors.read()
    require_held(model, tensors, str(folder))
    if config.stage == "meta" and config.down_fingerprint not in (None, fingerprint(tensors)):
        raise FingerprintMismatchError(
            f"{folder}: expected the Down {str(config.down_fingerprint)[:16]}…, as its configuration says, found "
            f"{fingerprint(tensors)[:16]}…. Fetch it again."
        )
    modules = modules_in(tensors)
    # PEFT compares each name of a list with each other one.
    many = not isinstance(config.target_modules, str) and len(config.target_modules or ()) > len(modules)
    if many or (isinstance(config.target_modules, str) and config.target_modules != "all-linear"):
        config.target_modules = whole_paths(modules)
    if isinstance(config.exclude_modules, str):
        config.exclude_modules = None


def down_reference(config: MetaLoraConfig, folder: Path) -> Path | str:
    """Where a subject's Down is: a local folder, or a repository id.

    A relative path starts at the subject's folder and stays inside the folder around it; an absolute one is taken as
    it is.

    Raises:
        MissingDownError: nothing is named, or what is named is neither here nor a repository id.
        UnsafeNameError: the path leads out of the folder around the subject.
    """
    name = config.down
    if name is None or not name.strip():
        raise MissingDownError(
            f"{folder}: expected the name of a Down, found none. Load its Down first "
            f"(fingerprint {str(config.down_fingerprint)[:16]}…), or save the subject with down=..."
        )
    if name in EMBEDDED:
        return EMBEDDED[name]
    if "\0" in name or "\\" in name or name.startswith("~") or re.match(r"[A-Za-z]:", name):
        raise _unsafe_path(name, folder)
    if os.path.isabs(name):
        found = Path(name)
    else:
        around = Path(os.path.abspath(folder)).parent
        found = Path(os.path.normpath(around / Path(os.path.abspath(folder)).name / name))
        if not found.is_relative_to(around) or found == around:
            raise _unsafe_path(name, folder)
    if os.path.isdir(found):
        return found
    if REPO_ID.fullmatch(name) and ".." not in name:
        return name
    raise MissingDownError(
        f"{folder}: expected the Down {name[:80]!r} as a folder at {str(found)[:160]} or as a repository id, found "
        "neither. Put the folder there, or load its Down first."
    )


def _unsafe_path(name: str, folder: Path) -> UnsafeNameError:
    return UnsafeNameError(
        f"{folder}: expected a Down beside the subject or below it, found the path {name[:80]!r}. "
        "Put both into one folder, or name the Down's repository."
    )


def require_stage(config: MetaLoraConfig, stage: str, where: str | Path, verb: str = "load") -> None:
    """Raise WrongKindError where a Down ("meta") or a subject was wanted and the other came; `verb` is what to do."""
    if config.stage != stage:
        raise WrongKindError(
            f"{where}: expected a {'Down' if stage == 'meta' else 'subject'} (stage {stage!r}), found stage "
            f"{config.stage!r}. Use {verb}_{'subject' if stage == 'meta' else 'down'}."
        )


def _canonical(config: MetaLoraConfig, tensors: Mapping[str, Any]) -> MetaLoraConfig:
    """The configuration with its modules spelt out: a file's own patterns are never matched against a model."""
    return dataclasses.replace(
        config,
        target_modules=whole_paths(modules_in(tensors)),
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        tensors_digest=None,
    )


def _mean(name: str, tensor: torch.Tensor) -> torch.Tensor:
    return tensor.mean(dim=0, keepdim=True) if name.rpartition(".")[2] in SUBJECT_PARTS else tensor
