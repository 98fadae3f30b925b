# SPDX-License-Identifier: Apache-2.0
"""r, meta_r, alpha and scale of a module: from a configuration's patterns, and back into them."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

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
    """The value of the first pattern that a module's path matches, as PEFT's `get_pattern_key` matches them."""
    if not pattern:
        return default
    whole, ends, others = _sorted_keys(tuple(pattern))
    parts = module.split(".")
    found = [whole.get(module), *(ends.get(".".join(parts[start:])) for start in range(len(parts)))]
    first = min((number for number in found if number is not None), default=len(pattern))
    first = next((number for number, key in others if number < first and key.match(module)), first)
    return list(pattern.values())[first] if first < len(pattern) else default


@functools.lru_cache(maxsize=64)
def _sorted_keys(keys: tuple[str, ...]) -> tuple[dict[str, int], dict[str, int], list[tuple[int, re.Pattern[str]]]]:
    """Keys by how they match, with their places: whole paths, ends of paths, and real expressions.

    Of the first two kinds there are as many as modules, and compiling each for each module would take minutes.
    """
    whole: dict[str, int] = {}
    ends: dict[str, int] = {}
    others: list[tuple[int, re.Pattern[str]]] = []
    for number, key in enumerate(keys):
        plain = re.sub(r"\\(.)", r"\1", key.removeprefix("^").removesuffix("$"))
        if key == f"^{re.escape(plain)}$":
            whole.setdefault(plain, number)
        elif re.fullmatch(r"\w+", key):
            ends.setdefault(key, number)
        else:
            others.append((number, re.compile(rf"(.*\.)?({key})$")))
    return whole, ends, others


def whole_paths(modules: Iterable[str]) -> str:
    """Target modules that are these and no others; in a list, "proj_out" would match every path that ends in it."""
    return "|".join(re.escape(module) for module in sorted(modules))


def exceptions(values: Mapping[str, Any], default: float) -> dict[str, Any]:
    """A pattern of ranks or alphas: the modules whose value is not the default, each by its whole path alone."""
    return {f"^{re.escape(module)}$": value for module, value in values.items() if value != default}
