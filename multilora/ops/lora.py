"""The K-particle LoRA linear, whole and as its low-rank part alone: schemas, gradients, checks.

`lora_add` is for base layers that compute their own product (quantised, tensor-parallel). In eager
mode it adds to the memory of their output; torch.compile gets the same result from an operator
without side effects.
"""

import functools
import math

import torch
from torch import Tensor

from multilora.ops import dispatch
from multilora.ops._library import (
    FrozenTensorError,
    autocast_dtype,
    define,
    on_kept_backend,
    refuse_forward_mode,
)
from multilora.ops.common import finite

# --- operators -----------------------------------------------------------------------------------


def _fake_linear(x, weight, lora_A, lora_B, bias, scaling):
    particles, rank = lora_A.shape[:2]
    y = x.new_empty(particles, x.shape[1], weight.shape[0])
    return y, x.new_empty(particles, x.shape[1], rank)


def _fake_linear_backward(grad, x, weight, lora_A, lora_B, shrunk, scaling, needs):
    shapes = (x, lora_A, lora_B)
    return tuple(t.new_empty(t.shape if need else (0,)) for t, need in zip(shapes, needs))


def _fake_shrunk(y, x, lora_A, lora_B, scaling):
    return x.new_empty(*lora_A.shape[:1], x.shape[1], lora_A.shape[1])


def _fake_add(y, x, lora_A, lora_B, scaling):
    return y.new_empty(y.shape), _fake_shrunk(y, x, lora_A, lora_B, scaling)


def _add_to_copy(y, x, lora_A, lora_B, scaling):
    out = y.clone(memory_format=torch.contiguous_format)
    return out, _add_in_place_op(out, x, lora_A, lora_B, scaling)


# In all of them x is (K, T, d_in), or (1, T, d_in) where the particles share their rows. The second
# output, or the only one of lora_add_, is S = x Aᵀ (K, T, r), which the backward reads again.
_linear_op = define(
    "lora_linear(Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor? bias,"
    " float scaling) -> (Tensor, Tensor)",
    _fake_linear,
)
# needs: which of dx, dA, dB to compute; the others come back empty. Without a weight this is the
# gradient of the low-rank part alone (lora_add).
_backward_op = define(
    "lora_linear_backward(Tensor grad, Tensor x, Tensor? weight, Tensor lora_A, Tensor lora_B,"
    " Tensor shrunk, float scaling, bool[3] needs) -> (Tensor, Tensor, Tensor)",
    _fake_linear_backward,
)
# y holds K·T rows of d_out, contiguous, whatever its leading axes are.
_ADD = "Tensor x, Tensor lora_A, Tensor lora_B, float scaling"
_add_in_place_op = define(f"lora_add_(Tensor(a!) y, {_ADD}) -> Tensor", _fake_shrunk)
_add_op = define(
    f"lora_add(Tensor y, {_ADD}) -> (Tensor, Tensor)", _fake_add, function=_add_to_copy
)


def _save_linear(ctx, inputs, output):
    x, weight, lora_A, lora_B, _, scaling = inputs
    _, shrunk = output
    ctx.mark_non_differentiable(shrunk)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, lora_A, lora_B, shrunk)
    ctx.scaling = scaling


def _linear_backward(ctx, grad, _):
    if grad is None:
        return (None,) * 6
    x, _, A, B, _, _ = ctx.needs_input_grad
    dx, dA, dB = _backward_op(grad.contiguous(), *ctx.saved_tensors, ctx.scaling, [x, A, B])
    return dx if x else None, None, dA if A else None, dB if B else None, None, None


def _save_low_rank(ctx, x, lora_A, lora_B, shrunk, scaling):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, lora_A, lora_B, shrunk)
    ctx.scaling = scaling


def _save_add(ctx, inputs, output):
    _, x, lora_A, lora_B, scaling = inputs
    _, shrunk = output
    ctx.mark_non_differentiable(shrunk)
    _save_low_rank(ctx, x, lora_A, lora_B, shrunk, scaling)


def _add_backward(ctx, grad, *_):
    if grad is None:
        return (None,) * 5
    x, lora_A, lora_B, shrunk = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[1:4])
    rows = grad.contiguous().view(*shrunk.shape[:2], lora_B.shape[1])
    grads = _backward_op(rows, x, None, lora_A, lora_B, shrunk, ctx.scaling, needs)
    return grad, *(g if need else None for g, need in zip(grads, needs)), None


_linear_op.register_autograd(_linear_backward, _save_linear)
_backward_op.refuse_gradient()
_add_op.register_autograd(_add_backward, _save_add)


def _add_in_place(y, x, lora_A, lora_B, scaling):
    shrunk = _add_in_place_op(y, x, lora_A, lora_B, scaling)
    # Autograd does not see what a kernel writes, nor, under a dispatch mode, what PyTorch's
    # operators inside ours write. Count the change, so that a layer that saved y raises.
    if not y.is_inference():
        torch.autograd.graph.increment_version(y)
    return shrunk


class _AddInPlace(torch.autograd.Function):
    """lora_add in y's memory, for eager mode only: an operator that mutates has no gradient."""

    @staticmethod
    def forward(ctx, y, x, lora_A, lora_B, scaling):
        shrunk = _add_in_place(y, x, lora_A, lora_B, scaling)
        ctx.request = dispatch.requested()
        _save_low_rank(ctx, x, lora_A, lora_B, shrunk, scaling)
        # Return the memory under a new tensor. If y itself were marked dirty, autograd would copy
        # the whole gradient three times where y is a view, as every F.linear of 3-D rows returns.
        return y.data

    backward = staticmethod(on_kept_backend(_add_backward))


# --- public functions ----------------------------------------------------------------------------


def lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None = None,
    scaling: float = 1.0,
) -> Tensor:
    """y_k = x_k Wᵀ + bias + scaling · (x_k A_kᵀ) B_kᵀ for all K particles at once.

    Where all particles read the same input, pass x as (1, *, d_in) or as `x.expand(K, ...)`
    (stride 0 on the particle axis): the base product is then computed once, and the gradient of x
    is summed over the particles before its product with the weight.

    weight and bias are frozen: no gradient is computed for them, and one that requires a gradient
    has to be passed as `.detach()`, so that nobody waits for it. Under torch.autocast, x, weight
    and bias are cast to autocast's dtype, as in F.linear.

    Source: Hu et al. 2022 (LoRA), eq. 3, for each of the K particles.

    Args:
        x: the input (K, *, d_in), or (1, *, d_in) for all particles.
        weight: the frozen weight (d_out, d_in), in x's dtype.
        lora_A: (K, r, d_in), in x's dtype, or a float32 master beside a bfloat16 or float16 x.
        lora_B: (K, d_out, r), in lora_A's dtype. Gradients come back in that dtype.
        bias: the frozen bias (d_out,), in x's dtype, or None.
        scaling: what the low-rank part is multiplied with.

    Returns:
        (K, *, d_out), in x's dtype.

    Raises:
        ValueError: for shapes or devices that do not fit, and for a weight or bias that requires a
            gradient.
        TypeError: for dtypes that do not fit.
        NotImplementedError: for forward-mode derivatives.
    """
    refuse_forward_mode("lora_linear", x, weight, lora_A, lora_B, bias)
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        _refuse_gradient(weight=weight, bias=bias)
    if torch._C._is_any_autocast_enabled():
        dtype = autocast_dtype(x.device.type)
        if dtype is not None and x.dtype != torch.float64:
            x, weight = x.to(dtype), weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)
    # The compiler may look at sizes that stand for many: nothing may be cached by them.
    check = _check_linear.__wrapped__ if torch.compiler.is_compiling() else _check_linear
    of_bias = (None, None, None) if bias is None else (bias.shape, bias.dtype, bias.device)
    check(
        scaling,
        (x.shape, weight.shape, lora_A.shape, lora_B.shape, of_bias[0]),
        (x.dtype, weight.dtype, lora_A.dtype, lora_B.dtype, of_bias[1]),
        (x.device, weight.device, lora_A.device, lora_B.device, of_bias[2]),
    )
    rows = x if x.ndim == 3 and x.stride(0) else _rows_of(x)
    y, _ = _linear_op(rows, weight, lora_A, lora_B, bias, float(scaling))
    return y if x.ndim == 3 else y.view(len(lora_A), *x.shape[1:-1], len(weight))


def lora_add(y: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float = 1.0) -> Tensor:
    """y_k + scaling · (x_k A_kᵀ) B_kᵀ for all K particles at once, in y's memory.

    The caller gives y up: the result takes its memory, except where y is not contiguous and under
    torch.compile. Nothing that is read later, x included, may live in that memory; a layer that
    saved y for its backward raises there.

    Everything is computed in y's dtype, which a base layer under torch.autocast has chosen already.

    Source: Hu et al. 2022 (LoRA), eq. 3, its second term, for each of the K particles.

    Args:
        y: what a base layer has just returned, (K, *, d_out) or (K·B, *, d_out).
        x: the input (K, *, d_in), or (1, *, d_in) or `x.expand(K, ...)` where all particles read
            the same input.
        lora_A: (K, r, d_in), in any floating dtype, such as float32 beside a bfloat16 y.
        lora_B: (K, d_out, r), in lora_A's dtype.
        scaling: what the low-rank part is multiplied with.

    Returns:
        The sum, in y's shape and dtype. Gradients come back in the dtypes of x, lora_A and lora_B.

    Raises:
        ValueError: for shapes or devices that do not fit.
        TypeError: for dtypes that do not fit.
        RuntimeError: where y is a leaf that requires a gradient.
        NotImplementedError: for forward-mode derivatives.
    """
    refuse_forward_mode("lora_add", y, x, lora_A, lora_B)
    _check_add(y, x, lora_A, lora_B)
    arguments = (_rows_of(x).to(y.dtype), lora_A, lora_B, finite(scaling))
    if torch.compiler.is_compiling():
        return _add_op(y, *arguments)[0]
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


def _rows_of(x: Tensor) -> Tensor:
    """x (K or 1, *, d_in) -> (K or 1, T, d_in), with one set of rows where x is shared."""
    if x.shape[0] > 1 and x.stride(0) == 0:
        x = _one_of_equals(x)
    if x.ndim == 3:
        return x
    return x.unsqueeze(1) if x.ndim == 2 else x.flatten(1, -2)


def _one_of_equals(x: Tensor) -> Tensor:
    """One particle's rows, which stand for all. A leaf that is itself expanded stays as it is: it
    keeps its K gradients."""
    if not (torch.is_grad_enabled() and x.requires_grad):
        return x[:1]
    if x.is_leaf:
        return x
    particles = x.shape[0]
    exact = particles & (particles - 1) == 0 and x.dtype != torch.float16
    if not exact or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return x[:1]
    # The gradient of x[:1] is K times as large, and zero but for one K-th.
    return _OneOfEquals.apply(x)


class _OneOfEquals(torch.autograd.Function):
    """x (K, ...) -> x[:1], whose gradient is shared out as one K-th for each particle.

    An expanded x uses the sum of these alone. A K-th is exact for powers of two only, and that of a
    float16 could be too small.
    """

    @staticmethod
    def forward(ctx, x):
        ctx.particles = x.shape[0]
        return x[:1]

    @staticmethod
    def backward(ctx, grad):
        return (grad / ctx.particles).expand(ctx.particles, *grad.shape[1:])


# --- checks --------------------------------------------------------------------------------------


def _refuse_gradient(**frozen: Tensor | None) -> None:
    for name, t in frozen.items():
        if t is not None and t.requires_grad and torch.is_grad_enabled():
            raise FrozenTensorError(
                f"lora_linear computes no gradient for {name}, which is frozen; got {name} "
                f"{tuple(t.shape)} with requires_grad=True: pass {name}.detach(), or call "
                "requires_grad_(False) on it"
            )


# Every layer asks with the same shapes in every step.
@functools.lru_cache(maxsize=4096)
def _check_linear(scaling, shapes, dtypes, devices) -> None:
    """Raise where the scaling, or x, weight, lora_A, lora_B and bias, do not fit."""
    finite(scaling)
    x, weight, lora_A, lora_B, bias = shapes
    got = (
        f"x {tuple(x)}, weight {tuple(weight)}, lora_A {tuple(lora_A)}, lora_B {tuple(lora_B)}, "
        f"bias {None if bias is None else tuple(bias)}"
    )
    fits = (
        len(x) >= 2
        and len(weight) == 2
        and len(lora_A) == len(lora_B) == 3
        and x[0] in (1, lora_A[0])
        and x[-1] == weight[1] == lora_A[2]
        and lora_B == (lora_A[0], weight[0], lora_A[1])
        and (bias is None or bias == weight[:1])
        and lora_A[0] >= 1
        and lora_A[1] >= 1
    )
    if not fits:
        raise ValueError(
            "lora_linear needs x (K, *, d_in) or (1, *, d_in), weight (d_out, d_in), "
            "lora_A (K, r, d_in), lora_B (K, d_out, r), bias (d_out,) or None, with K, r >= 1; "
            f"got {got}"
        )
    x, weight, lora_A, lora_B, bias = devices
    if not (x == weight == lora_A == lora_B and bias in (None, x)):
        raise ValueError(
            f"lora_linear needs all tensors on one device; got x on {x}, weight on {weight}, "
            f"lora_A on {lora_A}, lora_B on {lora_B}"
            f"{'' if bias is None else f', bias on {bias}'} for {got}"
        )
    x, weight, lora_A, lora_B, bias = dtypes
    base_fits = x.is_floating_point and x == weight and bias in (None, x)
    masters = x in (torch.float16, torch.bfloat16) and lora_A == torch.float32
    if not (base_fits and lora_A == lora_B and (masters or lora_A == x)):
        raise TypeError(
            "lora_linear needs x, weight and bias in one floating dtype, and lora_A and lora_B in "
            f"that dtype or in float32 beside float16/bfloat16; got x {x}, weight {weight}, "
            f"lora_A {lora_A}, lora_B {lora_B}, bias {bias} for {got}"
        )


def _check_add(y, x, lora_A, lora_B) -> None:
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
            "as many rows per particle, lora_A (K, r, d_in), lora_B (K, d_out, r), with K, r >= 1; "
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
