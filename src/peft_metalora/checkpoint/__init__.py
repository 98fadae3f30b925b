# SPDX-License-Identifier: Apache-2.0
"""Downs and subjects as files (docs/format.md): read with every check, written whole or not at all."""

from __future__ import annotations

from .artefacts import load_down
from .factors import SubjectSource
from .writing import require_replaceable, save_down, save_subject, write_artefact

__all__ = [
    "SubjectSource",
    "load_down",
    "require_replaceable",
    "save_down",
    "save_subject",
    "write_artefact",
]
