# SPDX-License-Identifier: Apache-2.0
"""Meta-LoRA on nn.Linear, with the fewest kernels and saved activations we know of.

Four roads give the same numbers within rounding:

- *fused* (fused.py), to train on a plain nn.Linear in the dtype of x, or in the one that autocast gives x: the
  adapter's product is added in place onto the base's, and one autograd node stands for both;
- *in place*, for inference: the same sum without autograd, on any base;
- *pointwise*, under torch.compile without autograd and for a small rank: sums that the compiler melts into the
  operations before and after the layer;
- *general*, for everything else: training on other bases or with hooks on them, several active adapters, DoRA, dropout,
  a subject for each token, torch.func's transforms."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .base_layers import gives_its_own, is_unhooked
from .down import MAGNITUDE
from .folding import Shown, autocast_somewhere, dtype_of_sums, transformed
from .fused import FusedLinear, add_outer_, add_product_, folding_first_is_cheaper, times, triton_kernels
from .layer import MetaLoraLayer, cast
from .subject_index import Chosen, Positions, gather

AUTOCAST = torch.float32, torch.bfloat16, torch.float16  # what autocast converts before a product
POINTWISE_RANK = 4  # above, a matrix product beats sums of outer products
ADDERS = 16  # how many shapes of inputs a layer remembers how to add onto


class Linear(MetaLoraLayer):
    """Meta-LoRA on nn.Linear, its quantised kin and transformers' Conv1D: x (..., d_in) -> (..., d_out)."""

    def _shaped_like_weight(self, delta: Tensor) -> Tensor:
        return delta.T if isinstance(self.get_base_layer(), Conv1D) else delta

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return base(x) plus the active adapters: x (..., d_in) -> (..., d_out)."""
        if args or kwargs or self.subject_index.by_tokens or torch.compiler.is_compiling() or transformed():
            return super().forward(x, *args, **kwargs)
        if self.merged_adapters and not self._disable_adapters:
            return self.base_layer(x)
        name = self._fusible(x)
        if name is None:
            return super().forward(x)
        given = x
        if autocast_somewhere() and torch.is_autocast_enabled(device := x.device.type) and x.dtype in AUTOCAST:
            x = cast(x, torch.get_autocast_dtype(device))
        base: Any = self._modules["base_layer"]
        weight, bias = base._parameters.get("weight"), base._parameters.get("bias")
        plain = type(base) is nn.Linear and type(weight) is nn.Parameter and weight.dtype == x.dtype
        plain = plain and is_unhooked(base)
        if not torch.is_grad_enabled():
            return self._infer(x, given, name, plain)
        if plain and not weight.requires_grad and (bias is None or not bias.requires_grad):
            return self._forward_fused(x, name)
        return super().forward(given)

    # Below, nn.Module's dicts are read directly: at batch 1 a model is bound by Python, and its __getattr__ is slow.

    def _fusible(self, x: Tensor) -> str | None:
        """Name of the one adapter that can be fused with the base, None if the general road must be taken."""
        shown = self.subject_index.shown
        active = self._active_adapter if shown is None else shown
        modules: Any = self._modules
        name = active if type(active) is str else active[0] if len(active) == 1 else None
        if (
            name not in self.scaling
            or name in modules[MAGNITUDE]._parameters
            or self._disable_adapters
            or x.dim() < 2
            or (self.training and name in modules["metalora_dropout"]._modules)
        ):
            return None
        return name

    def _infer(self, x: Tensor, given: Tensor, name: str, plain: bool) -> Tensor:
        """The base's product and, in place onto it, the adapter's; for one subject in few Python steps.

        Args:
            x: in the dtype that products have. given: as it came, for a base that is not fused.
        """
        base: Any = self._modules["base_layer"]
        index = self.subject_index
        slot = index.one
        if slot is not None:
            values = index.written.values
            if values is not None and len(values) > 1 and x.shape[0] % len(values):
                self._chosen(x)  # says what is wrong
            index.last = index.written
        # The base goes first: a sample without subject is then exactly the base.
        y = F.linear(x, base._parameters["weight"], base._parameters["bias"]) if plain else base(given)
        if slot is not None and slot < 0:
            return y
        # A tensor of another kind may compute nothing (FakeTensorMode): nothing made with one is kept.
        if type(y) is not Tensor or not y.is_contiguous() or y.dtype != x.dtype:
            return self._add(y, y, given, name, self._chosen(given))
        if not plain and not (is_unhooked(base) and gives_its_own(base)):
            y = y.clone()  # somebody else may hold it
        shown = None if slot is None else self.fold_of_slot(name, slot)
        if shown is None or not x.is_contiguous():
            chosen = self._chosen(x)
            rows = 1 if chosen is None else chosen.slot.shape[0]
            up = gather(self.metalora_up[name], chosen, chosen is not None and chosen.complete)
            deep = x.reshape(rows, -1, self.in_features)
            add_product_(y.view(rows, -1, self.d_out), *self._inner(deep, name, chosen), up)
            return y
        key = x.shape, x.dtype, x.data_ptr() % 16, y.data_ptr() % 16
        add = shown.adders.get(key)
        if add is None:
            self._add_first(y, x, shown, key)
        else:
            add(y, x)
        return y

    def _add_first(self, y: Tensor, x: Tensor, shown: Shown, key: Any) -> None:
        """Add a subject's product onto y, and keep what does it for every x like this one."""
        flat = y.view(1, -1, self.d_out), x.view(1, -1, self.in_features)
        given = shown.factor.unsqueeze(0), shown.up, shown.scale
        if kernels := triton_kernels(x, shown.up.shape[2]):
            kernels.add_product_(*flat, *given)
            add = kernels.adder(*flat, *given)
        else:
            factor, up, scale = cast(shown.factor, x.dtype), cast(shown.up[0].t(), x.dtype), shown.scale

            def add(y: Tensor, x: Tensor) -> None:
                y.view(-1, y.shape[-1]).addmm_(F.linear(x, factor).view(-1, len(factor)), up, alpha=scale)

            add(y, x)
        if add is not None:
            if len(shown.adders) == ADDERS:  # a service sees images of many sizes
                shown.adders.clear()
            shown.adders[key] = add

    def _forward_fused(self, x: Tensor, name: str) -> Tensor:
        self._unfold_what_trains(name)
        base: Any = self.base_layer
        chosen = self._chosen(x)
        rows = 1 if chosen is None else chosen.slot.shape[0]
        deep = x.reshape(rows, -1, self.in_features)
        complete = chosen is not None and chosen.complete
        factors = (gather(held[name], chosen, complete) for held in (self.metalora_mid, self.metalora_up))
        down = self._down(self.down_key[name])
        y = FusedLinear.apply(deep, base.weight, base.bias, down, *factors, self.scaling[name])
        return y.view(*x.shape[:-1], self.d_out)

    def _inner(self, deep: Tensor, name: str, chosen: Chosen | None) -> tuple[Tensor, Tensor, float]:
        """What gives Mid @ Down @ x: an input (rows, tokens, k), a factor (rows or 1, r, k), the scale to apply.

        Without a fold it is x and Mid @ Down, or Down @ x and Mid, whichever costs fewer operations.
        """
        dtype = deep.dtype
        if not torch.is_grad_enabled() and self.is_folded(name):
            return deep, self._folded(name, dtype, chosen), self.scaling[name] / self.fold_scale[name]
        down = cast(self._down(self.down_key[name]), dtype)
        mid = gather(cast(self.metalora_mid[name], dtype), chosen)
        if not torch.is_grad_enabled() and folding_first_is_cheaper(deep, mid):
            return deep, torch.matmul(mid, down), self.scaling[name]
        return F.linear(deep, down), mid, self.scaling[name]

    def _project(self, deep: Tensor, name: str, chosen: Chosen | None) -> tuple[Tensor, float]:
        """Mid @ Down @ x for x (rows, tokens, d_in) -> (rows, tokens, r), and the scale that is still to be applied."""
        inner, factor, scaling = self._inner(deep, name, chosen)
        return times(inner, factor), scaling

    def _folded(self, name: str, dtype: torch.dtype, chosen: Chosen | None) -> Tensor:
        """The fold of each sample's slot, (rows, r, d_in)."""
        return gather(cast(self.metalora_folded[name].view(-1, self.r[name], self.in_features), dtype), chosen)

    def _add(self, result: Tensor, base: Tensor, x: Tensor, name: str, chosen: Chosen | None) -> Tensor:
        dtype = result.dtype
        rows = 1 if chosen is None else chosen.slot.shape[0]
        deep = cast(self._dropped(x, name), dtype).reshape(rows, -1, self.in_features)
        up = gather(cast(self.metalora_up[name], dtype), chosen)
        total = result.reshape(rows, -1, self.d_out)
        if name in self.metalora_magnitude:
            z, scaling = self._project(deep, name, chosen)
            alone = base.reshape(rows, -1, self.d_out)
            return self._decomposed(total, alone, scaling * times(z, up), name, chosen).view(result.shape)
        if torch.compiler.is_compiling() and not torch.is_grad_enabled() and self.r[name] <= POINTWISE_RANK:
            z, scaling = self._pointwise_project(deep, name, chosen)
            return _pointwise(total, z, up, scaling).view(result.shape)
        z, scaling = self._project(deep, name, chosen)
        if z.dtype == dtype and self._may_overwrite():
            add_outer_(total, z, up, scaling)
            return total.view(result.shape)
        if rows == 1:
            return torch.addmm(total[0], z[0], up[0].t(), alpha=scaling).view(result.shape)
        return torch.baddbmm(total, z, up.mT, alpha=scaling).view(result.shape)

    def _may_overwrite(self) -> bool:
        # With autograd an in-place sum on a view copies the gradient. DoRA reads what the base gave again. torch.func's
        # vmap has no rule for a product that adds onto its output; a compiler finds out by itself.
        base, traced = self.base_layer, torch.compiler.is_compiling() or transformed()
        if torch.is_grad_enabled() or traced or len(self.metalora_magnitude):
            return False
        return is_unhooked(base) and gives_its_own(base)

    def _tokens(self, x: Tensor, base: Tensor) -> tuple[int, ...]:
        return tuple(x.shape[1:-1])

    def _add_at(self, result: Tensor, base: Tensor, x: Tensor, name: str, places: Positions) -> Tensor:
        batch, dtype, scaling = x.shape[0], result.dtype, self.scaling[name]
        h = F.linear(cast(self._dropped(x, name), dtype), cast(self._down(self.down_key[name]), dtype)).flatten(1, -2)
        total, alone = result.reshape(batch, -1, self.d_out), base.reshape(batch, -1, self.d_out)
        for slot, where in places:
            mid, up = (cast(factors[name][slot], dtype) for factors in (self.metalora_mid, self.metalora_up))
            delta = scaling * F.linear(F.linear(h.index_select(1, where), mid), up)
            part = total.index_select(1, where)
            if name in self.metalora_magnitude:
                chosen = Chosen(where.new_tensor([slot]), where.new_ones(1, 1, 1, dtype=torch.bool))
                part = self._decomposed(part, alone.index_select(1, where), delta, name, chosen)
            else:
                part = part + delta
            total = total.index_copy(1, where, part)
        return total.view(result.shape)

    def _decomposed(self, total: Tensor, base: Tensor, delta: Tensor, name: str, chosen: Chosen | None) -> Tensor:
        """total + (s - 1) * base without bias + s * delta; s is the learnt length of a row over the present one (DoRA).

        As in the paper (section 4.3) the present length is a constant for the gradient.
        """
        bias = getattr(self.get_base_layer(), "bias", None)
        magnitude = self.metalora_magnitude[name]
        scale = (magnitude / self.row_norms(name).to(magnitude.dtype)).unsqueeze(1)
        scale = gather(scale, chosen) if chosen is None else torch.where(chosen.present, scale[chosen.slot], 1)
        product = base if bias is None else base - bias.to(base.dtype)
        if chosen is not None:
            delta = torch.where(chosen.present, delta, 0)
        return total + (scale - 1).to(base.dtype) * product + scale.to(base.dtype) * delta

    def _pointwise_project(self, deep: Tensor, name: str, chosen: Chosen | None) -> tuple[Tensor, float]:
        inner, factor, scaling = self._inner(deep, name, chosen)
        if inner is not deep:
            return times(inner, factor), scaling
        dtype = dtype_of_sums(deep)
        sums = [(deep * factor[:, k : k + 1]).sum(-1, dtype=dtype) for k in range(factor.shape[1])]
        return torch.stack(sums, dim=-1), scaling

    def __repr__(self) -> str:
        return "metalora." + super().__repr__()


def _pointwise(total: Tensor, z: Tensor, up: Tensor, scaling: float) -> Tensor:
    """total + scaling * z @ up^T as sums of outer products, at least in float32."""
    dtype = dtype_of_sums(total)
    small = sum(z[..., k : k + 1].to(dtype) * up[:, None, :, k].to(dtype) for k in range(up.shape[-1]))
    return (total.to(dtype) + scaling * small).to(total.dtype)
