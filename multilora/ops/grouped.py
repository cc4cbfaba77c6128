"""The grouped linear: rows that are sorted by group, each with its group's matrix."""

import functools

import torch
from torch import Tensor

from multilora.ops._library import autocast_dtype, define, refuse_forward_mode

# --- operators -----------------------------------------------------------------------------------


def _fake(x, weight, ends):
    return x.new_empty(x.shape[0], weight.shape[1])


def _fake_backward(grad, x, weight, ends, needs):
    return tuple(t.new_empty(t.shape if need else (0,)) for t, need in zip((x, weight), needs))


_op = define("grouped_linear(Tensor x, Tensor weight, Tensor ends) -> Tensor", _fake)
# needs: which of dx and dW to compute; the others come back empty.
_backward_op = define(
    "grouped_linear_backward(Tensor grad, Tensor x, Tensor weight, Tensor ends, bool[2] needs)"
    " -> (Tensor, Tensor)",
    _fake_backward,
)


def _save(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad):
    if grad is None:
        return None, None, None
    needs = list(ctx.needs_input_grad[:2])
    grads = _backward_op(grad.contiguous(), *ctx.saved_tensors, needs)
    return *(g if need else None for g, need in zip(grads, needs)), None


_op.register_autograd(_backward, _save)
_backward_op.refuse_gradient()


# --- the public function -------------------------------------------------------------------------


def grouped_linear(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """y_t = W_{g(t)} x_t for rows that are sorted by group: one product for groups of any sizes.

    The rows of group g are x[ends[g - 1] : ends[g]], and those of the first group start at 0. A
    group may be empty. The gradients are dx_t = W_{g(t)}ᵀ dy_t and dW_g = Σ_t dy_t x_tᵀ over the
    rows of g; neither is computed where nobody asks for it.

    Under torch.autocast, x is cast to autocast's dtype, as in F.linear.

    On a GPU nothing waits for the values of `ends`: they are not checked there, rows behind the
    last end hold anything, and kernels read no memory outside of the tensors. (The reference has
    to wait for them where it computes one group after another: in other dtypes than bfloat16, and
    for rows that do not start at multiples of 16 bytes.)

    Args:
        x: the rows (T, d_in).
        weight: a matrix for each group (G, d_out, d_in), G >= 1, in x's dtype, or a float32 master
            beside a bfloat16 or float16 x, whose gradient comes back in float32.
        ends: where each group ends (G,), int32, on x's device: ascending, and T for the last one.

    Returns:
        (T, d_out), in x's dtype.

    Raises:
        ValueError: for shapes or devices that do not fit; on a CPU, for ends that do not ascend
            from 0 to T.
        TypeError: for dtypes that do not fit.
        NotImplementedError: for forward-mode derivatives.
    """
    refuse_forward_mode("grouped_linear", x, weight)
    if torch._C._is_any_autocast_enabled():
        dtype = autocast_dtype(x.device.type)
        if dtype is not None and x.dtype != torch.float64:
            x = x.to(dtype)
            if weight.dtype != torch.float32:
                weight = weight.to(dtype)
    # The compiler may look at sizes that stand for many: nothing may be cached by them.
    check = _check.__wrapped__ if torch.compiler.is_compiling() else _check
    check(
        (x.shape, weight.shape, ends.shape),
        (x.dtype, weight.dtype, ends.dtype),
        (x.device, weight.device, ends.device),
    )
    return _op(x, weight, ends.contiguous())


# Every layer asks with the same shapes in every step, as long as its batches are equal.
@functools.lru_cache(maxsize=4096)
def _check(shapes, dtypes, devices) -> None:
    """Raise where x, weight and ends do not fit."""
    x, weight, ends = shapes
    got = f"x {tuple(x)}, weight {tuple(weight)}, ends {tuple(ends)}"
    fits = (
        len(x) == 2
        and len(weight) == 3
        and len(ends) == 1
        and weight[0] == ends[0]
        and weight[0] >= 1
        and weight[2] == x[1]
    )
    if not fits:
        raise ValueError(
            "grouped_linear needs x (T, d_in), weight (G, d_out, d_in) and ends (G,), with G >= 1; "
            f"got {got}"
        )
    x, weight, ends = devices
    if not x == weight == ends:
        raise ValueError(
            f"grouped_linear needs all tensors on one device; got x on {x}, weight on {weight}, "
            f"ends on {ends} for {got}"
        )
    x, weight, ends = dtypes
    masters = x in (torch.float16, torch.bfloat16) and weight == torch.float32
    if not (x.is_floating_point and (weight == x or masters) and ends == torch.int32):
        raise TypeError(
            "grouped_linear needs x and weight in one floating dtype, or weight in float32 beside "
            f"a float16/bfloat16 x, and ends in int32; got x {x}, weight {weight}, ends {ends} for "
            f"{got}"
        )
