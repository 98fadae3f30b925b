# SPDX-License-Identifier: Apache-2.0
"""What can be adapted: the kinds of base layer, the shape of their Down, what may be done with what they give, and a
clear refusal of everything else."""

from __future__ import annotations

import copy
from typing import Any, NoReturn

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.quantization_utils import (
    Bnb4bitBackend,
    TorchaoBackend,
    get_quantization_kwargs,
    resolve_quantization_backend,
)
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..errors import UnsupportedModuleError

_hooked_everywhere = torch.nn.modules.module._has_any_global_hook  # as nn.Module asks before it calls forward alone

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TESTED_BACKENDS = ("bnb 8bit", "bnb 4bit", "torchao")


def base_of(module: nn.Module) -> Any:
    """The innermost base layer of a module that may be wrapped by tuners."""
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def factor_shape(base: Any) -> tuple[tuple[int, ...], int]:
    """Return the shape of one row of a base layer's Down, (d_in,) or (channels, *kernel), and its d_out."""
    if isinstance(base, CONVOLUTIONS):
        return (base.in_channels, *base.kernel_size), base.out_channels
    if isinstance(base, Conv1D):
        return (base.weight.shape[0],), base.weight.shape[1]
    return (base.in_features,), base.out_features


def is_unhooked(base: Any) -> bool:
    """Whether to call a base layer is to call its class's forward: it has no hooks and no forward of its own."""
    return not (
        base._forward_hooks
        or base._forward_pre_hooks
        or base._backward_hooks
        or base._backward_pre_hooks
        or _hooked_everywhere()
        or "forward" in base.__dict__
    )


def gives_its_own(base: Any) -> bool:
    """Whether a base layer that `is_unhooked` gives a new tensor that nobody else holds: it may be added onto."""
    kind = type(base)
    return kind.forward in (nn.Linear.forward, Conv1D.forward) or kind.__module__ == "bitsandbytes.nn.modules"


def check_supported(model: nn.Module, key: str, module: nn.Module) -> None:
    """Raise UnsupportedModuleError, with what to do, if the module cannot be adapted."""
    base = base_of(module)
    if isinstance(base, nn.Embedding):
        _refuse(key, "an Embedding: there is no input for a shared Down to look at", "train it with modules_to_save")
    backend = quantization_backend(model, base)
    if backend is not None and backend.backend_name not in TESTED_BACKENDS:
        _refuse(
            key,
            f"quantised by {backend.backend_name!r}; tested are {', '.join(TESTED_BACKENDS)} (docs/quantisation.md)",
            "quantise the model with one of these",
        )
    if isinstance(base, CONVOLUTIONS):
        if base.groups != 1:
            _refuse(
                key, f"a convolution with groups={base.groups}, which a Down over all channels would mix", "exclude it"
            )
    elif not isinstance(base, (nn.Linear, Conv1D)):
        kinds = "nn.Linear, Conv1d, Conv2d, Conv3d and transformers' Conv1D"
        _refuse(key, f"a {type(base).__module__}.{type(base).__name__}; Meta-LoRA adapts {kinds}", "exclude it")
    if backend is None and not base.weight.is_floating_point():
        _refuse(
            key,
            f"quantised ({type(base).__name__}, {base.weight.dtype}) in a way that PEFT has no handler for",
            f"quantise the model with one of {', '.join(TESTED_BACKENDS)} (docs/quantisation.md)",
        )


def _refuse(key: str, what: str, remedy: str) -> NoReturn:
    raise UnsupportedModuleError(f"{key!r} is {what}. What to do: {remedy}, or leave it out of target_modules.")


class ReadOnlyTorchaoBackend(TorchaoBackend):
    """PEFT's handler of torchao's weights, for those whose recipe the model does not know: read, but not written."""

    supports_merge = False


def quantization_backend(model: nn.Module, base: nn.Module) -> Any:
    """PEFT's handler of a quantised weight, or ours that extends it; None for an ordinary one.

    torchao can merge only if the model remembers how it was quantised (`hf_quantizer`); without, it can still be
    trained and served.
    """
    arguments = get_quantization_kwargs(model)
    try:
        backend = resolve_quantization_backend(base, **arguments)
    except ValueError:
        return ReadOnlyTorchaoBackend(None)
    return PackedBnb4bitBackend() if isinstance(backend, Bnb4bitBackend) else backend


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
