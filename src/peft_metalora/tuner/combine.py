# SPDX-License-Identifier: Apache-2.0
"""A new adapter out of others: their weighted sum, exact by standing Mids and Ups side by side, or at a lower rank.

On one Down, sum_i w_i Up_i Mid_i Down is one product [w_1 Up_1 ...] [Mid_1; ...] Down. On several it is one with the
Downs [Down_a; Down_b ...] stacked, where each Mid_i has zeros in the columns of the Downs that are not its own."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import ModulesToSaveWrapper, merge_utils
from torch import Tensor, nn

from ..errors import AdapterNotFoundError, AdapterStateError
from .config import MetaLoraConfig
from .convert import svd_of_product
from .folding import without_autocast
from .layer import MetaLoraLayer
from .on_model import meta_lora_layers
from .ranks import Ranks, exceptions, whole_paths


def add_weighted_subject(
    model: nn.Module,
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: str = "cat",
    svd_rank: int | None = None,
    slots: Sequence[int] | None = None,
    *,
    density: float | None = None,
    majority_sign_method: str = "total",
) -> None:
    """Add the weighted sum of adapters as a new adapter of one slot; it is not made active.

    Adapters of one Down give a subject on that Down. Adapters of several give an adapter of stage 'meta' with a Down of
    its own, the several stacked (meta_r adds up), which is saved with it and outlives them; the Mid that subjects on
    this Down start from is the sum's. A layer that only some of the adapters have gets the sum of those. What
    `facts` says about an adapter does not hold for a sum and is left out. A module that one of them trained whole comes
    along as it is; trained rows of an embedding do not.

    Args:
        adapters: which adapters to combine. weights: one factor each, any sign.
        combination_type: 'cat' is exact, its rank is the sum of the ranks; 'svd' is the best approximation of rank
            `svd_rank` (by default the largest rank among the adapters); 'linear' sums Mids and Ups alone, as PEFT's
            LoRA does: cheap, the same rank, not the sum of the functions. 'ties' (arXiv 2306.01708), 'dare_linear',
            'dare_ties' (arXiv 2311.03099) and 'magnitude_prune' drop numbers of the factors, with `_svd` of the whole
            difference, as PEFT's LoRA does with A = Mid @ Down and B = Up; their sum has a Down of its own, that A.
        slots: which slot of each adapter, the first by default.
        density: the share of numbers that 'ties' and its kin keep, in (0, 1].
        majority_sign_method: how 'ties' and 'dare_ties' elect signs, 'total' or 'frequency'.

    Raises:
        AdapterNotFoundError: an adapter that is not there.
        AdapterStateError: another count of weights, a name that is taken, an unknown combination, no density where one
            is needed, ranks that differ where factors are summed, DoRA, a module that more than one of them trained
            whole (modules_to_save).
    """
    if isinstance(model, BaseTuner):  # as its method `add_weighted_adapter`
        model = model.model
    slots = list(slots) if slots is not None else [0] * len(adapters)
    layers = list(meta_lora_layers(model))
    how = Combination(combination_type, svd_rank, density, majority_sign_method)
    _check(layers, adapters, weights, slots, adapter_name, how)
    whole = _trained_whole(model, adapters)
    sums: dict[str, LayerSum] = {}
    for path, layer in layers:
        parts = [part for part in zip(adapters, weights, slots, strict=True) if part[0] in layer.metalora_mid]
        if parts:
            sums[path] = sum_at(layer, parts, how)
    downs = {layer.down_key[name] for _, layer in layers for name in adapters if name in layer.down_key}
    own_down = len(downs) > 1 or how.elementwise
    down_key = adapter_name if own_down else downs.pop()
    peft_config: dict[str, Any] = model.peft_config  # type: ignore[assignment]
    config = _config(peft_config, adapters, sums, own_down)
    for one in sums.values():
        r, meta_r = one.mid.shape
        one.layer.update_layer(adapter_name, config, Ranks(r, meta_r, r), down_key)
        one.layer.metalora_mid[adapter_name].data = one.mid.unsqueeze(0)
        one.layer.metalora_up[adapter_name].data = one.up.unsqueeze(0)
        if own_down:
            one.layer.metalora_mid_init[adapter_name] = one.mid.clone()
            one.layer.metalora_down[adapter_name].data = one.down.clone()
    for wrapper, owner in whole:
        wrapper.update(adapter_name)
        wrapper.modules_to_save[adapter_name].load_state_dict(wrapper.modules_to_save[owner].state_dict())
        wrapper.modules_to_save[adapter_name].requires_grad_(False)
    peft_config[adapter_name] = config


def _config(
    configs: Mapping[str, MetaLoraConfig], adapters: Sequence[str], sums: Mapping[str, LayerSum], own_down: bool
) -> MetaLoraConfig:
    """What describes the sum, so that it loads from a file."""
    first = configs[adapters[0]]
    rank_of = {path: one.mid.shape[0] for path, one in sums.items()}
    meta_rank_of = {path: one.mid.shape[1] for path, one in sums.items()}
    r, meta_r = max(rank_of.values()), max(meta_rank_of.values())
    changes: dict[str, Any] = {"stage": "subject", "start": "fresh"}
    if own_down:
        changes = {"stage": "meta", "start": "stored", "down_init": "uniform"}
        changes |= {"down": None, "down_revision": None, "down_fingerprint": None}
    elif first.stage == "meta":
        changes["down"] = adapters[0]
    return dataclasses.replace(
        first,
        **changes,
        num_slots=1,
        r=r,
        meta_r=meta_r,
        lora_alpha=r,
        use_rslora=False,
        init_weights=True,
        rank_pattern=exceptions(rank_of, r),
        meta_rank_pattern=exceptions(meta_rank_of, meta_r),
        alpha_pattern=exceptions(rank_of, r),
        target_modules=whole_paths(sums),
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        facts=None,
        modules_to_save=sorted({name for one in adapters for name in configs[one].modules_to_save or ()}) or None,
        trainable_token_indices=None,
    )


def _trained_whole(model: nn.Module, adapters: Sequence[str]) -> list[tuple[ModulesToSaveWrapper, str]]:
    """The modules that one of the adapters trained whole, with its name."""
    found, several = [], []
    for path, module in model.named_modules():
        if not isinstance(module, ModulesToSaveWrapper):
            continue
        owners = [name for name in dict.fromkeys(adapters) if name in module.modules_to_save]
        if len(owners) > 1:
            several.append(f"{path!r} of {', '.join(map(repr, owners))}")
        found += [(module, owner) for owner in owners]
    if several:
        raise AdapterStateError(
            "Cannot add weighted adapters if they target the same module with modules_to_save, but found "
            f"{len(several)} such instance(s). Whole modules do not add up: {'; '.join(several)}. Combine adapters of "
            "which one has it at most."
        )
    return found


def _check(
    layers: list[tuple[str, MetaLoraLayer]],
    adapters: Sequence[str],
    weights: Sequence[float],
    slots: Sequence[int],
    adapter_name: str,
    how: Combination,
) -> None:
    known = {name for _, layer in layers for name in layer.metalora_mid}
    for name in adapters:
        if name not in known:
            raise AdapterNotFoundError(f"Adapter {name} does not exist. The model has: {', '.join(sorted(known))}.")
    if not adapters or len(weights) != len(adapters) or len(slots) != len(adapters):
        raise AdapterStateError(
            f"Give one weight (and slot) for each adapter: got {len(adapters)} adapters, {len(weights)} weights, "
            f"{len(slots)} slots."
        )
    if adapter_name in known or "." in adapter_name:
        raise AdapterStateError(f"The name {adapter_name!r} is taken or holds a dot. Choose another.")
    if how.kind not in COMBINATIONS:
        raise AdapterStateError(f"combination_type must be one of {COMBINATIONS}, got {how.kind!r}.")
    if how.svd_rank is not None and how.svd_rank < 1:
        raise AdapterStateError(f"svd_rank must be at least 1, got {how.svd_rank}.")
    if how.elementwise and (how.density is None or not 0 < how.density <= 1):
        raise AdapterStateError(
            f"{how.kind!r} needs a density above 0, at most 1, got {how.density}. Give density=0.5."
        )
    if how.majority_sign_method not in ("total", "frequency"):
        raise AdapterStateError(
            f"majority_sign_method must be 'total' or 'frequency', got {how.majority_sign_method!r}."
        )
    for path, layer in layers:
        present = [(name, slot) for name, slot in zip(adapters, slots, strict=True) if name in layer.metalora_mid]
        if how.by_factor and len({layer.r[name] for name, _ in present}) > 1:
            raise AdapterStateError(f"{how.kind!r} needs equal ranks, they differ at {path!r}. Use 'cat' or 'svd'.")
        for name, slot in present:
            if not layer.supports_lora_conversion(name):
                raise AdapterStateError(f"{name!r} uses DoRA at {path!r}, which does not add up. Merge it instead.")
            if not 0 <= slot < layer.metalora_mid[name].shape[0]:
                raise AdapterStateError(f"Adapter {name!r} has no slot {slot}.")


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
    with without_autocast(layer.metalora_up[parts[0][0]].device):
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
