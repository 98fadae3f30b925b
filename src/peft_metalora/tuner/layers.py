# SPDX-License-Identifier: Apache-2.0
"""Which base layers can be adapted, and with which of our layers."""

from __future__ import annotations

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..errors import UnsupportedModuleError
from .config import MetaLoraConfig
from .layer import MetaLoraLayer, factor_sizes
from .linear import Linear
from .subjects import SubjectIndex


def _base_of(module: nn.Module) -> nn.Module:
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def check_supported(key: str, module: nn.Module) -> None:
    """Raise UnsupportedModuleError, with what to do, if the module cannot be adapted."""
    base = _base_of(module)
    if not isinstance(base, nn.Linear):
        raise UnsupportedModuleError(
            f"{key!r} is a {type(base).__name__}; Meta-LoRA adapts nn.Linear. Leave it out of target_modules."
        )


def sizes(module: nn.Module) -> tuple[int, int]:
    """(d_in, d_out) of a module that can be adapted, wrapped or not."""
    return factor_sizes(_base_of(module))


def down_shape(module: nn.Module, meta_r: int) -> tuple[int, ...]:
    """Shape of the Down that fits a module."""
    return (meta_r, sizes(module)[0])


def create_layer(model: nn.Module, target: nn.Module, index: SubjectIndex, config: MetaLoraConfig) -> MetaLoraLayer:
    """Wrap a base layer."""
    return Linear(target, index, config.fan_in_fan_out)
