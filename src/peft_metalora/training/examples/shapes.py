# SPDX-License-Identifier: Apache-2.0
"""Which shapes the crops of training have: one square, or aspect-ratio buckets. Plain Python."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from ...errors import ConfigError

Shape = tuple[int, int]  # height, width, in pixels

_LONGEST = 2.0  # ratio of the longest bucket's sides
_STEPS = 8  # automatic buckets differ by about this part of the resolution: few shapes, so that batches fill


def parse_shapes(text: str) -> list[Shape] | None:
    """Buckets as diffusers' scripts take them, 'height,width;height,width'; None for 'auto'.

    >>> parse_shapes("512,512;640,384")
    [(512, 512), (640, 384)]

    Raises:
        ConfigError: it is neither.
    """
    if text == "auto":
        return None
    shapes = []
    for part in text.split(";"):
        match = re.fullmatch(r"\s*([1-9]\d*)\s*,\s*([1-9]\d*)\s*", part)
        if match is None:
            raise ConfigError(
                f"aspect_ratio_buckets must be 'auto' or 'height,width;height,width', found {part!r} in {text!r}"
            )
        shapes.append((int(match[1]), int(match[2])))
    return shapes


def crop_shapes(buckets: str | None, resolution: int, multiple: int) -> list[Shape]:
    """The shapes that photos are cut to.

    Args:
        buckets: None: one square. 'auto': areas of at most resolution², sides up to 2 : 1. Else as `parse_shapes` says.
        multiple: of which the base model needs both sides to be.

    >>> crop_shapes("auto", 512, 16)
    [(384, 640), (448, 576), (512, 512), (576, 448), (640, 384)]

    Raises:
        ConfigError: sides that do not fit the base model.
    """
    if buckets is not None and (given := parse_shapes(buckets)) is not None:
        wrong = [shape for shape in given if shape[0] % multiple or shape[1] % multiple]
        if wrong:
            raise ConfigError(
                f"the sides of aspect_ratio_buckets must be multiples of {multiple} for this base model, found "
                + "; ".join(f"{height},{width}" for height, width in wrong)
            )
        return sorted(set(given))
    if resolution % multiple:
        raise ConfigError(f"resolution must be a multiple of {multiple} for this base model, found {resolution}")
    shapes = {(resolution, resolution)}
    if buckets is not None:
        step = multiple * max(1, round(resolution / (_STEPS * multiple)))
        for width in range(step, 2 * resolution, step):
            height = resolution * resolution // width // step * step
            if height and resolution < max(height, width) <= _LONGEST * min(height, width):
                shapes.add((height, width))
    return sorted(shapes)


def nearest_shape(shapes: Sequence[Shape], width: int, height: int) -> Shape:
    """The shape whose ratio of sides is nearest to that of an image, so that least is cut away."""
    return min(shapes, key=lambda shape: abs(math.log(shape[0] / shape[1]) - math.log(height / width)))
