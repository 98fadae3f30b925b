# SPDX-License-Identifier: Apache-2.0
"""r, meta_r, alpha and scale of a module: from a configuration's patterns, and back into them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from peft.utils.other import get_pattern_key

from .config import MetaLoraConfig


class Ranks(NamedTuple):
    """What one module gets: r (r2), meta_r (r1) and lora_alpha, which counts per sqrt(r) with rsLoRA."""

    r: int
    meta_r: int
    lora_alpha: float
    use_rslora: bool = False

    @property
    def scaling(self) -> float:
        """What the adapter's output is multiplied by."""
        return scale_of(self.lora_alpha, self.r, self.use_rslora)


def scale_of(lora_alpha: float, r: int, use_rslora: bool) -> float:
    """lora_alpha / r, or lora_alpha / sqrt(r) (rsLoRA, arXiv 2312.03732)."""
    return lora_alpha / (math.sqrt(r) if use_rslora else r)


def ranks_of(config: MetaLoraConfig, module: str) -> Ranks:
    """Ranks and alpha of a module, by its path, the patterns considered."""
    r = from_pattern(config.rank_pattern, module, config.r)
    meta_r = from_pattern(config.meta_rank_pattern, module, config.meta_r)
    alpha = from_pattern(config.alpha_pattern, module, config.lora_alpha)
    return Ranks(int(r), int(meta_r), alpha, config.use_rslora)


def from_pattern(pattern: Mapping[str, float] | None, module: str, default: float) -> float:
    """The value of the first pattern that a module's path matches, as PEFT matches them."""
    return pattern.get(get_pattern_key(list(pattern), module), default) if pattern else default


def whole_paths(modules: Iterable[str]) -> str:
    """Target modules that are these and no others; in a list, "proj_out" would match every path that ends in it."""
    return "|".join(re.escape(module) for module in sorted(modules))


def exceptions(values: Mapping[str, Any], default: float) -> dict[str, Any]:
    """A pattern of ranks or alphas: the modules whose value is not the default, each by its whole path alone."""
    return {f"^{re.escape(module)}$": value for module, value in values.items() if value != default}
