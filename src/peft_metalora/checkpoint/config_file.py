# SPDX-License-Identifier: Apache-2.0
"""`adapter_config.json` of Downs and subjects: read with each field checked against its type, written in one order.

A configuration from a file is as untrusted as its tensors: expressions in it are limited to what cannot be made slow,
numbers to what a model can hold.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import ConfigFormatError, FormatVersionError, MetaLoraError, WrongKindError
from ..settings import is_revision
from ..tuner import MetaLoraConfig
from ..tuner.config import MAX_ALPHA, wrong_field
from .untrusted import MAX_CONFIG_BYTES, parse_json, read_json

FORMAT_VERSION = 2
"""The newest that is read. Version 1 knows no subject spaces and is still what is written where there is none."""
CONFIG_FILE = "adapter_config.json"
PEFT_TYPE = "META_LORA"
_SINCE_2 = "space_fingerprint", "encoder_fingerprint"
_PATTERN_KEY = re.compile(r"\^?[A-Za-z0-9_\\.-]+\$?")


def read_config(folder: str | os.PathLike[str]) -> MetaLoraConfig:
    """Read `adapter_config.json` of a Down or a subject, each field checked against its type.

    Fields that this release does not know are left out, as PEFT does, so that a newer PEFT's additions do no harm.

    Raises:
        ArtefactNotFoundError, CorruptFileError: there is none, or it is no JSON object.
        WrongKindError: it is another adapter's.
        FormatVersionError: a newer release wrote it.
        ConfigFormatError: a field is of the wrong type or has a value that cannot be.
    """
    path = Path(folder) / CONFIG_FILE
    return parse_config(read_json(path), path)


def parse_config(table: Mapping[str, Any], path: Path) -> MetaLoraConfig:
    """A configuration out of its JSON, which came from the file `path`; raises as `read_config` does."""
    if table.get("peft_type") != PEFT_TYPE:
        raise WrongKindError(
            f"{path}: expected peft_type {PEFT_TYPE}, found {str(table.get('peft_type'))[:40]!r}. "
            "Load ordinary adapters with PEFT or pipe.load_lora_weights."
        )
    version = table.get("format_version", 1)
    check_version(version, path)
    known = {field.name for field in dataclasses.fields(MetaLoraConfig)}
    values = {name: value for name, value in table.items() if name in known}
    if (wrong := wrong_field(values)) is not None:
        raise _bad_field(path, *wrong, values[wrong[0]])
    if version < 2:
        values.update(dict.fromkeys(_SINCE_2))
    check_values(values, path)
    for name in ("modules_to_save", "trainable_token_indices"):
        if values.get(name):
            raise _bad_field(path, name, "none: the files of Downs and subjects hold factors alone", values[name])
        values[name] = None  # PEFT would look for the embedding of an empty list
    if values.get("bias", "none") != "none":
        raise _bad_field(path, "bias", "'none'", values["bias"])
    try:
        return MetaLoraConfig(**values)
    except (MetaLoraError, ValueError, TypeError, LookupError, ArithmeticError) as error:
        raise ConfigFormatError(f"{path}: expected a configuration that can be, found: {error}") from error


def check_version(version: Any, path: Path) -> None:
    """Refuse what a newer release wrote; raises FormatVersionError, and ConfigFormatError for what is no version."""
    if type(version) is not int or version < 1:
        raise _bad_field(path, "format_version", "a whole number from 1", version)
    if version > FORMAT_VERSION:
        raise FormatVersionError(
            f"{path}: expected format version {FORMAT_VERSION} or older, found {version}. "
            "Upgrade: pip install -U peft-metalora."
        )


def check_values(values: Mapping[str, Any], path: Path, *, expressions: bool = False) -> None:
    """Check what a configuration of a file says, its types being right, whoever goes on to load it.

    Args:
        expressions: whether patterns may be more than names of modules, as PEFT's users write them.

    Raises:
        ConfigFormatError: a number that no model holds, an expression that could be made slow, a name that is none.
    """
    for name in ("r", "meta_r", "num_slots"):
        if name in values and not 1 <= values[name] <= 2**20:
            raise _bad_field(path, name, "a number from 1 to 2**20", values[name])
    for name in ("rank_pattern", "meta_rank_pattern", "alpha_pattern"):
        for key, value in (values.get(name) or {}).items():
            # Keys are used as regular expressions: without repetition none of them can be made slow.
            if (
                not (_is_tame(key) if expressions else _PATTERN_KEY.fullmatch(key))
                or len(key) > 256
                or not _compiles(key)
            ):
                raise _bad_field(path, name, "module names as keys", key)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 2**20:
                raise _bad_field(path, name, "positive numbers as values", value)
    alphas = [values.get("lora_alpha"), *(values.get("alpha_pattern") or {}).values()]
    if any(alpha is not None and not abs(alpha) <= MAX_ALPHA for alpha in alphas):  # nor is NaN
        raise _bad_field(path, "lora_alpha", "a number that half precision can hold", values.get("lora_alpha"))
    for name in ("down_fingerprint", "tensors_digest", *_SINCE_2):
        if values.get(name) is not None and not re.fullmatch(r"[0-9a-f]{64}", values[name]):
            raise _bad_field(path, name, "64 hexadecimal digits", values[name])
    for name in ("revision", "down_revision"):
        if values.get(name) is not None and not is_revision(values[name]):
            raise _bad_field(path, name, "a branch, tag or commit", values[name])
    mapping = values.get("auto_mapping") or {}
    if not all(isinstance(one, str) for pair in mapping.items() for one in pair):
        raise _bad_field(path, "auto_mapping", "names of a class and a library", mapping)
    if not is_name(values.get("subject_name")):
        raise _bad_field(path, "subject_name", "a name of at most 256 printable characters", values["subject_name"])


def is_name(who: str | None) -> bool:
    """Whether a subject may be called so; None is no name."""
    return who is None or (0 < len(who) <= 256 and who.isprintable())


def _is_tame(pattern: str) -> bool:
    """Whether an expression takes a number of steps that is a small power of the length of a module's path."""
    bare = re.sub(r"\\.", "", pattern)
    return len(re.findall(r"[*+{]", bare)) <= 3 and not re.search(r"\)[*+{]", bare)


def _compiles(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError):
        return False
    return True


def _bad_field(path: Path, name: str, expected: str, value: Any) -> ConfigFormatError:
    return ConfigFormatError(
        f"{path}: expected {name} to be {expected}, found {str(value)[:60]!r} ({type(value).__name__}). "
        "Fetch the file again, or save it again with this release."
    )


def config_json(config: MetaLoraConfig) -> bytes:
    """`adapter_config.json` with its fields and sets in order, so that equal configurations are equal files.

    Raises:
        ConfigFormatError: it could not be read again.
    """

    def plain(value: Any) -> Any:
        if isinstance(value, (set, frozenset)):
            return sorted(value)
        raise TypeError(f"a {type(value).__name__}")

    try:
        text = json.dumps(config.to_dict(), indent=2, sort_keys=True, default=plain, allow_nan=False).encode()
    except (ValueError, TypeError, RecursionError) as error:
        raise ConfigFormatError(f"expected facts of plain JSON, found {error}. Give text, numbers, lists.") from error
    if len(text) > MAX_CONFIG_BYTES:
        raise ConfigFormatError(
            f"expected a configuration of at most {MAX_CONFIG_BYTES} bytes, which is all that is read again, found "
            f"{len(text)}. Give shorter facts, or fewer patterns."
        )
    path = Path(CONFIG_FILE)
    try:
        parse_config(parse_json(text.decode(), path, "configuration"), path)
    except MetaLoraError as error:
        raise ConfigFormatError(f"expected a configuration that can be read again, found: {error}") from error
    return text
