# SPDX-License-Identifier: Apache-2.0
"""Where a new Down starts: uniform, orthogonal rows (Saxe et al., arXiv 1312.6120), or the base weight's leading
directions (after PiSSA, arXiv 2404.02948, but the base stays as it is)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..errors import NonFiniteError
from .folding import without_autocast

# Rows as long, on average, as those of the uniform start: U(-1/sqrt(n), 1/sqrt(n)) has n entries of variance 1/(3n).
ROW_LENGTH = 1 / math.sqrt(3)


@torch.no_grad()
def start_down(down: Tensor, how: str, weight: Callable[[], Tensor]) -> None:
    """Fill a Down (meta_r, ...) in place: 'uniform', 'orthogonal' rows, or 'pissa', the weight's own directions.

    Args:
        weight: gives the base weight as (d_out, ...), read only where it is needed.

    Raises:
        NonFiniteError: a base weight without directions.
    """
    if down.is_meta:
        return
    if how == "uniform":
        nn.init.kaiming_uniform_(down, a=math.sqrt(5))
    elif how == "orthogonal":
        nn.init.orthogonal_(down.view(down.shape[0], -1), gain=ROW_LENGTH)
    else:
        matrix = weight().float().flatten(1)
        if not matrix.isfinite().all():
            raise NonFiniteError(
                "expected a finite base weight for the start 'pissa', found NaN or infinity. Load the base anew, or in "
                "a dtype that holds its weights."
            )
        rank = min(down.shape[0], *matrix.shape)
        with without_autocast(matrix.device):
            _, _, right = torch.svd_lowrank(matrix, q=min(rank + 8, *matrix.shape), niter=4)
        set_rows(down, right.T[:rank])


def set_rows(down: Tensor, directions: Tensor) -> None:
    """Write orthonormal rows (k, n) into a Down; where there are fewer than its rank, the rest stays uniform."""
    nn.init.kaiming_uniform_(down, a=math.sqrt(5))
    down.view(down.shape[0], -1)[: directions.shape[0]] = ROW_LENGTH * directions.to(down)
