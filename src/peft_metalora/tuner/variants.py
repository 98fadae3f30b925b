# SPDX-License-Identifier: Apache-2.0
"""LoRA's later ideas inside Meta-LoRA's three factors: starts of Down, learning rates by factor, weight decomposition.

- Starts of Down: orthogonal rows (Saxe et al., arXiv 1312.6120), the base weight's leading directions (after PiSSA,
  arXiv 2404.02948, but the base stays as it is), the leading directions of real inputs (after EVA, arXiv 2410.07170).
- `lora_plus_groups`: a higher learning rate for Up (LoRA+, arXiv 2402.12354).
- `decomposed_norms`: row norms of W + scaling * Up Mid Down for DoRA (arXiv 2402.09353) without forming the sum."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import AdapterNotFoundError, AdapterStateError
from .down import MID, UP
from .subjects import meta_lora_layers

# Rows as long, on average, as those of the uniform start: U(-1/sqrt(n), 1/sqrt(n)) has n entries of variance 1/(3n).
ROW_LENGTH = 1 / math.sqrt(3)


@torch.no_grad()
def start_down(down: Tensor, how: str, weight: Callable[[], Tensor]) -> None:
    """Fill a Down (meta_r, ...) in place: 'uniform', 'orthogonal' rows, or 'pissa', the weight's own directions.

    Args:
        weight: gives the base weight as (d_out, ...), read only where it is needed.
    """
    if down.is_meta:
        return
    if how == "uniform":
        nn.init.kaiming_uniform_(down, a=math.sqrt(5))
    elif how == "orthogonal":
        nn.init.orthogonal_(down.view(down.shape[0], -1), gain=ROW_LENGTH)
    else:
        matrix = weight().float().flatten(1)
        rank = min(down.shape[0], *matrix.shape)
        _, _, right = torch.svd_lowrank(matrix, q=min(rank + 8, *matrix.shape), niter=4)
        _set_rows(down, right.T[:rank])


def _set_rows(down: Tensor, directions: Tensor) -> None:
    """Write orthonormal rows (k, n) into a Down; where there are fewer than its rank, the rest stays uniform."""
    nn.init.kaiming_uniform_(down, a=math.sqrt(5))
    down.view(down.shape[0], -1)[: directions.shape[0]] = ROW_LENGTH * directions.to(down)


@torch.no_grad()
def init_down_from_data(
    model: nn.Module, run: Callable[[], object], adapter_name: str = "default", max_tokens: int = 4096
) -> None:
    """Let each Down of a stage 'meta' adapter start at the leading directions of the inputs its layer sees.

    Args:
        run: calls the model on representative data, any number of times; hooks look on.
        max_tokens: of each call at most so many tokens of a layer's input are used, spread evenly.

    Raises:
        AdapterNotFoundError, AdapterStateError: no such adapter, or one that does not own its Down; a convolution.
    """
    layers = [(path, layer) for path, layer in meta_lora_layers(model) if adapter_name in layer.metalora_mid]
    if not layers:
        raise AdapterNotFoundError(f"The model has no Meta-LoRA adapter {adapter_name!r}.")
    for path, layer in layers:
        if layer.stage[adapter_name] != "meta":
            raise AdapterStateError(f"{adapter_name!r} is a subject; only a stage 'meta' adapter has a Down to start.")
        if len(layer.down_row) > 1:
            raise AdapterStateError(f"{path!r} is a convolution; a start from data is for linear layers.")
    sketches: dict[str, Tensor] = {}

    def look(path: str, rank: int) -> Callable[[nn.Module, Any], None]:
        def hook(_: nn.Module, arguments: Any) -> None:
            tokens = arguments[0].detach().reshape(-1, arguments[0].shape[-1]).float()
            tokens = tokens[:: max(1, math.ceil(tokens.shape[0] / max_tokens))]
            seen = torch.cat([sketches[path], tokens]) if path in sketches else tokens
            _, values, right = torch.linalg.svd(seen, full_matrices=False)
            sketches[path] = values[:rank, None] * right[:rank]

        return hook

    handles = [
        layer.register_forward_pre_hook(look(path, layer.metalora_down[adapter_name].shape[0]))
        for path, layer in layers
    ]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    unseen = [path for path, _ in layers if path not in sketches]
    if unseen:
        raise AdapterStateError(f"{unseen[0]!r} saw no input while run() was called ({len(unseen)} such layers).")
    for path, layer in layers:
        directions = torch.nn.functional.normalize(sketches[path], dim=-1)
        _set_rows(layer.metalora_down[adapter_name].data, directions[sketches[path].norm(dim=-1) > 0])


def lora_plus_groups(
    model: nn.Module, lr: float, ratio: float = 16.0, adapter_name: str = "default", weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Return optimiser groups of what trains in an adapter: Down and Mid at `lr`, Up at `lr * ratio` (LoRA+).

    Args:
        ratio: LoRA+ recommends about 16 for LoRA.

    Raises:
        AdapterNotFoundError: nothing of such an adapter trains.
    """
    slow: list[Tensor] = []
    fast: list[Tensor] = []
    for _, layer in meta_lora_layers(model):
        if adapter_name not in layer.metalora_mid:
            continue
        slow += [layer.get_parameter(f"{MID}.{adapter_name}")]
        slow += [layer.metalora_down[adapter_name]] if adapter_name in layer.metalora_down else []
        slow += [layer.metalora_magnitude[adapter_name]] if adapter_name in layer.metalora_magnitude else []
        fast += [layer.get_parameter(f"{UP}.{adapter_name}")]
    slow, fast = [p for p in slow if p.requires_grad], [p for p in fast if p.requires_grad]
    if not slow and not fast:
        raise AdapterNotFoundError(f"Nothing of an adapter {adapter_name!r} trains. Add it, or make it active.")
    return [
        {"params": slow, "lr": lr, "weight_decay": weight_decay},
        {"params": fast, "lr": lr * ratio, "weight_decay": weight_decay},
    ]


@torch.no_grad()
def decomposed_norms(weight: Tensor, folded: Tensor, up: Tensor, scaling: float) -> Tensor:
    """Row norms of weight + scaling * up @ folded for every slot, (slots, d_out), in float32.

    Args:
        weight: (d_out, d_in). folded: Mid @ Down, (slots, r, d_in). up: (slots, d_out, r).
    """
    weight, folded, up = weight.float(), folded.float(), up.float() * scaling
    cross = (up * (weight @ folded.mT)).sum(-1)
    own = (up * (up @ (folded @ folded.mT))).sum(-1)
    return (weight.square().sum(-1) + 2 * cross + own).clamp(min=1e-12).sqrt()
