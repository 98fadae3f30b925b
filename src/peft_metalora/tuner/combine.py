# SPDX-License-Identifier: Apache-2.0
"""A new subject out of others: their weighted sum, exact by standing Mids and Ups side by side, or at a lower rank.

Works between subjects of one Down: sum_i w_i Up_i Mid_i Down is one product [w_1 Up_1 ...] [Mid_1; ...] Down."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from ..errors import AdapterNotFoundError, AdapterStateError
from .convert import svd_of_product
from .layer import MetaLoraLayer
from .subjects import meta_lora_layers

COMBINATIONS = ("cat", "linear", "svd")


def add_weighted_subject(
    model: nn.Module,
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: str = "cat",
    svd_rank: int | None = None,
    slots: Sequence[int] | None = None,
) -> None:
    """Add the weighted sum of subjects as a new adapter of one slot on the same Down; it is not made active.

    A module that one of them trained whole comes along as it is; trained rows of an embedding do not.

    Args:
        adapters: which adapters to combine; all use one Down. weights: one factor each, any sign.
        combination_type: 'cat' is exact, its rank is the sum of the ranks; 'svd' is the best approximation of rank
            `svd_rank` (by default the largest rank among the adapters); 'linear' sums Mids and Ups alone, as PEFT's
            LoRA does: cheap, the same rank, not the sum of the functions.
        slots: which slot of each adapter, the first by default.

    Raises:
        AdapterNotFoundError: an adapter that is not there.
        AdapterStateError: different Downs, another count of weights, a name that is taken, an unknown combination, a
            module that more than one of them trained whole (modules_to_save).
    """
    slots = list(slots) if slots is not None else [0] * len(adapters)
    layers = list(meta_lora_layers(model))
    _check(layers, adapters, weights, slots, adapter_name, combination_type, svd_rank)
    whole = _trained_whole(model, adapters)
    plans: list[tuple[str, MetaLoraLayer, Tensor, Tensor]] = []
    for path, layer in layers:
        parts = [part for part in zip(adapters, weights, slots, strict=True) if part[0] in layer.metalora_mid]
        if parts:
            plans.append((path, layer, *_combined(layer, parts, combination_type, svd_rank)))
    peft_config: dict[str, Any] = model.peft_config  # type: ignore[assignment]
    ranks = {path: mid.shape[0] for path, _, mid, _ in plans}
    first = peft_config[adapters[0]]
    config = dataclasses.replace(
        first,
        stage="subject",
        num_slots=1,
        r=max(ranks.values()),
        lora_alpha=max(ranks.values()),
        use_rslora=False,
        rank_pattern={path: rank for path, rank in ranks.items() if rank != max(ranks.values())},
        alpha_pattern={path: rank for path, rank in ranks.items() if rank != max(ranks.values())},
        target_modules=sorted(ranks),
        start="fresh",
        modules_to_save=sorted({name for one in adapters for name in peft_config[one].modules_to_save or ()}) or None,
        trainable_token_indices=None,
    )
    if first.stage == "meta":
        config.down = adapters[0]
    for _, layer, mid, up in plans:
        used = next(name for name in adapters if name in layer.metalora_mid)
        r, meta_r = mid.shape
        layer.update_layer(adapter_name, config, r, meta_r, r, layer.down_key[used])
        for container, value in ((layer.metalora_mid, mid), (layer.metalora_up, up)):
            container[adapter_name].data = value.unsqueeze(0).to(container[used].detach())
        layer.sync_down()
    for wrapper, owner in whole:
        wrapper.update(adapter_name)
        wrapper.modules_to_save[adapter_name].load_state_dict(wrapper.modules_to_save[owner].state_dict())
        wrapper.modules_to_save[adapter_name].requires_grad_(False)
    peft_config[adapter_name] = config


def _trained_whole(model: nn.Module, adapters: Sequence[str]) -> list[tuple[ModulesToSaveWrapper, str]]:
    """The modules that one of the adapters trained whole, with its name."""
    found = []
    for path, module in model.named_modules():
        if not isinstance(module, ModulesToSaveWrapper):
            continue
        owners = [name for name in dict.fromkeys(adapters) if name in module.modules_to_save]
        if len(owners) > 1:
            raise AdapterStateError(
                f"{', '.join(map(repr, owners))} each trained a {path!r} of their own (modules_to_save), and whole "
                "modules do not add up. Combine adapters of which one has it at most."
            )
        found += [(module, owner) for owner in owners]
    return found


def _check(
    layers: list[tuple[str, MetaLoraLayer]],
    adapters: Sequence[str],
    weights: Sequence[float],
    slots: Sequence[int],
    adapter_name: str,
    combination_type: str,
    svd_rank: int | None,
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
    if combination_type not in COMBINATIONS:
        raise AdapterStateError(f"combination_type must be one of {COMBINATIONS}, got {combination_type!r}.")
    if svd_rank is not None and svd_rank < 1:
        raise AdapterStateError(f"svd_rank must be at least 1, got {svd_rank}.")
    for path, layer in layers:
        present = [(name, slot) for name, slot in zip(adapters, slots, strict=True) if name in layer.metalora_mid]
        keys = {layer.down_key[name] for name, _ in present}
        if len(keys) > 1:
            raise AdapterStateError(
                f"At {path!r} the adapters use {len(keys)} different Downs, so no Mid and Up express their sum. "
                "Convert each with to_lora and combine the LoRAs."
            )
        if combination_type == "linear" and len({layer.r[name] for name, _ in present}) > 1:
            raise AdapterStateError(f"'linear' needs equal ranks, they differ at {path!r}. Use 'cat' or 'svd'.")
        for name, slot in present:
            if not layer.supports_lora_conversion(name):
                raise AdapterStateError(f"{name!r} uses DoRA at {path!r}, which does not add up. Merge it instead.")
            if not 0 <= slot < layer.metalora_mid[name].shape[0]:
                raise AdapterStateError(f"Adapter {name!r} has no slot {slot}.")


@torch.no_grad()
def _combined(
    layer: MetaLoraLayer, parts: list[tuple[str, float, int]], combination_type: str, svd_rank: int | None
) -> tuple[Tensor, Tensor]:
    """Mid (r, meta_r) and Up (d_out, r), with scaling 1, of the weighted sum at one layer."""
    mids = [layer.metalora_mid[name].detach()[slot].double() for name, _, slot in parts]
    ups = [layer.metalora_up[name].detach()[slot].double() for name, _, slot in parts]
    scales = [weight * layer.scaling[name] for name, weight, _ in parts]
    if combination_type == "linear":
        roots = [math.copysign(math.sqrt(abs(scale)), scale) for scale in scales]
        mid = torch.stack([abs(root) * mid for root, mid in zip(roots, mids, strict=True)]).sum(0)
        return mid, torch.stack([root * up for root, up in zip(roots, ups, strict=True)]).sum(0)
    mid = torch.cat(mids)
    up = torch.cat([scale * u for scale, u in zip(scales, ups, strict=True)], dim=1)
    if combination_type == "cat":
        return mid, up
    rank = min(svd_rank or max(m.shape[0] for m in mids), mid.shape[0], up.shape[0])
    down = layer.metalora_down[layer.down_key[parts[0][0]]].detach().double().flatten(1)
    left = svd_of_product(up, mid @ down)[0][:, :rank]
    return left.T @ up @ mid, left
