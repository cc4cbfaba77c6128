"""SVGD's update of all adapters as one operator."""

from collections.abc import Sequence

from torch import Tensor

from multilora.ops._library import define, refuse_forward_mode
from multilora.ops.geometry import TAGS, check_factors, gram_gradient, scalings


def _fake(grad_A, grad_B, mix, upstream, lora_A, lora_B, scaling):
    return [t.new_empty(t.shape) for t in (*lora_A, *lora_B)]


# The directions of all lora_A, then of all lora_B; upstream = dL/dT, as in lora_gram_backward.
_op = define(
    "svgd_update(Tensor[] grad_A, Tensor[] grad_B, Tensor mix, Tensor upstream, Tensor[] lora_A,"
    " Tensor[] lora_B, float[] scaling) -> Tensor[]",
    _fake,
    TAGS,
)
_op.refuse_gradient()


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

    D is `pairwise_frobenius(lora_A, lora_B, scaling)`. lora_A, grad_A (K, r, d_in) and lora_B,
    grad_B (K, d_out, r), L layers of any shapes with one K; upstream (L, K, K); mix (L, K, K), or
    (L, K) where each particle moves by its own gradient only. -> the φ of all lora_A and of all
    lora_B, in their dtype. What the particles are to each other is computed in float64, so that
    nearly equal ones repel with all of the dtype's digits. Asking for derivatives raises.

    Raises ValueError for shapes, lengths or devices that do not fit, TypeError for dtypes.
    Source: Bella (Doan et al. 2024), eq. 4; the repulsion is a choice of `upstream`.
    """
    lora_A, lora_B, grad_A, grad_B = map(list, (lora_A, lora_B, grad_A, grad_B))
    scales = scalings(scaling, len(lora_A))
    refuse_forward_mode("svgd_update", *grad_A, *grad_B, mix, upstream, *lora_A, *lora_B)
    check_factors("svgd_update", lora_A, lora_B, scales)
    _check(grad_A, grad_B, mix, upstream, lora_A, lora_B)
    directions = _op(grad_A, grad_B, mix, gram_gradient(upstream), lora_A, lora_B, scales)
    return directions[: len(lora_A)], directions[len(lora_A) :]


def _check(grad_A, grad_B, mix, upstream, lora_A, lora_B) -> None:
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
