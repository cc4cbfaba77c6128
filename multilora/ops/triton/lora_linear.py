"""The K-particle LoRA linear: which kernels give y and the gradients, in which order.

What a problem's sizes decide is decided once and kept: a call allocates and launches.

Dims: K particles, T rows, r rank.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from multilora.ops import reference
from multilora.ops.common import accumulator
from multilora.ops.triton import configs
from multilora.ops.triton.blocks import is_aligned
from multilora.ops.triton.common import Chip, Launch, chip, precision
from multilora.ops.triton.lora_gemm import accumulate, gemm
from multilora.ops.triton.lora_pass import Sum, ThinPass, reduce, thin_pass

#: As many problems are kept: those of a model's layers, at some numbers of rows.
_KEPT = 4096


class _Problem(NamedTuple):
    """All that decides which kernels run. members: 1 where the particles share x, else K. rules:
    what chooses their configurations, which others take the place of while tuning."""

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


def _problem(x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> _Problem:
    members, rows, d_in = x.shape
    particles, d_out, rank = lora_B.shape
    return _Problem(
        particles, members, rows, rank, d_in, d_out, lora_A.stride(), lora_B.stride(), scaling,
        x.dtype, lora_A.dtype, precision(x.dtype), chip(x.device),
        (configs.lora_gemm, configs.lora_pass),
    )  # fmt: skip


def lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """x (K or 1, T, d_in) -> y (K, T, d_out) and S = x Aᵀ (K, T, r)."""
    x, weight = x.contiguous(), weight.contiguous()
    p = _problem(x, lora_A, lora_B, scaling)
    if 0 in (p.rows, p.d_in, p.d_out):
        return reference.lora_linear(x, weight, lora_A, lora_B, bias, scaling)
    bias = None if bias is None else bias.contiguous()
    shrink, product = _forward(p, bias is not None, is_aligned(x, weight))
    y = x.new_empty(p.particles, p.rows, p.d_out)
    shrunk = x.new_empty(p.particles, p.rows, p.rank)
    shrinker = None
    if shrink is None:
        shrinker = lora_A.to(p.dtype, memory_format=torch.contiguous_format)
    else:
        shrink.launch(x, lora_A, shrunk, None, None)
    if product is None:
        accumulate(y, x, weight.mT, shrunk, lora_B, bias, scaling)
    else:
        product(x, weight, shrinker, y, shrunk, lora_B, bias)
    return y, shrunk


@functools.lru_cache(_KEPT)
def _forward(p: _Problem, has_bias: bool, aligned: bool) -> tuple[ThinPass | None, Launch | None]:
    """S by a pass of its own, or None: inside the GEMM; the GEMM, or None: the vendor's."""
    shared = "" if p.members == p.particles else "out"
    config = configs.lora_gemm(
        p.particles, p.rows, p.d_in, p.d_out, p.rank, p.dtype, p.chip, shared
    )
    shrink = None if config.path == "shrink inside" else _shrink(p, aligned)
    if config.path == "accumulate":
        return shrink, None
    return shrink, gemm(
        p.particles, p.rows, p.d_in, p.d_out, p.rank, shared, False, has_bias, p.strides_B,
        p.scaling, p.dtype, aligned, p.chip, config,
    )  # fmt: skip


@functools.lru_cache(_KEPT)
def _shrink(p: _Problem, aligned: bool) -> ThinPass:
    """S = x Aᵀ."""
    return thin_pass(
        p.particles, p.members, p.rows, p.d_in, p.rank, _turned(p.strides_A), False, 1.0,
        p.dtype, aligned, p.chip,
    )  # fmt: skip


def _turned(strides: tuple[int, int, int]) -> tuple[int, int, int]:
    return strides[0], strides[2], strides[1]


def lora_add_(y: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """y (K·T rows of d_out) += scaling·(x Aᵀ) Bᵀ for x (K or 1, T, d_in) -> S = x Aᵀ (K, T, r)."""
    x = x.contiguous()
    p = _problem(x, lora_A, lora_B, scaling)
    if 0 in (p.rows, p.d_in, p.d_out):
        return reference.lora_add_(y, x, lora_A, lora_B, scaling)
    shrunk = x.new_empty(p.particles, p.rows, p.rank)
    _shrink(p, is_aligned(x)).launch(x, lora_A, shrunk, None, None)
    # A product as thin as this is y's one read and one write: the vendor's does no more.
    y = y.view(p.particles, p.rows, p.d_out)
    y.baddbmm_(shrunk, lora_B.to(y.dtype).mT, alpha=scaling)
    return shrunk


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
    needs_x, needs_A, needs_B = needs
    x, grad = x.contiguous(), grad.contiguous()
    p = _problem(x, lora_A, lora_B, scaling)
    if 0 in (p.rows, p.d_in, p.d_out):
        return reference.lora_linear_backward(
            grad, x, weight, lora_A, lora_B, shrunk, scaling, needs
        )
    weight = None if weight is None else weight.contiguous()
    plan = _backward(p, *needs, weight is not None, is_aligned(x, grad, weight))
    dx = x.new_empty(x.shape if needs_x and weight is not None else 0)
    dA = lora_A.new_empty(lora_A.shape if needs_A else 0)
    dB = lora_B.new_empty(lora_B.shape if needs_B else 0)
    sums: list[Tensor | None] = []
    d_shrunk = parts = None
    if needs_B:
        parts = x.new_empty((plan.outer or plan.shrink).partial, dtype=accumulator(p.dtype))
        sums += parts, dB
    if plan.shrink is not None:
        d_shrunk = x.new_empty(shrunk.shape)
        both = (None, None) if plan.shrink.partial is None else (shrunk, parts)
        plan.shrink.launch(grad, lora_B, d_shrunk, *both)
    if plan.outer is not None:
        plan.outer.launch(grad, None, None, shrunk, parts)
    if needs_A:
        parts = x.new_empty(plan.inner.partial, dtype=accumulator(p.dtype))
        plan.inner.launch(x, None, None, d_shrunk, parts)
        sums += parts, dA
    if plan.sums is not None:
        plan.sums(*sums, *[None] * (4 - len(sums)))
    if needs_x and weight is None:
        dx = reference.expand_gradient(d_shrunk, lora_A.to(p.dtype), p.members != p.particles)
    elif needs_x:
        # The rows are the same for all particles, so dY is summed before the large product.
        rest = grad if p.members == p.particles else grad.sum(0, keepdim=True)
        if plan.product is None:
            accumulate(dx, rest, weight, d_shrunk, lora_A.mT, None, 1.0)
        else:
            plan.product(rest, weight, None, dx, d_shrunk, lora_A, None)
    return dx, dA, dB


class _Backward(NamedTuple):
    """What is None is not needed, but for the product: there it is the vendor's."""

    shrink: ThinPass | None  # dS = s·dY·B, and the parts of dB where they do not cost a pass
    outer: ThinPass | None  # dB = s·dYᵀ·S in parts, by a pass of their own
    inner: ThinPass | None  # dA = dSᵀ·X in parts
    sums: Launch | None
    product: Launch | None  # dX = dY·W + dS·A


@functools.lru_cache(_KEPT)
def _backward(
    p: _Problem, needs_x: bool, needs_A: bool, needs_B: bool, has_weight: bool, aligned: bool
) -> _Backward:
    common = (p.dtype, aligned, p.chip)
    over_grad = (p.particles, p.particles, p.rows, p.d_out, p.rank)
    shrink = outer = inner = sums = product = None
    parts = []
    if needs_x or needs_A:
        together = needs_B and configs.lora_pass_together(
            p.particles, p.rows, p.d_out, p.rank, p.dtype, p.chip
        )
        shrink = thin_pass(*over_grad, p.strides_B, together, p.scaling, *common)
    if needs_B:
        if shrink is None or shrink.partial is None:
            outer = thin_pass(*over_grad, None, True, p.scaling, *common)
        of_B = (p.d_out * p.rank, p.rank, 1)
        parts.append(Sum((outer or shrink).partial, of_B, p.scaling))
    if needs_A:
        over_x = (p.particles, p.members, p.rows, p.d_in, p.rank)
        inner = thin_pass(*over_x, None, True, 1.0, *common)
        of_A = (p.rank * p.d_in, 1, p.d_in)
        parts.append(Sum(inner.partial, of_A, 1.0))
    if parts:
        sums = reduce(*parts)
    if needs_x and has_weight:
        shared = "" if p.members == p.particles else "in"
        sizes = (p.particles, p.rows, p.d_out, p.d_in, p.rank)
        config = configs.lora_gemm(*sizes, p.dtype, p.chip, shared, True)
        if config.path != "accumulate":
            strides = _turned(p.strides_A)
            product = gemm(*sizes, shared, True, False, strides, 1.0, *common, config)
    return _Backward(shrink, outer, inner, sums, product)
