"""The low-rank part of K particles, added to an output that exists: schema, gradient, checks.

For base layers whose product is their own (quantised, tensor-parallel). In eager mode the sum is
made in the output's memory; torch.compile gets the same as an operator without side effects.
"""

import math

import torch
from torch import Tensor

from multilora.ops import dispatch
from multilora.ops._library import (
    define,
    on_kept_backend,
    refuse_forward_mode,
)
from multilora.ops.common import finite
from multilora.ops.lora_linear import backward_op, rows_of


def _fake_shrunk(y, x, lora_A, lora_B, scaling):
    return x.new_empty(*lora_A.shape[:1], x.shape[1], lora_A.shape[1])


def _fake_copied(y, x, lora_A, lora_B, scaling):
    return y.new_empty(y.shape), _fake_shrunk(y, x, lora_A, lora_B, scaling)


def _add_to_copy(y, x, lora_A, lora_B, scaling):
    out = y.clone(memory_format=torch.contiguous_format)
    return out, _in_place_op(out, x, lora_A, lora_B, scaling)


# y holds K·T rows of d_out, contiguous, whatever its leading axes; x is (K, T, d_in), or
# (1, T, d_in) where all particles read the same rows. The backward reads S = x Aᵀ (K, T, r) again.
_ARGUMENTS = "Tensor x, Tensor lora_A, Tensor lora_B, float scaling"
_in_place_op = define(f"lora_add_(Tensor(a!) y, {_ARGUMENTS}) -> Tensor", _fake_shrunk)
_copying_op = define(
    f"lora_add(Tensor y, {_ARGUMENTS}) -> (Tensor, Tensor)", _fake_copied, function=_add_to_copy
)


def _save(ctx, x, lora_A, lora_B, shrunk, scaling):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, lora_A, lora_B, shrunk)
    ctx.scaling = scaling


def _setup_context(ctx, inputs, output):
    _, x, lora_A, lora_B, scaling = inputs
    _, shrunk = output
    ctx.mark_non_differentiable(shrunk)
    _save(ctx, x, lora_A, lora_B, shrunk, scaling)


def _backward(ctx, grad, *_):
    if grad is None:
        return (None,) * 5
    x, lora_A, lora_B, shrunk = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[1:4])
    rows = grad.contiguous().view(*shrunk.shape[:2], lora_B.shape[1])
    grads = backward_op(rows, x, None, lora_A, lora_B, shrunk, ctx.scaling, needs)
    return grad, *(g if need else None for g, need in zip(grads, needs)), None


_copying_op.register_autograd(_backward, _setup_context)


def _add_in_place(y, x, lora_A, lora_B, scaling):
    shrunk = _in_place_op(y, x, lora_A, lora_B, scaling)
    # A layer that keeps y for its own backward is to hear of it there: autograd does not see what
    # a kernel writes, nor, under a dispatch mode, what PyTorch's operators inside ours do.
    if not y.is_inference():
        torch.autograd.graph.increment_version(y)
    return shrunk


class _AddInPlace(torch.autograd.Function):
    """The same in y's memory. Eager mode only: an operator that mutates has no gradient."""

    @staticmethod
    def forward(ctx, y, x, lora_A, lora_B, scaling):
        shrunk = _add_in_place(y, x, lora_A, lora_B, scaling)
        ctx.backend = dispatch.requested()
        _save(ctx, x, lora_A, lora_B, shrunk, scaling)
        # The memory under a new tensor. As y itself, marked dirty, autograd would copy the whole
        # gradient three times where y is a view, and every F.linear of 3-D rows returns one.
        return y.data

    backward = staticmethod(on_kept_backend(_backward))


def lora_add(y: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float = 1.0) -> Tensor:
    """y_k + scaling · (x_k A_kᵀ) B_kᵀ for all K particles at once, in y's memory.

    y (K, *, d_out) or (K·B, *, d_out), what a base layer has just returned; x (K, *, d_in), or
    (1, *, d_in) or `x.expand(K, ...)` where all particles read the same input; lora_A (K, r, d_in),
    lora_B (K, d_out, r) -> as y, in its dtype.

    y is given up: the result takes its memory, except where y is not contiguous and under
    torch.compile. Nothing that is read later, x included, may live in that memory; a layer that
    saved y for its backward raises there.

    All is computed in y's dtype, which a base layer under torch.autocast has chosen already. lora_A
    and lora_B may have another one, such as float32 masters beside a bfloat16 y; gradients come
    back in the dtypes of x, lora_A and lora_B.

    Raises ValueError for shapes or devices that do not fit, TypeError for dtypes, RuntimeError
    where y is a leaf that requires a gradient, NotImplementedError for forward-mode derivatives.
    Source: Hu et al. 2022 (LoRA), eq. 3, its second term, for each of the K particles.
    """
    refuse_forward_mode("lora_add", y, x, lora_A, lora_B)
    _check(y, x, lora_A, lora_B)
    arguments = (rows_of(x).to(y.dtype), lora_A, lora_B, finite(scaling))
    if torch.compiler.is_compiling():
        return _copying_op(y, *arguments)[0]
    y = y.contiguous()
    if not torch.is_grad_enabled() or not any(t.requires_grad for t in (y, x, lora_A, lora_B)):
        _add_in_place(y, *arguments)
        return y
    if y.is_leaf and y.requires_grad:
        raise RuntimeError(
            "lora_add takes the memory of y, so y cannot be a leaf that requires a gradient; "
            f"pass y.clone(); got y {tuple(y.shape)}"
        )
    return _AddInPlace.apply(y, *arguments)


def _check(y, x, lora_A, lora_B) -> None:
    fits = (
        y.ndim >= 2
        and x.ndim >= 2
        and lora_A.ndim == lora_B.ndim == 3
        and lora_A.shape[0] >= 1
        and lora_A.shape[1] >= 1
        and x.shape[0] in (1, lora_A.shape[0])
        and x.shape[-1] == lora_A.shape[2]
        and lora_B.shape == (lora_A.shape[0], y.shape[-1], lora_A.shape[1])
        and math.prod(y.shape[:-1]) == lora_A.shape[0] * math.prod(x.shape[1:-1])
    )
    shapes = (
        f"y {tuple(y.shape)}, x {tuple(x.shape)}, lora_A {tuple(lora_A.shape)}, "
        f"lora_B {tuple(lora_B.shape)}"
    )
    if not fits:
        raise ValueError(
            "lora_add needs y (K, *, d_out) or (K·B, *, d_out), x (K, *, d_in) or (1, *, d_in) of "
            "as many rows a particle, lora_A (K, r, d_in), lora_B (K, d_out, r), with K, r >= 1; "
            f"got {shapes}"
        )
    if not y.device == x.device == lora_A.device == lora_B.device:
        raise ValueError(
            f"lora_add needs all tensors on one device; got y on {y.device}, x on {x.device}, "
            f"lora_A on {lora_A.device}, lora_B on {lora_B.device} for {shapes}"
        )
    if not (
        all(t.is_floating_point() for t in (y, x, lora_A, lora_B)) and lora_A.dtype == lora_B.dtype
    ):
        raise TypeError(
            "lora_add needs floating dtypes, with lora_A and lora_B alike; got y "
            f"{y.dtype}, x {x.dtype}, lora_A {lora_A.dtype}, lora_B {lora_B.dtype} for {shapes}"
        )
