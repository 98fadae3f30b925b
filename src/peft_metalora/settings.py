# SPDX-License-Identifier: Apache-2.0
"""Settings dataclasses: how a field is declared, and the table that the docs make of them. Plain Python only."""

from __future__ import annotations

from dataclasses import MISSING, field, fields
from typing import Any


def setting(help: str, default: Any = MISSING, choices: tuple[str, ...] = ()) -> Any:
    """A field of a settings dataclass: its one description, its default, the values it may have."""
    metadata = {"help": help, "choices": choices} if choices else {"help": help}
    return field(metadata=metadata) if default is MISSING else field(default=default, metadata=metadata)


def settings_table(cls: type) -> str:
    """The settings of a dataclass as a Markdown table, for docs/settings.md."""
    lines = ["| Setting | Default | |", "|---|---|---|"]
    for one in fields(cls):
        default = one.default_factory() if one.default_factory is not MISSING else one.default
        shown = "required" if default is MISSING else "" if default is None or default == [] else f"`{default}`"
        lines.append(f"| `{one.name}` | {shown} | {one.metadata['help']} |".replace(" |  | ", " | | "))
    return "\n".join(lines)
