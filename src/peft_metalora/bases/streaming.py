# SPDX-License-Identifier: Apache-2.0
"""A frozen denoiser whose blocks wait in host memory and come to the device, one ahead of the computation, in training.

diffusers' group offloading lets go of a block's weights when its forward pass ends, and its backward pass then finds
none. Here a block comes when it is called, which gradient checkpointing does once more in the backward pass, and stays
until its place is needed: each kind of block has two places on the device, and the one that was left longest is taken.
Checkpointing has to be of the reentrant kind, whose second pass is a whole one: with the other kind, bitsandbytes'
layers take the weights that they saw in the first.

Streamed are the weights of linear layers and convolutions inside the blocks, quantised or not; all else (norms, biases,
scales of quantised weights, adapters) stays on the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

_LAYERS = nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d
_CHUNK = 2**28  # bytes; torch rounds what it pins up to a power of two


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The blocks that a diffusers model repeats, in the order in which it holds them."""
    named: Sequence[str] = getattr(model, "_repeated_blocks", None) or getattr(model, "_no_split_modules", None) or ()
    return [module for module in model.modules() if {cls.__name__ for cls in type(module).__mro__} & set(named)]


class BlockStream:
    """Streams a model's blocks; it is on the device when this is made, all but their weights.

    Args:
        model: frozen, without adapters, on the host (bitsandbytes' layers may be on the device).
        device: where it computes.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.model, self.device = model, device
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._host = HostMemory(pinned=device.type == "cuda")
        self._blocks: list[_Block] = []
        self._streamed: set[int] = set()
        places: dict[Any, list[_Place]] = {}
        for number, module in enumerate(blocks_of(model)):
            kept = [self._host.keep(weight.value) for weight in _weights_of(module)]
            module.to(device)
            weights = list(_weights_of(module))
            self._streamed |= {id(weight.parameter) for weight in weights}
            like = [weight.value for weight in weights]
            kind = tuple((tensor.shape, tensor.dtype) for tensor in like)
            if kind not in places:
                places[kind] = [_Place([torch.empty_like(tensor) for tensor in like]) for _ in range(2)]
            self._blocks.append(_Block(module, weights, kept, places[kind]))
            self._blocks[-1].park()
            module.register_forward_pre_hook(lambda _, __, number=number: self._come(number))
        self._last: int | None = None
        self.settle()

    def settle(self) -> None:
        """Bring what has been put on the model since, such as an adapter, to the device."""
        for module in self.model.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                if id(parameter) in self._streamed or parameter.device == self.device:
                    continue
                if type(parameter) is nn.Parameter:
                    parameter.data = parameter.data.to(self.device)
                else:  # what a quantiser made has its numbers elsewhere
                    moved = parameter.to(self.device)
                    own = moved if isinstance(moved, nn.Parameter) else nn.Parameter(moved, requires_grad=False)
                    setattr(module, name, own)
            for name, buffer in list(module.named_buffers(recurse=False)):
                setattr(module, name, buffer.to(self.device))

    def checkpointed(self, module: nn.Module, *args: Any) -> Any:
        """Run a module now and once more in the backward pass, for `enable_gradient_checkpointing`."""
        return checkpoint(module.__call__, *_with_gradients(args), use_reentrant=True)

    def _come(self, number: int) -> None:
        """Have a block's weights on the device before it runs, and start to bring those of the next one."""
        block, before = self._blocks[number], self._last
        ready = torch.cuda.current_stream(self.device).record_event() if self._copies is not None else None
        if block.place is None:
            self._bring(block, ready)
        if self._copies is not None and block.arrived is not None:
            torch.cuda.current_stream(self.device).wait_event(block.arrived)
            block.arrived = None
        block.touch()
        if number != before:
            self._last = number
            ahead = self._blocks[self._after(number, before)]
            if self._copies is not None and ahead.place is None and ahead.spare() is not block.place:
                self._bring(ahead, ready)

    def _after(self, number: int, before: int | None) -> int:
        """Which block is likely to be called next: the forward pass goes up, the backward pass down."""
        step = -1 if before is not None and number < before and before - number < len(self._blocks) - 1 else 1
        following = number + step
        if following == len(self._blocks):  # a backward pass, or the next forward pass
            return max(number - 1, 0) if self._blocks[number].module.training else 0
        return max(following, 0)

    def _bring(self, block: _Block, ready: Any) -> None:
        """Copy a block's weights into the place of its kind that was left longest.

        Args:
            ready: an event on the computing stream after all that still reads what lies there.
        """
        place = block.spare()
        if self._copies is None:
            block.take(place)
            return
        with torch.cuda.stream(self._copies):
            self._copies.wait_event(ready)
            block.take(place)
            block.arrived = self._copies.record_event()


@dataclass(eq=False)
class _Weight:
    """Where a layer keeps the numbers of its weight: in the parameter's data, or in a part of what torchao made."""

    parameter: Any
    attribute: str

    @property
    def value(self) -> Tensor:
        found: Tensor = getattr(self.parameter, self.attribute)
        return found

    def show(self, tensor: Tensor) -> None:
        setattr(self.parameter, self.attribute, tensor)


@dataclass(eq=False)
class _Place:
    """Room on the device for the weights of one block."""

    tensors: list[Tensor]
    owner: _Block | None = None
    used: int = 0


@dataclass(eq=False)
class _Block:
    module: nn.Module
    weights: list[_Weight]
    host: list[Tensor]
    places: list[_Place]
    place: _Place | None = None
    arrived: Any = None

    def spare(self) -> _Place:
        """The place of this kind that was left longest."""
        return min(self.places, key=lambda place: place.used)

    def touch(self) -> None:
        """Be the one that was here last."""
        assert self.place is not None
        self.place.used = 1 + max(place.used for place in self.places)

    def park(self) -> None:
        """Show the weights where they wait."""
        self.place = None
        for weight, tensor in zip(self.weights, self.host, strict=True):
            weight.show(tensor)

    def take(self, place: _Place) -> None:
        """Copy the weights to a place and show them there; who had it waits again."""
        if place.owner is not None:
            place.owner.park()
        for weight, source, target in zip(self.weights, self.host, place.tensors, strict=True):
            target.copy_(source, non_blocking=True)
            weight.show(target)
        place.owner, self.place = self, place
        self.touch()


class HostMemory:
    """Host memory for weights, page-locked on request so that copies go on beside the computation."""

    def __init__(self, *, pinned: bool) -> None:
        self._pinned = pinned
        self._chunk = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def keep(self, tensor: Tensor) -> Tensor:
        """A copy of a tensor in this memory; or itself, if it lies in such memory already."""
        if not self._pinned:
            return tensor.detach().clone()
        if tensor.is_pinned():
            return tensor.detach()
        size, start = tensor.nbytes, -(-self._used // 64) * 64
        if start + size > self._chunk.nbytes:
            self._chunk, start = torch.empty(max(_CHUNK, size), dtype=torch.uint8, pin_memory=True), 0
        self._used = start + size
        kept = self._chunk[start : start + size].view(tensor.dtype).view(tensor.shape)
        kept.copy_(tensor)
        return kept


def _weights_of(block: nn.Module) -> Iterator[_Weight]:
    for module in block.modules():
        parameter: Any = module.weight if isinstance(module, _LAYERS) else None
        if parameter is not None and not parameter.requires_grad:
            inner = list(getattr(type(parameter), "tensor_data_names", ()))
            largest = max(inner, key=lambda name: getattr(parameter, name).nbytes) if inner else "data"
            yield _Weight(parameter, largest)


def _with_gradients(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Arguments of which one has a gradient: without, the reentrant checkpoint would give its parameters none."""
    if any(isinstance(one, Tensor) and one.requires_grad for one in args):
        return args
    first = next(place for place, one in enumerate(args) if isinstance(one, Tensor) and one.is_floating_point())
    return *args[:first], args[first].detach().requires_grad_(), *args[first + 1 :]
