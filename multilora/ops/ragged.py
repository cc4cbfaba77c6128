"""The LoRA linear on a CPU, where particles have numbers of rows, ranks and scalings of their own.

There a loop over the particles costs less than what one product for all of them would compute
besides: padding, and adapters that are not there. Each step writes into its place of the whole.

Dims: K particles of which some have rows, T rows of all of them, r the largest rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from multilora.ops import dispatch

_PLAIN = frozenset({Tensor, torch.nn.Parameter})


class Part(NamedTuple):
    """The rows start … end − 1 belong to a particle, whose adapter has this rank and scaling."""

    particle: int
    start: int
    end: int
    rank: int
    scaling: float


def is_plain() -> bool:
    """Whether nothing has to see single operators, or changes their dtypes."""
    return not (
        torch._C._is_any_autocast_enabled()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
    )


def takes(*tensors: Tensor) -> bool:
    """Whether these run here: on a CPU, in one dtype, and where the reference is to compute."""
    first = tensors[0]
    return (
        all(type(t) in _PLAIN and t.is_cpu and t.dtype == first.dtype for t in tensors)
        and first.dtype.itemsize >= 4
        and dispatch.backend_of("grouped_linear", (first,)) == "reference"
    )


def ragged_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    parts: Sequence[Part],
) -> Tensor:
    """y_t = W x_t + b + s_k B_k A_k x_t for the rows t of each particle k.

    Args:
        x: the rows (T, d_in).
        weight, bias: W (d_out, d_in) and b (d_out,), frozen.
        lora_A, lora_B: (K, r, d_in) and (K, d_out, r). What lies behind a particle's rank is not
            read, and has the gradient zero.
        parts: the particles that have rows, and an adapter. Other rows get W x_t + b.

    Returns:
        (T, d_out).
    """
    return _Ragged.apply(x, weight, bias, None, lora_A, lora_B, parts)


def ragged_add(
    y: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, parts: Sequence[Part]
) -> Tensor:
    """y_t += s_k B_k A_k x_t, in place, for y (T, d_out); else as `ragged_linear`."""
    return _Ragged.apply(x, None, None, y, lora_A, lora_B, parts)


class Mask(NamedTuple):
    """Which of the factors of all parts, side by side, belong to which rows.

    columns: of the K·r rows of all A_k, those of the parts (R,), with R the sum of their ranks.
    scales: (T, R), a particle's scaling where a column belongs to a row's particle, else 0.
    """

    columns: Tensor
    scales: Tensor


def mask_of(x: Tensor, lora_A: Tensor, parts: Sequence[Part]) -> Mask:
    """The mask for rows x (T, d_in)."""
    columns: list[int] = []
    scales = x.new_zeros(len(x), sum(p.rank for p in parts))
    for p in parts:
        here = slice(len(columns), len(columns) + p.rank)
        scales[p.start : p.end, here] = p.scaling
        first = p.particle * lora_A.shape[1]
        columns += range(first, first + p.rank)
    return Mask(torch.tensor(columns), scales)


def joined(lora_A: Tensor, lora_B: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """The factors of these columns side by side, (R, d_in) and (R, d_out), copied."""
    down, up = lora_A.flatten(0, 1), lora_B.mT.flatten(0, 1)
    return down.index_select(0, columns), up.index_select(0, columns)


def joined_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, factors: tuple[Tensor, Tensor], scales: Tensor
) -> Tensor:
    """`ragged_linear` without a gradient, where products are small: every row takes all factors in
    two products, of which `scales` keeps its own. That is less work than two for each part."""
    down, up = factors
    return F.linear(x, weight, bias).addmm_(F.linear(x, down).mul_(scales), up)


class _Ragged(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        y: Tensor | None,
        lora_A: Tensor,
        lora_B: Tensor,
        parts: Sequence[Part],
    ) -> Tensor:
        if y is None:
            assert weight is not None
            y = F.linear(x, weight, bias)
        else:
            ctx.mark_dirty(y)
        shrunk = []
        for k, start, end, rank, scaling in parts:
            S = torch.mm(x[start:end], lora_A[k, :rank].T)
            y[start:end].addmm_(S, lora_B[k, :, :rank].T, alpha=scaling)
            shrunk.append(S)
        ctx.parts = parts
        ctx.save_for_backward(x, weight, lora_A, lora_B, *shrunk)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """dS = s·dY·B, dX = dY·W + dS·A, dA = dSᵀ·X, dB = s·dYᵀ·S, part by part."""
        x, weight, lora_A, lora_B, *shrunk = ctx.saved_tensors
        needs_x, needs_W, needs_b, needs_y, needs_A, needs_B, _ = ctx.needs_input_grad
        assert not needs_W and not needs_b
        dy = dy.contiguous()
        dx = dA = dB = None
        if needs_x:
            dx = torch.zeros_like(x) if weight is None else torch.mm(dy, weight)
        if needs_A:
            dA = torch.zeros_like(lora_A)
        if needs_B:
            dB = torch.zeros_like(lora_B)
        unread = dy.new_empty(())  # beta=0: it gives the product a factor
        for (k, start, end, rank, scaling), S in zip(ctx.parts, shrunk):
            own = dy[start:end]
            if needs_x or needs_A:
                # Transposed, dS (r, n): a rank as the last axis in memory is slow.
                turned = torch.addmm(unread, lora_B[k, :, :rank].T, own.T, beta=0, alpha=scaling)
            if dx is not None:
                dx[start:end].addmm_(turned.T, lora_A[k, :rank])
            if dA is not None:
                torch.mm(turned, x[start:end], out=dA[k, :rank])
            if dB is not None:
                dB[k, :, :rank] = torch.mm(S.T, own).T.mul_(scaling)
        return dx, None, None, dy if needs_y else None, dA, dB, None
