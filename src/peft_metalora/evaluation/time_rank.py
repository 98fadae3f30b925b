# SPDX-License-Identifier: Apache-2.0
"""The mask of T-LoRA (arXiv 2507.05964): the noisier the image, the fewer components of an adapter take part.

On a LoRA it lies between its two factors, on Meta-LoRA between Mid and Up. The layers are told of the noise level by a
hook on the denoiser.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from ..tuner.on_model import meta_lora_layers


class TimeRank:
    """Put on a denoiser whose `timestep` is the noise level t in [0, 1]; `take_off` takes it off again.

    Of r components the first floor((1 - t) * (r - least)) + least take part.

    Args:
        denoiser: holds an adapter.
        least: how many take part in pure noise.
    """

    def __init__(self, denoiser: nn.Module, least: int) -> None:
        self.least = least
        self._time = torch.empty(0)
        self._handle = denoiser.register_forward_pre_hook(self, with_kwargs=True)
        _on[denoiser] = self
        for module in denoiser.modules():
            if isinstance(module, LoraLayer):
                for factor in module.lora_A.values():
                    factor.register_forward_hook(lambda _, inputs, projected: self._masked(projected))
        for _, layer in meta_lora_layers(denoiser):
            self._mask_mid(layer)

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self._time = kwargs["timestep"]

    @staticmethod
    def take_off(denoiser: nn.Module) -> None:
        """Before the adapter goes, and its layers with it."""
        mask = _on.pop(denoiser, None)
        if mask is not None:
            mask._handle.remove()

    def _mask_mid(self, layer: Any) -> None:
        project = layer._project

        def masked(*args: Any) -> tuple[Tensor, float]:
            projected, scaling = project(*args)
            return self._masked(projected), scaling

        layer._project = masked
        layer._fusible = lambda x: None  # the fused road does not stop between Mid and Up

    def _masked(self, projected: Tensor) -> Tensor:
        """Of (..., r), which holds a block of tokens for each sample."""
        r = projected.shape[-1]
        count = torch.floor((1 - self._time) * (r - self.least)) + self.least
        mask = torch.arange(r, device=projected.device) < count[:, None]
        return (projected.reshape(len(count), -1, r) * mask[:, None]).reshape(projected.shape)


_on: WeakKeyDictionary[nn.Module, TimeRank] = WeakKeyDictionary()
