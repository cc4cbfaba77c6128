"""The K-particle LoRA linear as an operator: schema, shapes, gradient, checks."""

import functools

import torch
from torch import Tensor

from multilora.ops._library import (
    FrozenTensorError,
    autocast_dtype,
    define,
    refuse_forward_mode,
)
from multilora.ops.common import finite


def _fake_forward(x, weight, lora_A, lora_B, bias, scaling):
    particles, rank = lora_A.shape[:2]
    y = x.new_empty(particles, x.shape[1], weight.shape[0])
    return y, x.new_empty(particles, x.shape[1], rank)


def _fake_backward(grad, x, weight, lora_A, lora_B, shrunk, scaling, needs):
    shapes = (x, lora_A, lora_B)
    return tuple(t.new_empty(t.shape if need else (0,)) for t, need in zip(shapes, needs))


# x is (K, T, d_in), or (1, T, d_in) where all particles read the same rows. The second output
# is S = x Aᵀ (K, T, r), which the backward reads again.
_forward_op = define(
    "lora_linear(Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor? bias,"
    " float scaling) -> (Tensor, Tensor)",
    _fake_forward,
)
# needs: which of dx, dA, dB to compute; the others come back empty. Without a weight, dx is that of
# the low-rank part (lora_add).
backward_op = define(
    "lora_linear_backward(Tensor grad, Tensor x, Tensor? weight, Tensor lora_A, Tensor lora_B,"
    " Tensor shrunk, float scaling, bool[3] needs) -> (Tensor, Tensor, Tensor)",
    _fake_backward,
)


def _setup_context(ctx, inputs, output):
    x, weight, lora_A, lora_B, _, scaling = inputs
    _, shrunk = output
    ctx.mark_non_differentiable(shrunk)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, lora_A, lora_B, shrunk)
    ctx.scaling = scaling


def _backward(ctx, grad, _):
    if grad is None:
        return (None,) * 6
    x, _, A, B, _, _ = ctx.needs_input_grad
    dx, dA, dB = backward_op(grad.contiguous(), *ctx.saved_tensors, ctx.scaling, [x, A, B])
    return dx if x else None, None, dA if A else None, dB if B else None, None, None


_forward_op.register_autograd(_backward, _setup_context)
backward_op.refuse_gradient()


def lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None = None,
    scaling: float = 1.0,
) -> Tensor:
    """y_k = x_k Wᵀ + bias + scaling · (x_k A_kᵀ) B_kᵀ for all K particles at once.

    x (K, *, d_in), weight (d_out, d_in), lora_A (K, r, d_in), lora_B (K, d_out, r),
    bias (d_out,) -> (K, *, d_out), in x's dtype.

    Where all particles read the same input, pass x as (1, *, d_in) or as `x.expand(K, ...)`
    (stride 0 on the particle axis): the base product is then computed once, and the gradient of x
    is summed over the particles before its product with the weight.

    weight and bias are frozen: no gradient is computed for them, and one that requires a gradient
    has to be passed as `.detach()`, so that nobody waits for it. lora_A and lora_B may be float32
    masters beside a bfloat16 or float16 x and weight; their gradients come back in float32. Under
    torch.autocast, x, weight and bias are cast to autocast's dtype, as in F.linear.

    Raises ValueError for shapes or devices that do not fit and for a weight or bias that requires a
    gradient, TypeError for dtypes, NotImplementedError for forward-mode derivatives.
    Source: Hu et al. 2022 (LoRA), eq. 3, for each of the K particles.
    """
    refuse_forward_mode("lora_linear", x, weight, lora_A, lora_B, bias)
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        _refuse_gradient(weight=weight, bias=bias)
    if torch._C._is_any_autocast_enabled():
        dtype = autocast_dtype(x.device.type)
        if dtype is not None and x.dtype != torch.float64:
            x, weight = x.to(dtype), weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)
    # What the compiler looks at may be sizes that stand for many.
    require_fit = _require_fit.__wrapped__ if torch.compiler.is_compiling() else _require_fit
    of_bias = (None, None, None) if bias is None else (bias.shape, bias.dtype, bias.device)
    require_fit(
        scaling,
        (x.shape, weight.shape, lora_A.shape, lora_B.shape, of_bias[0]),
        (x.dtype, weight.dtype, lora_A.dtype, lora_B.dtype, of_bias[1]),
        (x.device, weight.device, lora_A.device, lora_B.device, of_bias[2]),
    )
    rows = x if x.ndim == 3 and x.stride(0) else rows_of(x)
    y, _ = _forward_op(rows, weight, lora_A, lora_B, bias, float(scaling))
    return y if x.ndim == 3 else y.view(len(lora_A), *x.shape[1:-1], len(weight))


def _refuse_gradient(**frozen: Tensor | None) -> None:
    for name, t in frozen.items():
        if t is not None and t.requires_grad and torch.is_grad_enabled():
            raise FrozenTensorError(
                f"lora_linear computes no gradient for {name}, which is frozen; got {name} "
                f"{tuple(t.shape)} with requires_grad=True: pass {name}.detach(), or call "
                "requires_grad_(False) on it"
            )


def rows_of(x: Tensor) -> Tensor:
    """x (K or 1, *, d_in) -> (K or 1, T, d_in): one row set where all particles read the same."""
    if x.shape[0] > 1 and x.stride(0) == 0:
        x = _one_of_equals(x)
    if x.ndim == 3:
        return x
    return x.unsqueeze(1) if x.ndim == 2 else x.flatten(1, -2)


def _one_of_equals(x: Tensor) -> Tensor:
    """One particle's rows stand for all, but for a leaf that is itself expanded: it keeps its K
    gradients."""
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
    """x (K, ...) -> x[:1]. Its gradient is a K-th for each: only their sum is of use to an
    expanded x. A K-th of a float16 could be too small, and is exact for powers of two alone."""

    @staticmethod
    def forward(ctx, x):
        ctx.particles = x.shape[0]
        return x[:1]

    @staticmethod
    def backward(ctx, grad):
        return (grad / ctx.particles).expand(ctx.particles, *grad.shape[1:])


# Every layer asks the same in every step.
@functools.lru_cache(maxsize=4096)
def _require_fit(scaling, shapes, dtypes, devices) -> None:
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
