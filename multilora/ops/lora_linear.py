"""The K-particle LoRA linear as an operator: schema, shapes, gradient, checks."""

import torch
from torch import Tensor

from multilora.ops._library import (
    FrozenTensorError,
    autocast_dtype,
    define,
    refuse_forward_mode,
    refuse_gradient,
    register_autograd,
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
    needs = [ctx.needs_input_grad[i] for i in (0, 2, 3)]
    grads = backward_op(grad.contiguous(), *ctx.saved_tensors, ctx.scaling, needs)
    dx, dA, dB = (g if need else None for g, need in zip(grads, needs))
    return dx, None, dA, dB, None, None


register_autograd(_forward_op, _backward, _setup_context)
refuse_gradient(backward_op)


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
    for name, frozen in (("weight", weight), ("bias", bias)):
        if frozen is not None and frozen.requires_grad and torch.is_grad_enabled():
            raise FrozenTensorError(
                f"lora_linear computes no gradient for {name}, which is frozen; got {name} "
                f"{tuple(frozen.shape)} with requires_grad=True: pass {name}.detach(), or call "
                "requires_grad_(False) on it"
            )
    dtype = autocast_dtype(x.device.type)
    if dtype is not None and x.dtype != torch.float64:
        x, weight = x.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    _check(x, weight, lora_A, lora_B, bias)
    particles = lora_A.shape[0]
    y, _ = _forward_op(rows_of(x), weight, lora_A, lora_B, bias, finite(scaling))
    return y if x.ndim == 3 else y.view(particles, *x.shape[1:-1], weight.shape[0])


def rows_of(x: Tensor) -> Tensor:
    """x (K or 1, *, d_in) -> (K or 1, T, d_in): one row set where all particles read the same."""
    if x.shape[0] > 1 and x.stride(0) == 0:
        # One particle's rows stand for all. A leaf that is itself expanded keeps K gradients.
        expanded_leaf = torch.is_grad_enabled() and x.requires_grad and x.is_leaf
        x = x if expanded_leaf else x[:1]
    if x.ndim == 3:
        return x
    return x.unsqueeze(1) if x.ndim == 2 else x.flatten(1, -2)


def _check(x, weight, lora_A, lora_B, bias) -> None:
    fits = (
        x.ndim >= 2
        and weight.ndim == 2
        and lora_A.ndim == lora_B.ndim == 3
        and x.shape[0] in (1, lora_A.shape[0])
        and x.shape[-1] == weight.shape[1] == lora_A.shape[2]
        and lora_B.shape == (lora_A.shape[0], weight.shape[0], lora_A.shape[1])
        and (bias is None or bias.shape == weight.shape[:1])
        and lora_A.shape[0] >= 1
        and lora_A.shape[1] >= 1
    )
    if not fits:
        raise ValueError(
            "lora_linear needs x (K, *, d_in) or (1, *, d_in), weight (d_out, d_in), "
            "lora_A (K, r, d_in), lora_B (K, d_out, r), bias (d_out,) or None, with K, r >= 1; "
            f"got {_shapes(x, weight, lora_A, lora_B, bias)}"
        )
    device = x.device
    if not (
        weight.device == lora_A.device == lora_B.device == device
        and (bias is None or bias.device == device)
    ):
        raise ValueError(
            "lora_linear needs all tensors on one device; got x on "
            f"{device}, weight on {weight.device}, lora_A on {lora_A.device}, lora_B on "
            f"{lora_B.device}{'' if bias is None else f', bias on {bias.device}'} "
            f"for {_shapes(x, weight, lora_A, lora_B, bias)}"
        )
    dtype = x.dtype
    base_fits = dtype.is_floating_point and weight.dtype == dtype
    base_fits = base_fits and (bias is None or bias.dtype == dtype)
    masters = dtype in (torch.float16, torch.bfloat16) and lora_A.dtype == torch.float32
    if not (base_fits and lora_A.dtype == lora_B.dtype and (masters or lora_A.dtype == dtype)):
        raise TypeError(
            "lora_linear needs x, weight and bias in one floating dtype, and lora_A and lora_B in "
            "that dtype or in float32 beside float16/bfloat16; got x "
            f"{dtype}, weight {weight.dtype}, lora_A {lora_A.dtype}, lora_B {lora_B.dtype}, "
            f"bias {None if bias is None else bias.dtype} "
            f"for {_shapes(x, weight, lora_A, lora_B, bias)}"
        )


def _shapes(x, weight, lora_A, lora_B, bias) -> str:
    return (
        f"x {tuple(x.shape)}, weight {tuple(weight.shape)}, lora_A {tuple(lora_A.shape)}, "
        f"lora_B {tuple(lora_B.shape)}, bias {None if bias is None else tuple(bias.shape)}"
    )
