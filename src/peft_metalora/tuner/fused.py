# SPDX-License-Identifier: Apache-2.0
"""A frozen nn.Linear and its adapter as one autograd node, with the fewest kernels and saved activations we know of.

Backward adds into the base's input gradient, and with Down frozen only Down @ x is kept (meta_r values a token) instead
of x. On a GPU, factors of a small rank go through the kernels of kernels.py, elsewhere through plain products."""

from __future__ import annotations

import functools
import warnings
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

KERNEL_RANK = 4  # the largest rank that kernels.py is made for: above, matrix units win
KERNEL_DTYPES = torch.float32, torch.bfloat16, torch.float16


class FusedLinear(torch.autograd.Function):
    """y = x @ W^T + b + scaling * ((x @ down^T) @ mid^T) @ up^T as one node, for a frozen W and b in the dtype of x.

    Shapes: x (rows, tokens, d_in), down (meta_r, d_in), mid (rows, r, meta_r), up (rows, d_out, r); rows is 1 where all
    samples share a subject. The factors may be of another dtype. x is kept for backward only if Down trains.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        down: Tensor,
        mid: Tensor,
        up: Tensor,
        scaling: float,
    ) -> Tensor:
        ctx.scaling, ctx.down_dtype, ctx.factor_dtypes = scaling, down.dtype, (mid.dtype, up.dtype)
        down = down.to(x.dtype)
        h, y = F.linear(x, down), F.linear(x, weight, bias)
        ctx.kernels = triton_kernels(x, up.shape[2])
        if ctx.kernels:
            z = torch.empty(*x.shape[:2], up.shape[2], device=x.device, dtype=torch.float32)
            mid, up = mid.contiguous(), up.contiguous()
            ctx.kernels.add_product_(y, h, mid, up, scaling, z)
        else:
            mid, up = mid.to(x.dtype), up.to(x.dtype)
            z = times(h, mid)
            add_outer_(y, z, up, scaling)
        ctx.save_for_backward(weight, down, mid, up, h, z, x if ctx.needs_input_grad[3] else None)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        weight, down, mid, up, h, z, x = ctx.saved_tensors
        need_x, _, _, need_down, need_mid, need_up, _ = ctx.needs_input_grad
        dx = ddown = dmid = dup = None
        if ctx.kernels:
            dy = dy.contiguous()
            dz, dmid, dup = ctx.kernels.factor_gradients(dy, z, h, up, ctx.scaling)
        else:
            scaled = ctx.scaling != 1  # at batch 1 every kernel counts
            dz = times(dy, (up * ctx.scaling if scaled else up).mT)
            if need_up:
                dup = transposed_times(dy, z)
                if scaled:
                    dup.mul_(ctx.scaling)
            if need_mid:
                dmid = transposed_times(dz, h)
        mid = mid.to(down.dtype)
        if need_down:
            gathered = transposed_times(dz.to(down.dtype), x)
            ddown = torch.mm(mid.flatten(0, 1).t(), gathered.flatten(0, 1)).to(ctx.down_dtype)  # sums over rows too
        if need_x:
            dx = torch.matmul(dy, weight)
            factor = torch.matmul(mid, down).mT
            if ctx.kernels:
                ctx.kernels.add_product_(dx, None, None, factor, 1.0, dz)
            else:
                add_outer_(dx, dz, factor, 1.0)
        mid_dtype, up_dtype = ctx.factor_dtypes
        dmid = None if dmid is None or not need_mid else dmid.to(mid_dtype)
        dup = None if dup is None or not need_up else dup.to(up_dtype)
        return dx, None, None, ddown, dmid, dup, None


def triton_kernels(x: Tensor, r: int) -> ModuleType | None:
    """The kernels, where they can work on x (rows, tokens, n) and a factor of rank r; None: use plain products."""
    if (
        not x.is_cuda
        or r > KERNEL_RANK
        or x.dtype not in KERNEL_DTYPES
        or not x.is_contiguous()
        or type(x) is not Tensor
    ):
        return None
    if x.get_device() != torch.cuda.current_device():  # Triton launches on the current one
        return None
    return _kernels_on(x.device)


@functools.cache
def _kernels_on(device: torch.device) -> ModuleType | None:
    """The kernels if Triton is there and can build them: it comes with torch on Linux and needs a C compiler."""
    try:
        from . import kernels

        y, up = torch.zeros(1, 1, 16, device=device), torch.ones(1, 16, 1, device=device)
        given = torch.ones_like(y), up.mT.contiguous(), up, 1.0
        for _ in range(2):  # the second launch takes the shorter way
            kernels.add_product_(y, *given)
        if add := kernels.adder(y, *given):  # and this one the shortest
            add(y, given[0])
        if not (y == (48 if add else 32)).all():
            raise RuntimeError("their sums are wrong")
    except Exception as error:  # whatever a driver, a compiler or Triton raises
        warnings.warn(f"Triton's kernels cannot be used, plain products are slower: {error}", stacklevel=2)
        return None
    return kernels


def folding_first_is_cheaper(x: Tensor, mid: Tensor) -> bool:
    """Whether (Mid @ Down) @ x costs fewer operations than Mid @ (Down @ x).

    Args:
        x: (rows, tokens, d_in). mid: (rows or 1, r, meta_r).
    """
    factors, r, meta_r = mid.shape
    tokens = x.shape[0] * x.shape[1]
    return r * (factors * meta_r + tokens) < meta_r * tokens


def add_product_(y: Tensor, x: Tensor, factor: Tensor, scaling: float, up: Tensor) -> None:
    """y += scaling * (x @ factor^T) @ up^T in place.

    Args:
        y: (rows, tokens, n). x: (rows, tokens, k). factor: (rows or 1, r, k). up: (rows or 1, n, r), of any dtype.
    """
    if kernels := triton_kernels(x, up.shape[2]):
        kernels.add_product_(y, x, factor.contiguous(), up, scaling)
    else:
        add_outer_(y, times(x, factor), up.to(y.dtype), scaling)


def add_outer_(total: Tensor, z: Tensor, up: Tensor, scaling: float) -> None:
    """total += scaling * z @ up^T in place, for total (rows, tokens, n), z (rows, tokens, r), up (rows, n, r).

    A product of its own: cuBLAS has no fast kernel for an inner size of 1 that adds a bias as well (75 us against 48 us
    for adding onto the output, 6144 x 3072, one H100).
    """
    if total.shape[0] == 1:
        total[0].addmm_(z[0], up[0].t(), alpha=scaling)
    else:
        total.baddbmm_(z, up.mT, alpha=scaling)


def times(x: Tensor, factor: Tensor) -> Tensor:
    """x (rows, tokens, n) @ factor (rows, m, n)^T -> (rows, tokens, m)."""
    return F.linear(x, factor[0]) if factor.shape[0] == 1 else torch.bmm(x, factor.mT)


def transposed_times(a: Tensor, b: Tensor) -> Tensor:
    """a (rows, tokens, m)^T @ b (rows, tokens, n) -> (rows, m, n)."""
    if a.shape[0] == 1:  # mm may split the long sum over tokens, bmm does not
        return torch.mm(a[0].t(), b[0]).unsqueeze(0)
    return torch.bmm(a.mT, b)
