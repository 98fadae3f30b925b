# SPDX-License-Identifier: Apache-2.0
"""The source `latents`: a convolutional network on the base's own VAE latents; there is nothing to download."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ...errors import ConfigError
from .source import EncodeImages, to_pixels

_LAST = 4  # side of the last plane: where a feature sits in it matters, so that it is not pooled away
_GROUPS = 8
_BRIGHT, _DIM, _DARKEST = 0.95, 0.6, 0.05


class LatentSource:
    """Latents of the square in the middle of a photo.

    Args:
        detail: none.
        resolution: side of that square in pixels.
        encode_images: the base's VAE.

    Raises:
        ConfigError: a detail, no VAE, or latents smaller than 4 x 4.
    """

    def __init__(self, detail: str, *, resolution: int, encode_images: EncodeImages | None) -> None:
        if detail:
            raise ConfigError(f"encoder 'latents' takes nothing after it, found {detail!r}")
        if encode_images is None:
            raise ConfigError("encoder 'latents' needs the base's VAE, found none: give encode_images")
        self.name, self._resolution, self._encode = "latents", resolution, encode_images
        with torch.no_grad():
            shape = tuple(encode_images(torch.zeros(1, 3, resolution, resolution, device="cpu")).shape[1:])
        if min(shape[1:]) < _LAST:
            raise ConfigError(
                f"encoder 'latents' needs latents of at least {_LAST} x {_LAST}, found {shape[1]} x {shape[2]}: raise "
                "the resolution"
            )
        self.feature_shape: tuple[int, ...] = shape

    def features(self, photos: Sequence[Image.Image]) -> Tensor:
        """(n, c, h, w) float32; see `Source`."""
        with torch.no_grad():
            return self._encode(even_exposure(to_pixels(photos, self._resolution)) * 2 - 1).float()

    def trunk(self, width: int) -> nn.Module:
        """Residual blocks that halve the plane until it is 4 x 4; the number of channels doubles twice at the most."""
        channels, side = self.feature_shape[0], min(self.feature_shape[1:])
        layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, padding=1)]
        have = width
        while side > _LAST:
            wanted = min(2 * have, 4 * width)
            layers.append(_Block(have, wanted))
            have, side = wanted, (side + 1) // 2
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(_LAST), nn.GroupNorm(_GROUPS, have), nn.SiLU(), nn.Flatten())


def even_exposure(pixels: Tensor) -> Tensor:
    """Photos (n, 3, h, w) in [0, 1], dark ones made as bright as an ordinary one.

    Who is photographed in low light stays who they are, also for an encoder that was trained on bright photos alone:
    where the brightest hundredth of a photo's places is below `_DIM` in its brightest channel, it becomes `_BRIGHT`.
    Ordinary photos stay as they are: with all of them evened out, tune people of the embedded domain were read a
    hundredth worse (R-FaceSim 0.675 and 0.686 without, benchmarks/results/encoder_choices.json).
    """
    bright = pixels.amax(1).flatten(1).quantile(0.99, dim=1)
    factor = torch.where(bright < _DIM, _BRIGHT / bright.clamp(min=_DARKEST), torch.ones_like(bright))
    return (pixels * factor.view(-1, 1, 1, 1)).clamp(max=1)


class _Block(nn.Module):
    """Residual block with group norm: (n, c_in, h, w) -> (n, c_out, h / 2, w / 2)."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(_GROUPS, c_in), nn.GroupNorm(_GROUPS, c_out)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.skip = nn.Conv2d(c_in, c_out, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return self.skip(x) + self.conv2(F.silu(self.norm2(h)))
