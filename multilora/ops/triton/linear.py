"""The K-particle LoRA linear: which kernels give y and the gradients, in which order.

Plans depend on a problem's sizes alone and are kept: a call only allocates and launches.

Dims: K particles, T rows, r rank.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from multilora.ops.common import accumulator, empty_gradients, empty_linear, expand_gradient
from multilora.ops.triton import configs
from multilora.ops.triton.blocks import aligned
from multilora.ops.triton.common import Chip, Launch, chip, precision
from multilora.ops.triton.gemm import expand, gemm
from multilora.ops.triton.thin import Sum, ThinPass, reduce, thin_pass

#: How many problems are kept: enough for a model's layers at several numbers of rows.
_KEPT = 4096


class _Problem(NamedTuple):
    """All that decides which kernels run.

    members is 1 where the particles share x, else K. rules choose the configurations; while tuning,
    others are in their place.
    """

    particles: int
    members: int
    rows: int
    rank: int
    d_in: int
    d_out: int
    strides_A: tuple[int, int, int]
    strides_B: tuple[int, int, int]
    scaling: float
    dtype: torch.dtype
    factors: torch.dtype
    precision: str
    chip: Chip
    rules: tuple[Callable[..., Any], ...]


def _problem(x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> tuple[Any, ...]:
    """The fields of a _Problem, which the plans' caches take for one."""
    members, rows, d_in = x.shape
    particles, d_out, rank = lora_B.shape
    dtype = x.dtype
    return (
        particles, members, rows, rank, d_in, d_out, lora_A.stride(), lora_B.stride(), scaling,
        dtype, lora_A.dtype, "ieee" if dtype != torch.float32 else precision(dtype),
        chip(x.device), (configs.lora_gemm, configs.lora_pass),
    )  # fmt: skip


# --- forward -------------------------------------------------------------------------------------


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
        return empty_linear(x, weight, lora_A, bias)
    x, weight = aligned(x), aligned(weight)
    if bias is not None:
        bias = aligned(bias)
    plan = _forward(_problem(x, lora_A, lora_B, scaling), bias is not None)
    y, shrunk = x.new_empty((particles, rows, d_out)), x.new_empty((particles, rows, rank))
    shrinker = None
    if plan.shrink is not None:
        plan.shrink(x, lora_A, shrunk, None, None)
    else:
        shrinker = aligned(lora_A.to(x.dtype))
    if plan.gemm is not None:
        plan.gemm(x, weight, shrinker, y, shrunk, lora_B, bias)
    elif plan.expand is not None:
        plan.expand(shrunk, lora_B, bias, y)
        _add_product(y, x, weight.mT)
    return y, shrunk


class _Forward(NamedTuple):
    shrink: Launch | None  # S = x Aᵀ; None: inside the GEMM
    gemm: Launch | None  # y = x Wᵀ + bias + s·S Bᵀ; None: the vendor's adds to what `expand` gives
    expand: Launch | None  # y = bias + s·S Bᵀ


@functools.lru_cache(_KEPT)
def _forward(problem: tuple[Any, ...], has_bias: bool) -> _Forward:
    p = _Problem(*problem)
    shared = "" if p.members == p.particles else "out"
    sizes = (p.particles, p.rows, p.d_in, p.d_out, p.rank)
    config = configs.lora_gemm(*sizes, p.dtype, p.chip, shared)
    shrink = None if config.path == "shrink inside" else _shrinking(problem)
    if config.path == "accumulate":
        return _Forward(shrink, None, _expanding(p, p.d_out, has_bias, p.strides_B, p.scaling))
    of_B = (p.strides_B, p.scaling)
    product = gemm(sizes, shared, False, has_bias, *of_B, p.dtype, p.chip, config)
    return _Forward(shrink, product, None)


@functools.lru_cache(_KEPT)
def _shrinking(problem: tuple[Any, ...]) -> Launch:
    """S = x Aᵀ in a separate pass."""
    p = _Problem(*problem)
    over_x = (p.particles, p.members, p.rows, p.d_in, p.rank)
    strides = _turned(p.strides_A)
    return thin_pass(*over_x, strides, False, 1.0, p.dtype, p.chip).launch


def _expanding(
    p: _Problem, cols: int, has_bias: bool, strides: tuple[int, int, int], scaling: float
) -> Launch:
    return expand(p.particles, p.rows, cols, p.rank, has_bias, strides, scaling, p.dtype)


def _turned(strides: tuple[int, int, int]) -> tuple[int, int, int]:
    return strides[0], strides[2], strides[1]


def _add_product(y: Tensor, x: Tensor, weight: Tensor) -> None:
    """y += x·weight (depth, cols), by the vendor's GEMM.

    It keeps all of the library's efficiency; what it costs is that y is written twice and read
    once.
    """
    y.flatten(0, 1).addmm_(x.flatten(0, 1), weight)


def shrink(x: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
    """S = x Aᵀ (K, T, r) of an aligned x (K or 1, T, d_in)."""
    particles, rank, _ = lora_A.shape
    shrunk = x.new_empty((particles, x.shape[1], rank))
    problem = _problem(x, lora_A, lora_B, 1.0)
    _shrinking(problem)(x, lora_A, shrunk, None, None)
    return shrunk


def lora_add_(y: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """y (K·T rows of d_out) += scaling·(x Aᵀ) Bᵀ for x (K or 1, T, d_in) -> S = x Aᵀ (K, T, r)."""
    particles, d_out, _ = lora_B.shape
    rows = x.shape[1]
    if 0 in (rows, x.shape[2], d_out):
        return x.new_zeros(particles, rows, lora_A.shape[1])
    shrunk = shrink(aligned(x), lora_A, lora_B)
    # A product as thin as this is y's one read and one write: the vendor's does no more.
    y = y.view(particles, rows, d_out)
    y.baddbmm_(shrunk, lora_B.to(y.dtype).mT, alpha=scaling)
    return shrunk


# --- backward ------------------------------------------------------------------------------------


def lora_linear_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    shrunk: Tensor,
    scaling: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """grad (K, T, d_out) -> dx (as x), dA (K, r, d_in), dB (K, d_out, r), or empty."""
    if 0 in (x.shape[1], x.shape[2], grad.shape[2]):
        return empty_gradients(x, lora_A, lora_B, needs)
    x, grad = aligned(x), aligned(grad)
    problem = _problem(x, lora_A, lora_B, scaling)
    d_shrunk, dA, dB = _thin_products(problem, grad, x, lora_A, lora_B, shrunk, needs)
    if not needs[0] or d_shrunk is None:
        return x.new_empty(0), dA, dB
    shared = x.shape[0] != lora_A.shape[0]
    if weight is None:
        return expand_gradient(d_shrunk, lora_A.to(x.dtype), shared), dA, dB
    weight = aligned(weight)
    # The rows are the same for all particles, so dY is summed before the large product.
    rest = grad.sum(0, keepdim=True) if shared else grad
    product, expand = _input_gradient(problem)
    dx = x.new_empty(x.shape)
    if product is not None:
        product(rest, weight, None, dx, d_shrunk, lora_A, None)
    elif expand is not None:
        expand(d_shrunk, lora_A, None, dx)
        _add_product(dx, rest, weight)
    return dx, dA, dB


@functools.lru_cache(_KEPT)
def _input_gradient(problem: tuple[Any, ...]) -> tuple[Launch | None, Launch | None]:
    """dX = dY·W + dS·A; or None, and dS·A, to which the vendor's GEMM adds."""
    p = _Problem(*problem)
    shared = "" if p.members == p.particles else "in"
    sizes = (p.particles, p.rows, p.d_out, p.d_in, p.rank)
    config = configs.lora_gemm(*sizes, p.dtype, p.chip, shared, True)
    of_A = (_turned(p.strides_A), 1.0)
    if config.path == "accumulate":
        return None, _expanding(p, p.d_in, False, *of_A)
    return gemm(sizes, shared, True, False, *of_A, p.dtype, p.chip, config), None


def thin_gradients(
    grad: Tensor,
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    shrunk: Tensor,
    scaling: float,
    needs: list[bool],
) -> tuple[Tensor | None, Tensor, Tensor]:
    """dS = s·dY·B (K, T, r), or None where nobody needs it; dA and dB, or empty.

    grad and x are aligned.
    """
    problem = _problem(x, lora_A, lora_B, scaling)
    return _thin_products(problem, grad, x, lora_A, lora_B, shrunk, needs)


def _thin_products(
    problem: tuple[Any, ...],
    grad: Tensor,
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    shrunk: Tensor,
    needs: list[bool],
) -> tuple[Tensor | None, Tensor, Tensor]:
    _, needs_A, needs_B = needs
    plan = _thin_gradients(problem, *needs)
    d_shrunk = None
    dA = lora_A.new_empty(lora_A.shape if needs_A else 0)
    dB = lora_B.new_empty(lora_B.shape if needs_B else 0)
    parts_A = parts_B = None
    if plan.parts_B is not None:
        parts_B = x.new_empty(plan.parts_B, dtype=plan.sum_dtype)
    if plan.shrink is not None:
        d_shrunk = x.new_empty(shrunk.shape)
        together = (None, None) if plan.shrink.parts is None else (shrunk, parts_B)
        plan.shrink.launch(grad, lora_B, d_shrunk, *together)
    if plan.outer is not None:
        plan.outer.launch(grad, None, None, shrunk, parts_B)
    if plan.inner is not None and plan.inner.parts is not None:
        parts_A = x.new_empty(plan.inner.parts, dtype=plan.sum_dtype)
        plan.inner.launch(x, None, None, d_shrunk, parts_A)
    if plan.sums is None:
        return d_shrunk, dA, dB
    if needs_A and needs_B:
        plan.sums(parts_A, dA, parts_B, dB)
    elif needs_A:
        plan.sums(parts_A, dA, None, None)
    else:
        plan.sums(parts_B, dB, None, None)
    return d_shrunk, dA, dB


class _Thin(NamedTuple):
    """The launches of the thin gradients; None for those that are not needed."""

    shrink: ThinPass | None  # dS = s·dY·B, and the parts of dB where they cost no pass
    outer: ThinPass | None  # dB = s·dYᵀ·S in parts, in a separate pass
    inner: ThinPass | None  # dA = dSᵀ·X in parts
    parts_B: tuple[int, int, int, int] | None
    sum_dtype: torch.dtype
    sums: Launch | None


@functools.lru_cache(_KEPT)
def _thin_gradients(problem: tuple[Any, ...], needs_x: bool, needs_A: bool, needs_B: bool) -> _Thin:
    p = _Problem(*problem)
    kind = (p.dtype, p.chip)
    over_grad = (p.particles, p.particles, p.rows, p.d_out, p.rank)
    shrink = outer = inner = parts_B = None
    sums = []
    if needs_x or needs_A:
        together = needs_B and configs.lora_pass_together(*over_grad[1:], p.dtype, p.chip)
        shrink = thin_pass(*over_grad, p.strides_B, together, p.scaling, *kind)
    if needs_A:
        over_x = (p.particles, p.members, p.rows, p.d_in, p.rank)
        inner = thin_pass(*over_x, None, True, 1.0, *kind)
        assert inner.parts is not None
        sums.append(Sum(inner.parts, (p.rank * p.d_in, 1, p.d_in), 1.0))
    if needs_B:
        parts_B = None if shrink is None else shrink.parts
        if parts_B is None:
            outer = thin_pass(*over_grad, None, True, p.scaling, *kind)
            parts_B = outer.parts
        assert parts_B is not None
        sums.append(Sum(parts_B, (p.d_out * p.rank, p.rank, 1), p.scaling))
    added = reduce(*sums) if sums else None
    return _Thin(shrink, outer, inner, parts_B, accumulator(p.dtype), added)
