# SPDX-License-Identifier: Apache-2.0
"""Settings dataclasses: how a field is declared, and the list that the docs make of them. Plain Python only."""

from __future__ import annotations

import copy
import math
import re
import reprlib
from collections.abc import Mapping
from dataclasses import MISSING, field, fields
from typing import Any

_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 200


def setting(help: str, default: Any = MISSING, choices: tuple[str, ...] = (), positional: str = "") -> Any:
    """A field of a settings dataclass.

    Args:
        help: its one description. default: a list or a dict is copied for each object.
        choices: the values it may have. positional: on the command line it has no flag, and is called so.
    """
    given = {"help": help, "choices": choices, "positional": positional}
    metadata = {name: value for name, value in given.items() if value}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: copy.copy(default), metadata=metadata)
    return field(default=default, metadata=metadata)


# What several commands have, to be given to `setting`.
BASE_MODEL = "Base model: a diffusers folder or a repository id."
BASE_OF_DOWN = f"{BASE_MODEL} Default: the one that the Down names."
REVISION = "Revision of the base model's repository.", None
DOWN_REVISION = "Revision of the Down's repository.", None
LOCAL_FILES_ONLY = "Never ask the network.", False
PRECISION = (
    "Precision of the base model and of the arithmetic; 'auto' is bf16 on a GPU and 'no' (float32) on a CPU; fp16 is "
    "for cards without bf16.",
    "auto",
    ("auto", "no", "bf16", "fp16"),
)
DEVICE = "Device. Default: a GPU when there is one.", None
READ_FACE_CROP = (
    "Read the square around the largest face of a photo, found by this detector: 'insightface' (needs the extra "
    "[face]), or module:function. Default: as the encoder was trained.",
    None,
)
READ_FACE_MARGIN = (
    "With face_crop, room around the face, as a share of its box. Default: as the encoder was trained.",
    None,
)
READ_FACE_ALIGN = "With face_crop, turn photos so that the eyes are level. Default: as the encoder was trained.", None
FACE_MODEL = (
    "With an encoder that reads through a face model of somebody's own: that model again, module:function. A Down's "
    "files start no code by themselves.",
    None,
)
GENERIC = (
    "Class of your own for a base whose family is not known, or instead of the known one: module:Class, or "
    "file.py:Class (see the page on adding a base). A Down's files start no code by themselves.",
    None,
)
OVERWRITE = "Replace an artefact of another kind, or another person's, that lies there.", False
QUANTIZE = (
    "Hold the weights of the denoiser and of large text encoders in fewer bits: int8 or fp8 (torchao), or nf4, 4 bits "
    "(bitsandbytes, on a GPU).",
    "none",
    ("none", "int8", "fp8", "nf4"),
)
OFFLOAD = (
    "Where weights wait that are not in use. none: on the device; model: whole models in host memory; sequential: "
    "layers (to draw only); group: blocks, which come ahead of the computation.",
    "none",
    ("none", "model", "sequential", "group"),
)


def settings_list(cls: type) -> str:
    """The settings of a dataclass that have help, as a Markdown definition list for docs/settings.md."""
    entries = []
    for one in fields(cls):
        if "help" not in one.metadata:
            continue
        default = one.default_factory() if one.default_factory is not MISSING else one.default
        kind = one.type if isinstance(one.type, str) else one.type.__name__
        term = f"`{one.name}: {kind}`, required" if default is MISSING else f"`{one.name}: {kind} = {default!r}`"
        choices = one.metadata.get("choices", ())
        allowed = f" One of {', '.join(f'`{choice}`' for choice in choices)}." if choices else ""
        text = one.metadata["help"].replace("<", "&lt;")
        entries.append(f"{term}\n:   {text}{allowed}")
    return "\n\n".join(entries)


def fault_of(values: Mapping[str, Any], cls: type) -> str | None:
    """What is wrong with settings of a dataclass one by one, whatever they mean: numbers are finite and of a size,
    texts are texts, and where there are choices each is one of them."""
    for name, value in values.items():
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, float) and not math.isfinite(item):
                return f"{name} must be a finite number, found {item!r}"
            if isinstance(item, int) and not -(2**62) < item < 2**62:
                return f"{name} must be a number below 2**62, found a larger one"
            if isinstance(item, str) and ("\0" in item or not _is_unicode(item)):
                return f"{name} must be a text that UTF-8 can hold, without NUL, found {shown(item)}"
    for one in fields(cls):
        value, choices = values.get(one.name, one.default), one.metadata.get("choices")
        if choices and value not in (*choices, one.default):
            return f"{one.name} must be one of {', '.join(map(repr, choices))}, found {shown(value)}"
    return None


def below_one(settings: object, *names: str) -> str | None:
    """What is wrong where one of these fields is a number below 1; None where none is. A field of None passes."""
    for name in names:
        if (value := getattr(settings, name)) is not None and value < 1:
            return f"{name} must be at least 1, found {value}"
    return None


def is_revision(text: str) -> bool:
    """Whether a revision is none but that: it becomes part of addresses and of paths in the Hub's cache."""
    return re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.,/@+=#%-]{0,254}", text) is not None and ".." not in text


def shown(value: object) -> str:
    """A value for a message, short whatever it is."""
    try:
        return _REPR.repr(value)
    except (ValueError, RecursionError):  # a whole number of thousands of digits
        return f"a {type(value).__name__}"


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
