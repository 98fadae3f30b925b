# SPDX-License-Identifier: Apache-2.0
"""A clip as a file: an animated WebP by Pillow, or an MP4 by diffusers' own export, which needs imageio-ffmpeg."""

from __future__ import annotations

import importlib.util
import io
import itertools
from collections.abc import Sequence

from PIL import Image

from ..errors import ConfigError
from ..files import temporary_folder

CLIP_FORMATS = "webp", "mp4"


def require_clip_format(kind: str) -> None:
    """Check that clips can be written so.

    Raises:
        ConfigError: another format, or a package is missing.
    """
    if kind not in CLIP_FORMATS:
        raise ConfigError(f"clip_format must be one of {', '.join(CLIP_FORMATS)}, found {kind!r}")
    missing = [name for name in ("imageio", "imageio_ffmpeg") if importlib.util.find_spec(name) is None]
    if kind == "mp4" and missing:
        raise ConfigError(
            f"clip_format 'mp4' needs {' and '.join(missing)}, found none: pip install 'peft-metalora[video]', or "
            "write 'webp'"
        )


def clip(frames: Sequence[Image.Image], frames_per_second: int, kind: str) -> bytes:
    """The bytes of a file; a WebP begins again at its end.

    Args:
        kind: one of `CLIP_FORMATS`.

    Raises:
        ConfigError: as `require_clip_format`.
    """
    require_clip_format(kind)
    if kind == "mp4":
        return _mp4(frames, frames_per_second)
    # Whole milliseconds that do not drift.
    ends = [round(1000 * number / frames_per_second) for number in range(len(frames) + 1)]
    durations = [end - start for start, end in itertools.pairwise(ends)]
    buffer = io.BytesIO()
    frames[0].save(
        buffer, format="WEBP", save_all=True, append_images=frames[1:], duration=durations, loop=0, quality=90
    )
    return buffer.getvalue()


def _mp4(frames: Sequence[Image.Image], frames_per_second: int) -> bytes:
    from diffusers.utils import export_to_video

    with temporary_folder() as folder:
        path = folder / "clip.mp4"
        export_to_video([*frames], str(path), fps=frames_per_second)
        return path.read_bytes()
