# SPDX-License-Identifier: Apache-2.0
"""The gradient of each of many subjects by the slots of one adapter: `stacked.RowGradients` for bases of any size.

The base runs once over all samples, with ordinary autograd, so that gradient checkpointing and autocast work; what
belongs to which subject is the slots' business. Any method can be stacked, slots are Meta-LoRA's alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...bases import Base
from ...bases.precision import autocast
from ...errors import AdapterNotFoundError
from ...tuner.down import MID, UP
from ...tuner.on_model import meta_lora_layers
from .loop import LossScale
from .replay import text_in


class SlotGradients:
    """The training loss of each subject of an adapter with slots, and its gradient with respect to that subject alone.

    Args:
        base: its denoiser holds a subject adapter in training, one slot a subject.
        adapter_name: of that adapter.
        mixed_precision: as the settings of both stages have it.

    Attributes:
        values: (S, N) float32, the subjects of the next call, to be written in place.
        scale: of the loss, in float16; whoever steps by the gradients says how it went.
        names: of the factors, in the order in which `values` holds their numbers; as a subject's file has them.

    Raises:
        AdapterNotFoundError: there is no such adapter.
    """

    def __init__(self, base: Base, adapter_name: str = "default", mixed_precision: str = "no") -> None:
        self.base, self._precision = base, mixed_precision
        self.scale = LossScale.of(mixed_precision)
        layers = [layer for _, layer in meta_lora_layers(base.denoiser) if adapter_name in layer.metalora_mid]
        if not layers:
            raise AdapterNotFoundError(f"expected a Meta-LoRA adapter {adapter_name!r} on the denoiser, found none")
        ends = f".{MID}.{adapter_name}", f".{UP}.{adapter_name}"
        factors = {name: one for name, one in base.denoiser.named_parameters() if name.endswith(ends)}
        self.names = [name.removesuffix(f".{adapter_name}") for name in factors]
        self._factors = list(factors.values())
        self._index = layers[0].subject_index
        self.values = torch.cat([factor.detach().float().flatten(1) for factor in self._factors], dim=1)

    def __call__(self, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """One pass over a batch that holds a block of samples for each subject; see `RowGradients`.

        Returns:
            Losses (S,), each the mean over a block, and gradients (S, N), as `values`.
        """
        count, device = len(self.values), self.values.device
        with torch.no_grad():
            for factor, part in zip(self._factors, self._split(self.values), strict=True):
                factor.copy_(part.view_as(factor))
        each = len(inputs["latents"]) // count
        # One index serves all layers of a model.
        self._index.write(tuple(row for row in range(count) for _ in range(each)), device, each=True)
        text = text_in(inputs)
        with autocast(self._precision, device, adapter_casts=True):
            losses = self.base.loss(inputs["latents"], text, inputs["noise"], inputs["times"], inputs.get("mask"))
        rows = losses.unflatten(0, (count, each)).mean(1)
        for factor in self._factors:
            factor.grad = None
        # No row depends on another's numbers, so that the gradient of the sum is each one's own. Not by autograd.grad:
        # streamed blocks are checkpointed in the reentrant way, which knows nothing of it.
        (rows.sum() if self.scale is None else rows.sum() * self.scale.value).backward()
        # Of layers that nothing comes after, such as those of the text in a last block, there is none.
        gradients = [torch.zeros_like(one) if one.grad is None else one.grad for one in self._factors]
        joined = torch.cat([one.flatten(1) for one in gradients], dim=1).float()
        return rows.detach(), joined if self.scale is None else joined / self.scale.value

    @torch.no_grad()
    def show(self, subject: Tensor) -> None:
        """Have the denoiser by itself show a subject (N,), until the next call."""
        for factor, part in zip(self._factors, self._split(subject[None]), strict=True):
            factor[0].copy_(part.view_as(factor[0]))
        self._index.write(None, subject.device)

    def _split(self, subjects: Tensor) -> tuple[Tensor, ...]:
        return subjects.split([factor[0].numel() for factor in self._factors], dim=1)
