# SPDX-License-Identifier: Apache-2.0
"""A new adapter out of others: their weighted sum, exact by standing Mids and Ups side by side, or at a lower rank.

On one Down, sum_i w_i Up_i Mid_i Down is one product [w_1 Up_1 ...] [Mid_1; ...] Down. On several it is one with the
Downs [Down_a; Down_b ...] stacked, where each Mid_i has zeros in the columns of the Downs that are not its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from peft.utils import ModulesToSaveWrapper
from torch import nn

from ..errors import AdapterNotFoundError, AdapterStateError
from .config import MetaLoraConfig, exceptions, whole_paths
from .layer import MetaLoraLayer
from .subjects import meta_lora_layers
from .sums import COMBINATIONS, Combination, LayerSum, sum_at


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
        one.layer.update_layer(adapter_name, config, r, meta_r, r, down_key)
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
