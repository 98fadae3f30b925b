# SPDX-License-Identifier: Apache-2.0
"""Meta-LoRA as an ordinary LoRA: exact, with no SVD, because Mid @ Down is a rank-r factor and Up the other.

`to_lora` is the road to every tool that reads LoRA files. `register_lora_conversion` makes PEFT's own `convert_to_lora`
and `save_as_lora` take it for Meta-LoRA layers; PEFT would else take an SVD of the full product."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import conversion
from torch import Tensor, nn

from ..errors import AdapterStateError, ConfigError
from .layer import MetaLoraLayer
from .on_model import layers_of, require_slot
from .ranks import exceptions, whole_paths


@torch.no_grad()
def lora_factors(layer: MetaLoraLayer, adapter_name: str, slot: int = 0) -> tuple[Tensor, Tensor]:
    """Return A = Mid @ Down, (r, *row of Down), and B = scaling * Up, (d_out, r) or (d_out, r, 1, ...), for a layer.

    Both are computed in float32 at least, contiguous, and returned in the dtype of Up.
    """
    up = layer.metalora_up[adapter_name].detach()[slot]
    folded = layer.folded_factor(adapter_name, slot)
    b = up.to(folded.dtype) * layer.scaling[adapter_name]
    b = b.view(*b.shape, *[1] * (folded.dim() - 2))
    return folded.to(up.dtype).contiguous(), b.to(up.dtype).contiguous()


def to_lora(model: nn.Module, adapter_name: str = "default", slot: int = 0) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Return one subject as an ordinary LoRA: A = Mid @ Down, B = Up with the scale folded in, alpha = r.

    No approximation: the product is the same to the rounding of one matrix product.

    Args:
        model: anything that holds Meta-LoRA layers. slot: which subject of the adapter.

    Returns:
        A LoraConfig that names each module by its whole path, and `{module}.lora_A.weight` (r, d_in) and
        `.lora_B.weight` (d_out, r), with the paths of the bare base model; PEFT's files prefix them with
        `base_model.model.`.

    Raises:
        AdapterNotFoundError: no such adapter.
        AdapterStateError: no such slot, or a weight-decomposed (DoRA) adapter, which is no sum.
    """
    layers = layers_of(model, adapter_name)
    require_slot(layers[0][1], adapter_name, slot)
    state: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for path, layer in layers:
        if not layer.supports_lora_conversion(adapter_name):
            raise AdapterStateError(f"{path!r} of {adapter_name!r} uses DoRA, which no plain LoRA expresses. Merge it.")
        state[f"{path}.lora_A.weight"], state[f"{path}.lora_B.weight"] = lora_factors(layer, adapter_name, slot)
        ranks[path] = layer.r[adapter_name]
    return lora_config(ranks), state


def lora_config(ranks: Mapping[str, int], **settings: Any) -> LoraConfig:
    """The configuration of an ordinary LoRA on these modules and no others, its alpha the rank of each.

    Args:
        ranks: by module path. settings: further fields of `LoraConfig`.
    """
    r = statistics.mode(ranks.values())
    others = exceptions(ranks, r)
    return LoraConfig(
        r=r,
        lora_alpha=r,
        target_modules=whole_paths(ranks),
        rank_pattern=others,
        alpha_pattern=dict(others),
        **settings,
    )


def register_lora_conversion() -> None:
    """Let PEFT's convert_to_lora and save_as_lora use the exact factors of Meta-LoRA layers; repeated calls do nothing.

    PEFT has no hook for this: it asks every layer for its full delta weight and takes an SVD.
    """
    if getattr(conversion._convert_module_to_lora, "exact_for_meta_lora", False):
        return
    approximate = conversion._convert_module_to_lora

    def convert(module: Any, rank: float, adapter_name: str = "default") -> tuple[Tensor, Tensor, int]:
        if not isinstance(module, MetaLoraLayer) or adapter_name not in module.metalora_mid:
            return approximate(module, rank=rank, adapter_name=adapter_name)
        a, b = lora_factors(module, adapter_name, module.merge_slot() or 0)
        limit = min(a[0].numel(), b.shape[0])
        if isinstance(rank, int) and rank > limit:
            raise ConfigError(
                f"The chosen rank {rank} is larger than the weight shape ({limit}), please choose a lower rank: "
                f"{min(a.shape[0], limit)} is exact."
            )
        return _with_rank(a, b, rank)

    convert.exact_for_meta_lora = True  # type: ignore[attr-defined]
    conversion._convert_module_to_lora = convert


def _with_rank(a: Tensor, b: Tensor, rank: float) -> tuple[Tensor, Tensor, int]:
    """A LoRA of the rank asked for: the factors as they are, filled up with zeros, or the best of a lower rank.

    Args:
        a: (r, ...). b: (d_out, r, ...). rank: a whole number, or the share of squared singular values to keep.
    """
    exact = a.shape[0]
    if rank == exact or (isinstance(rank, float) and rank == 1.0):
        return a, b, exact
    if isinstance(rank, int) and rank > exact:
        more = rank - exact
        a = torch.cat([a, a.new_zeros(more, *a.shape[1:])])
        return a, torch.cat([b, b.new_zeros(b.shape[0], more, *b.shape[2:])], dim=1), rank
    left, values, right = svd_of_product(b.flatten(1), a.flatten(1))
    if isinstance(rank, float):
        share = values.square().cumsum(0) / values.square().sum().clamp(min=1e-30)
        rank = int((share < rank).sum()) + 1
    new_b = (left[:, :rank] * values[:rank]).view(b.shape[0], rank, *b.shape[2:])
    return right[:rank].reshape(rank, *a.shape[1:]).to(a.dtype).contiguous(), new_b.to(b.dtype).contiguous(), rank


def svd_of_product(b: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """SVD of b (n, r) @ a (r, m) through its r x r core: left (n, r), values (r,), right (r, m), in float64."""
    q_b, r_b = torch.linalg.qr(b.double())
    q_a, r_a = torch.linalg.qr(a.double().T)
    left, values, right = torch.linalg.svd(r_b @ r_a.T)
    return q_b @ left, values, right @ q_a.T
