"""The large product of the LoRA linear: one GEMM kernel for y and dX.

It runs over the virtual concatenation [X | S]·[W | sB]ᵀ: the low-rank product is one more step of
depth r on the same accumulator, so y is written once and never read. dX = [dY | dS]·[W ; A] is the
same kernel with W in the other operand order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from multilora.ops.triton.blocks import describable, load_block, store_block
from multilora.ops.triton.common import Chip, Launch, accumulator_of, cdiv, dot, precision
from multilora.ops.triton.configs import LoraGemm, lora_expand


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
    q_ptr += tl.cast(k, tl.int64) * stride_k + tl.cast(col, tl.int64) * stride_c
    q_ptr += tl.cast(first, tl.int64) * stride_r
    c, j = tl.arange(0, BLOCK_N)[:, None], tl.arange(0, BLOCK_R)[None, :]
    mask = (c < cols - col) & (j < rank - first)
    # A factor may be a view whose axes are far apart.
    q_ptrs = (q_ptr + c.to(tl.int64) * stride_c) + j.to(tl.int64) * stride_r
    q = tl.load(q_ptrs, mask=mask, other=0.0)
    # In float32: a product with a scalar would stay in the master's dtype.
    return (tl.cast(q, accumulator_of(dtype)) * SCALING).to(dtype)


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
        s = load_block(
            None, s_ptr, k, row, step * BLOCK_R, rows, rank, False, BLOCK_M, BLOCK_R
        )  # fmt: skip
        q = _load_expander(
            q_ptr, k, col, step * BLOCK_R, cols, rank,
            q_stride_k, q_stride_c, q_stride_r, SCALING, s.dtype, BLOCK_N, BLOCK_R,
        )  # fmt: skip
        acc = dot(s, q.T, acc, PRECISION)
    return acc


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
    SHARED: "", each particle has its own rows; "out", one X serves all Y_k; "in", one Y sums
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
            s = load_block(None, s_ptr, k, row, 0, rows, rank, False, BLOCK_M, BLOCK_R)
            q = _load_expander(
                q_ptr, k, col, 0, cols, rank, q_stride_k, q_stride_c, q_stride_r, SCALING,
                y_ptr.dtype.element_ty, BLOCK_N, BLOCK_R,
            )  # fmt: skip

        acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
        if SHRINK:
            shrunk = tl.zeros((BLOCK_M, BLOCK_R), ACC)
        for i in range(0, depth, BLOCK_K):
            x = load_block(
                x_desc, x_ptr, k, row, i, rows, depth, DESCRIBED, BLOCK_M, BLOCK_K
            )  # fmt: skip
            if W_DEPTH_FIRST:
                w = load_block(
                    w_desc, w_ptr, 0, i, col, depth, cols, DESCRIBED, BLOCK_K, BLOCK_N
                )  # fmt: skip
            else:
                w = load_block(
                    w_desc, w_ptr, 0, col, i, cols, depth, DESCRIBED, BLOCK_N, BLOCK_K
                ).T  # fmt: skip
            acc = dot(x, w, acc, PRECISION)
            if SHRINK:
                p = load_block(
                    p_desc, p_ptr, k, 0, i, rank, depth, DESCRIBED, BLOCK_R, BLOCK_K
                )  # fmt: skip
                shrunk = dot(x, p.T, shrunk, PRECISION)
        if SHRINK:
            s = shrunk.to(y_ptr.dtype.element_ty)
            if n == 0:
                store_block(None, s_ptr, s, k, row, 0, rows, rank, False, BLOCK_M, BLOCK_R)
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
                    store_block(
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
            store_block(
                y_desc, y_ptr, acc, k, row, col, rows, cols, DESCRIBED, BLOCK_M, BLOCK_N
            )  # fmt: skip


def gemm(
    sizes: tuple[int, int, int, int, int],
    shared: str,
    w_depth_first: bool,
    has_bias: bool,
    strides: tuple[int, int, int],
    scaling: float,
    dtype: torch.dtype,
    chip: Chip,
    config: LoraGemm,
) -> Launch:
    """The kernel's launch, to be called with x (K or 1, T, depth), weight, shrinker, y (K or 1, T,
    cols), S (K, T, r), expander (K, cols, r) and bias, all but the expander contiguous.

    sizes are K, T, depth, cols and r; strides are the expander's. The shrinker (K, r, depth), in
    `dtype`, is None but where the path is "shrink inside". All but the expander and S start at
    multiples of 16 bytes.
    """
    particles, rows, depth, cols, rank = sizes
    shrink = config.path == "shrink inside"
    m, n, k, r = config.block_m, config.block_n, config.block_k, config.block_r
    strips = (1 if shared else particles) * cdiv(rows, m)
    described = describable(chip, dtype, depth, cols)
    blocks = (
        ((1 if shared else particles, rows, depth), (m, k)),
        ((1, depth, cols), (k, n)) if w_depth_first else ((1, cols, depth), (n, k)),
        ((particles, rank, depth), (r, k)) if shrink else None,
        ((1 if shared == "in" else particles, rows, cols), (m, n)),
    )
    return Launch(
        _lora_linear_gemm_kernel,
        (min(config.programs * chip.processors, strips * cdiv(cols, n)),),
        blocks if described else (None,) * 4,
        (*sizes, *strides),
        SCALING=scaling,
        SHRINK=shrink,
        SHARED=shared,
        W_DEPTH_FIRST=w_depth_first,
        HAS_BIAS=has_bias,
        DESCRIBED=described,
        RANK_STEPS=cdiv(rank, r),
        BLOCK_M=m,
        BLOCK_N=n,
        BLOCK_K=k,
        BLOCK_R=r,
        GROUP=config.group,
        FLATTEN=config.flatten,
        PRECISION=precision(dtype),
        num_warps=config.warps,
        num_stages=config.stages,
    )


@triton.jit
def _lora_linear_expand_kernel(
    s_ptr,  # S (K, rows, rank)
    q_ptr,  # Q (K, cols, rank), by its strides
    bias_ptr,
    y_ptr,  # Y (K, rows, cols)
    rows,
    cols,
    rank,
    q_stride_k,
    q_stride_c,
    q_stride_r,
    SCALING: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RANK_STEPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Y_k = bias + S_k (s·Q_k)ᵀ, a tile a program: y is written once and never read."""
    ACC: tl.constexpr = accumulator_of(y_ptr.dtype.element_ty)
    tiles_n = tl.cdiv(cols, BLOCK_N)
    row = tl.program_id(0) // tiles_n * BLOCK_M
    col = tl.program_id(0) % tiles_n * BLOCK_N
    k = tl.program_id(1)
    acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    acc = _expand(
        acc, s_ptr, q_ptr, k, row, col, rows, cols, rank,
        q_stride_k, q_stride_c, q_stride_r, SCALING,
        0, RANK_STEPS, BLOCK_M, BLOCK_N, BLOCK_R, PRECISION,
    )  # fmt: skip
    if HAS_BIAS:
        c = col + tl.arange(0, BLOCK_N)
        acc += tl.load(bias_ptr + c, mask=c < cols, other=0.0).to(ACC)[None, :]
    store_block(None, y_ptr, acc, k, row, col, rows, cols, False, BLOCK_M, BLOCK_N)


def expand(
    particles: int,
    rows: int,
    cols: int,
    rank: int,
    has_bias: bool,
    strides: tuple[int, int, int],
    scaling: float,
    dtype: torch.dtype,
) -> Launch:
    """y = bias + S·(scaling·expander)ᵀ, to be called with S (K, T, r), expander (K, cols, r) of
    these strides, bias and y (K, T, cols): what comes before a product that adds to y.

    Not baddbmm: where y is not its first argument, it copies that into y before it adds.
    """
    config = lora_expand(rank, dtype)
    m, n, r = config.block_m, config.block_n, config.block_r
    return Launch(
        _lora_linear_expand_kernel,
        (cdiv(rows, m) * cdiv(cols, n), particles),
        (),
        (rows, cols, rank, *strides),
        SCALING=scaling,
        HAS_BIAS=has_bias,
        RANK_STEPS=cdiv(rank, r),
        BLOCK_M=m,
        BLOCK_N=n,
        BLOCK_R=r,
        PRECISION=precision(dtype),
        num_warps=config.warps,
    )
