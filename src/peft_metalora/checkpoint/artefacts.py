# SPDX-License-Identifier: Apache-2.0
"""The file format of Downs and subjects (docs/format.md): reading with every check, writing with none half done.

Both are PEFT adapter folders. A *Down* holds, per module, `metalora_down`, `metalora_mid_init` (the Mid that every
subject starts from), and the mean `metalora_mid` and `metalora_up` of stage 1; beside it may lie what it reads photos
with. A *subject* holds `metalora_mid` and `metalora_up`, or a code of its Down's subject space alone, and names its
Down by reference and fingerprint. Nothing here knows the network: `hub` finds folders,
this module reads them. Nothing here changes a model either: what comes back has been read and checked in full.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
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
    MetaLoraError,
    MissingDownError,
    OutputExistsError,
    UnsafeNameError,
    WrongKindError,
)
from ..files import EMBEDDED, require_apart, staged_folder
from ..tuner import DownSource, MetaLoraConfig, down_fingerprint, down_state, fingerprint, subject_state
from ..tuner.config import reference_to_write
from ..tuner.down import MID, digest_of
from ..tuner.placing import require_adapter
from ..tuner.ranks import exceptions, ranks_of, whole_paths
from .base_model import REPO_ID, bare_model, base_model_name, check_layers, require_held
from .card_file import CARD_FILE, is_made_card
from .config_file import (
    CONFIG_FILE,
    FORMAT_VERSION,
    PEFT_TYPE,
    check_values,
    check_version,
    config_json,
    is_name,
    read_config,
)
from .factors import (
    SUBJECT_PARTS,
    WEIGHTS_FILE,
    FactorFile,
    SubjectSource,
    check_ranks,
    check_subject_on_down,
    config_of,
    open_weights,
    require_finite,
    save_factors,
)
from .folded import FOLD_FILE, LoraPair, component_name, fold_subject, save_diffusers
from .reader_files import READER_FILES, ReaderFiles
from .space import CODE_FILE, CodeSource, SubjectCode, SubjectSpace, load_code, load_space, save_code
from .untrusted import read_json

# Reading


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
        _require_stage(self.config, "meta", self.folder)
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
        """Read it as a subject on `down`, which its header is compared with first; raises as `load_subject`.

        Args:
            find_space: gives the subject space of its Down, for a subject that is a code.
        """
        _require_stage(self.config, "subject", self.folder)
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


def load_subject(folder: str | os.PathLike[str]) -> SubjectSource:
    """Read a subject and its Down from local folders; `hub.load_subject` also knows repositories.

    Args:
        folder: a folder that `save_subject` or PEFT's `save_pretrained` wrote.

    Raises:
        MissingDownError: the subject names no Down that can be found.
        Everything that `load_down` raises.
    """
    with open_artefact(folder) as found:
        _require_stage(found.config, "subject", found.folder)
        down = find_local_down(found.config, found.folder)

        def find_space() -> SubjectSpace:
            return space_for(found.config, Path(down_reference(found.config, found.folder)), down)

        return found.subject(down, find_space)


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
    modules = {name.rpartition(".")[0] for name in tensors}
    # PEFT compares each name of a list with each other one.
    many = not isinstance(config.target_modules, str) and len(config.target_modules or ()) > len(modules)
    if many or (isinstance(config.target_modules, str) and config.target_modules != "all-linear"):
        config.target_modules = whole_paths(modules)
    if isinstance(config.exclude_modules, str):
        config.exclude_modules = None


def find_local_down(config: MetaLoraConfig, folder: Path) -> DownSource:
    """The Down that a subject in `folder` names by a path; raises MissingDownError when it names none that is here."""
    reference = down_reference(config, folder)
    if isinstance(reference, str):
        raise MissingDownError(
            f"{folder}: expected its Down in a local folder, found the name of a repository, {reference}. "
            "Load it with peft_metalora.load_subject, which downloads, or load the Down first."
        )
    return load_down(reference, expected_fingerprint=config.down_fingerprint)


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


def _require_stage(config: MetaLoraConfig, stage: str, path: Path) -> None:
    if config.stage != stage:
        raise WrongKindError(
            f"{path}: expected a {'Down' if stage == 'meta' else 'subject'} (stage {stage!r}), found stage "
            f"{config.stage!r}. Use load_{'subject' if stage == 'meta' else 'down'}."
        )


def _canonical(config: MetaLoraConfig, tensors: Mapping[str, Any]) -> MetaLoraConfig:
    """The configuration with its modules spelt out: a file's own patterns are never matched against a model."""
    return dataclasses.replace(
        config,
        target_modules=whole_paths({name.rpartition(".")[0] for name in tensors}),
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        tensors_digest=None,
    )


def _mean(name: str, tensor: torch.Tensor) -> torch.Tensor:
    return tensor.mean(dim=0, keepdim=True) if name.rpartition(".")[2] in SUBJECT_PARTS else tensor


# Writing


def save_down(
    folder: str | os.PathLike[str],
    model: nn.Module,
    adapter_name: str = "default",
    *,
    facts: Mapping[str, Any] | None = None,
    base_model: str | None = None,
    base_revision: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a stage-`meta` adapter as a Down: its Down, the shared Mid start, and the mean Mid and Up of its slots.

    Args:
        folder: written all at once; an older Down in it is replaced.
        model: anything that holds the adapter (a PeftModel, an injected or a diffusers model).
        facts: plain JSON about the training (domain, subjects, steps, recipe), kept in the configuration.
        base_model: repository id or path of the base; by default what the model remembers.
        base_revision: its revision.
        overwrite: whether it may replace what is no Down.

    Returns:
        The folder.

    Raises:
        WrongKindError: the adapter is a subject.
        OutputExistsError: something else lies there.
        NonFiniteError: a tensor holds NaN or infinity.
        WriteFailedError: the disk refuses; what was there is unchanged.
    """
    config = _adapter_config(model, adapter_name, "meta")
    tensors = down_state(model, adapter_name)
    config = _with_plain_patterns(config, tensors)
    config = _file_config(config, model, facts, base_model, base_revision, down_fingerprint=fingerprint(tensors))
    return write_artefact(Path(folder), config, tensors, overwrite=overwrite)


def save_subject(
    folder: str | os.PathLike[str],
    model: nn.Module,
    adapter_name: str = "default",
    *,
    slot: int = 0,
    down: str | os.PathLike[str] | None = None,
    down_revision: str | None = None,
    facts: Mapping[str, Any] | None = None,
    base_model: str | None = None,
    base_revision: str | None = None,
    subject_name: str | None = None,
    fold: bool | None = None,
    whole: bool = False,
    overwrite: bool = False,
) -> Path:
    """Write one slot of a stage-`subject` adapter as a subject, with its exact fold as an ordinary LoRA beside it.

    Somebody who was read from photos, or loaded from a code, and has not been trained since is written as the code.

    Args:
        folder: written all at once; an older subject in it is replaced.
        slot: which of the adapter's subjects.
        down: the Down to name, as a local folder (written as a relative path when it lies beside the subject) or a
            repository id; by default what the adapter's configuration names.
        facts: plain JSON, such as `consent`, in the place of what the adapter knows of itself.
        subject_name: who it is; by default as the file said that it was loaded from, or else the adapter's name.
        fold: whether to ship `pytorch_lora_weights.safetensors`, which plain diffusers loads; by default beside Mid and
            Up, and not beside a code.
        whole: whether to write Mid and Up even of a code.
        overwrite: whether it may replace what is no subject, or somebody else. Never its own Down.

    Returns:
        The folder.

    Raises:
        As `save_down`.
    """
    target = Path(folder)
    config = _adapter_config(model, adapter_name, "subject")
    named = str(down) if down is not None else config.located_down()
    require_apart(target, down=named)
    tensors = subject_state(model, adapter_name, slot)
    factors = down_state(model, adapter_name)
    reference = reference_to_write(named, target)
    is_new = config.origin is None and adapter_name != "default"
    config = _file_config(
        _with_plain_patterns(config, tensors),
        model,
        facts,
        base_model,
        base_revision,
        down=reference,
        down_revision=down_revision if down is not None else config.down_revision,
        down_fingerprint=down_fingerprint(model, adapter_name),
        subject_name=subject_name or config.subject_name or (adapter_name if is_new else None),
    )
    code = None if whole else code_on_model(model, adapter_name)
    fold = code is None if fold is None else fold
    pairs = fold_subject(config, factors, tensors) if fold else {}
    return write_artefact(target, config, code or tensors, pairs, overwrite=overwrite)


def save_read_subject(
    folder: str | os.PathLike[str],
    subject: CodeSource,
    *,
    facts: Mapping[str, Any] | None = None,
    whole: bool = False,
    overwrite: bool = False,
) -> Path:
    """Write a subject that was read from photos, and that no model holds; its configuration says who and on what.

    Args:
        facts, whole, overwrite: as `save_subject`.

    Returns:
        The folder.

    Raises:
        As `save_subject`.
    """
    target, named = Path(folder), subject.config.located_down()
    require_apart(target, down=named)
    config = dataclasses.replace(subject.config, down=reference_to_write(named, target), inference_mode=True)
    config.facts = None if facts is None else dict(facts)
    if not whole:
        return write_artefact(target, config, subject.code, overwrite=overwrite)
    pairs = fold_subject(config, subject.down.tensors, subject.tensors)
    return write_artefact(target, config, subject.tensors, pairs, overwrite=overwrite)


def know_code(model: nn.Module, adapter_name: str, code: SubjectCode) -> None:
    """Remember that the factors of a subject on the model were just expanded from a code."""
    config = _adapter_config(model, adapter_name, "subject")
    config.__dict__["expanded_from"] = code, digest_of(subject_state(model, adapter_name))


def code_on_model(model: nn.Module, adapter_name: str) -> SubjectCode | None:
    """The code of a subject on the model, if its factors are what they were when they were expanded from one."""
    known = require_adapter(model, adapter_name).expanded_from
    return known[0] if known is not None and known[1] == digest_of(subject_state(model, adapter_name)) else None


def _adapter_config(model: nn.Module, adapter_name: str, stage: str) -> MetaLoraConfig:
    config = require_adapter(model, adapter_name)
    _require_stage(config, stage, Path(adapter_name))
    if config.bias != "none" or config.modules_to_save:
        raise ConfigFormatError(
            f"expected bias='none' and no modules_to_save, found {config.bias!r} and {config.modules_to_save}: the "
            "files of Downs and subjects hold factors alone. Use PEFT's save_pretrained for this adapter."
        )
    return config


def _with_plain_patterns(config: MetaLoraConfig, tensors: Mapping[str, torch.Tensor]) -> MetaLoraConfig:
    """Ranks and scales that differ, by whole module paths: expressions of any other kind are refused on reading."""
    if not (config.rank_pattern or config.meta_rank_pattern or config.alpha_pattern):
        return config
    mids = {name.rpartition(".")[0]: tensor for name, tensor in tensors.items() if name.endswith(f".{MID}")}
    alphas = {module: ranks_of(config, module).lora_alpha for module in mids}

    return dataclasses.replace(
        config,
        rank_pattern=exceptions({module: mid.shape[1] for module, mid in mids.items()}, config.r),
        meta_rank_pattern=exceptions({module: mid.shape[2] for module, mid in mids.items()}, config.meta_r),
        alpha_pattern=exceptions(alphas, config.lora_alpha),
    )


def _file_config(
    config: MetaLoraConfig,
    model: nn.Module,
    facts: Mapping[str, Any] | None,
    base_model: str | None,
    base_revision: str | None,
    **changes: Any,
) -> MetaLoraConfig:
    inner = bare_model(model)
    fields: dict[str, Any] = {
        "num_slots": 1,
        "inference_mode": True,
        "init_weights": True,
        "facts": dict(facts) if facts is not None else config.facts,
        "base_model_name_or_path": base_model or config.base_model_name_or_path or base_model_name(model),
        "revision": base_revision or config.revision,
        "auto_mapping": {
            "base_model_class": type(inner).__name__,
            "parent_library": type(inner).__module__.partition(".")[0],
        },
    }
    return dataclasses.replace(config, **fields, **changes)


SIDE_FILES = (FOLD_FILE, *READER_FILES)
"""What is made from the tensors and lies beside them: of an older save it goes before another takes its place."""
MAIN_FILES = (WEIGHTS_FILE, CODE_FILE)
"""What holds an artefact itself, one of the two: of an older save the other goes once the new one is there."""


def write_artefact(
    folder: Path,
    config: MetaLoraConfig,
    content: Mapping[str, torch.Tensor] | SubjectCode,
    fold: Mapping[str, LoraPair] | None = None,
    *,
    reader: ReaderFiles | None = None,
    card: bytes | None = None,
    overwrite: bool = False,
) -> Path:
    """Write the files of an artefact, all or nothing: configuration and content, and what is given to lie beside them.

    What an older save left and this one does not write goes; a card that somebody edited stays, unless it speaks of
    somebody else.

    Args:
        content: tensors by name, or the code that a subject is.

    Raises:
        NonFiniteError, WriteFailedError
        OutputExistsError: as `require_replaceable`.
    """
    code = content if isinstance(content, SubjectCode) else None
    tensors = content if not isinstance(content, SubjectCode) else {"the code": content.code}
    require_finite(tensors, folder)
    require_replaceable(folder, config.stage, config.subject_name, overwrite=overwrite)
    edited = (folder / CARD_FILE).exists() and not is_made_card(folder / CARD_FILE)
    edited = edited and what_else(folder, config.stage, config.subject_name) is None
    space = code or reader
    config = dataclasses.replace(
        config,
        format_version=1 if space is None else FORMAT_VERSION,
        space_fingerprint=None if space is None else space.space_fingerprint,
        encoder_fingerprint=None if reader is None else reader.encoder_fingerprint,
    )
    with staged_folder(folder, SIDE_FILES if edited else (*SIDE_FILES, CARD_FILE), MAIN_FILES) as stage:
        if card is not None and not edited:
            (stage / CARD_FILE).write_bytes(card)
        if code is not None:
            save_code(stage, dataclasses.replace(code, subject_name=config.subject_name))
            # The modules are those of the Down: by name they would take more room than the code.
            config = dataclasses.replace(config, tensors_digest=code.digest, target_modules=None)
        else:
            config = save_factors(stage / WEIGHTS_FILE, config, tensors)
        if reader is not None:
            reader.write(stage)
        if fold:
            save_diffusers(stage / FOLD_FILE, fold, component_name(config))
        (stage / CONFIG_FILE).write_bytes(config_json(config))
    return folder


def require_replaceable(
    folder: str | os.PathLike[str], stage: str | None, subject_name: str | None = None, *, overwrite: bool = False
) -> None:
    """Check that a save to `folder` replaces nothing but an older save of the same.

    Args:
        stage: 'meta' or 'subject', as a configuration has it; None for an ordinary LoRA.
        subject_name: who the subject is, if that is known.
        overwrite: whether it may replace another kind, or somebody else.

    Raises:
        OutputExistsError: an adapter of another kind lies there, or the subject of another name, or of none.
        ConfigFormatError: a name that no file may hold.
    """
    if not is_name(subject_name):
        raise ConfigFormatError(
            f"expected a name of at most 256 printable characters for the subject, found {ascii(subject_name)[:80]}: "
            "rename the folder that it comes from, or give another name"
        )
    found = None if overwrite else what_else(folder, stage, subject_name)
    if found is not None:
        raise OutputExistsError(
            f"{folder}: expected a new folder, or an older save of the same, found {found}. Choose another folder, or "
            "give overwrite=True to replace it."
        )


def what_else(folder: str | os.PathLike[str], stage: str | None, subject_name: str | None = None) -> str | None:
    """What lies in a folder that is no older save of the same, in words; None: nothing. Arguments as above."""
    path = Path(folder) / CONFIG_FILE
    if not path.exists():
        names = {name for name in (*MAIN_FILES, FOLD_FILE) if (Path(folder) / name).exists()}
        return bare_weights(names) if stage is not None or names & {*MAIN_FILES} else None
    try:
        there = read_json(path)
    except MetaLoraError:
        there = {}
    kind, who = there.get("stage") if there.get("peft_type") == PEFT_TYPE else None, there.get("subject_name") or None
    if kind != stage or (kind is None and there.get("peft_type") != "LORA"):
        return {"meta": "a Down", "subject": "a subject"}.get(str(kind), "another adapter")
    if kind != "subject" or who == subject_name:
        return None
    found, own = (f"{name!r}" if name else "without a name" for name in (who, subject_name))
    return f"the subject {found}, not {own}" if who else f"a subject {found}, not {own}"


def bare_weights(names: Iterable[str]) -> str | None:
    """What files without a configuration are, in words; None: nothing.

    diffusers calls the weights of a LoRA by the name that our fold has.
    """
    weights = sorted({*names} & {*MAIN_FILES, FOLD_FILE})
    return f"another adapter ({weights[0]} without {CONFIG_FILE})" if weights else None
