# SPDX-License-Identifier: Apache-2.0
"""LPIPS (https://arxiv.org/abs/1801.03924): how far apart two images look, by the authors' package `lpips`.

The package needs torchvision, which must fit the installed torch; the weights of its backbone are fetched by
torchvision. It is imported when a distance is made, never before.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import EmbedderUnavailableError


class Lpips:
    """A distance for `scores.diversity`.

    Args:
        net: backbone: "alex" (the authors' choice for comparing images), "vgg" or "squeeze".
        batch_size: pairs in one pass; it does not change the distances.

    Raises:
        EmbedderUnavailableError: the package or torchvision is not installed, or the weights are not there.
    """

    def __init__(self, net: str = "alex", *, device: str | torch.device = "cpu", batch_size: int = 32) -> None:
        try:
            import lpips

            model = lpips.LPIPS(net=net, verbose=False)
        except Exception as error:  # a torchvision that does not fit raises RuntimeError, a missing download URLError
            raise EmbedderUnavailableError(
                f"expected the package lpips, a torchvision that fits torch, and their weights for net {net!r}, found: "
                f"{error!r}. pip install 'peft-metalora[lpips]'"
            ) from error
        self.model, self.device, self.batch_size = model.eval().requires_grad_(False).to(device), device, batch_size

    @torch.no_grad()
    def __call__(self, first: Tensor, second: Tensor) -> Tensor:
        """Distances (n,) of two times n images (n, 3, h, w) in [-1, 1], on the CPU; 0 for equal ones."""
        pairs = zip(first.split(self.batch_size), second.split(self.batch_size), strict=True)
        return torch.cat([self.model(a.to(self.device), b.to(self.device)).flatten().float().cpu() for a, b in pairs])
