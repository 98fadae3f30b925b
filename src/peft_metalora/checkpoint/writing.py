# SPDX-License-Identifier: Apache-2.0
"""Downs and subjects into folders: a save is there whole or not at all, and replaces but an older one of the same."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import ConfigFormatError, MetaLoraError, OutputExistsError
from ..files import require_apart, staged_folder
from ..tuner import MetaLoraConfig, down_fingerprint, down_state, fingerprint, subject_state
from ..tuner.config import reference_to_write
from ..tuner.down import MID
from ..tuner.placing import require_adapter
from ..tuner.ranks import exceptions, ranks_of
from .artefacts import MAIN_FILES, SIDE_FILES, require_stage
from .base_model import bare_model, base_model_name
from .card_file import CARD_FILE, is_made_card
from .config_file import CONFIG_FILE, FORMAT_VERSION, PEFT_TYPE, config_json, is_name
from .factors import WEIGHTS_FILE, require_finite, save_factors
from .folded import FOLD_FILE, LoraPair, component_name, fold_subject, save_diffusers
from .reader_files import ReaderFiles
from .space import CodeSource, SubjectCode, code_on_model, save_code
from .untrusted import read_json


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


def _adapter_config(model: nn.Module, adapter_name: str, stage: str) -> MetaLoraConfig:
    config = require_adapter(model, adapter_name)
    require_stage(config, stage, adapter_name, "save")
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
