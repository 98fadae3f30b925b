# SPDX-License-Identifier: Apache-2.0
"""Picks the layer of ours that fits a base layer."""

from __future__ import annotations

from torch import nn

from .bases import CONVOLUTIONS, base_of, quantization_backend
from .conv import Conv
from .layer import MetaLoraLayer
from .linear import Linear
from .subject_index import SubjectIndex


def create_layer(model: nn.Module, target: nn.Module, index: SubjectIndex) -> MetaLoraLayer:
    """Wrap a base layer that `check_supported` has accepted."""
    base = base_of(target)
    kind: type[MetaLoraLayer] = Conv if isinstance(base, CONVOLUTIONS) else Linear
    return kind(target, index, quantization_backend(model, base))
