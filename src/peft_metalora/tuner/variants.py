# SPDX-License-Identifier: Apache-2.0
"""LoRA's later ideas that look at a whole model: a start of Down from data, learning rates by factor.

- `init_down_from_data`: the leading directions of real inputs (after EVA, arXiv 2410.07170).
- `lora_plus_groups`: a higher learning rate for Up (LoRA+, arXiv 2402.12354)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import AdapterNotFoundError, AdapterStateError
from .down import MID, UP
from .on_model import layers_of, meta_lora_layers
from .starts import set_rows


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
    layers = layers_of(model, adapter_name)
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
        set_rows(layer.metalora_down[adapter_name].data, directions[sketches[path].norm(dim=-1) > 0])


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
