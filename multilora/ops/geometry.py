"""Frobenius geometry of the adapters as operators, for one layer or for all layers at once."""

from collections.abc import Sequence

import torch
from torch import Tensor

from multilora.ops._library import define, refuse_forward_mode
from multilora.ops.common import accumulator, finite


def _fake_gram(lora_A, lora_B, scaling):
    particles = lora_A[0].shape[0]
    shape = (len(lora_A), particles, particles)
    return lora_A[0].new_empty(shape, dtype=accumulator(lora_A[0].dtype))


def _fake_backward(grad, lora_A, lora_B, scaling):
    return [t.new_empty(t.shape) for t in (*lora_A, *lora_B)]


# A kernel may keep a table of the sizes on the device from its first call on, which the graphs that
# torch.compile captures do not allow.
TAGS = (torch.Tag.cudagraph_unsafe,)

_gram_op = define(
    "lora_gram(Tensor[] lora_A, Tensor[] lora_B, float[] scaling) -> Tensor", _fake_gram, TAGS
)
_distance_op = define(
    "pairwise_frobenius(Tensor[] lora_A, Tensor[] lora_B, float[] scaling) -> Tensor",
    _fake_gram,
    TAGS,
)
# The gradients of all lora_A, then of all lora_B, given grad = dL/dT (L, K, K). Both operators
# share it: D is linear in T.
_backward_op = define(
    "lora_gram_backward(Tensor grad, Tensor[] lora_A, Tensor[] lora_B, float[] scaling)"
    " -> Tensor[]",
    _fake_backward,
    TAGS,
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


def gram_gradient(grad: Tensor) -> Tensor:
    """dL/dT from grad = dL/dD (L, K, K), where D_ij = T_ii + T_jj − 2 T_ij."""
    # In float64: the diagonal must cancel the rest of its row when two particles are nearly equal.
    grad = grad.double()
    on_diagonal = grad.sum(-1) + grad.sum(-2)
    return torch.diag_embed(on_diagonal) - 2 * grad


def _distance_backward(ctx, grad):
    return _gram_backward(ctx, gram_gradient(grad))


_gram_op.register_autograd(_gram_backward, _setup_context)
_distance_op.register_autograd(_distance_backward, _setup_context)
_backward_op.refuse_gradient()


def lora_gram(
    lora_A: Tensor | Sequence[Tensor],
    lora_B: Tensor | Sequence[Tensor],
    scaling: float | Sequence[float] = 1.0,
) -> Tensor:
    """T_ij = ⟨ΔW_i, ΔW_j⟩_F with ΔW_i = scaling · B_i A_i, without forming any ΔW.

    lora_A (K, r, d_in), lora_B (K, d_out, r) -> (K, K). Sequences of L layers, of any shapes with
    one K, and one scaling or L of them -> (L, K, K), all layers in one call.

    T_ij = s² ⟨A_i A_jᵀ, B_iᵀ B_j⟩: O(r² (d_in + d_out)) a pair. The output is float32 (float64
    for float64 factors), accumulated in float64; autocast does not touch it.

    Raises ValueError for shapes, lengths or devices that do not fit, TypeError for dtypes,
    NotImplementedError for forward-mode derivatives.
    Source: Bella (Doan et al. 2024), appendix G.
    """
    return _call(_gram_op, "lora_gram", lora_A, lora_B, scaling)


def pairwise_frobenius(
    lora_A: Tensor | Sequence[Tensor],
    lora_B: Tensor | Sequence[Tensor],
    scaling: float | Sequence[float] = 1.0,
) -> Tensor:
    """D_ij = ‖ΔW_i − ΔW_j‖²_F, never negative, with an exactly zero diagonal.

    Shapes, dtypes and errors are those of `lora_gram`: (K, K), or (L, K, K) for L layers. The
    difference T_ii + T_jj − 2 T_ij is taken in float64, so particles a part in a thousand
    apart keep their distance.
    """
    return _call(_distance_op, "pairwise_frobenius", lora_A, lora_B, scaling)


def _call(op, name, lora_A, lora_B, scaling) -> Tensor:
    if isinstance(lora_A, Tensor) and isinstance(lora_B, Tensor):
        return _call(op, name, [lora_A], [lora_B], scaling).squeeze(0)
    lora_A, lora_B = list(lora_A), list(lora_B)
    scales = scalings(scaling, len(lora_A))
    refuse_forward_mode(name, *lora_A, *lora_B)
    check_factors(name, lora_A, lora_B, scales)
    return op(lora_A, lora_B, scales)


def scalings(scaling: float | Sequence[float], layers: int) -> list[float]:
    """One finite number a layer."""
    scales = list(scaling) if isinstance(scaling, Sequence) else [scaling] * layers
    return [finite(s) for s in scales]


def check_factors(name, lora_A, lora_B, scaling) -> None:
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
