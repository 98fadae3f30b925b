# SPDX-License-Identifier: Apache-2.0
"""Triton kernels for the small factors, on GPUs: what a product of inner size r <= 4 costs is the bytes it moves.

cuBLAS moves them at half of the memory's speed for such shapes, and each of its products is one more launch. Here

- `add_product_` reads x and y once and writes y once: Mid @ Down @ x and Up in one launch;
- `factor_gradients` reads dy once for the gradients of Up, of Mid and of what lies under Up.

Sums are in float32 whatever the inputs are, so factors in float32 need no cast. Both give the same bits in each run."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Tile(NamedTuple):
    """Tokens and columns that a program has at once, its warps, and how many programs share the columns of a token."""

    tokens: int
    columns: int
    warps: int
    shares: int = 1


Tiles = tuple[tuple[int, Tile], ...]
# By the least number of tokens; chosen on an H200.
ADD_TILES = ((0, Tile(2, 1024, 4, shares=3)),)
GRADIENT_TILES = ((1800, Tile(16, 512, 4)), (0, Tile(8, 1024, 8)))
SMALL = 512  # the longest rows of x that several programs go through for one token
MOST_SHAPES = 2048  # whose launches are remembered: a service sees images of many sizes


def add_product_(
    y: Tensor, x: Tensor | None, a: Tensor | None, up: Tensor, scaling: float, z: Tensor | None = None
) -> None:
    """y += scaling * z @ up^T in place, with z = x @ a^T, or given where `x` is None.

    Args:
        y: (rows, tokens, n), contiguous. x: (rows, tokens, k), contiguous. a: (rows or 1, r, k), contiguous.
        up: (rows or 1, n, r), of any strides.
        z: (rows, tokens, r) float32: written where x is given, else read.
    """
    key, grid, numbers = _add_form(y, x, a, up, z)
    _launch(_add_product, key, grid, (y, x, a, up, z, float(scaling), *numbers), ADD_TILES)


def adder(y: Tensor, x: Tensor, a: Tensor, up: Tensor, scaling: float) -> Callable[[Tensor, Tensor], None] | None:
    """As `add_product_`, for y and x like these without any look-up: of their shapes, dtypes, device and alignment.

    None where there is no such kernel yet. What `a` and `up` hold has to stay where it is as long as this is used.
    """
    key, _, numbers = _add_form(y, x, a, up, None)
    launcher = _launchers.get(_known(key, y, x))
    if launcher is None:
        return None
    # Addresses: about every tensor Triton asks the driver where it is.
    rest = a.data_ptr(), up.data_ptr(), None, float(scaling), *numbers

    def add(y: Tensor, x: Tensor) -> None:
        launcher(y.data_ptr(), x.data_ptr(), *rest)

    if torch.cuda.device_count() <= 1:
        return add
    device = y.get_device()

    def add_there(y: Tensor, x: Tensor) -> None:
        with torch.cuda.device(device):  # another may be the current one by now
            add(y, x)

    return add_there


def _add_form(
    y: Tensor, x: Tensor | None, a: Tensor | None, up: Tensor, z: Tensor | None
) -> tuple[tuple[Any, ...], tuple[int, int, int], tuple[Any, ...]]:
    """What identifies a launch of `_add_product`, its grid, and the numbers that it takes after tensors and scale."""
    rows, tokens, n = y.shape
    factors, _, r = up.shape
    if factors == 1:
        rows, tokens = 1, rows * tokens
    k, inner = (0, None) if x is None else (x.shape[2], x.dtype)
    key = (rows, tokens, n, k, *up.stride(), y.dtype, inner, up.dtype, a is None or a.dtype, z is None, r)
    return key, *_add_numbers(rows, tokens, n, k, up.stride(), r, x is not None, z is not None)


@functools.lru_cache(maxsize=MOST_SHAPES)
def _add_numbers(
    rows: int, tokens: int, n: int, k: int, strides: tuple[int, ...], r: int, from_x: bool, with_z: bool
) -> tuple[tuple[int, int, int], tuple[Any, ...]]:
    padded, tile = triton.next_power_of_2(r), _tile(ADD_TILES, (rows, tokens))
    columns = tile.columns // padded
    width = max(16, min(triton.next_power_of_2(k), columns))
    shares = tile.shares if k <= SMALL else 1  # each has to go through all of x
    constants = (r, padded, from_x, with_z, tile.tokens, width, columns)
    return (triton.cdiv(tokens, tile.tokens), rows, shares), (tokens, n, k, r * k, *strides, *constants)


def _tile(tiles: Tiles, key: tuple[Any, ...]) -> Tile:
    """The tile for a key that begins with rows and tokens."""
    tokens = key[0] * key[1]
    return next(tile for least, tile in tiles if tokens >= least)


def factor_gradients(dy: Tensor, z: Tensor, h: Tensor, up: Tensor, scaling: float) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of y = scaling * z @ up^T with z = h @ mid^T, all in float32.

    Args:
        dy: (rows, tokens, n), contiguous. z: (rows, tokens, r) float32. h: (rows, tokens, meta_r), contiguous.
        up: (rows or 1, n, r), contiguous.

    Returns:
        dz (rows, tokens, r), dmid (rows or 1, r, meta_r), dup (rows or 1, n, r).
    """
    rows, tokens, n = dy.shape
    meta_r, r = h.shape[2], up.shape[2]
    if up.shape[0] == 1:
        rows, tokens = 1, rows * tokens
    padded, tile = triton.next_power_of_2(r), _tile(GRADIENT_TILES, (rows, tokens))
    blocks = triton.cdiv(tokens, tile.tokens)
    dz = torch.empty_like(z)
    parts = torch.empty(rows, blocks, (n + meta_r) * r, device=dy.device, dtype=torch.float32)
    constants = (
        r,
        padded,
        tile.tokens,
        tile.columns // padded,
        min(triton.next_power_of_2(meta_r), 128 // padded),
    )
    key = (rows, tokens, n, meta_r, r, dy.dtype, h.dtype, up.dtype)
    arguments = (dy, z, h, up, dz, parts, float(scaling), tokens, n, meta_r, *constants)
    _launch(_factor_gradients, key, (blocks, rows, 1), arguments, GRADIENT_TILES)
    sums = parts.sum(1)
    return dz, sums[:, n * r :].reshape(rows, r, meta_r), sums[:, : n * r].reshape(rows, n, r)


_launchers: dict[Any, Any] = {}  # kernels that Triton has compiled, with their grids; the oldest leave
_filling = threading.Lock()


def _known(key: tuple[Any, ...], first: Tensor, second: Tensor | None) -> tuple[Any, ...]:
    """Triton compiles for pointers that 16 divides, or not: of activations that counts, of factors it is not used."""
    return (*key, first.get_device(), first.data_ptr() % 16, second is None or second.data_ptr() % 16)


def _launch(
    kernel: Any, key: tuple[Any, ...], grid: tuple[int, int, int], arguments: tuple[Any, ...], tiles: Tiles
) -> None:
    """Launch a kernel; from the second time on without the look-ups of Triton, slower than a product at batch 1."""
    known = _known(key, arguments[0], arguments[1])
    launcher = _launchers.get(known)
    if launcher is not None:
        launcher(*arguments)
        return
    compiled = kernel[grid](*arguments, num_warps=_tile(tiles, key).warps)
    if compiled is not None:  # Triton's interpreter compiles nothing
        with _filling:
            while len(_launchers) >= MOST_SHAPES:
                del _launchers[next(iter(_launchers))]
            _launchers[known] = _launcher(compiled, grid, arguments[0].get_device())


def _launcher(compiled: Any, grid: tuple[int, int, int], device: int) -> Callable[..., None]:
    """As Triton's own `compiled[grid]`, for the device that is current, and without asking for it or for hooks."""
    compiled[grid]  # which brings it onto the device
    run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
    stream_of = triton.runtime.driver.active.get_current_stream

    def launch(*arguments: Any) -> None:
        run(*grid, stream_of(device), function, metadata, None, None, None, *arguments)

    return launch


@triton.jit(do_not_specialize_on_alignment=["a", "up", "z"])
def _add_product(
    y,
    x,
    a,
    up,
    z,
    scaling,
    tokens,
    n,
    k,
    a_row,
    up_row,
    up_n,
    up_r,
    R: tl.constexpr,
    PADDED: tl.constexpr,
    FROM_X: tl.constexpr,
    WITH_Z: tl.constexpr,
    TOKENS: tl.constexpr,
    INNER: tl.constexpr,
    OUTER: tl.constexpr,
) -> None:
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    row = tl.program_id(1)
    inside = token < tokens
    place = (row.to(tl.int64) * tokens + token)[:, None]
    rank = tl.arange(0, PADDED)[None, :]
    known = inside[:, None] & (rank < R)
    if FROM_X:
        small = tl.zeros((TOKENS, PADDED), tl.float32)
        for start in range(0, k, INNER):
            c = (start + tl.arange(0, INNER))[None, :]
            values = tl.load(x + place * k + c, mask=inside[:, None] & (c < k), other=0).to(tl.float32)
            j = tl.arange(0, PADDED)[:, None]
            factor = tl.load(a + row * a_row + j * k + c, mask=(j < R) & (c < k), other=0).to(tl.float32)
            small += tl.sum(values[:, None, :] * factor[None, :, :], 2)
        if WITH_Z:
            tl.store(z + place * R + rank, small, mask=known & (tl.program_id(2) == 0))
    else:
        small = tl.load(z + place * R + rank, mask=known, other=0)
    small *= scaling
    for start in range(tl.program_id(2) * OUTER, n, tl.num_programs(2) * OUTER):
        c = start + tl.arange(0, OUTER)
        factor = tl.load(
            up + row * up_row + c[:, None] * up_n + rank * up_r, mask=(c < n)[:, None] & (rank < R), other=0
        ).to(tl.float32)
        product = tl.sum(small[:, None, :] * factor[None, :, :], 2)
        target = y + place * n + c[None, :]
        mask = inside[:, None] & (c < n)[None, :]
        total = tl.load(target, mask=mask, other=0).to(tl.float32) + product
        tl.store(target, total.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize_on_alignment=["h", "up"])
def _factor_gradients(
    dy,
    z,
    h,
    up,
    dz,
    parts,
    scaling,
    tokens,
    n,
    meta_r,
    R: tl.constexpr,
    PADDED: tl.constexpr,
    TOKENS: tl.constexpr,
    OUTER: tl.constexpr,
    META: tl.constexpr,
) -> None:
    block, row = tl.program_id(0), tl.program_id(1)
    token = block * TOKENS + tl.arange(0, TOKENS)
    inside = token < tokens
    place = (row.to(tl.int64) * tokens + token)[:, None]
    rank = tl.arange(0, PADDED)[None, :]
    known = inside[:, None] & (rank < R)
    small = tl.load(z + place * R + rank, mask=known, other=0) * scaling
    part = parts + (row * tl.num_programs(0) + block).to(tl.int64) * (n + meta_r) * R
    below = tl.zeros((TOKENS, PADDED), tl.float32)
    for start in range(0, n, OUTER):
        c = start + tl.arange(0, OUTER)
        gradient = tl.load(dy + place * n + c[None, :], mask=inside[:, None] & (c < n)[None, :], other=0).to(tl.float32)
        mask = (c < n)[:, None] & (rank < R)
        factor = tl.load(up + row * n * R + c[:, None] * R + rank, mask=mask, other=0).to(tl.float32)
        below += tl.sum(gradient[:, :, None] * factor[None, :, :], 1)
        tl.store(part + c[:, None] * R + rank, tl.sum(gradient[:, :, None] * small[:, None, :], 0), mask=mask)
    below *= scaling
    tl.store(dz + place * R + rank, below, mask=known)
    for start in range(0, meta_r, META):
        c = (start + tl.arange(0, META))[None, :]
        projected = tl.load(h + place * meta_r + c, mask=inside[:, None] & (c < meta_r), other=0).to(tl.float32)
        j = tl.arange(0, PADDED)[:, None]
        total = tl.sum(below[:, :, None] * projected[:, None, :], 0)
        tl.store(part + n * R + j * meta_r + c, total, mask=(j < R) & (c < meta_r))
