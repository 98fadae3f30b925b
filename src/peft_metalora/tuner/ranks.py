# SPDX-License-Identifier: Apache-2.0
"""r, meta_r, alpha and scale of a module, from a configuration's patterns and back into them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from peft.utils.other import get_pattern_key

from .config import MetaLoraConfig


def module_rank(config: MetaLoraConfig, module: str) -> int:
    """r2 of a module, its pattern considered."""
    return int(_from_pattern(config.rank_pattern, module, config.r))


def module_meta_rank(config: MetaLoraConfig, module: str) -> int:
    """r1 of a module, its pattern considered."""
    return int(_from_pattern(config.meta_rank_pattern, module, config.meta_r))


def module_scaling(config: MetaLoraConfig, module: str) -> float:
    """lora_alpha / r, or lora_alpha / sqrt(r), of a module."""
    rank = module_rank(config, module)
    return module_alpha(config, module) / (math.sqrt(rank) if config.use_rslora else rank)


def module_alpha(config: MetaLoraConfig, module: str) -> float:
    """lora_alpha of a module, its pattern considered."""
    return _from_pattern(config.alpha_pattern, module, config.lora_alpha)


def _from_pattern(pattern: Mapping[str, float] | None, module: str, default: float) -> float:
    return pattern[key] if pattern and (key := get_pattern_key(list(pattern), module)) in pattern else default


def whole_paths(modules: Iterable[str]) -> str:
    """Target modules that are these and no others; in a list, "proj_out" would match every path that ends in it."""
    return "|".join(re.escape(module) for module in sorted(modules))


def exceptions(values: Mapping[str, Any], default: float) -> dict[str, Any]:
    """A pattern of ranks or alphas: the modules whose value is not the default, each by its whole path alone."""
    return {f"^{re.escape(module)}$": value for module, value in values.items() if value != default}


def _ranks(config: MetaLoraConfig, key: str) -> tuple[int, int, float]:
    r = config.rank_pattern.get(get_pattern_key(list(config.rank_pattern), key), config.r)
    meta_r = config.meta_rank_pattern.get(get_pattern_key(list(config.meta_rank_pattern), key), config.meta_r)
    alpha = config.alpha_pattern.get(get_pattern_key(list(config.alpha_pattern), key), config.lora_alpha)
    return r, meta_r, alpha
