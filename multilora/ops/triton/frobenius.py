"""The adapters' Frobenius geometry and SVGD's update as Triton kernels, all layers in one launch.

With the factors of all particles stacked, A_cat (K·r, d_in) and B_cat (d_out, K·r), everything
follows from G_A = A_cat A_catᵀ and G_B = B_catᵀ B_cat of every layer:
1. partial: products over a stretch of d -> workspace (float64; those of float32 factors are exact);
2. trace: T_ij = s² ⟨G_A, G_B⟩ over the blocks (i, j), or the distances made of T;
   weigh: W = (U ⊗ 1) ∘ G, in place;
3. apply: dA_cat = W_B A_cat, dB_cat = B_cat W_A, and SVGD's mixed gradients on top.
An item is one factor of one layer: all lora_A, then all lora_B. A unit is what a program does.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from multilora.ops.common import TABLE_IS_NOT_THERE, accumulator
from multilora.ops.triton.common import cdiv, chip, dot, launch
from multilora.ops.triton.configs import Geometry, geometry, geometry_trace

# The fields of an item, int64 each: the feature axis, the rank, the start of its Gram matrix in the
# workspace, the number of its parts, the features of each part, its first units.
_D = tl.constexpr(0)
_RANK = tl.constexpr(1)
_OFFSET = tl.constexpr(2)
_SPLITS = tl.constexpr(3)
_CHUNK = tl.constexpr(4)
_PARTIAL_FIRST = tl.constexpr(5)
_APPLY_FIRST = tl.constexpr(6)
_FIELDS = tl.constexpr(7)


@triton.jit
def _field(items, item, FIELD: tl.constexpr, DIVISOR: tl.constexpr):
    """One field of an item, known to be a multiple of DIVISOR."""
    return tl.multiple_of(tl.load(items + item * _FIELDS + FIELD), DIVISOR)


@triton.jit
def _rank(items, item, RANK: tl.constexpr):
    """The item's rank; a constant where the host knows one for all."""
    return tl.load(items + item * _FIELDS + _RANK).to(tl.int32) if RANK == 0 else RANK


@triton.jit
def _pointer(pointers, item, like, VECTOR: tl.constexpr):
    pointer = tl.load(pointers + item).to(like.dtype)
    return tl.multiple_of(pointer, 16) if VECTOR > 1 else pointer


@triton.jit
def _where(c, at, particles, d, rank, LORA_B: tl.constexpr, RANK: tl.constexpr):
    """Offsets and mask of rows c of A_cat, or columns c of B_cat, at the features `at`."""
    offsets = c * d + at  # (K, r, d)
    if LORA_B:  # (K, d, r)
        offsets = c // rank * (d * rank) + at * rank + c % rank
    return offsets, (c < _rows(particles, rank, RANK)) & (at < d)


@triton.jit
def _rows(particles, rank, RANK: tl.constexpr):
    return tl.multiple_of(particles * rank, RANK) if RANK > 0 else particles * rank


@triton.jit
def _load_rows(x, c, at, particles, d, rank, LORA_B: tl.constexpr, RANK: tl.constexpr):
    offsets, mask = _where(c, at, particles, d, rank, LORA_B, RANK)
    values = tl.load(x + offsets, mask=mask, other=0.0)
    if values.dtype.primitive_bitwidth == 16:
        # The compiler gives operands that it can follow back to 16 bits a layout that float64
        # products do not have. A sum over one element is exact, and where it stops following.
        values = tl.sum(values.to(tl.float32)[:, :, None], 2)
    return values.to(tl.float64)


@triton.jit
def _gram_tile(
    x, rows, cols, start, stop, particles, d, rank,
    LORA_B: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Σ x[rows, at] x[cols, at] over start <= at < stop."""
    acc = tl.zeros((BLOCK, BLOCK), tl.float64)
    for first in range(start, stop, BLOCK_D):
        at = first + tl.arange(0, BLOCK_D)
        # On the diagonal both are the same rows, loaded in both orders all the same: the compiler
        # does not pipeline the load of a value that is also transposed.
        left = _load_rows(x, rows[:, None], at[None, :], particles, d, rank, LORA_B, RANK)
        right = _load_rows(x, cols[None, :], at[:, None], particles, d, rank, LORA_B, RANK)
        acc = dot(left, right, acc, "ieee")
    return acc


@triton.jit
def _lora_gram_partial_kernel(
    like,
    factors,
    items,
    units,
    work,
    layers,
    particles,
    tiles,
    RANK: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    unit = tl.program_id(0) // (tiles * tiles)
    tile = tl.program_id(0) % (tiles * tiles)
    row = tile // tiles * BLOCK
    col = tile % tiles * BLOCK
    item = tl.load(units + unit).to(tl.int32)
    rank = _rank(items, item, RANK)
    n = particles * rank
    # The Gram matrix is symmetric; layers of a lower rank have fewer tiles.
    if (row > col) | (col >= n):
        return
    d = _field(items, item, _D, VECTOR)
    chunk = _field(items, item, _CHUNK, BLOCK_D).to(tl.int32)
    split = unit - tl.load(items + item * _FIELDS + _PARTIAL_FIRST).to(tl.int32)
    start = split * chunk
    stop = tl.minimum(start + chunk, d).to(tl.int32)
    x = _pointer(factors, item, like, VECTOR)
    rows = row + tl.arange(0, BLOCK)
    cols = col + tl.arange(0, BLOCK)
    if item < layers:
        acc = _gram_tile(
            x, rows, cols, start, stop, particles, d, rank, False, RANK, BLOCK, BLOCK_D
        )
    else:
        acc = _gram_tile(x, rows, cols, start, stop, particles, d, rank, True, RANK, BLOCK, BLOCK_D)
    gram = work + tl.load(items + item * _FIELDS + _OFFSET) + split.to(tl.int64) * n * n
    mask = (rows[:, None] < n) & (cols[None, :] < n)
    tl.store(gram + rows[:, None].to(tl.int64) * n + cols[None, :], acc, mask=mask)
    if row < col:
        tl.store(gram + cols[None, :].to(tl.int64) * n + rows[:, None], acc, mask=mask)


@triton.jit
def _sum_splits(work, items, item, offsets, n, mask):
    """Elements of an item's Gram matrix: its parts, summed in their order."""
    part = work + tl.load(items + item * _FIELDS + _OFFSET)
    total = tl.zeros(offsets.shape, tl.float64)
    for _ in range(tl.load(items + item * _FIELDS + _SPLITS).to(tl.int32)):
        total += tl.load(part + offsets, mask=mask, other=0.0)
        part += n.to(tl.int64) * n
    return total


@triton.jit
def _traces(
    work,
    items,
    layer,
    layers,
    i,
    j,
    b,
    particles,
    rank,
    BLOCK_J: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """Σ_ab G_A[i·r + a, j·r + b] G_B[i·r + a, j·r + b] for all j (BLOCK_J)."""
    n = particles * rank
    total = tl.zeros((BLOCK_J * BLOCK_B,), tl.float64)
    for first in range(0, rank, BLOCK_A):
        a = first + tl.arange(0, BLOCK_A)[:, None]
        offsets = (i * rank + a).to(tl.int64) * n + (j * rank + b)
        mask = (a < rank) & (b < rank) & (j < particles)
        gram_A = _sum_splits(work, items, layer, offsets, n, mask)
        gram_B = _sum_splits(work, items, layers + layer, offsets, n, mask)
        total += tl.sum(gram_A * gram_B, 0)
    return tl.sum(tl.reshape(total, (BLOCK_J, BLOCK_B)), 1)


@triton.jit
def _lora_gram_trace_kernel(
    out,
    work,
    items,
    scales,
    layers,
    particles,
    DISTANCE: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """A row of T or of D a program."""
    layer = tl.program_id(0) // particles
    i = tl.program_id(0) % particles
    rank = tl.load(items + layer * _FIELDS + _RANK).to(tl.int32)
    columns = tl.arange(0, BLOCK_J * BLOCK_B)[None, :]
    j, b = columns // BLOCK_B, columns % BLOCK_B
    value = _traces(work, items, layer, layers, i, j, b, particles, rank, BLOCK_J, BLOCK_A, BLOCK_B)
    others = tl.arange(0, BLOCK_J)
    if DISTANCE:
        norms = _traces(
            work, items, layer, layers, j, j, b, particles, rank, BLOCK_J, BLOCK_A, BLOCK_B
        )
        value = tl.sum(tl.where(others == i, norms, 0.0), 0) + norms - 2 * value
        # Not a maximum, which would hide a NaN.
        value = tl.where((value < 0) | (others == i), 0.0, value)
    scale = tl.load(scales + layer)
    value *= scale * scale
    row = out + tl.program_id(0).to(tl.int64) * particles
    tl.store(row + others, value.to(out.dtype.element_ty), mask=others < particles)


@triton.jit
def _lora_gram_weigh_kernel(
    work, items, grad, scales, layers, particles, blocks, BLOCK: tl.constexpr
):
    """W = (U ⊗ 1) ∘ G with U = s² (grad + gradᵀ), over the first part of G."""
    item = tl.program_id(0) // blocks
    layer = item % layers
    rank = tl.load(items + item * _FIELDS + _RANK).to(tl.int32)
    n = particles * rank
    index = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    mask = index < n * n
    i = index // n // rank
    j = index % n // rank
    upstream = grad + layer.to(tl.int64) * particles * particles
    U = tl.load(upstream + i * particles + j, mask=mask, other=0.0).to(tl.float64)
    U += tl.load(upstream + j * particles + i, mask=mask, other=0.0).to(tl.float64)
    scale = tl.load(scales + layer)
    weighed = _sum_splits(work, items, item, index, n, mask) * (U * (scale * scale))
    tl.store(work + tl.load(items + item * _FIELDS + _OFFSET) + index, weighed, mask=mask)


@triton.jit
def _apply_tile(
    x, g, out, weight, mix, row, at, particles, d, rank,
    LORA_B: tl.constexpr,
    MIX: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out[m, at] = Σ_c W[m, c] x[c, at] + Σ_j mix[m // r, j] g[j·r + m % r, at], m = row..."""
    n = _rows(particles, rank, RANK)
    m = row + tl.arange(0, BLOCK_M)[:, None]
    at = at[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float64)
    for first in range(0, n, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        mask = (m < n) & (c[None, :] < n)
        w = tl.load(weight + m.to(tl.int64) * n + c[None, :], mask=mask, other=0.0)
        values = _load_rows(x, c[:, None], at, particles, d, rank, LORA_B, RANK)
        acc = dot(w, values, acc, "ieee")
        if MIX == 2:
            # mix ⊗ 1: factors of different particles, each component with its like.
            same = mask & (m % rank == c[None, :] % rank)
            v = tl.load(mix + m // rank * particles + c[None, :] // rank, mask=same, other=0.0)
            values = _load_rows(g, c[:, None], at, particles, d, rank, LORA_B, RANK)
            acc = dot(v.to(tl.float64), values, acc, "ieee")
    if MIX == 1:
        v = tl.load(mix + m // rank, mask=m < n, other=0.0).to(tl.float64)
        acc += v * _load_rows(g, m, at, particles, d, rank, LORA_B, RANK)
    offsets, mask = _where(m, at, particles, d, rank, LORA_B, RANK)
    if out.dtype.element_ty == tl.bfloat16:
        acc = acc.to(tl.float32)
    tl.store(out + offsets, acc.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _lora_gram_apply_kernel(
    like,
    factors,
    grads,
    outs,
    items,
    units,
    work,
    mix,
    layers,
    particles,
    tiles,
    MIX: tl.constexpr,
    RANK: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """MIX: 0, no gradients; 1, mix (L, K); 2, mix (L, K, K)."""
    unit = tl.program_id(0) // tiles
    row = tl.program_id(0) % tiles * BLOCK_M
    item = tl.load(units + unit).to(tl.int32)
    rank = _rank(items, item, RANK)
    if row >= particles * rank:
        return
    layer = (item % layers).to(tl.int64)
    d = _field(items, item, _D, VECTOR)
    first = tl.load(items + item * _FIELDS + _APPLY_FIRST).to(tl.int32)
    at = (unit - first) * BLOCK_D + tl.arange(0, BLOCK_D)
    x = _pointer(factors, item, like, VECTOR)
    out = _pointer(outs, item, like, VECTOR)
    g = _pointer(grads, item, like, VECTOR)
    mix += layer * particles * particles if MIX == 2 else layer * particles
    EVEN: tl.constexpr = RANK if RANK > 0 else 1
    # The gradient of lora_A takes the products of lora_B, and the other way round.
    if item < layers:
        weight = work + _field(items, item + layers, _OFFSET, EVEN)
        _apply_tile(
            x, g, out, weight, mix, row, at, particles, d, rank,
            False, MIX, RANK, BLOCK_M, BLOCK_C, BLOCK_D,
        )  # fmt: skip
    else:
        weight = work + _field(items, item - layers, _OFFSET, EVEN)
        _apply_tile(
            x, g, out, weight, mix, row, at, particles, d, rank,
            True, MIX, RANK, BLOCK_M, BLOCK_C, BLOCK_D,
        )  # fmt: skip


@triton.jit
def _pointer_table_kernel(table, pointers):
    """table[i] = pointers[i]. They come by value: there is no copy to wait for, and a captured
    graph keeps them."""
    for i in tl.static_range(len(pointers)):
        tl.store(table + i, pointers[i])


def traces(
    lora_A: list[Tensor], lora_B: list[Tensor], scaling: list[float], distance: bool
) -> Tensor:
    """The traces T (L, K, K), or the distances D made of them."""
    factors = [t.contiguous() for t in (*lora_A, *lora_B)]
    plan = _plan_of(lora_A, lora_B, scaling)
    work, (items, _, _, scales), _ = _gram_partials(plan, factors)
    layers, particles = len(lora_A), lora_A[0].shape[0]
    out = factors[0].new_empty(layers, particles, particles, dtype=accumulator(factors[0].dtype))
    config = geometry_trace(particles, plan.max_rank)
    launch(
        _lora_gram_trace_kernel,
        (layers * particles,),
        out,
        work,
        items,
        scales,
        layers,
        particles,
        DISTANCE=distance,
        BLOCK_J=config.block_j,
        BLOCK_A=config.block_a,
        BLOCK_B=config.block_b,
        num_warps=config.warps,
    )
    return out


def factor_gradients(
    upstream: Tensor,
    lora_A: list[Tensor],
    lora_B: list[Tensor],
    scaling: list[float],
    mix: Tensor | None = None,
    grads: list[Tensor] | None = None,
) -> list[Tensor]:
    """The gradients for dL/dT = upstream, plus grads mixed."""
    factors = [t.contiguous() for t in (*lora_A, *lora_B)]
    plan = _plan_of(lora_A, lora_B, scaling)
    work, (items, _, units, scales), table = _gram_partials(plan, factors)
    layers, particles = len(lora_A), lora_A[0].shape[0]
    blocks = cdiv((particles * plan.max_rank) ** 2, _WEIGH_BLOCK)
    launch(
        _lora_gram_weigh_kernel,
        (2 * layers * blocks,),
        work,
        items,
        upstream.contiguous(),
        scales,
        layers,
        particles,
        blocks,
        BLOCK=_WEIGH_BLOCK,
    )
    outs = [torch.empty_like(t) for t in factors]
    outs_table = _pointer_table(outs)
    # Without gradients these two arguments are not read.
    grads = [t.contiguous() for t in grads] if grads is not None else factors
    grads_table = _pointer_table(grads) if grads is not factors else table
    config = plan.config
    tiles = cdiv(particles * plan.max_rank, config.apply_block)
    launch(
        _lora_gram_apply_kernel,
        (plan.apply_units * tiles,),
        factors[0],
        table,
        grads_table,
        outs_table,
        items,
        units,
        work,
        mix.contiguous() if mix is not None else work,
        layers,
        particles,
        tiles,
        MIX=0 if mix is None else mix.ndim - 1,
        RANK=plan.rank,
        VECTOR=_vector(plan, [*factors, *grads, *outs]),
        BLOCK_M=config.apply_block,
        BLOCK_C=config.apply_block_c,
        BLOCK_D=config.apply_block_d,
        num_warps=config.apply_warps,
        num_stages=config.stages,
        maxnreg=config.apply_registers(plan.rank),
    )
    return outs


_WEIGH_BLOCK = 256
# The pointers that one launch writes: its parameters may have 4 KB.
_POINTERS = 256


def _gram_partials(
    plan: _Plan, factors: list[Tensor]
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The workspace with all Gram matrices in parts, the plan on the device, the pointers."""
    device = factors[0].device
    items, partial_units, apply_units, scales = _on_device(plan, device)
    table = _pointer_table(factors)
    layers, particles = len(factors) // 2, factors[0].shape[0]
    work = factors[0].new_empty(plan.workspace, dtype=torch.float64)
    config = plan.config
    tiles = cdiv(particles * plan.max_rank, config.block)
    launch(
        _lora_gram_partial_kernel,
        (plan.partial_units * tiles * tiles,),
        factors[0],
        table,
        items,
        partial_units,
        work,
        layers,
        particles,
        tiles,
        RANK=plan.rank,
        VECTOR=_vector(plan, factors),
        BLOCK=config.block,
        BLOCK_D=config.block_d,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    return work, (items, partial_units, apply_units, scales), table


@dataclass(frozen=True, eq=False)
class _Plan:
    """How the work is cut: `values` are the items, the units of both kernels and the scalings.

    rank: the one rank of all layers where that is a power of two, else 0.
    """

    config: Geometry
    values: list[int]
    scaling: list[float]
    partial_units: int
    apply_units: int
    workspace: int
    rank: int
    max_rank: int
    vector: int


# The kernels count the elements of a Gram matrix, of float64, with 32 bits.
_MOST_ROWS = 46_340


def refuses(lora_A: list[Tensor]) -> str | None:
    """Why the kernels do not take these factors, or None."""
    rows = max(A.shape[0] * A.shape[1] for A in lora_A)
    if rows > _MOST_ROWS:
        return f"the kernels hold Gram matrices of at most {_MOST_ROWS} rows (17 GB), not {rows}"
    return None


def _plan_of(lora_A: list[Tensor], lora_B: list[Tensor], scaling: list[float]) -> _Plan:
    first = lora_A[0]
    sizes = tuple((A.shape[1], A.shape[2], B.shape[1]) for A, B in zip(lora_A, lora_B))
    return _plan(first.shape[0], sizes, tuple(scaling), first.dtype, chip(first.device))


@functools.cache
def _plan(particles, sizes, scaling, dtype, chip) -> _Plan:
    ranks = tuple(rank for rank, _, _ in sizes)
    widths = tuple(d_in for _, d_in, _ in sizes) + tuple(d_out for _, _, d_out in sizes)
    config = geometry(particles, ranks, widths, dtype, chip)
    items: list[int] = []
    partial: list[int] = []
    apply: list[int] = []
    offset = 0
    for item, (rank, d) in enumerate(zip(ranks * 2, widths)):
        # Parts of equal length, whole steps each.
        splits = cdiv(d, config.chunk)
        chunk = cdiv(cdiv(d, max(splits, 1)), config.block_d) * config.block_d
        splits = cdiv(d, chunk) if d else 0
        items += [d, rank, offset, splits, chunk, len(partial), len(apply)]
        partial += [item] * splits
        apply += [item] * cdiv(d, config.apply_block_d)
        # One at least: a layer without features still has a Gram matrix, of zeros.
        offset += max(splits, 1) * (particles * rank) ** 2
    rank = ranks[0] if len(set(ranks)) == 1 and ranks[0] & (ranks[0] - 1) == 0 else 0
    vector = 16 // dtype.itemsize
    if any(d % vector for d in widths):
        vector = 1
    return _Plan(
        config,
        items + partial + apply,
        list(scaling),
        len(partial),
        len(apply),
        offset,
        rank,
        max(ranks),
        vector,
    )


def _vector(plan: _Plan, tensors: list[Tensor]) -> int:
    """How many elements 16 bytes are where every row starts at a multiple of them, else 1."""
    return plan.vector if all(t.data_ptr() % 16 == 0 for t in tensors) else 1


@functools.cache
def _on_device(plan: _Plan, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The plan's tables; copied once for the sizes of a model, and kept, as captured graphs read
    them."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(TABLE_IS_NOT_THERE)
    layers = len(plan.scaling)
    scales = torch.tensor(plan.scaling, dtype=torch.float64, device="cpu").view(torch.int64)
    values = torch.cat([torch.tensor(plan.values, device="cpu"), scales]).to(device)
    parts = [2 * layers * _FIELDS.value, plan.partial_units, plan.apply_units, layers]
    items, partial, apply, scales = values.split(parts)
    return items, partial, apply, scales.view(torch.float64)


def _pointer_table(tensors: list[Tensor]) -> Tensor:
    """The tensors' addresses, on their device."""
    table = tensors[0].new_empty(len(tensors), dtype=torch.int64)
    for first in range(0, len(tensors), _POINTERS):
        some = tuple(t.data_ptr() for t in tensors[first : first + _POINTERS])
        launch(_pointer_table_kernel, (1,), table[first:], some, num_warps=1)
    return table
