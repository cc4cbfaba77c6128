"""Frobenius geometry of the adapters, and SVGD's update, for one layer or all layers at once."""

from collections.abc import Sequence

import torch
from torch import Tensor

from multilora.ops._library import define, refuse_forward_mode
from multilora.ops.common import accumulator, finite

# --- operators -----------------------------------------------------------------------------------


def _fake_gram(lora_A, lora_B, scaling):
    particles = lora_A[0].shape[0]
    shape = (len(lora_A), particles, particles)
    return lora_A[0].new_empty(shape, dtype=accumulator(lora_A[0].dtype))


def _fake_backward(grad, lora_A, lora_B, scaling):
    return [t.new_empty(t.shape) for t in (*lora_A, *lora_B)]


def _fake_update(grad_A, grad_B, mix, upstream, lora_A, lora_B, scaling):
    return [t.new_empty(t.shape) for t in (*lora_A, *lora_B)]


def _traces(backend, lora_A, lora_B, scaling):
    return backend.traces(lora_A, lora_B, scaling, False)


def _distances(backend, lora_A, lora_B, scaling):
    return backend.traces(lora_A, lora_B, scaling, True)


def _gradients(backend, grad, lora_A, lora_B, scaling):
    return backend.factor_gradients(grad, lora_A, lora_B, scaling)


def _update(backend, grad_A, grad_B, mix, upstream, lora_A, lora_B, scaling):
    return backend.factor_gradients(upstream, lora_A, lora_B, scaling, mix, [*grad_A, *grad_B])


# A kernel may keep a table of the sizes on the device from its first call on, which the graphs that
# torch.compile captures do not allow.
_TAGS = (torch.Tag.cudagraph_unsafe,)
_FACTORS = "Tensor[] lora_A, Tensor[] lora_B, float[] scaling"

_gram_op = define(f"lora_gram({_FACTORS}) -> Tensor", _fake_gram, _TAGS, _traces)
_distance_op = define(f"pairwise_frobenius({_FACTORS}) -> Tensor", _fake_gram, _TAGS, _distances)
# The gradients of all lora_A, then of all lora_B, given grad = dL/dT (L, K, K). Both operators
# share it: D is linear in T.
_backward_op = define(
    f"lora_gram_backward(Tensor grad, {_FACTORS}) -> Tensor[]", _fake_backward, _TAGS, _gradients
)
# The directions of all lora_A, then of all lora_B; upstream = dL/dT, as in lora_gram_backward.
_update_op = define(
    f"svgd_update(Tensor[] grad_A, Tensor[] grad_B, Tensor mix, Tensor upstream, {_FACTORS})"
    " -> Tensor[]",
    _fake_update,
    _TAGS,
    _update,
)


def _setup_context(ctx, inputs, output):
    lora_A, lora_B, scaling = inputs
    ctx.save_for_backward(*lora_A, *lora_B)
    ctx.scaling = scaling


def _gram_backward(ctx, grad):
    layers = len(ctx.scaling)
    lora_A, lora_B = list(ctx.saved_tensors[:layers]), list(ctx.saved_tensors[layers:])
    grads = _backward_op(grad, lora_A, lora_B, ctx.scaling)
    return grads[:layers], grads[layers:], None


def _gram_gradient(grad: Tensor) -> Tensor:
    """dL/dT from grad = dL/dD (L, K, K), where D_ij = T_ii + T_jj − 2 T_ij."""
    # In float64: the diagonal must cancel the rest of its row when two particles are nearly equal.
    grad = grad.double()
    on_diagonal = grad.sum(-1) + grad.sum(-2)
    return torch.diag_embed(on_diagonal) - 2 * grad


def _distance_backward(ctx, grad):
    return _gram_backward(ctx, _gram_gradient(grad))


_gram_op.register_autograd(_gram_backward, _setup_context)
_distance_op.register_autograd(_distance_backward, _setup_context)
_backward_op.refuse_gradient()
_update_op.refuse_gradient()


# --- public functions ----------------------------------------------------------------------------


def lora_gram(
    lora_A: Tensor | Sequence[Tensor],
    lora_B: Tensor | Sequence[Tensor],
    scaling: float | Sequence[float] = 1.0,
) -> Tensor:
    """T_ij = ⟨ΔW_i, ΔW_j⟩_F with ΔW_i = scaling · B_i A_i, without forming any ΔW.

    T_ij = s² ⟨A_i A_jᵀ, B_iᵀ B_j⟩ costs O(r² (d_in + d_out)) per pair. It is accumulated in float64
    and returned in float32 (float64 for float64 factors); autocast does not touch it.

    Source: Bella (Doan et al. 2024), appendix G.

    Args:
        lora_A: (K, r, d_in), or a sequence of L layers, of any shapes with one K.
        lora_B: (K, d_out, r), or a sequence of as many.
        scaling: one number, or one for each layer.

    Returns:
        (K, K), or (L, K, K) for sequences, computed for all layers in one call.

    Raises:
        ValueError: for shapes, lengths or devices that do not fit.
        TypeError: for dtypes that do not fit.
        NotImplementedError: for forward-mode derivatives.
    """
    return _call(_gram_op, "lora_gram", lora_A, lora_B, scaling)


def pairwise_frobenius(
    lora_A: Tensor | Sequence[Tensor],
    lora_B: Tensor | Sequence[Tensor],
    scaling: float | Sequence[float] = 1.0,
) -> Tensor:
    """D_ij = ‖ΔW_i − ΔW_j‖²_F, never negative, with an exactly zero diagonal.

    The difference T_ii + T_jj − 2 T_ij is taken in float64, so particles that differ by a part in a
    thousand keep their distance.

    Args, Returns and Raises are those of `lora_gram`: (K, K), or (L, K, K) for L layers.
    """
    return _call(_distance_op, "pairwise_frobenius", lora_A, lora_B, scaling)


def svgd_update(
    grad_A: Sequence[Tensor],
    grad_B: Sequence[Tensor],
    mix: Tensor,
    upstream: Tensor,
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    scaling: float | Sequence[float] = 1.0,
) -> tuple[list[Tensor], list[Tensor]]:
    """φ_i = Σ_j mix_ij grad_j + ∇_i ⟨upstream, D⟩ for both factors of all layers in one pass.

    D is `pairwise_frobenius(lora_A, lora_B, scaling)`. The distances and repulsions are computed in
    float64, so that nearly equal particles repel with all of the dtype's digits.

    Source: Bella (Doan et al. 2024), eq. 4; the repulsion is a choice of `upstream`.

    Args:
        grad_A: the gradients (K, r, d_in) of L layers, of any shapes with one K.
        grad_B: the gradients (K, d_out, r).
        mix: (L, K, K), or (L, K) where each particle moves by its own gradient only.
        upstream: (L, K, K), the derivative of a function of D.
        lora_A: the factors (K, r, d_in).
        lora_B: the factors (K, d_out, r).
        scaling: one number, or one for each layer.

    Returns:
        The φ of all lora_A and of all lora_B, in their dtype. They have no derivatives: asking for
        one raises.

    Raises:
        ValueError: for shapes, lengths or devices that do not fit.
        TypeError: for dtypes that do not fit.
    """
    lora_A, lora_B, grad_A, grad_B = map(list, (lora_A, lora_B, grad_A, grad_B))
    scales = _scalings(scaling, len(lora_A))
    refuse_forward_mode("svgd_update", *grad_A, *grad_B, mix, upstream, *lora_A, *lora_B)
    _check_factors("svgd_update", lora_A, lora_B, scales)
    _check_update(grad_A, grad_B, mix, upstream, lora_A, lora_B)
    directions = _update_op(grad_A, grad_B, mix, _gram_gradient(upstream), lora_A, lora_B, scales)
    return directions[: len(lora_A)], directions[len(lora_A) :]


def _call(op, name, lora_A, lora_B, scaling) -> Tensor:
    if isinstance(lora_A, Tensor) and isinstance(lora_B, Tensor):
        return _call(op, name, [lora_A], [lora_B], scaling).squeeze(0)
    lora_A, lora_B = list(lora_A), list(lora_B)
    scales = _scalings(scaling, len(lora_A))
    refuse_forward_mode(name, *lora_A, *lora_B)
    _check_factors(name, lora_A, lora_B, scales)
    return op(lora_A, lora_B, scales)


def _scalings(scaling: float | Sequence[float], layers: int) -> list[float]:
    """One finite number for each layer."""
    scales = list(scaling) if isinstance(scaling, Sequence) else [scaling] * layers
    return [finite(s) for s in scales]


# --- checks --------------------------------------------------------------------------------------


def _check_factors(name, lora_A, lora_B, scaling) -> None:
    """Raise where the factors of all layers do not fit together."""
    if not lora_A or not len(lora_A) == len(lora_B) == len(scaling):
        raise ValueError(
            f"{name} needs as many lora_A as lora_B and scalings, and at least one; "
            f"got {len(lora_A)}, {len(lora_B)} and {len(scaling)}"
        )
    particles = lora_A[0].shape[0] if lora_A[0].ndim else 0
    for layer, (A, B) in enumerate(zip(lora_A, lora_B)):
        shapes = f"lora_A {tuple(A.shape)}, lora_B {tuple(B.shape)} at layer {layer}"
        ranks_fit = A.ndim == B.ndim == 3 and A.shape[1] == B.shape[2] >= 1
        if not (ranks_fit and A.shape[0] == B.shape[0] == particles >= 1):
            raise ValueError(
                f"{name} needs lora_A (K, r, d_in) and lora_B (K, d_out, r) with one K >= 1 in all "
                f"layers (K = {particles} at layer 0); got {shapes}"
            )
        if A.device != B.device or A.device != lora_A[0].device:
            raise ValueError(
                f"{name} needs all factors on one device; got {A.device} and {B.device} for "
                f"{shapes}, and {lora_A[0].device} at layer 0"
            )
        if A.dtype != B.dtype or A.dtype != lora_A[0].dtype or not A.dtype.is_floating_point:
            raise TypeError(
                f"{name} needs all factors in one floating dtype; got {A.dtype} and {B.dtype} for "
                f"{shapes}, and {lora_A[0].dtype} at layer 0"
            )


def _check_update(grad_A, grad_B, mix, upstream, lora_A, lora_B) -> None:
    """Raise where the gradients, mix and upstream do not fit factors that do."""
    layers, particles = len(lora_A), lora_A[0].shape[0]
    if len(grad_A) != layers or len(grad_B) != layers:
        raise ValueError(
            f"svgd_update needs a gradient of every factor; got {len(grad_A)} and {len(grad_B)} "
            f"for {layers} layers"
        )
    for i, (grad, factor) in enumerate(zip((*grad_A, *grad_B), (*lora_A, *lora_B))):
        if grad.shape != factor.shape or grad.device != factor.device:
            raise ValueError(
                "svgd_update needs gradients like their factors; got "
                f"{tuple(grad.shape)} on {grad.device} for {tuple(factor.shape)} on "
                f"{factor.device} at layer {i % layers}"
            )
        if grad.dtype != factor.dtype:
            raise TypeError(
                f"svgd_update needs gradients in their factors' dtype; got {grad.dtype} for "
                f"{factor.dtype} at layer {i % layers}"
            )
    full = (layers, particles, particles)
    if upstream.shape != full or tuple(mix.shape) not in (full, full[:2]):
        raise ValueError(
            f"svgd_update needs upstream {full} and mix {full} or {full[:2]}; got "
            f"{tuple(upstream.shape)} and {tuple(mix.shape)}"
        )
    if mix.device != lora_A[0].device or upstream.device != lora_A[0].device:
        raise ValueError(
            f"svgd_update needs everything on one device; got mix on {mix.device}, upstream on "
            f"{upstream.device}, lora_A on {lora_A[0].device}"
        )
