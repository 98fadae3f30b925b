# SPDX-License-Identifier: Apache-2.0
"""Meta-LoRA on convolutions: Down carries the base's kernel, stride, padding and dilation; Mid and Up are 1 x 1."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .layer import MetaLoraLayer, cast
from .subject_index import Chosen, Positions, gather


class Conv(MetaLoraLayer):
    """Meta-LoRA on nn.Conv1d, Conv2d and Conv3d with groups=1: x (batch, d_in, *size) -> (batch, d_out, *size)."""

    def _batch(self, x: Tensor) -> int:
        return x.shape[0] if x.dim() == len(self.down_row) + 1 else 1

    def _add(self, result: Tensor, base: Tensor, x: Tensor, name: str, chosen: Chosen | None) -> Tensor:
        layer: Any = self.get_base_layer()
        dtype, scaling = result.dtype, self.scaling[name]
        x = cast(self._dropped(x, name), dtype)
        batch = self._batch(x)
        up = gather(cast(self.metalora_up[name], dtype), chosen).expand(batch, -1, -1)
        if chosen is None and not torch.is_grad_enabled() and self.is_folded(name):
            factor = self.metalora_folded[name][: self.r[name]]
            z = layer._conv_forward(x, cast(factor, dtype), None).reshape(batch, self.r[name], -1)
            scaling /= self.fold_scale[name]
        else:
            h = layer._conv_forward(x, cast(self._down(self.down_key[name]), dtype), None)
            mid = gather(cast(self.metalora_mid[name], dtype), chosen).expand(batch, -1, -1)
            z = torch.bmm(mid, h.reshape(batch, h.shape[-len(self.down_row)], -1))
        flat = result.reshape(batch, self.d_out, -1)
        return torch.baddbmm(flat, up, z, alpha=scaling).view(result.shape)

    def _tokens(self, x: Tensor, base: Tensor) -> tuple[int, ...]:
        return tuple(base.shape[-len(self.down_row) + 1 :])

    def _add_at(self, result: Tensor, base: Tensor, x: Tensor, name: str, places: Positions) -> Tensor:
        layer: Any = self.get_base_layer()
        batch, dtype, scaling = self._batch(x), result.dtype, self.scaling[name]
        h = layer._conv_forward(cast(self._dropped(x, name), dtype), cast(self._down(self.down_key[name]), dtype), None)
        h, total = h.reshape(batch, self.meta_r[name], -1), result.reshape(batch, self.d_out, -1)
        for slot, where in places:
            mid, up = (cast(factors[name][slot], dtype) for factors in (self.metalora_mid, self.metalora_up))
            total = total.index_add(2, where, up @ (mid @ h.index_select(2, where)), alpha=scaling)
        return total.view(result.shape)

    def __repr__(self) -> str:
        return "metalora." + super().__repr__()
