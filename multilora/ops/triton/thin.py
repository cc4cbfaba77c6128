"""The thin products of the LoRA linear: one pass over an activation, and the sum of its parts."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from multilora.ops.triton import configs
from multilora.ops.triton.blocks import describable, load_block
from multilora.ops.triton.common import Chip, Launch, accumulator_of, cdiv, dot, precision


@triton.jit
def _lora_linear_pass_kernel(
    g_desc,
    g_ptr,  # G (K or 1, rows, width)
    f_ptr,  # F (K, width, rank), by its strides, where SHRINK
    shrunk_ptr,  # G·(s·F) (K, rows, rank), where SHRINK
    s_ptr,  # S (K, rows, rank), where OUTER
    partial_ptr,  # GᵀS (chunks, K, width, rank), where OUTER
    particles,
    rows,
    width,
    rank,
    rows_each,
    f_stride_k,
    f_stride_d,
    f_stride_r,
    SCALING: tl.constexpr,
    SHARED: tl.constexpr,
    SHRINK: tl.constexpr,
    OUTER: tl.constexpr,
    DESCRIBED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One pass over G that gives its thin products: with F along the width, with S along the rows.

    A program of the first holds BLOCK_M rows and walks along the width; it can give the second's
    partial sums on the way. Alone, the second holds BLOCK_N columns and walks down rows_each rows.
    Where G is SHARED by all particles, their K·r columns are one matrix.
    """
    dtype: tl.constexpr = g_ptr.dtype.element_ty
    ACC: tl.constexpr = accumulator_of(dtype)
    member = tl.program_id(2).to(tl.int64)
    column = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    # Where the block's particle starts in F, S and a partial sum, and each column after that.
    if SHARED:
        valid = column < particles * rank
        k, j = (column // rank).to(tl.int64), column % rank
        f_start, s_start, o_start = 0, 0, 0
        f_column = (k * f_stride_k + j * f_stride_r)[None, :]
        s_column = (k * rows * rank + j)[None, :]
        o_column = (k * width * rank + j)[None, :]
    else:
        valid = column < rank
        f_start, s_start, o_start = member * f_stride_k, member * rows * rank, member * width * rank
        f_column = (column.to(tl.int64) * f_stride_r)[None, :]
        s_column = column[None, :]
        o_column = column[None, :]
    valid = valid[None, :]
    i, d = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_N)[:, None]
    if SHRINK:
        chunk = tl.program_id(0)
        row, col = chunk * BLOCK_M, 0
        steps = tl.cdiv(width, BLOCK_N)
        shrunk = tl.zeros((BLOCK_M, BLOCK_R), ACC)
        if OUTER:
            # The rows stay the same.
            s_rows = s_ptr + s_start + tl.cast(row, tl.int64) * rank
            s = tl.load(s_rows + i * rank + s_column, mask=(i < rows - row) & valid, other=0.0)
    else:
        blocks = tl.cdiv(width, BLOCK_N)
        chunk = tl.program_id(0) // blocks
        row, col = chunk * rows_each, tl.program_id(0) % blocks * BLOCK_N
        steps = tl.cdiv(min(rows_each, rows - row), BLOCK_M)
    if OUTER:
        partial_ptr += chunk.to(tl.int64) * particles * width * rank + o_start
        outer = tl.zeros((BLOCK_N, BLOCK_R), ACC)
    for step in range(steps):
        if SHRINK:
            col = step * BLOCK_N
        g = load_block(
            g_desc, g_ptr, member.to(tl.int32), row, col, rows, width, DESCRIBED, BLOCK_M, BLOCK_N
        )  # fmt: skip
        if SHRINK:
            at = f_ptr + f_start + tl.cast(col, tl.int64) * f_stride_d
            mask = (d < width - col) & valid
            at = (at + d.to(tl.int64) * f_stride_d) + f_column
            f = tl.load(at, mask=mask, other=0.0)
            shrunk = dot(g, (tl.cast(f, ACC) * SCALING).to(dtype), shrunk, PRECISION)
        if OUTER:
            if SHRINK:
                outer = dot(g.T, s, tl.zeros((BLOCK_N, BLOCK_R), ACC), PRECISION)
                at = partial_ptr + tl.cast(col, tl.int64) * rank
                tl.store(at + d * rank + o_column, outer, mask=(d < width - col) & valid)
            else:
                at = s_ptr + s_start + tl.cast(row, tl.int64) * rank
                s = tl.load(at + i * rank + s_column, mask=(i < rows - row) & valid, other=0.0)
                outer = dot(g.T, s, outer, PRECISION)
                row += BLOCK_M
    if SHRINK:
        at = shrunk_ptr + s_start + tl.cast(row, tl.int64) * rank
        tl.store(at + i * rank + s_column, shrunk.to(dtype), mask=(i < rows - row) & valid)
    else:
        at = partial_ptr + tl.cast(col, tl.int64) * rank
        tl.store(at + d * rank + o_column, outer, mask=(d < width - col) & valid)


@triton.jit
def _sum_parts(
    partial_ptr,  # (chunks, K, width, rank)
    out_ptr,  # (K, width, rank), by its strides
    block,
    chunks,
    width,
    rank,
    elements,
    stride_k,
    stride_d,
    stride_r,
    SCALING: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One block of s · the sum over the chunks, always in the same order."""
    i = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), partial_ptr.dtype.element_ty)
    # Several at a time, so that their loads are under way together.
    for first in range(0, chunks, CHUNKS):
        chunk = first + tl.arange(0, CHUNKS)[:, None]
        at = partial_ptr + chunk.to(tl.int64) * elements + i[None, :]
        some = tl.load(at, mask=(chunk < chunks) & (i < elements)[None, :], other=0.0)
        total += tl.sum(some, 0)
    k, d, j = i // (width * rank), i // rank % width, i % rank
    offset = k * stride_k + d * stride_d + j * stride_r
    tl.store(out_ptr + offset, (total * SCALING).to(out_ptr.dtype.element_ty), mask=i < elements)


@triton.jit
def _lora_linear_reduce_kernel(
    partial_ptr,
    out_ptr,
    other_partial_ptr,
    other_out_ptr,
    rank,
    chunks,
    width,
    elements,
    stride_k,
    stride_d,
    stride_r,
    other_chunks,
    other_width,
    other_elements,
    other_stride_k,
    other_stride_d,
    other_stride_r,
    SCALING: tl.constexpr,
    OTHER_SCALING: tl.constexpr,
    BOTH: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The partial sums of one factor's gradient, and behind them, where BOTH, of the other's."""
    block = tl.program_id(0)
    first = tl.cdiv(elements, BLOCK)
    if block < first:
        _sum_parts(
            partial_ptr, out_ptr, block, chunks, width, rank, elements,
            stride_k, stride_d, stride_r, SCALING, CHUNKS, BLOCK,
        )  # fmt: skip
    elif BOTH:
        _sum_parts(
            other_partial_ptr, other_out_ptr, block - first, other_chunks, other_width, rank,
            other_elements, other_stride_k, other_stride_d, other_stride_r, OTHER_SCALING,
            CHUNKS, BLOCK,
        )  # fmt: skip


class ThinPass(NamedTuple):
    """launch: to be called with g (K or 1, T, width), factor (K, width, r), out, shrunk (K, T, r)
    and a tensor of the shape `parts` in the accumulator's dtype; or None for what it has not."""

    launch: Launch
    parts: tuple[int, int, int, int] | None


def thin_pass(
    particles: int,
    members: int,
    rows: int,
    width: int,
    rank: int,
    strides: tuple[int, int, int] | None,
    outer: bool,
    scaling: float,
    dtype: torch.dtype,
    chip: Chip,
) -> ThinPass:
    """out = g·(scaling·factor) (K, T, r), where there is a factor, of these strides; and, where
    `outer`, gᵀ·shrunk in parts (chunks, K, width, r).

    g, in `dtype` and of `members` particles, is contiguous and starts at a multiple of 16 bytes.
    """
    shared, shrink = members != particles, strides is not None
    columns = particles * rank if shared else rank
    config = configs.lora_pass(members, rows, width, columns, dtype, chip, shrink, outer)
    m, n, r = config.block_m, config.block_n, config.block_r
    if shrink:
        chunks = programs = cdiv(rows, m)
    else:
        chunks = cdiv(rows, config.rows_each)
        programs = chunks * cdiv(width, n)
    described = describable(chip, dtype, width)
    launch = Launch(
        _lora_linear_pass_kernel,
        (programs, cdiv(columns, r), members),
        (((members, rows, width), (m, n)) if described else None,),
        (particles, rows, width, rank, config.rows_each, *(strides or (0, 0, 0))),
        SCALING=scaling,
        SHARED=shared,
        SHRINK=shrink,
        OUTER=outer,
        DESCRIBED=described,
        BLOCK_M=m,
        BLOCK_N=n,
        BLOCK_R=r,
        PRECISION=precision(dtype),
        num_warps=config.warps,
        num_stages=config.stages,
    )
    return ThinPass(launch, (chunks, particles, width, rank) if outer else None)


class Sum(NamedTuple):
    """The sum of the parts (chunks, K, width, r), times scaling, and the strides of its result."""

    parts: tuple[int, int, int, int]
    strides: tuple[int, int, int]
    scaling: float


def reduce(one: Sum, other: Sum | None = None) -> Launch:
    """The sums of one or two factors' gradients; to be called with the parts and the
    sum of each."""
    parts, block = (one,) if other is None else (one, other), 256
    elements = [math.prod(part.parts[1:]) for part in parts]
    numbers = [(p.parts[0], p.parts[2], n, *p.strides) for p, n in zip(parts, elements)]
    return Launch(
        _lora_linear_reduce_kernel,
        (sum(cdiv(n, block) for n in elements),),
        (),
        (one.parts[-1], *numbers[0], *numbers[-1]),
        SCALING=one.scaling,
        OTHER_SCALING=parts[-1].scaling,
        BOTH=other is not None,
        CHUNKS=16,
        BLOCK=block,
        num_warps=4,
    )
