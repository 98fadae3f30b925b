# SPDX-License-Identifier: Apache-2.0
"""Settings dataclasses: how a field is declared, and the table that the docs make of them. Plain Python only."""

from __future__ import annotations

import copy
import math
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


def settings_table(cls: type) -> str:
    """The settings of a dataclass as a Markdown table, for docs/settings.md."""
    lines = ["| Setting | Default | |", "|---|---|---|"]
    for one in fields(cls):
        default = one.default_factory() if one.default_factory is not MISSING else one.default
        shown = "required" if default is MISSING else "" if default is None or default == [] else f"`{default}`"
        lines.append(f"| `{one.name}` | {shown} | {one.metadata['help']} |".replace(" |  | ", " | | "))
    return "\n".join(lines)


def fault_of(values: Mapping[str, Any]) -> str | None:
    """What is wrong with settings one by one, whatever they mean: numbers are finite and of a size, texts are texts."""
    for name, value in values.items():
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, float) and not math.isfinite(item):
                return f"{name} must be a finite number, found {item!r}"
            if isinstance(item, int) and not -(2**62) < item < 2**62:
                return f"{name} must be a number below 2**62, found a larger one"
            if isinstance(item, str) and ("\0" in item or not _is_unicode(item)):
                return f"{name} must be a text that UTF-8 can hold, without NUL, found {shown(item)}"
    return None


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
