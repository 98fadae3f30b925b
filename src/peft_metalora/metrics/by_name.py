# SPDX-License-Identifier: Apache-2.0
"""Embedders and detectors as settings name them: ours by a word, somebody else's as `module:function`."""

from __future__ import annotations

import importlib
from contextlib import suppress
from typing import Any

from ..errors import ConfigError
from ..files import written_in
from .detectors import FaceDetector, InsightFaceDetector
from .dlib_faces import DlibEmbedder
from .embedders import Embedder
from .insight_faces import InsightFaceEmbedder


def face_embedder(name: str, setting: str = "embedder", **options: Any) -> Embedder:
    """'insightface', 'dlib', or `module:function` that returns an embedder.

    Args:
        setting: that named it. options: of `InsightFaceEmbedder`.

    Raises:
        ConfigError: there is no such function. EmbedderUnavailableError: a package or its weights are missing.
    """
    if name == "insightface":
        return InsightFaceEmbedder(**options)
    if name == "dlib":
        return DlibEmbedder()
    embedder: Embedder = made_by(name, setting, "embed", "'insightface', 'dlib'")
    return embedder


def load_detector(name: str) -> FaceDetector:
    """'insightface', or `module:function` that returns a detector; raises as `face_embedder`."""
    detector: FaceDetector = InsightFaceDetector() if name == "insightface" else made_by(name, "face_crop", "detect")
    return detector


def made_by(name: str, setting: str, method: str, ours: str = "'insightface'") -> Any:
    """What `module:function` returns, such as an embedder of somebody's own.

    Args:
        setting: that named it. method: that it must have. ours: what else the setting takes.

    Raises:
        ConfigError: there is no such function, or it returns something else.
    """
    module, _, function = name.partition(":")
    try:
        made = getattr(importlib.import_module(module), function)()
        getattr(made, method)
        return made
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{setting} must be {ours} or module:function, found {name!r}: {error}") from error


def code_of(name: str | None) -> dict[str, str]:
    """What tells `module:function` from itself after an edit, as `files.written_in`; nothing of what we bring."""
    module, _, function = (name or "").partition(":")
    with suppress(ImportError, AttributeError, ValueError):  # `made_by` names what is wrong
        return written_in(getattr(importlib.import_module(module), function)) if function else {}
    return {}
