# SPDX-License-Identifier: Apache-2.0
"""bitsandbytes' 4-bit weights in the layout of its CPU kernels, which PEFT's handler would misread.

On CPUs with bf16 products an eval forward repacks the weight in place for `gemv_4bit`: blocks of 32 rows are
interleaved and the scales become bf16. What dequantises in the usual layout then gives other numbers, and the kernel
has no backward.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft.utils.quantization_utils import Bnb4bitBackend
from torch import Tensor, nn


def is_packed(base: nn.Module) -> bool:
    """Whether a base layer's weight is in the CPU kernels' layout."""
    return getattr(getattr(base.weight, "quant_state", None), "packing_format_for_cpu", False)


@torch.no_grad()
def unpacked(weight: Any) -> tuple[Tensor, Any]:
    """A packed weight's data and quantisation state in the usual layout; the weight itself is not touched.

    The scales are those that the packed weight computes with, so that nothing is rounded anew.
    """
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse as inverse

    state = copy.copy(weight.quant_state)
    # bitsandbytes' inverse leaves simple scales transposed and quantises nested ones a second time.
    state.original_nested = False
    data, state = inverse(weight.data, state)
    state.absmax = weight.quant_state.absmax.T.reshape(-1).float()
    state.nested, state.offset, state.state2 = False, None, None
    return data, state


def unpack(base: Any) -> None:
    """Bring a packed weight back to the usual layout, in which gradients pass through; the next eval packs it again."""
    base.weight.data, base.weight.quant_state = unpacked(base.weight)
    base.quant_state = base.weight.quant_state


class PackedBnb4bitBackend(Bnb4bitBackend):
    """PEFT's handler of 4-bit weights, for those in the CPU kernels' layout too."""

    def get_base_weight(self, base_layer: nn.Module) -> Tensor:
        """The weight (d_out, d_in) that the layer computes with, dequantised."""
        if not is_packed(base_layer):
            return super().get_base_weight(base_layer)
        from bitsandbytes.functional import dequantize_4bit

        data, state = unpacked(base_layer.weight)
        return dequantize_4bit(data, state)
