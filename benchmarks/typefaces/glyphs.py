# SPDX-License-Identifier: Apache-2.0
"""The packed fonts: their glyphs as signed distances on a device, and whom each split has.

Needs numpy and torch alone: what reads font files is `pack.py`.
"""

from __future__ import annotations

import json
import lzma
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

CHARACTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
BOX, BASELINE, CAP_HEIGHT = 64, 43, 28
"""A glyph's square in pixels, where letters stand in it, and how high capitals are."""
FORMAT = 1
REACH = 6.0
"""Distances farther from the edge than these pixels are cut off."""
_CHUNK = 8  # fonts whose distances are computed together


@dataclass
class Glyphs:
    """Fonts in memory.

    Attributes:
        distance: (fonts, 62, box, box) int8: signed distance to the edge, negative inside, 127 for `REACH` pixels.
        has: (fonts, 62) which glyphs are there.
        stroke: (fonts,) half of the thickness of strokes, in pixels.
        names, families: of each font. splits: the fonts of each, by number.
    """

    distance: Tensor
    has: Tensor
    stroke: Tensor
    names: list[str]
    families: list[int]
    splits: dict[str, list[int]]

    @classmethod
    def load(cls, path: Path, device: torch.device | str = "cpu", most: int | None = None) -> Glyphs:
        """Read a file that `pack.write_glyphs` wrote.

        Args:
            most: fonts of each split; None: all.
        """
        with np.load(path) as data:
            listed, has = json.loads(str(data["fonts"])), torch.from_numpy(data["has"])
            packed = np.frombuffer(lzma.decompress(data["glyphs"].tobytes()), np.uint8)
        packed = packed.reshape(len(listed), len(CHARACTERS), BOX, BOX // 2)
        splits: dict[str, list[int]] = {}
        for number, font in enumerate(listed):
            own = splits.setdefault(font["split"], [])
            if most is None or len(own) < most:
                own.append(number)
        kept = sorted(number for own in splits.values() for number in own)
        place = {number: at for at, number in enumerate(kept)}
        levels = torch.from_numpy(packed[kept]).to(device)
        coverage = torch.stack([levels >> 4, levels & 15], dim=-1).flatten(-2)
        distance = torch.cat([signed_distance(part.float() / 15) for part in coverage.split(_CHUNK)])
        # Of a glyph, how deep its ink is at the deepest; of a font, the median over its capitals.
        stroke = -(distance[:, :26].flatten(2).amin(2).float().median(1).values) * REACH / 127
        return cls(
            distance,
            has[kept].to(device),
            stroke,
            [listed[number]["name"] for number in kept],
            [listed[number]["family"] for number in kept],
            {name: [place[number] for number in own] for name, own in splits.items()},
        )


def signed_distance(coverage: Tensor) -> Tensor:
    """Coverage (..., h, w) in [0, 1] to signed distances to the edge as int8, negative inside; 127 stands for `REACH`.

    The edge runs through pixels that are covered in part, as far from their middle as the coverage says.
    """
    inside = coverage > 0.5
    partly = (coverage > 0.03) & (coverage < 0.97)
    padded = torch.nn.functional.pad(coverage, (1, 1, 1, 1))
    # Where ink ends between two pixels, neither is covered in part.
    across = torch.zeros_like(inside)
    for dy, dx in ((0, 1), (2, 1), (1, 0), (1, 2)):
        beside = padded[..., dy : dy + coverage.shape[-2], dx : dx + coverage.shape[-1]]
        across |= ((beside > 0.5) != inside) & ((beside <= 0.03) | (beside >= 0.97))
    edge = partly | across
    # A pixel outside is nearer to the edge than to a neighbour on it by as much as that is covered beyond its half.
    offset = torch.where(edge, 0.5 - coverage, torch.inf)
    reach = int(REACH)
    padded = torch.nn.functional.pad(offset, (reach,) * 4, value=torch.inf)
    nearest = torch.minimum(offset.abs(), torch.full_like(coverage, REACH))
    h, w = coverage.shape[-2:]
    for dy in range(-reach, reach + 1):
        for dx in range(-reach, reach + 1):
            length = (dx * dx + dy * dy) ** 0.5
            if 0 < length <= REACH:
                there = padded[..., reach + dy : reach + dy + h, reach + dx : reach + dx + w]
                towards = torch.where(inside & there.isfinite(), -there, there)
                nearest = torch.minimum(nearest, length + towards)
    nearest = nearest.clamp(0, REACH) * 127 / REACH
    return torch.where(inside, -nearest, nearest).round().to(torch.int8)
