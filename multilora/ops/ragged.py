"""The LoRA linear on a CPU, where particles have numbers of rows, ranks and scalings of their own.

There padding, and adapters that are not there, would cost as much as what is wanted. The forward is
one kernel for all particles (csrc/cpu/low_rank.cpp); without it, and in the backward, a loop over
the particles, of which each step writes into its place of the whole.

Dims: K particles of which some have rows, T rows of all of them, r the largest rank.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from multilora.ops import dispatch
from multilora.ops.common import Parts

_PLAIN = frozenset({Tensor, torch.nn.Parameter})
_DTYPES = frozenset({torch.float32, torch.float64})


def is_plain() -> bool:
    """Whether nothing has to see single operators, or changes their dtypes or derivatives."""
    return not (
        forward_ad._current_level >= 0
        or torch._C._is_any_autocast_enabled()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
    )


def runs_on(x: Tensor) -> bool:
    """Whether rows like these run here: on a CPU, and where the reference is to compute."""
    return x.is_cpu and dispatch.backend_of("grouped_linear", (x,)) == "reference"


def takes(weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor) -> bool:
    """Whether all are plain tensors of one dtype that a CPU computes in, and W and b frozen."""
    # One by one, since a loop over them would take longer in every layer.
    dtype = weight.dtype
    return (
        dtype in _DTYPES
        and not weight.requires_grad
        and is_plain_tensor(weight, dtype)
        and (bias is None or (not bias.requires_grad and is_plain_tensor(bias, dtype)))
        and is_plain_tensor(lora_A, dtype)
        and is_plain_tensor(lora_B, dtype)
    )


def is_plain_tensor(t: Tensor, dtype: torch.dtype) -> bool:
    """Whether its numbers are what lies in a CPU's memory, for a kernel that gets its address."""
    return (
        t.dtype == dtype
        and t.is_cpu
        and type(t) in _PLAIN
        and t.layout is torch.strided
        and not t.is_neg()
    )


def has_kernel() -> bool:
    """Whether the forward is the CPU's kernel, and not a loop."""
    return dispatch.current_backend("cpu") == "cpu"


def ragged_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    parts: Parts,
) -> Tensor:
    """y_t = W x_t + b + s_k B_k A_k x_t for the rows t of each particle k.

    Args:
        x: the rows (T, d_in).
        weight, bias: W (d_out, d_in) and b (d_out,), frozen.
        lora_A, lora_B: (K, r, d_in) and (K, d_out, r). What lies behind a particle's rank is not
            read, and has the gradient zero.
        parts: rows of none of them get W x_t + b.

    Returns:
        (T, d_out).
    """
    if torch.is_grad_enabled():
        return _Ragged.apply(x, weight, bias, None, lora_A, lora_B, parts)
    return _linear(x, weight, bias, lora_A, lora_B, parts)


def ragged_add(y: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, parts: Parts) -> Tensor:
    """y_t += s_k B_k A_k x_t, in place, for a contiguous y (T, d_out); else as `ragged_linear`."""
    if torch.is_grad_enabled():
        return _Ragged.apply(x, None, None, y, lora_A, lora_B, parts)
    _add(y, x, lora_A, lora_B, parts)
    if not y.is_inference():  # autograd does not see what a kernel writes
        torch.autograd.graph.increment_version(y)
    return y


def _linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    parts: Parts,
    shrunk: Tensor | None = None,
) -> Tensor:
    """`ragged_linear` without a gradient; shrunk (T, r), where it is given, gets A_k x_t."""
    if has_kernel():
        # The product with W adds to the rest, so that y is read once less.
        y = x.new_empty(len(x), len(weight))
        _kernel()(y, bias, x, lora_A, lora_B, parts, shrunk)
        return y.addmm_(x, weight.T)
    y = F.linear(x, weight, bias)
    _add(y, x, lora_A, lora_B, parts, shrunk)
    return y


def _add(
    y: Tensor,
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    parts: Parts,
    shrunk: Tensor | None = None,
) -> None:
    if has_kernel():
        _kernel()(y, y, x, lora_A, lora_B, parts, shrunk)
        return
    for k, start, end, rank, scaling in parts:
        out = None if shrunk is None else shrunk[start:end, :rank]
        S = torch.mm(x[start:end], lora_A[k, :rank].T, out=out)
        y[start:end].addmm_(S, lora_B[k, :, :rank].T, alpha=scaling)


@functools.cache
def _kernel() -> Any:
    return importlib.import_module("multilora.ops.cpu").low_rank


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
        parts: Parts,
    ) -> Tensor:
        shrunk = x.new_empty(len(x), lora_A.shape[1])
        if y is None:
            assert weight is not None
            y = _linear(x, weight, bias, lora_A, lora_B, parts, shrunk)
        else:
            ctx.mark_dirty(y)
            _add(y, x, lora_A, lora_B, parts, shrunk)
        ctx.parts = parts
        ctx.set_materialize_grads(False)
        *_, needs_A, needs_B, _ = ctx.needs_input_grad
        kept = x if needs_A else None, shrunk if needs_B else None
        ctx.save_for_backward(weight, lora_A, lora_B, *kept)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        """dS = s·dY·B, dX = dY·W + dS·A, dA = dSᵀ·X, dB = s·dYᵀ·S, part by part."""
        if dy is None:
            return (None,) * 7
        weight, lora_A, lora_B, x, shrunk = ctx.saved_tensors
        needs_x, needs_W, needs_b, needs_y, needs_A, needs_B, _ = ctx.needs_input_grad
        assert not needs_W and not needs_b
        dy = dy.contiguous()
        dx = dA = dB = None
        if needs_x:
            dx = dy.new_zeros(len(dy), lora_A.shape[-1]) if weight is None else torch.mm(dy, weight)
        if needs_A:
            dA = torch.zeros_like(lora_A)
        if needs_B:
            dB = torch.zeros_like(lora_B)
        unread = dy.new_empty(())  # beta=0: it gives the product a factor
        for k, start, end, rank, scaling in ctx.parts:
            own = dy[start:end]
            if needs_x or needs_A:
                # Transposed, dS (r, n): a rank as the last axis in memory is slow.
                turned = torch.addmm(unread, lora_B[k, :, :rank].T, own.T, beta=0, alpha=scaling)
            if dx is not None:
                dx[start:end].addmm_(turned.T, lora_A[k, :rank])
            if dA is not None:
                torch.mm(turned, x[start:end], out=dA[k, :rank])
            if dB is not None:
                S = shrunk[start:end, :rank]
                dB[k, :, :rank] = torch.mm(S.T, own).T.mul_(scaling)
        return dx, None, None, dy if needs_y else None, dA, dB, None
