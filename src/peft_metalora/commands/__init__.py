# SPDX-License-Identifier: Apache-2.0
"""What the subcommands of `metalora` do; `cli` makes their flags."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Done:
    """What a command has done.

    Attributes:
        sentence: for people. values: the same for programs (`--json`); paths and what else JSON lacks become texts.
        code: the exit code, 1 where the command worked and found something amiss.
    """

    sentence: str
    values: dict[str, Any]
    code: int = 0
