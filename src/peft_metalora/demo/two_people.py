# SPDX-License-Identifier: Apache-2.0
"""Two people side by side before one wall, 128 x 64 px: drawn, described, and cut in halves again.

Each half is a picture of its own person as `render.py` draws one, so that the domain's judges read it. Walls are plain
or striped: those two patterns go on from one half into the other.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from . import scene
from .embedded import MAX_SEQUENCE_LENGTH, RESOLUTION
from .render import render
from .scene import Scene

LEFT, RIGHT = (0, 0, RESOLUTION, RESOLUTION), (RESOLUTION, 0, 2 * RESOLUTION, RESOLUTION)
"""The halves of the picture as boxes (x0, y0, x1, y1) in pixels."""

_WALL = ("background", "background_tone", "pattern", "pattern_angle", "pattern_size")
_LIGHT = ("light", "light_x", "light_y", "strength")
_WORDS = MAX_SEQUENCE_LENGTH - 2  # the tokenizer adds a start and an end


def sample_pairs(n: int, generator: torch.Generator | None = None) -> tuple[Scene, Scene]:
    """Draw n scenes of the left and of the right person, with one wall and light, on the generator's device."""
    device = generator.device if generator is not None else "cpu"
    left, right = (scene.sample_scenes(n, generator, device) for _ in range(2))
    left = replace(left, pattern=left.pattern % 2)
    right = replace(right, **{name: getattr(left, name) for name in (*_WALL, *_LIGHT)})
    # Stripes of the right half count from its own middle, two half frames further: see render.py's `_background`.
    period = 0.42 + 0.22 * left.pattern_size
    return left, replace(right, pattern_phase=(left.pattern_phase - left.pattern_angle.sin() / period) % 1)


def render_pairs(people: tuple[Tensor, Tensor], scenes: tuple[Scene, Scene]) -> Tensor:
    """Identities (n, factors) and scenes, left and right -> (n, 3, 64, 128) in [0, 1]."""
    return torch.cat([render(own, seen, RESOLUTION) for own, seen in zip(people, scenes, strict=True)], dim=-1)


def captions(scenes: tuple[Scene, Scene], generator: torch.Generator | None = None) -> list[str]:
    """Describe n pairs in the words of one person's captions, e.g. "a photo of a person, facing left, a person, sad, in
    a red shirt, on a plain blue wall".

    The left person's clauses come first, wall and light last. A caption names as many clauses as it draws, and
    no more than the encoders read.
    """
    texts = []
    for left, right in zip(scene.captions(scenes[0]), scene.captions(scenes[1]), strict=True):
        subject, *own = left.split(", ")
        other = right.split(", ")[1:]
        clauses = [*own[:3], *other[:3], *own[3:]]
        order = torch.randperm(len(clauses), generator=generator).tolist()
        wanted = int(torch.randint(len(clauses) + 1, (), generator=generator))
        kept: set[int] = set()
        room = _WORDS - len(subject.split()) - 2
        for number in order[:wanted]:
            words = len(clauses[number].split())
            if words <= room:
                room -= words
                kept.add(number)
        named = [[clauses[i] for i in part if i in kept] for part in (range(3), range(3, 6), range(6, 8))]
        texts.append(", ".join([subject, *named[0], "a person", *named[1], *named[2]]))
    return texts


def halves(images: Tensor) -> tuple[Tensor, Tensor]:
    """(n, 3, 64, 128) -> the left and the right picture, (n, 3, 64, 64) each."""
    left, right = images.chunk(2, dim=-1)
    return left, right
