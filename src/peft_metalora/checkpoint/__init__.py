# SPDX-License-Identifier: Apache-2.0
"""Downs and subjects as files (docs/format.md): read with every check, written whole or not at all."""

from __future__ import annotations

from .artefacts import load_down, load_subject, require_replaceable, save_down, save_subject, write_artefact
from .factors import SubjectSource

__all__ = [
    "SubjectSource",
    "load_down",
    "load_subject",
    "require_replaceable",
    "save_down",
    "save_subject",
    "write_artefact",
]
