"""The K-particle LoRA linear: one GEMM kernel for y and dX, one pass kernel for all that is thin.

Dims: K particles, T rows, r rank. The GEMM runs over the virtual concatenation [X | S]·[W | sB]ᵀ:
the low-rank product is one more step of depth r on the same accumulator, so y is written once and
never read. dX = [dY | dS]·[W ; A] is the same kernel with W in the other operand order. Where the
vendor's GEMM gains more than that, it accumulates onto the low-rank product instead.

Tiles never straddle particles: descriptors have the particle axis apart, so rows past T are zeros
when read and are dropped when written.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from multilora.ops import reference
from multilora.ops.common import accumulator
from multilora.ops.triton import configs
from multilora.ops.triton.common import accumulator_of, cdiv, chip, dot, launch, precision


@triton.jit
def _expand(
    acc,
    s_ptr,
    q_ptr,
    k,
    row,
    col,
    rows,
    cols,
    rank,
    q_stride_k,
    q_stride_c,
    q_stride_r,
    SCALING: tl.constexpr,
    FIRST: tl.constexpr,
    RANK_STEPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """acc + S_k·(s·Q_k)ᵀ over the rank steps from FIRST on."""
    for step in tl.static_range(FIRST, RANK_STEPS):
        s = _load_block(
            None, s_ptr, k, row, step * BLOCK_R, rows, rank, False, BLOCK_M, BLOCK_R
        )  # fmt: skip
        q = _load_expander(
            q_ptr, k, col, step * BLOCK_R, cols, rank,
            q_stride_k, q_stride_c, q_stride_r, SCALING, s.dtype, BLOCK_N, BLOCK_R,
        )  # fmt: skip
        acc = dot(s, q.T, acc, PRECISION)
    return acc


@triton.jit
def _load_expander(
    q_ptr,
    k,
    col,
    first,
    cols,
    rank,
    stride_k,
    stride_c,
    stride_r,
    SCALING: tl.constexpr,
    dtype: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """The tile (BLOCK_N, BLOCK_R) of s·Q, rounded once, to `dtype`, from its master."""
    q_ptr += tl.cast(k, tl.int64) * stride_k + tl.cast(col, tl.int64) * stride_c + first * stride_r
    c, j = tl.arange(0, BLOCK_N)[:, None], tl.arange(0, BLOCK_R)[None, :]
    mask = (c < cols - col) & (j < rank - first)
    q = tl.load(q_ptr + c * stride_c + j * stride_r, mask=mask, other=0.0)
    # In float32: a product with a scalar would stay in the master's dtype.
    return (tl.cast(q, accumulator_of(dtype)) * SCALING).to(dtype)


@triton.jit
def _load_block(
    desc, ptr, k, row, col, rows, cols,
    DESCRIBED: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The block (HEIGHT, WIDTH) of a contiguous tensor (K, rows, cols); zeros outside."""
    if DESCRIBED:
        return desc.load([k, row, col]).reshape(HEIGHT, WIDTH)
    # 64-bit arithmetic for the block's corner only.
    ptr += (tl.cast(k, tl.int64) * rows + row) * cols + col
    i, j = tl.arange(0, HEIGHT)[:, None], tl.arange(0, WIDTH)[None, :]
    return tl.load(ptr + i * cols + j, mask=(i < rows - row) & (j < cols - col), other=0.0)


@triton.jit
def _store_block(
    desc, ptr, block, k, row, col, rows, cols,
    DESCRIBED: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Its inverse; what lies outside is dropped."""
    block = block.to(ptr.dtype.element_ty)
    if DESCRIBED:
        desc.store([k, row, col], block.reshape(1, HEIGHT, WIDTH))
    else:
        ptr += (tl.cast(k, tl.int64) * rows + row) * cols + col
        i, j = tl.arange(0, HEIGHT)[:, None], tl.arange(0, WIDTH)[None, :]
        tl.store(ptr + i * cols + j, block, mask=(i < rows - row) & (j < cols - col))


@triton.jit
def _lora_linear_gemm_kernel(
    x_desc,
    w_desc,
    p_desc,
    y_desc,
    x_ptr,  # X (K or 1, rows, depth)
    w_ptr,  # W (1, cols, depth), or (1, depth, cols) where W_DEPTH_FIRST
    p_ptr,  # P (K, rank, depth) where SHRINK
    y_ptr,  # Y (K or 1, rows, cols)
    s_ptr,  # S (K, rows, rank): written where SHRINK, else read
    q_ptr,  # Q (K, cols, rank), by its strides
    bias_ptr,
    particles,
    rows,
    depth,
    cols,
    rank,
    q_stride_k,
    q_stride_c,
    q_stride_r,
    SCALING: tl.constexpr,
    SHRINK: tl.constexpr,
    SHARED: tl.constexpr,
    W_DEPTH_FIRST: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DESCRIBED: tl.constexpr,
    RANK_STEPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP: tl.constexpr,
    FLATTEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Y_k = X_k Wᵀ + bias + S_k (s·Q_k)ᵀ for all particles k, persistently.

    SHRINK: S = X Pᵀ comes from a second product inside the loop over the depth.
    SHARED: "" , every particle has rows of its own; "out", one X serves all Y_k; "in", one Y sums
    all low-rank products.
    """
    ACC: tl.constexpr = accumulator_of(y_ptr.dtype.element_ty)
    strips_each = tl.cdiv(rows, BLOCK_M)
    strips = particles * strips_each if SHARED == "" else strips_each
    tiles_n = tl.cdiv(cols, BLOCK_N)
    for tile in tl.range(tl.program_id(0), strips * tiles_n, tl.num_programs(0), flatten=FLATTEN):
        # GROUP strips share the columns of W that are in L2.
        group = tile // (GROUP * tiles_n) * GROUP
        height = min(strips - group, GROUP)
        strip = group + tile % (GROUP * tiles_n) % height
        n = tile % (GROUP * tiles_n) // height
        k = strip // strips_each
        row = strip % strips_each * BLOCK_M
        col = n * BLOCK_N

        # Asked for before the long loop, so that they are here when it ends. Where the loop shrinks
        # too, it needs these registers.
        if SHARED == "" and not SHRINK:
            s = _load_block(None, s_ptr, k, row, 0, rows, rank, False, BLOCK_M, BLOCK_R)
            q = _load_expander(
                q_ptr, k, col, 0, cols, rank, q_stride_k, q_stride_c, q_stride_r, SCALING,
                y_ptr.dtype.element_ty, BLOCK_N, BLOCK_R,
            )  # fmt: skip

        acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
        if SHRINK:
            shrunk = tl.zeros((BLOCK_M, BLOCK_R), ACC)
        for i in range(0, depth, BLOCK_K):
            x = _load_block(
                x_desc, x_ptr, k, row, i, rows, depth, DESCRIBED, BLOCK_M, BLOCK_K
            )  # fmt: skip
            if W_DEPTH_FIRST:
                w = _load_block(
                    w_desc, w_ptr, 0, i, col, depth, cols, DESCRIBED, BLOCK_K, BLOCK_N
                )  # fmt: skip
            else:
                w = _load_block(
                    w_desc, w_ptr, 0, col, i, cols, depth, DESCRIBED, BLOCK_N, BLOCK_K
                ).T  # fmt: skip
            acc = dot(x, w, acc, PRECISION)
            if SHRINK:
                p = _load_block(
                    p_desc, p_ptr, k, 0, i, rank, depth, DESCRIBED, BLOCK_R, BLOCK_K
                )  # fmt: skip
                shrunk = dot(x, p.T, shrunk, PRECISION)
        if SHRINK:
            s = shrunk.to(y_ptr.dtype.element_ty)
            if n == 0:
                _store_block(None, s_ptr, s, k, row, 0, rows, rank, False, BLOCK_M, BLOCK_R)
            q = _load_expander(
                q_ptr, k, col, 0, cols, rank, q_stride_k, q_stride_c, q_stride_r, SCALING,
                y_ptr.dtype.element_ty, BLOCK_N, BLOCK_R,
            )  # fmt: skip

        if HAS_BIAS:
            c = col + tl.arange(0, BLOCK_N)
            acc += tl.load(bias_ptr + c, mask=c < cols, other=0.0).to(ACC)[None, :]
        if SHARED != "":
            for member in range(particles):
                expanded = _expand(
                    acc, s_ptr, q_ptr, member, row, col, rows, cols, rank,
                    q_stride_k, q_stride_c, q_stride_r, SCALING,
                    0, RANK_STEPS, BLOCK_M, BLOCK_N, BLOCK_R, PRECISION,
                )  # fmt: skip
                if SHARED == "out":
                    _store_block(
                        y_desc, y_ptr, expanded, member, row, col, rows, cols,
                        DESCRIBED, BLOCK_M, BLOCK_N,
                    )  # fmt: skip
                else:
                    acc = expanded
        else:
            acc = dot(s, q.T, acc, PRECISION)
            acc = _expand(
                acc, s_ptr, q_ptr, k, row, col, rows, cols, rank,
                q_stride_k, q_stride_c, q_stride_r, SCALING,
                1, RANK_STEPS, BLOCK_M, BLOCK_N, BLOCK_R, PRECISION,
            )  # fmt: skip
        if SHARED != "out":
            _store_block(
                y_desc, y_ptr, acc, k, row, col, rows, cols, DESCRIBED, BLOCK_M, BLOCK_N
            )  # fmt: skip


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
        f_column = (column * f_stride_r)[None, :]
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
        g = _load_block(
            g_desc, g_ptr, member.to(tl.int32), row, col, rows, width, DESCRIBED, BLOCK_M, BLOCK_N
        )  # fmt: skip
        if SHRINK:
            at = f_ptr + f_start + tl.cast(col, tl.int64) * f_stride_d
            mask = (d < width - col) & valid
            f = tl.load(at + d * f_stride_d + f_column, mask=mask, other=0.0)
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
def _lora_linear_reduce_kernel(
    partial_ptr,  # (chunks, K, width, rank)
    out_ptr,  # (K, width, rank), by its strides
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
    """s · the sum over the chunks, always in the same order."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
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


def lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """x (K or 1, T, d_in) -> y (K, T, d_out) and S = x Aᵀ (K, T, r)."""
    particles, rank, d_in = lora_A.shape
    rows, d_out = x.shape[1], weight.shape[0]
    if 0 in (rows, d_in, d_out):
        return reference.lora_linear(x, weight, lora_A, lora_B, bias, scaling)
    shared = x.shape[0] != particles
    config = configs.lora_gemm(
        particles, rows, d_in, d_out, rank, x.dtype, chip(x.device), "out" if shared else ""
    )
    x = x.contiguous()
    y = x.new_empty(particles, rows, d_out)
    shrunk = x.new_empty(particles, rows, rank)
    if config.path != "shrink inside":
        _pass(x, lora_A.mT, shrunk, None, particles, rank, 1.0)
    if config.path == "accumulate":
        _accumulate(y, x, weight.mT, shrunk, lora_B, bias, scaling)
    else:
        _gemm(y, x, weight, lora_A, shrunk, lora_B, bias, scaling, config, False)
    return y, shrunk


def lora_linear_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    shrunk: Tensor,
    scaling: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """grad (K, T, d_out) -> dx (as x), dA (K, r, d_in), dB (K, d_out, r), or empty."""
    needs_x, needs_A, needs_B = needs
    particles, rank, d_in = lora_A.shape
    rows, d_out = x.shape[1], weight.shape[0]
    if 0 in (rows, d_in, d_out):
        return reference.lora_linear_backward(
            grad, x, weight, lora_A, lora_B, shrunk, scaling, needs
        )
    shared = x.shape[0] != particles
    dx, dA, dB = x.new_empty(0), lora_A.new_empty(0), lora_B.new_empty(0)
    if not any(needs):
        return dx, dA, dB
    x, grad = x.contiguous(), grad.contiguous()
    # dS = s·dY·B and dB = s·dYᵀ·S: one pass over dY, where the partial sums do not cost another.
    d_shrunk = x.new_empty(shrunk.shape) if needs_x or needs_A else None
    wanted = shrunk if needs_B else None
    together = configs.lora_pass_together(particles, rows, d_out, rank, x.dtype, chip(x.device))
    if d_shrunk is not None and needs_B and not together:
        _pass(grad, lora_B, d_shrunk, None, particles, rank, scaling)
        partial = _pass(grad, None, None, wanted, particles, rank, scaling)
    else:
        partial = _pass(grad, lora_B, d_shrunk, wanted, particles, rank, scaling)
    if needs_B:
        dB = lora_B.new_empty(lora_B.shape)
        _reduce(partial, dB, scaling)
    if needs_A:
        dA = lora_A.new_empty(lora_A.shape)
        _reduce(_pass(x, None, None, d_shrunk, particles, rank, 1.0), dA.mT, 1.0)
    if needs_x:
        # The rows are the same for all particles, so dY is summed before the large product.
        rest = grad.sum(0, keepdim=True) if shared else grad
        config = configs.lora_gemm(
            particles,
            rows,
            d_out,
            d_in,
            rank,
            x.dtype,
            chip(x.device),
            "in" if shared else "",
            True,
        )
        dx = x.new_empty(x.shape)
        if config.path == "accumulate":
            _accumulate(dx, rest, weight, d_shrunk, lora_A.mT, None, 1.0)
        else:
            _gemm(dx, rest, weight, None, d_shrunk, lora_A.mT, None, 1.0, config, True)
    return dx, dA, dB


def _gemm(
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    shrinker: Tensor | None,
    shrunk: Tensor,
    expander: Tensor,
    bias: Tensor | None,
    scaling: float,
    config: configs.LoraGemm,
    w_depth_first: bool,
) -> None:
    """y (K or 1, T, cols) from x (K or 1, T, depth), weight, S (K, T, r), expander (K, cols, r)."""
    rows, depth, cols = y.shape[1], x.shape[2], y.shape[2]
    particles, _, rank = shrunk.shape
    shared = "" if x.shape[0] == y.shape[0] == particles else "in" if y.shape[0] == 1 else "out"
    shrink = config.path == "shrink inside"
    m, n, k, r = config.block_m, config.block_n, config.block_k, config.block_r
    weight = weight.contiguous().unsqueeze(0)
    shrinker = shrinker.to(x.dtype).contiguous() if shrink else None
    described = _describable(x, weight, shrinker, y)
    strips = (1 if shared else particles) * cdiv(rows, m)
    launch(
        _lora_linear_gemm_kernel,
        (min(config.programs * chip(x.device).processors, strips * cdiv(cols, n)),),
        _descriptor(described, x, m, k),
        _descriptor(described, weight, *((k, n) if w_depth_first else (n, k))),
        _descriptor(described, shrinker, r, k),
        _descriptor(described, y, m, n),
        x,
        weight,
        shrinker,
        y,
        shrunk,
        expander,
        None if bias is None else bias.contiguous(),
        particles,
        rows,
        depth,
        cols,
        rank,
        *expander.stride(),
        SCALING=scaling,
        SHRINK=shrink,
        SHARED=shared,
        W_DEPTH_FIRST=w_depth_first,
        HAS_BIAS=bias is not None,
        DESCRIBED=described,
        RANK_STEPS=cdiv(rank, r),
        BLOCK_M=m,
        BLOCK_N=n,
        BLOCK_K=k,
        BLOCK_R=r,
        GROUP=config.group,
        FLATTEN=config.flatten,
        PRECISION=precision(x.dtype),
        num_warps=config.warps,
        num_stages=config.stages,
    )


def _accumulate(
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    shrunk: Tensor,
    expander: Tensor,
    bias: Tensor | None,
    scaling: float,
) -> None:
    """The same with the vendor's GEMM: expand into y, then y += x·weight (depth, cols).

    Its product keeps all of the library's efficiency; what it costs is that y is written twice.
    """
    expander = (expander * scaling).to(x.dtype).mT
    if bias is None:
        torch.bmm(shrunk, expander, out=y)
    else:
        torch.baddbmm(bias, shrunk, expander, out=y)
    y.flatten(0, 1).addmm_(x.flatten(0, 1), weight)


def _pass(
    g: Tensor,
    factor: Tensor | None,
    out: Tensor | None,
    shrunk: Tensor | None,
    particles: int,
    rank: int,
    scaling: float,
) -> Tensor | None:
    """out = g·(scaling·factor) (K, T, r), where given; -> gᵀ·shrunk in parts (chunks, K, width, r).

    g (K or 1, T, width), factor (K, width, r), shrunk (K, T, r).
    """
    members, rows, width = g.shape
    shared = members != particles
    shrink, outer = out is not None, shrunk is not None
    columns = particles * rank if shared else rank
    config = configs.lora_pass(
        members, rows, width, columns, g.dtype, chip(g.device), shrink, outer
    )
    m, n, r = config.block_m, config.block_n, config.block_r
    if shrink:
        chunks = programs = cdiv(rows, m)
    else:
        chunks = cdiv(rows, config.rows_each)
        programs = chunks * cdiv(width, n)
    partial = None
    described = _describable(g)
    if outer:
        partial = g.new_empty(chunks, particles, width, rank, dtype=accumulator(g.dtype))
    launch(
        _lora_linear_pass_kernel,
        (programs, cdiv(columns, r), members),
        _descriptor(described, g, m, n),
        g,
        factor,
        out,
        shrunk,
        partial,
        particles,
        rows,
        width,
        rank,
        config.rows_each,
        *((0, 0, 0) if factor is None else factor.stride()),
        SCALING=scaling,
        SHARED=shared,
        SHRINK=shrink,
        OUTER=outer,
        DESCRIBED=described,
        BLOCK_M=m,
        BLOCK_N=n,
        BLOCK_R=r,
        PRECISION=precision(g.dtype),
        num_warps=config.warps,
        num_stages=config.stages,
    )
    return partial


def _reduce(partial: Tensor, out: Tensor, scaling: float) -> None:
    """out (K, width, r), of any strides = scaling · the sum of partial (chunks, K, width, r)."""
    chunks, _, width, rank = partial.shape
    elements, block = out.numel(), 256
    launch(
        _lora_linear_reduce_kernel,
        (cdiv(elements, block),),
        partial,
        out,
        chunks,
        width,
        rank,
        elements,
        *out.stride(),
        SCALING=scaling,
        CHUNKS=16,
        BLOCK=block,
        num_warps=4,
    )


def _describable(*tensors: Tensor | None) -> bool:
    """Whether Hopper's copy engine can move blocks of these: all rows on 16-byte boundaries."""
    present = [t for t in tensors if t is not None]
    return chip(present[0].device).capability >= 90 and all(
        t.data_ptr() % 16 == 0 and t.shape[-1] * t.element_size() % 16 == 0 for t in present
    )


def _descriptor(described: bool, t: Tensor | None, height: int, width: int) -> Any:
    """A contiguous (K, rows, cols) in blocks (height, width) of one k at a time."""
    if t is None or not described:
        return None
    # Not t.stride(): an axis of length one may have any.
    _, rows, cols = t.shape
    return TensorDescriptor(t, list(t.shape), [rows * cols, cols, 1], [1, height, width])
