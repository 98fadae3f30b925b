# SPDX-License-Identifier: Apache-2.0
"""What a base takes, from the shapes of its hulls alone: bytes of weights as they are held, of activations, arithmetic.

Estimates, made to be right within a quarter: what autograd keeps is counted from the outputs of layers and scaled by
what was measured on FLUX.1-dev (`benchmarks/results/training.json`: 5.9 GiB a sample of 512 px). Against the runs in
`benchmarks/results/memory.json` the most is 9 % below on SDXL, and the text encoders of FLUX.1-dev are 3 to 20 % above.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from .base import Base
from .memory import Memory, outside_of_blocks
from .streaming import blocks_of

GIB = 2**30
CONTEXT = 0.75 * GIB
"""What CUDA itself keeps: 0.68 to 0.90 GiB on an H100 (`benchmarks/results/memory.json`)."""
_BYTES = {"int8": 1.0, "fp8": 1.0, "nf4": 0.53}  # of a quantised number, its share of the scales included
_KEPT = 1.4  # numbers that autograd keeps for one that a linear layer or a convolution gives
_TEXT_SIDE = ("add_", "txt", "context", "text")
_OF_TIME = ("norm", "mod", "adaLN", "time")


@dataclass(frozen=True)
class Pass:
    """A sample's way through the denoiser.

    Attributes:
        kept: bytes that autograd keeps. checkpointed: the same where blocks are computed again in the backward pass.
        alive: bytes that are there at once without gradients. operations: of the forward pass.
    """

    kept: float
    checkpointed: float
    alive: float
    operations: float


def held(model: nn.Module, memory: Memory, dtype: torch.dtype, *, quantized: bool) -> float:
    """Bytes of a model's weights; `quantized`: whether `memory.quantize` is for it."""
    return sum(_bytes_of(model, memory, dtype, quantized).values())


def streamed(model: nn.Module, memory: Memory, dtype: torch.dtype, *, quantized: bool) -> float:
    """Bytes of a denoiser on the device whose blocks are streamed: two of each kind, and what is around them."""
    each = _bytes_of(model, memory, dtype, quantized)
    blocks = [sum(each.get(id(one), 0.0) for one in block.parameters()) for block in blocks_of(model)]
    return sum(each.values()) - sum(blocks) + sum(2 * size for size in set(blocks))


def largest_layer(model: nn.Module, memory: Memory, dtype: torch.dtype, *, quantized: bool) -> float:
    """Bytes of the largest layer of a model that comes to the device layer by layer."""
    return max(_bytes_of(model, memory, dtype, quantized).values())


def _bytes_of(model: nn.Module, memory: Memory, dtype: torch.dtype, quantized: bool) -> dict[int, float]:
    # Quantisers leave alone what a model asks to be precise, as T5 does of a quarter of its numbers.
    precise = getattr(model, "_keep_in_fp32_modules", None) or ()
    outside = {*outside_of_blocks(model), *precise} if quantized else set()
    each: dict[int, float] = {}
    for path, module in model.named_modules():
        small = quantized and isinstance(module, nn.Linear) and outside.isdisjoint(path.split("."))
        for name, parameter in module.named_parameters(recurse=False):
            size = _BYTES.get(memory.quantize, dtype.itemsize) if small and name == "weight" else dtype.itemsize
            each.setdefault(id(parameter), parameter.numel() * size)
    return each


def one_pass(base: Base, resolution: int, frames: int = 1) -> Pass:
    """What a sample of `resolution` pixels takes on its way through the denoiser, in two bytes a number.

    Args:
        frames: of a clip, as the denoiser sees them (`Base.latent_frames`).
    """
    side = resolution // base.vae_scale_factor
    if isinstance(base.denoiser, UNet2DConditionModel):
        units = list(_of_unet(base.denoiser, side))
    else:
        units = list(_of_transformer(base, side, frames))
    inner = [2 * _KEPT * unit.numbers for unit in units]
    return Pass(
        kept=sum(inner),
        checkpointed=sum(2 * unit.boundary for unit in units) + max(inner),
        alive=2 * max(inner),
        operations=sum(unit.operations for unit in units),
    )


@dataclass
class _Unit:
    """A block: numbers that its layers give, numbers that it hands on, and operations."""

    numbers: float = 0.0
    boundary: float = 0.0
    operations: float = 0.0


def _of_transformer(base: Base, side: int, frames: int) -> Iterator[_Unit]:
    image, text = frames * (side * base.vae_scale_factor // base.token_side) ** 2, base.max_sequence_length
    names = {id(module): path for path, module in base.denoiser.named_modules()}
    for block in blocks_of(base.denoiser) or [base.denoiser]:
        layers = [(path, one) for path, one in block.named_modules() if isinstance(one, nn.Linear)]
        crossing = {path for path, one in block.named_modules() if getattr(one, "is_cross_attention", False)}
        two_streams = any(sign in path for path, _ in layers for sign in _TEXT_SIDE)
        together = image if crossing else image + text
        both = text if any(sign in names[id(block)] for sign in _TEXT_SIDE) else image if two_streams else together
        unit, width = _Unit(), 0
        for path, layer in layers:
            attention, _, name = path.rpartition(".")
            crosses = attention in crossing
            of_text = two_streams and any(sign in path for sign in _TEXT_SIDE)
            seen = text if of_text or (crosses and name in ("to_k", "to_v")) else both
            if any(sign in path for sign in _OF_TIME):
                seen = 1
            unit.numbers += seen * layer.out_features
            unit.operations += 2.0 * seen * layer.in_features * layer.out_features
            if name == "to_q":
                width = layer.in_features
                unit.operations += 4.0 * (image * text if crosses else together**2) * layer.out_features
        unit.boundary = together * (width or max(layer.in_features for _, layer in layers))
        yield unit


def _of_unet(unet: Any, side: int) -> Iterator[_Unit]:
    """By a forward pass on the meta device, which computes nothing."""
    found: list[_Unit] = []

    def see(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        fan_in = module.weight[0].numel()
        found[-1].numbers += output.numel()
        found[-1].operations += 2.0 * output.numel() * fan_in

    def begin(module: nn.Module, *_: Any) -> None:
        found.append(_Unit())

    def end(module: nn.Module, _: Any, output: Any) -> None:
        found[-1].boundary = (output if isinstance(output, Tensor) else output[0]).numel()

    config, found[:] = unet.config, [_Unit()]
    handles = []
    for module in unet.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            handles.append(module.register_forward_hook(see))
        if type(module).__name__ in ("ResnetBlock2D", "Transformer2DModel"):
            handles += [module.register_forward_pre_hook(begin), module.register_forward_hook(end)]
    more: dict[str, Any] = {}
    with torch.device("meta"):
        if config.addition_embed_type == "text_time":
            pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
            more = {"added_cond_kwargs": {"text_embeds": torch.empty(1, pooled), "time_ids": torch.empty(1, 6)}}
        width = config.cross_attention_dim
        width = max(width) if isinstance(width, (list, tuple)) else width
        latents, text = torch.empty(1, config.in_channels, side, side), torch.empty(1, 77, width)
        try:
            with torch.no_grad():
                unet(latents.to(unet.dtype), torch.zeros(1), encoder_hidden_states=text.to(unet.dtype), **more)
        finally:
            for handle in handles:
                handle.remove()
    yield from found


def of_autoencoder(vae: nn.Module, resolution: int, *, decoding: bool = False) -> float:
    """Bytes that an autoencoder has at once at the full size of an image, in two bytes a number."""
    config: Any = vae.config
    widths, side = config.get("block_out_channels"), resolution
    if widths is None:  # one for clips, and some of those cut frames into patches first
        widths = [(config.get("decoder_base_dim") if decoding else None) or config.get("base_dim", 128)]
        side //= config.get("patch_size") or 1
    # Going up, the full size is reached before the last narrowing.
    return 3.0 * 2 * max(widths[: 2 if decoding else 1]) * side**2


def numbers_of_subject(layers: Sequence[Any], rank: int, meta_rank: int) -> tuple[int, int]:
    """Numbers of one subject, and of the Down, on these layers."""
    subject = sum(rank * meta_rank + layer.weight.shape[0] * rank for layer in layers)
    return subject, sum(meta_rank * math.prod(layer.weight.shape[1:]) for layer in layers)
