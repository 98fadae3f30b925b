# SPDX-License-Identifier: Apache-2.0
"""Where an encoder looks: what each source makes of photos before a small network reads a code from it.

A source is a file here and a line in `_SOURCES`. It is named by one setting, `latents`, `transformers:<id>` or `face`;
what follows the colon is the source's own.
"""

from __future__ import annotations

from collections.abc import Callable

from ...errors import ConfigError
from .face import FaceSource
from .latents import LatentSource
from .source import EncodeImages, Source
from .transformers import TransformersSource

__all__ = ["EncodeImages", "FaceSource", "LatentSource", "Source", "TransformersSource", "make_source", "source_kinds"]

_SOURCES: dict[str, Callable[..., Source]] = {
    "latents": LatentSource,
    "transformers": TransformersSource,
    "face": FaceSource,
}


def source_kinds() -> tuple[str, ...]:
    """Names of the sources there are."""
    return tuple(_SOURCES)


def make_source(name: str, *, resolution: int, encode_images: EncodeImages | None = None) -> Source:
    """The source of that name.

    Args:
        name: kind, and after a colon what the kind takes.
        resolution: side in pixels to which photos are brought, where the source has none of its own.
        encode_images: the base's VAE, for `latents`.

    Raises:
        ConfigError: no such source, or one that lacks what it needs.
        EmbedderUnavailableError: a package or weights that are not there.
    """
    kind, _, detail = name.partition(":")
    if kind not in _SOURCES:
        raise ConfigError(f"encoder must be one of {', '.join(_SOURCES)}, found {name!r}")
    return _SOURCES[kind](detail, resolution=resolution, encode_images=encode_images)
