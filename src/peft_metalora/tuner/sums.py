# SPDX-License-Identifier: Apache-2.0
"""The weighted sum of adapters at one layer, in numbers."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from peft.utils import merge_utils
from torch import Tensor

from .convert import svd_of_product
from .layer import MetaLoraLayer

ELEMENTWISE = ("ties", "dare_ties", "dare_linear", "magnitude_prune")
"""Sums that drop numbers of the factors, or of the whole difference (`..._svd`), by size, by chance or by sign."""

COMBINATIONS = ("cat", "linear", "svd", *ELEMENTWISE, *(f"{kind}_svd" for kind in ELEMENTWISE))
Part = tuple[str, float, int]  # adapter, weight, slot


@dataclasses.dataclass(frozen=True)
class Combination:
    """How to sum: the arguments of `add_weighted_subject` of these names, `kind` is its combination_type."""

    kind: str
    svd_rank: int | None
    density: float | None
    majority_sign_method: str

    @property
    def elementwise(self) -> bool:
        """Whether it drops numbers."""
        return self.kind.removesuffix("_svd") in ELEMENTWISE

    @property
    def by_factor(self) -> bool:
        """Whether it takes factors apart, which must then have one rank."""
        return self.kind == "linear" or self.kind in ELEMENTWISE

    def rank(self, ranks: list[int], *limits: int) -> int:
        """Of what an SVD keeps."""
        return min(self.svd_rank or max(ranks), *limits)


@dataclasses.dataclass(frozen=True)
class LayerSum:
    """The sum at one layer, with scaling 1: Mid (r, meta_r) and Up (d_out, r) on `down` (meta_r, ...)."""

    layer: MetaLoraLayer
    mid: Tensor
    up: Tensor
    down: Tensor


@torch.no_grad()
def sum_at(layer: MetaLoraLayer, parts: list[Part], how: Combination) -> LayerSum:
    """The weighted sum of adapters that a layer has."""
    return _elementwise(layer, parts, how) if how.elementwise else _stacking(layer, parts, how)


def _stacking(layer: MetaLoraLayer, parts: list[Part], how: Combination) -> LayerSum:
    downs = _downs(layer, parts)
    ends = dict(zip(downs, itertools.accumulate(down.shape[0] for down in downs.values()), strict=True))
    down = _stacked(list(downs.values()))
    own_mids, own_ups = _factors(layer, parts)
    mids, ups = [], [up.double() for up in own_ups]
    for (name, _, _), mid in zip(parts, own_mids, strict=True):
        end = ends[layer.down_key[name]]
        mids.append(F.pad(mid.double(), (end - mid.shape[1], down.shape[0] - end)))
    scales = [weight * layer.scaling[name] for name, weight, _ in parts]
    if how.kind == "linear":
        roots = [math.copysign(math.sqrt(abs(scale)), scale) for scale in scales]
        mid = torch.stack([abs(root) * mid for root, mid in zip(roots, mids, strict=True)]).sum(0)
        up = torch.stack([root * up for root, up in zip(roots, ups, strict=True)]).sum(0)
    else:
        mid = torch.cat(mids)
        up = torch.cat([scale * up for scale, up in zip(scales, ups, strict=True)], dim=1)
    if how.kind == "svd":
        rank = how.rank([m.shape[0] for m in mids], mid.shape[0], up.shape[0])
        left = svd_of_product(up, mid @ down.double().flatten(1))[0][:, :rank]
        mid, up = left.T @ up @ mid, left
    return LayerSum(layer, mid.to(_widest(own_mids)), up.to(_widest(own_ups)), down)


def _elementwise(layer: MetaLoraLayer, parts: list[Part], how: Combination) -> LayerSum:
    mids, ups = _factors(layer, parts)
    rows = [layer.folded_factor(name, slot).flatten(1) for name, _, slot in parts]
    scaled_ups = [layer.scaling[name] * up.to(rows[0]) for (name, _, _), up in zip(parts, ups, strict=True)]
    weights = [weight for _, weight, _ in parts]
    if how.kind.endswith("_svd"):
        delta = _merged([up @ row for up, row in zip(scaled_ups, rows, strict=True)], weights, how)
        left, values, right = torch.linalg.svd(delta, full_matrices=False)
        rank = how.rank([row.shape[0] for row in rows], len(values))
        row, up = right[:rank], left[:, :rank] * values[:rank]
    else:
        roots = [math.sqrt(abs(weight)) for weight in weights]
        row = _merged(rows, [math.copysign(root, weight) for root, weight in zip(roots, weights, strict=True)], how)
        up = _merged(scaled_ups, roots, how)
    mid = torch.eye(len(row), device=row.device)
    down = row.view(-1, *layer.down_row).to(_widest(list(_downs(layer, parts).values())))
    return LayerSum(layer, mid.to(_widest(mids)), up.to(_widest(ups)), down)


def _merged(tensors: list[Tensor], weights: list[float], how: Combination) -> Tensor:
    kind = how.kind.removesuffix("_svd")
    merge: Callable[..., Tensor] = getattr(merge_utils, kind)
    options: dict[str, Any] = {"majority_sign_method": how.majority_sign_method} if "ties" in kind else {}
    return merge(tensors, tensors[0].new_tensor(weights), how.density, **options)


def _downs(layer: MetaLoraLayer, parts: list[Part]) -> dict[str, Tensor]:
    """Each Down once, by its key."""
    return {layer.down_key[name]: layer.metalora_down[layer.down_key[name]].detach() for name, _, _ in parts}


def _factors(layer: MetaLoraLayer, parts: list[Part]) -> tuple[list[Tensor], list[Tensor]]:
    """Mid (r, meta_r) and Up (d_out, r) of each part."""
    mids = [layer.metalora_mid[name].detach()[slot] for name, _, slot in parts]
    return mids, [layer.metalora_up[name].detach()[slot] for name, _, slot in parts]


def _stacked(downs: list[Tensor]) -> Tensor:
    """Downs one upon another, (sum of meta_r, ...); one alone as it is, without a copy."""
    return downs[0] if len(downs) == 1 else torch.cat([down.to(_widest(downs)) for down in downs])


def _widest(tensors: list[Tensor]) -> torch.dtype:
    return functools.reduce(torch.promote_types, {tensor.dtype for tensor in tensors})
