# SPDX-License-Identifier: Apache-2.0
"""What the renderer draws with: signed distances (negative inside), soft coverage, layers and palettes.

Tensors of one value per image are (n, 1, 1), planes (n, h, w), colours (n, 3, 1, 1), images (n, 3, h, w).
"""

from __future__ import annotations

import torch
from torch import Tensor

Palette = tuple[tuple[float, ...], ...]


def row(table: Palette, index: Tensor) -> Tensor:
    """Pick colours by index, (n, 3, 1, 1)."""
    return torch.tensor(table, device=index.device)[index][:, :, None, None]


def blend(table: Palette, position: Tensor) -> Tensor:
    """Interpolate a palette at position (n, 1, 1) in [0, 1] with flat tops around its entries, (n, 3, 1, 1)."""
    entries = torch.arange(len(table), device=position.device)
    near = (1.5 - 2 * (position * (len(table) - 1) - entries).abs()).clamp(0, 1)  # (n, 1, entries)
    return (near @ position.new_tensor(table)).transpose(1, 2).unsqueeze(-1).float()


def ramp(value: Tensor, low: float, high: float) -> Tensor:
    """Smoothstep from 0 at `low` to 1 at `high`."""
    t = ((value - low) * (1 / (high - low))).clamp(0, 1)
    return t * t * (3 - 2 * t)


def cover(distance: Tensor, pixel: Tensor) -> Tensor:
    """Coverage of a pixel by a shape at a signed distance, soft over 1.5 pixels."""
    t = (0.5 - distance / (1.5 * pixel)).clamp(0, 1)
    return t * t * (3 - 2 * t)


def paint(image: Tensor, colour: Tensor, coverage: Tensor) -> Tensor:
    """Lay a colour over an image (n, 3, h, w), as far as coverage (n, h, w) in [0, 1] says."""
    return torch.lerp(image, colour, coverage.unsqueeze(1))


def ellipse(x: Tensor, y: Tensor, a: Tensor | float, b: Tensor | float) -> Tensor:
    """Distance to an ellipse of half axes a and b, exact to first order at its border."""
    x, y = x / a, y / b
    k0 = (x * x + y * y + 1e-8).sqrt()
    x, y = x / a, y / b
    return k0 * (k0 - 1) / (x * x + y * y + 1e-8).sqrt()


def segment(x: Tensor, y: Tensor, ax: Tensor, ay: Tensor, bx: Tensor, by: Tensor) -> Tensor:
    """Distance to the segment from (ax, ay) to (bx, by)."""
    dx, dy = bx - ax, by - ay
    x, y = x - ax, y - ay
    t = ((x * dx + y * dy) / (dx * dx + dy * dy)).clamp(0, 1)
    x, y = x - t * dx, y - t * dy
    return (x * x + y * y + 1e-8).sqrt()
