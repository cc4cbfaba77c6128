"""The grouped linear: rows that are sorted by group, each with its group's matrix.

Where groups end is known on the device alone, so the grid has a tile more for every group than
the rows would need, and programs without rows end at once.

Dims: G groups, T rows.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from multilora.ops.common import row_counts
from multilora.ops.triton import configs
from multilora.ops.triton.common import Chip, Launch, accumulator_of, cdiv, chip, dot, precision

#: How many problems are kept: enough for a model's layers at several numbers of rows.
_KEPT = 4096


@triton.jit
def _bounds(ends_ptr, group, rows):
    """Where the rows of a group start and end, inside of the tensors whatever `ends` holds."""
    start = tl.load(ends_ptr + group - 1, mask=group > 0, other=0)
    end = tl.load(ends_ptr + group)
    return max(start, 0), min(end, rows)


@triton.jit
def _grouped_linear_kernel(
    x_ptr,  # (T, depth), contiguous
    w_ptr,  # (G, depth, cols), by its strides
    y_ptr,  # (T, cols), contiguous
    ends_ptr,  # (G,)
    groups,
    rows,
    depth,
    cols,
    w_stride_g,
    w_stride_d,
    w_stride_c,
    GROUPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile of y: rows of one group alone.

    Group g, whose rows start at s, has the tiles from s // BLOCK_M + g on. These are enough:
    ⌊s/M⌋ + ⌈n/M⌉ <= ⌊(s + n)/M⌋ + 1.
    """
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    ACC: tl.constexpr = accumulator_of(dtype)
    tile = tl.program_id(0)
    g = tl.arange(0, GROUPS)
    starts = tl.load(ends_ptr + g - 1, mask=(g > 0) & (g < groups), other=0)
    firsts = starts // BLOCK_M + g
    group = tl.sum(((firsts <= tile) & (g < groups)).to(tl.int32), 0) - 1
    start, end = _bounds(ends_ptr, group, rows)
    row = start + (tile - start // BLOCK_M - group) * BLOCK_M
    if (row >= start) & (row < end):
        col = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        i, k = row + tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_K)
        x_rows = x_ptr + i.to(tl.int64) * depth
        w_cols = w_ptr + group.to(tl.int64) * w_stride_g + col.to(tl.int64) * w_stride_c
        acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
        for first in range(0, depth, BLOCK_K):
            d = first + k
            x = tl.load(x_rows + d[None, :], mask=(i < end) & (d < depth)[None, :], other=0.0)
            w_rows = d.to(tl.int64)[:, None] * w_stride_d
            w = tl.load(w_cols + w_rows, mask=(d < depth)[:, None] & (col < cols), other=0.0)
            acc = dot(x, w.to(dtype), acc, PRECISION)
        y_rows = y_ptr + i.to(tl.int64) * cols
        tl.store(y_rows + col, acc.to(dtype), mask=(i < end) & (col < cols))


@triton.jit
def _grouped_outer_kernel(
    g_ptr,  # (T, height), contiguous
    x_ptr,  # (T, width), contiguous
    w_ptr,  # (G, height, width), contiguous
    ends_ptr,
    rows,
    height,
    width,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile of gᵀ·x over the rows of one group, always added up in the same order."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    ACC: tl.constexpr = accumulator_of(dtype)
    across = tl.cdiv(width, BLOCK_N)
    tiles = tl.cdiv(height, BLOCK_M) * across
    group, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    start, end = _bounds(ends_ptr, group, rows)
    i = tile // across * BLOCK_M + tl.arange(0, BLOCK_M)
    j = tile % across * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    k = tl.arange(0, BLOCK_K)[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    for row in range(start, end, BLOCK_K):
        t = row + k
        at = t.to(tl.int64)
        mask = (t < end) & (i < height)[None, :]
        g = tl.load(g_ptr + at * height + i[None, :], mask=mask, other=0.0)
        x = tl.load(x_ptr + at * width + j, mask=(t < end) & (j < width), other=0.0)
        acc = dot(g.T, x, acc, PRECISION)
    out = w_ptr + group.to(tl.int64) * height * width + i.to(tl.int64)[:, None] * width
    block = acc.to(w_ptr.dtype.element_ty)
    tl.store(out + j, block, mask=(i < height)[:, None] & (j < width))


def grouped_linear(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """x (T, d_in), weight (G, d_out, d_in), ends (G,) -> y (T, d_out)."""
    _check(ends, x)
    return _by_group(x, weight.mT, ends)


def grouped_linear_backward(
    grad: Tensor, x: Tensor, weight: Tensor, ends: Tensor, needs: list[bool]
) -> tuple[Tensor, Tensor]:
    """grad (T, d_out) -> dx (T, d_in), dW (G, d_out, d_in); empty where not needed."""
    _check(ends, x)
    dx = _by_group(grad, weight, ends) if needs[0] else x.new_empty(0)
    if not needs[1]:
        return dx, weight.new_empty(0)
    groups, d_out, d_in = weight.shape
    if 0 in (x.shape[0], d_out, d_in):
        return dx, weight.new_zeros(weight.shape)
    dW = weight.new_empty(weight.shape)
    kind = (x.dtype, precision(x.dtype), chip(x.device))
    launch = _outer(groups, x.shape[0], d_out, d_in, *kind)
    launch(grad.contiguous(), x.contiguous(), dW, ends)
    return dx, dW


def _check(ends: Tensor, x: Tensor) -> None:
    # On a GPU the host does not wait for their values, and in tests they are there.
    if ends.is_cpu:
        row_counts(ends, x.shape[0])


def _by_group(x: Tensor, factor: Tensor, ends: Tensor) -> Tensor:
    """The product of every row of x (T, depth) with its group's matrix (G, depth, cols)."""
    rows, (groups, depth, cols) = x.shape[0], factor.shape
    if 0 in (rows, depth, cols):
        return x.new_zeros(rows, cols)
    y = x.new_empty(rows, cols)
    kind = (x.dtype, precision(x.dtype), chip(x.device))
    launch = _product(groups, rows, depth, cols, factor.stride(), *kind)
    launch(x.contiguous(), factor, y, ends)
    return y


@functools.lru_cache(_KEPT)
def _product(
    groups: int,
    rows: int,
    depth: int,
    cols: int,
    strides: tuple[int, int, int],
    dtype: torch.dtype,
    products: str,
    chip: Chip,
) -> Launch:
    """To be called with x, the matrices, y and ends."""
    config = configs.grouped_rows(groups, rows, depth, cols, dtype, chip)
    tiles = rows // config.block_m + groups
    return Launch(
        _grouped_linear_kernel,
        (tiles, cdiv(cols, config.block_n)),
        (),
        (groups, rows, depth, cols, *strides),
        GROUPS=configs.power_of_two(groups),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        PRECISION=products,
        num_warps=config.warps,
        num_stages=config.stages,
    )


@functools.lru_cache(_KEPT)
def _outer(
    groups: int,
    rows: int,
    height: int,
    width: int,
    dtype: torch.dtype,
    products: str,
    chip: Chip,
) -> Launch:
    """To be called with the gradient of y, x, the gradient of the matrices and ends."""
    config = configs.grouped_outer(groups, rows, height, width, dtype, chip)
    tiles = cdiv(height, config.block_m) * cdiv(width, config.block_n)
    return Launch(
        _grouped_outer_kernel,
        (groups * tiles,),
        (),
        (rows, height, width),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        PRECISION=products,
        num_warps=config.warps,
        num_stages=config.stages,
    )
