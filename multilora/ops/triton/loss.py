"""The Gram volume and its fusion with cross-entropy: one read of the logits, one write of dlogits.

Dims: K particles, N examples, C classes, e = exp(z − top) without the target's class. A tile of
logits is (K, V, N, LANES): a thread owns V classes of all particles of one example, so it adds up
its own part of the Gram matrix of e without a word to the others, under a running maximum of its
own. For more particles than its registers hold, a tile has one lane and the Gram matrix is a
product of float64 tensor cores.

The Gram matrix is float64 from its products on. An example is then reduced to K·(K + 2) numbers;
all that follows is float64 too, and where the sides are classes so is the gradient. The
formulas and the reasons are in reference.py.
"""

# Triton wants a constexpr to be declared in each branch that gives it a value.
# mypy: disable-error-code="no-redef"

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from multilora.ops.common import IGNORE_INDEX, accumulator, check_targets, core_dtype
from multilora.ops.triton import configs
from multilora.ops.triton.common import accumulator_of, cdiv, chip, dot, launch

MAX_PARTICLES = 32

# Triton reads globals in kernels only as constants.
_IGNORED = tl.constexpr(IGNORE_INDEX)

# A target out of range is reported from the device; the compiler's own overflow checks, which come
# with device_assert, stay off.
_ASSERTS = {"debug": True, "sanitize_overflow": False}


@triton.jit
def _labels(targets_ptr, examples, N, C):
    """-> targets and whether they take part, of shape examples."""
    y = tl.load(targets_ptr + examples, mask=examples < N, other=_IGNORED)
    return y, (y >= 0) & (y < C)


@triton.jit
def _places(chunk, stride_k, stride_n, examples, LANES: tl.constexpr, V: tl.constexpr,
            ALIGNED: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """The classes of a chunk, (LANES, 1, 1, V), and their offsets, (LANES, N, K, V).

    In memory's order: Triton deals the first axes to the threads first, and so all particles to
    one thread. _tile turns the axes.
    """
    lane = tl.arange(0, LANES)[:, None, None, None]
    v = tl.arange(0, V)[None, None, None, :]
    if ALIGNED:
        # A thread's classes lie side by side: loads of 16 bytes.
        classes = chunk * (LANES * V) + lane * V + v
    else:
        classes = chunk * (LANES * V) + v * LANES + lane
    k = tl.arange(0, BLOCK_K).to(tl.int64)[None, None, :, None]
    n = examples.to(tl.int64)[None, :, None, None]
    return classes, k * stride_k + n * stride_n + classes


@triton.jit
def _load_logits(
    logits_ptr, stride_k, stride_n, examples, valid, chunk, end, K: tl.constexpr,
    LANES: tl.constexpr, V: tl.constexpr, ALIGNED: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The logits of a chunk's classes before `end`, −∞ in padding and for ignored examples."""
    classes, places = _places(chunk, stride_k, stride_n, examples, LANES, V, ALIGNED, BLOCK_K)
    k = tl.arange(0, BLOCK_K)[None, None, :, None]
    mask = (k < K) & valid[None, :, None, None] & (classes < end)
    return tl.load(logits_ptr + places, mask=mask, other=-float("inf"))


@triton.jit
def _own_chunks(C, CHUNK: tl.constexpr):
    """This program's part of the classes: its first chunk, the one behind its last, its end."""
    chunks = tl.cdiv(C, CHUNK)
    each = tl.cdiv(chunks, tl.num_programs(1))
    first = tl.program_id(1) * each
    last = tl.minimum(first + each, chunks)
    return first, last, tl.minimum(last * CHUNK, C)


@triton.jit
def _on_target(y, chunk, LANES: tl.constexpr, V: tl.constexpr, ALIGNED: tl.constexpr):
    """Whether a class of the chunk is its example's target: (1, V, N, LANES)."""
    classes, _ = _places(chunk, 0, 0, y, LANES, V, ALIGNED, 1)
    return _tile(classes == y[None, :, None, None])


@triton.jit
def _tile(x):
    """(LANES, N, K, V) -> (K, V, N, LANES)"""
    return tl.permute(x, (2, 3, 1, 0))


@triton.jit
def _exp(x):
    if x.dtype == tl.float64:
        return tl.exp(x)
    # exp2 takes half as many instructions; it flushes results below 1e-38 to zero.
    return tl.exp2(x * 1.4426950408889634)


@triton.jit
def _matrix(x):
    """A tile (., ., 1, 1) or (., ., 1) as a matrix (., .) of float64.

    The sums of one term each hide from the compiler that the numbers were loaded as 16 bits, for
    which it would choose a layout that products of float64 do not have.
    """
    for _ in tl.static_range(len(x.shape) - 2):
        x = tl.sum(x, 2)
    return x.to(tl.float64)


@triton.jit
def _pairs(x):
    """The products of all pairs of particles (K, ...), in float64: (K, K, ...)."""
    x = x.to(tl.float64)
    return x[:, None] * x[None]


@triton.jit
def _finite(top):
    """top, or 0 where nothing has been seen yet: −∞ − (−∞) has no value."""
    return tl.where(top == -float("inf"), 0.0, top)


@triton.jit
def _merge_lanes(top, rest, gram):
    """Lanes, each with its own maximum -> (K, N), (K, N), (K, K, N) under the common one."""
    highest = tl.max(top, 2)
    shrink = _exp(top - _finite(highest)[:, :, None])
    rest = tl.sum(rest * shrink, 2)
    gram = tl.sum(gram * _pairs(shrink), 3)
    return highest, rest, gram


@triton.jit
def _negative_inverse(matrix, side, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr, PIVOT: tl.constexpr,
                      FLOOR: tl.constexpr):  # fmt: skip
    """Symmetric sweeps of positive semidefinite matrices (BLOCK, BLOCK, N), the first `side` rows.

    -> −matrix⁻¹, log det and det. No pivot is smaller than FLOOR; with PIVOT the largest comes
    first, so that the floor is met only where the rest of the matrix is rounding, which is then
    taken for zero beside the diagonal: it would grow from sweep to sweep.
    """
    i = tl.arange(0, BLOCK)
    log_det = tl.zeros([BLOCK_N], tl.float64)
    det = tl.full([BLOCK_N], 1.0, tl.float64)
    if PIVOT:
        swept = (i[:, None] >= side) & (tl.zeros([BLOCK, BLOCK_N], tl.int32) == 0)
    for step in range(side):
        if PIVOT:
            own = tl.where(i[:, None, None] == i[None, :, None], matrix, 0.0)
            diagonal = tl.sum(own, 1)
            # A NaN counts as 0 here, and spoils its example when its turn comes.
            diagonal = tl.where(diagonal > 0, diagonal, 0.0)
            pivot = tl.argmax(tl.where(swept, -1.0, diagonal), 0)[None, :]
            swept = swept | (i[:, None] == pivot)
        else:
            pivot = tl.zeros([1, BLOCK_N], tl.int32) + step
        hit = i[:, None] == pivot
        row = tl.sum(tl.where(hit[:, None, :], matrix, 0.0), 0)
        d = tl.sum(tl.where(hit, row, 0.0), 0)
        if PIVOT:
            row = tl.where((d < FLOOR)[None, :] & ~swept, 0.0, row)
        d = tl.where(d < FLOOR, FLOOR, d)
        log_det += tl.log(d)
        det *= d
        inverse = 1.0 / d
        scaled = row * inverse[None, :]
        matrix = tl.where(
            hit[:, None, :],
            tl.where(hit[None, :, :], -inverse[None, None, :], scaled[None, :, :]),
            tl.where(
                hit[None, :, :],
                scaled[:, None, :],
                matrix - row[:, None, :] * scaled[None, :, :],
            ),
        )
    return matrix, log_det, det


@triton.jit
def _finish(
    top, rest, gram, logits_ptr, targets_ptr, value_ptr, stats_ptr, core_ptr,
    stride_k, stride_n, examples, N, C, eps, log_eps,
    K: tl.constexpr, KIND: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr, CLASS_SIDE: tl.constexpr,
):  # fmt: skip
    """All that the Gram matrices of e decide. CLASS_SIDE: C, padded, where K >= C, or 0."""
    y, valid = _labels(targets_ptr, examples, N, C)
    k = tl.arange(0, BLOCK_K)
    live = (k[:, None] < K) & valid[None, :]
    top = tl.where(live, top, 0.0)
    rest = tl.where(live, rest, 1.0)
    diagonal = tl.where(k[:, None, None] == k[None, :, None], gram, 0.0)
    norm = tl.where(live, tl.sqrt(tl.sum(diagonal, 1)), 1.0)

    inside = examples < N
    rows = k.to(tl.int64)[:, None] * N + examples[None, :]
    mask = (k[:, None] < K) & inside[None, :]
    size = tl.full([], K, tl.int64) * N
    tl.store(stats_ptr + rows, top, mask=mask)
    tl.store(stats_ptr + size + rows, norm, mask=mask)
    tl.store(stats_ptr + 2 * size + rows, rest, mask=mask)

    if KIND == "zero":
        tl.store(value_ptr + examples, tl.zeros([BLOCK_N], tl.float64), mask=inside)
    else:
        if CLASS_SIDE:
            BLOCK: tl.constexpr = CLASS_SIDE
            side = C
            matrix = _class_gram(
                logits_ptr, stride_k, stride_n, examples, y, valid, top, norm, C, K, BLOCK_K,
                CLASS_SIDE,
            )  # fmt: skip
        else:
            BLOCK: tl.constexpr = BLOCK_K
            side = K
            inverse = 1.0 / norm
            matrix = gram * (inverse[:, None, :] * inverse[None, :, :])
        i = tl.arange(0, BLOCK)[:, None, None]
        j = tl.arange(0, BLOCK)[None, :, None]
        damping = tl.full([1, 1, 1], eps, tl.float64)
        if KIND == "logdet":
            matrix += tl.where((i == j) & (i < side), damping, 0.0)
            core, log_det, _ = _negative_inverse(matrix, side, BLOCK, BLOCK_N, False, 1e-30)
            value = tl.full([1], log_eps, tl.float64) * side - log_det
            if not CLASS_SIDE:
                # core − diag(core G), where core (G + eps) = −1
                own = tl.sum(tl.where(i == j, core, 0.0), 1)
                core += tl.where(i == j, 1.0 + damping * own[:, None, :], 0.0)
        else:
            core, _, det = _negative_inverse(matrix, side, BLOCK, BLOCK_N, True, 1e-15 * K)
            value = -det
            # core − diag(core G), where core = −adj G
            core = tl.where(i == j, core + 1.0, core) * det[None, None, :]
        n = examples.to(tl.int64)
        places = n[None, None, :] * side * side + i * side + j
        mask = (i < side) & (j < side) & inside[None, None, :]
        tl.store(core_ptr + places, tl.where(valid[None, None, :], core, 0.0), mask=mask)
        tl.store(value_ptr + examples, tl.where(valid, value, 0.0), mask=inside)


@triton.jit
def _class_gram(
    logits_ptr, stride_k, stride_n, examples, y, valid, top, norm, C,
    K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """F̃ᵀF̃ of one example: (C, C, 1)."""
    z = _load_logits(
        logits_ptr, stride_k, stride_n, examples, valid, 0, C, K, 1, BLOCK_C, True, BLOCK_K
    )
    z = tl.where(_on_target(y, 0, 1, BLOCK_C, True), -float("inf"), _tile(z).to(tl.float64))
    f = _matrix(tl.exp(z - top[:, None, :, None])) / norm
    gram = dot(tl.trans(f), f, tl.zeros([BLOCK_C, BLOCK_C], tl.float64), "ieee")
    return tl.reshape(gram, [BLOCK_C, BLOCK_C, 1])


@triton.jit(do_not_specialize=["N", "log_eps"])
def _volume_forward_kernel(
    logits_ptr, targets_ptr, value_ptr, stats_ptr, core_ptr, partial_ptr,
    stride_k, stride_n, N, C, eps: tl.float64, log_eps: tl.float64,
    K: tl.constexpr, KIND: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, LANES: tl.constexpr, V: tl.constexpr,
    CLASS_SIDE: tl.constexpr, DOT: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """One block of examples; with SPLIT a part of its classes, left in partial (S, N, K + 2, K)."""
    ACC: tl.constexpr = accumulator_of(logits_ptr.dtype.element_ty)
    examples = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    y, valid = _labels(targets_ptr, examples, N, C)
    tl.device_assert(valid | (y == _IGNORED), "multilora: a target is outside [0, C)")

    first, last, end = _own_chunks(C, LANES * V)
    top = tl.full([BLOCK_K, BLOCK_N, LANES], -float("inf"), ACC)
    rest = tl.zeros([BLOCK_K, BLOCK_N, LANES], ACC)
    gram = tl.zeros([BLOCK_K, BLOCK_K, BLOCK_N, LANES], tl.float64)
    ahead = _load_logits(
        logits_ptr, stride_k, stride_n, examples, valid, first, end, K, LANES, V, ALIGNED, BLOCK_K
    )
    for chunk in range(first, last):
        here = _on_target(y, chunk, LANES, V, ALIGNED)
        z = tl.where(here, -float("inf"), _tile(ahead).to(ACC))
        ahead = _load_logits(
            logits_ptr, stride_k, stride_n, examples, valid, chunk + 1, end, K, LANES, V, ALIGNED,
            BLOCK_K,
        )  # fmt: skip
        highest = tl.maximum(top, tl.max(z, 1))
        base = _finite(highest)
        shrink = _exp(top - base)
        e = _exp(z - base[:, None, :, :])
        top = highest
        rest = rest * shrink + tl.sum(e, 1)
        gram *= _pairs(shrink)
        if DOT:
            wide = _matrix(e)
            product = dot(wide, tl.trans(wide), tl.zeros([BLOCK_K, BLOCK_K], tl.float64), "ieee")
            gram += product[:, :, None, None]
        else:
            gram += tl.sum(_pairs(e), 2)

    top, rest, gram = _merge_lanes(top, rest, gram)
    top, rest = top.to(tl.float64), rest.to(tl.float64)
    if SPLIT:
        k = tl.arange(0, BLOCK_K)
        part = (tl.program_id(1).to(tl.int64) * N + examples) * ((K + 2) * K)
        mask = (k[:, None] < K) & (examples < N)[None, :]
        places = partial_ptr + part[None, :] + k[:, None]
        tl.store(places + K * K, top, mask=mask)
        tl.store(places + (K + 1) * K, rest, mask=mask)
        places = partial_ptr + part[None, None, :] + k[:, None, None] * K + k[None, :, None]
        tl.store(places, gram, mask=mask[:, None] & mask[None])
    else:
        _finish(
            top, rest, gram, logits_ptr, targets_ptr, value_ptr, stats_ptr, core_ptr,
            stride_k, stride_n, examples, N, C, eps, log_eps,
            K, KIND, BLOCK_K, BLOCK_N, CLASS_SIDE,
        )  # fmt: skip


@triton.jit(do_not_specialize=["N", "splits", "log_eps"])
def _volume_merge_kernel(
    logits_ptr, targets_ptr, value_ptr, stats_ptr, core_ptr, partial_ptr,
    stride_k, stride_n, N, C, eps: tl.float64, log_eps: tl.float64, splits,
    K: tl.constexpr, KIND: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_S: tl.constexpr,
):  # fmt: skip
    """The parts of one example are the lanes of a tile."""
    examples = tl.program_id(0) + tl.arange(0, 1)
    k = tl.arange(0, BLOCK_K)
    s = tl.arange(0, BLOCK_S)[None, None, :]
    part = (s.to(tl.int64) * N + examples[None, :, None]) * ((K + 2) * K)
    mask = (k[:, None, None] < K) & (s < splits)
    places = partial_ptr + part + k[:, None, None]
    top = tl.load(places + K * K, mask=mask, other=-float("inf"))
    rest = tl.load(places + (K + 1) * K, mask=mask, other=0.0)
    places = partial_ptr + part[None] + k[:, None, None, None] * K + k[None, :, None, None]
    gram = tl.load(places, mask=mask[:, None] & mask[None], other=0.0)
    top, rest, gram = _merge_lanes(top, rest, gram)
    _finish(
        top, rest, gram, logits_ptr, targets_ptr, value_ptr, stats_ptr, core_ptr,
        stride_k, stride_n, examples, N, C, eps, log_eps, K, KIND, BLOCK_K, 1, 0,
    )  # fmt: skip


@triton.jit(do_not_specialize=["N"])
def _particle_loss_mean_kernel(
    logits_ptr, targets_ptr, value_ptr, stats_ptr, nll_ptr, divergence_ptr, count_ptr,
    stride_k, stride_n, N, C, K, BLOCK: tl.constexpr,
):  # fmt: skip
    """Means over the valid targets: of one particle's −log p_y, or, in program K, of the value."""
    k = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK], tl.float64)
    count = tl.zeros([BLOCK], tl.int32)
    for start in range(0, N, BLOCK):
        n = start + tl.arange(0, BLOCK)
        y, valid = _labels(targets_ptr, n, N, C)
        count += valid.to(tl.int32)
        if k < K:
            own = tl.load(logits_ptr + k * stride_k + n.to(tl.int64) * stride_n + y, mask=valid)
            top = tl.load(stats_ptr + k * N + n, mask=valid)
            rest = tl.load(stats_ptr + (2 * K + k) * N + n, mask=valid)
            # −log p_y = log(1 + Σe / exp(z_y − top)) = log(1 + exp x), without loss for any x.
            x = tl.log(rest.to(tl.float64)) + (top.to(tl.float64) - own.to(tl.float64))
            small = tl.exp(-tl.abs(x))
            one = 1.0 + small
            exact = one == 1.0
            log = tl.where(exact, small, tl.log(one) * (small / tl.where(exact, 1.0, one - 1.0)))
            total += tl.where(valid, tl.where(x > 0, x, 0.0) + log, 0.0)
        else:
            total += tl.load(value_ptr + n, mask=valid, other=0.0).to(tl.float64)
    valid_targets = tl.maximum(tl.sum(count, 0), 1).to(tl.float64)
    mean = tl.sum(total, 0) / valid_targets
    if k < K:
        tl.store(nll_ptr + k, mean)
    else:
        tl.store(divergence_ptr, mean)
        tl.store(count_ptr, valid_targets)


@triton.jit(do_not_specialize=["N"])
def _volume_backward_kernel(
    grad_ptr, grad_nll_ptr, count_ptr, logits_ptr, targets_ptr, stats_ptr, core_ptr, out_ptr,
    stride_k, stride_n, stride_out, stride_grad, stride_nll, N, C,
    K: tl.constexpr, LOSS: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, LANES: tl.constexpr, V: tl.constexpr,
    CLASS_SIDE: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """dz = f̃ ∘ (offset + 2·grad·(core F̃)) off the target, for a block of examples and classes."""
    WRITTEN: tl.constexpr = accumulator_of(logits_ptr.dtype.element_ty)
    # Over the classes the gradient is a difference of large numbers.
    ACC: tl.constexpr = tl.float64 if CLASS_SIDE else WRITTEN
    examples = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    y, valid = _labels(targets_ptr, examples, N, C)
    k = tl.arange(0, BLOCK_K)
    inside = (k[:, None] < K) & (examples < N)[None, :]
    live = inside & valid[None, :]
    rows = k.to(tl.int64)[:, None] * N + examples[None, :]
    size = tl.full([], K, tl.int64) * N
    top = tl.load(stats_ptr + rows, mask=live, other=0.0)
    norm = tl.load(stats_ptr + size + rows, mask=live, other=1.0)
    inverse = 1.0 / norm
    if LOSS:
        count = tl.load(count_ptr)
        slope = tl.zeros([BLOCK_N], ACC) + 2.0 * (tl.load(grad_ptr) / count)
        rest = tl.load(stats_ptr + 2 * size + rows, mask=live, other=1.0)
        of_example = examples.to(tl.int64) * stride_n + y
        labels = k.to(tl.int64)[:, None] * stride_k + of_example[None, :]
        own = tl.load(logits_ptr + labels, mask=live, other=0.0).to(ACC)
        weight = tl.load(grad_nll_ptr + k.to(tl.int64) * stride_nll, mask=k < K, other=0.0) / count
        # e_y may overflow; p_y is then 1 and the rest of the softmax 0. The softmax is
        # f̃ · ‖e‖/(Σe + e_y) off the target, and p_y − 1 = −Σe/(Σe + e_y) on it.
        share = weight[:, None] / (rest + _exp(own - top))
        offset = share * norm
        on_target = -share * rest
    else:
        at = grad_ptr + examples.to(tl.int64) * stride_grad
        slope = 2.0 * tl.load(at, mask=valid, other=0.0)
        offset = tl.zeros([BLOCK_K, BLOCK_N], ACC)
        on_target = tl.zeros([BLOCK_K, BLOCK_N], ACC)

    if CLASS_SIDE:
        BLOCK: tl.constexpr = CLASS_SIDE
        side = C
    else:
        BLOCK: tl.constexpr = BLOCK_K
        side = K
    i = tl.arange(0, BLOCK)[:, None, None]
    j = tl.arange(0, BLOCK)[None, :, None]
    squares = examples.to(tl.int64)[None, None, :] * side * side + i * side + j
    mask = (i < side) & (j < side) & valid[None, None, :]
    core = tl.load(core_ptr + squares, mask=mask, other=0.0) * slope[None, None, :]

    first, last, end = _own_chunks(C, LANES * V)
    ahead = _load_logits(
        logits_ptr, stride_k, stride_n, examples, valid, first, end, K, LANES, V, ALIGNED, BLOCK_K
    )
    for chunk in range(first, last):
        here = _on_target(y, chunk, LANES, V, ALIGNED)
        z = tl.where(here, -float("inf"), _tile(ahead).to(ACC))
        ahead = _load_logits(
            logits_ptr, stride_k, stride_n, examples, valid, chunk + 1, end, K, LANES, V, ALIGNED,
            BLOCK_K,
        )  # fmt: skip
        f = _exp(z - top[:, None, :, None]) * inverse[:, None, :, None]
        if DOT:
            wide = _matrix(f)
            square = _matrix(core)
            zeros = tl.zeros([BLOCK_K, V], tl.float64)
            if CLASS_SIDE:
                x = dot(wide, square, zeros, "ieee")
                # ⟨X_i, f̃_i⟩ is in no diagonal of a core over the classes.
                x -= tl.sum(x * wide, 1)[:, None] * wide
            else:
                x = dot(square, wide, zeros, "ieee")
            x = x.to(ACC)[:, :, None, None]
        else:
            x = tl.sum(core[:, :, None, :, None] * f[None], 1)
        dz = f * (x + offset[:, None, :, None])
        dz = tl.where(here, on_target[:, None, :, None], dz)
        # In two steps: the interpreter cannot turn float64 into bfloat16.
        dz = tl.where(valid[None, None, :, None], dz, 0.0).to(WRITTEN)
        dz = dz.to(out_ptr.dtype.element_ty)
        classes, places = _places(chunk, stride_out, C, examples, LANES, V, ALIGNED, BLOCK_K)
        written = tl.trans(inside)[None, :, :, None] & (classes < C)
        tl.store(out_ptr + places, tl.permute(dz, (3, 2, 0, 1)), mask=written)


def volume(
    logits: Tensor, targets: Tensor, eps: float, kind: str, means: bool
) -> tuple[Tensor, ...]:
    """-> value (N,), stats (3, K, N), core (N, m, m); or, with means, nll (K,) and divergence (),
    stats, core, count ()."""
    particles, examples, classes = logits.shape
    logits, targets = _dense_classes(logits), targets.contiguous()
    value, stats, core = _forward(logits, targets, eps, kind)
    if not means:
        return value, stats, core
    nll = value.new_empty(particles)
    divergence, count = value.new_empty(()), value.new_empty(())
    config = configs.volume_mean(examples)
    launch(
        _particle_loss_mean_kernel, (particles + 1,),
        logits, targets, value, stats, nll, divergence, count,
        *logits.stride()[:2], examples, classes, particles,
        BLOCK=config.block, num_warps=config.warps,
    )  # fmt: skip
    return nll, divergence, stats, core, count


def _forward(
    logits: Tensor, targets: Tensor, eps: float, kind: str
) -> tuple[Tensor, Tensor, Tensor]:
    particles, examples, classes = logits.shape
    # On a GPU the kernel itself reports it, at the next synchronisation.
    if targets.device.type == "cpu":
        check_targets(logits, targets)
    value = logits.new_empty(examples, dtype=accumulator(logits.dtype))
    stats = value.new_empty(3, particles, examples)
    side = min(particles, classes)
    core = value.new_empty(examples, side, side, dtype=core_dtype(logits))
    if classes == 2 or (kind == "det" and particles > classes - 1):
        kind = "zero"
        core.zero_()
    config = configs.volume(
        particles, examples, classes, logits.dtype, is_aligned(logits), chip(logits.device)
    )
    partial = None
    if config.splits:
        shape = (config.splits, examples, particles + 2, particles)
        partial = logits.new_empty(shape, dtype=torch.float64)
    tensors = (logits, targets, value, stats, core, partial)
    sizes = (*logits.stride()[:2], examples, classes, eps, math.log(eps))
    launch(
        _volume_forward_kernel, (cdiv(examples, config.block_n), max(1, config.splits)),
        *tensors, *sizes, K=particles, KIND=kind, SPLIT=partial is not None,
        **_meta(config), **_ASSERTS, maxnreg=config.registers,
    )  # fmt: skip
    if config.splits:
        launch(
            _volume_merge_kernel, (examples,), *tensors, *sizes, config.splits,
            K=particles, KIND=kind, BLOCK_K=config.block_k,
            BLOCK_S=configs.power_of_two(config.splits), num_warps=config.merge_warps,
        )  # fmt: skip
    return value, stats, core


def volume_backward(
    grad: Tensor,
    logits: Tensor,
    targets: Tensor,
    stats: Tensor,
    core: Tensor,
    grad_nll: Tensor | None = None,
    count: Tensor | None = None,
) -> Tensor:
    """grad (N,) of the values; or grad () of their mean, and grad_nll (K,) -> dlogits (K, N, C)."""
    particles, examples, classes = logits.shape
    logits, targets = _dense_classes(logits), targets.contiguous()
    out = logits.new_empty(logits.shape)
    config = configs.volume(
        particles,
        examples,
        classes,
        logits.dtype,
        is_aligned(logits),
        chip(logits.device),
        backward=True,
    )
    strides = (grad.stride(0), 0) if grad_nll is None else (0, grad_nll.stride(0))
    launch(
        _volume_backward_kernel, (cdiv(examples, config.block_n), max(1, config.splits)),
        grad, grad_nll, count, logits, targets, stats.contiguous(), core.contiguous(), out,
        *logits.stride()[:2], examples * classes, *strides, examples, classes,
        K=particles, LOSS=grad_nll is not None, **_meta(config),
    )  # fmt: skip
    return out


def _meta(config: configs.Volume) -> dict[str, int | bool]:
    return {
        "ALIGNED": config.aligned,
        "BLOCK_K": config.block_k,
        "BLOCK_N": config.block_n,
        "LANES": config.lanes,
        "V": config.classes_each,
        "CLASS_SIDE": config.class_side,
        "DOT": config.dot,
        "num_warps": config.warps,
    }


def _dense_classes(logits: Tensor) -> Tensor:
    """One copy costs less than reading a sector for every single class."""
    return logits if logits.stride(-1) == 1 else logits.contiguous()


def is_aligned(logits: Tensor) -> bool:
    """Whether every row starts at a multiple of what one thread loads, as Triton can tell."""
    sizes = (logits.data_ptr(), *logits.stride()[:2], logits.shape[2])
    return all(size % 16 == 0 for size in sizes)
