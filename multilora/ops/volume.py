"""Gram-determinant volume of the non-target predictions, alone and fused with cross-entropy."""

import warnings

import torch
from torch import Tensor

from multilora.ops._library import define, refuse_forward_mode
from multilora.ops.common import accumulator, core_dtype

_KINDS = ("logdet", "det")
_warned_two_classes = False


def _fake_saved(logits):
    particles, rows, classes = logits.shape
    side = min(particles, classes)
    stats = logits.new_empty((3, particles, rows), dtype=accumulator(logits.dtype))
    return stats, logits.new_empty((rows, side, side), dtype=core_dtype(logits))


def _fake_volume(logits, targets, eps, kind):
    return (
        logits.new_empty(logits.shape[1], dtype=accumulator(logits.dtype)),
        *_fake_saved(logits),
    )


def _fake_loss(logits, targets, eps, kind):
    dtype = accumulator(logits.dtype)
    nll = logits.new_empty(logits.shape[0], dtype=dtype)
    return (nll, nll.new_empty(()), *_fake_saved(logits), nll.new_empty(()))


def _fake_volume_backward(grad, logits, targets, stats, core):
    return logits.new_empty(logits.shape)


def _fake_loss_backward(grad_nll, grad_divergence, logits, targets, stats, core, count):
    return logits.new_empty(logits.shape)


def _volume(backend, logits, targets, eps, kind):
    return backend.volume(logits, targets, eps, kind, False)


def _loss(backend, logits, targets, eps, kind):
    return backend.volume(logits, targets, eps, kind, True)


def _gradient(backend, grad, logits, targets, stats, core):
    return backend.volume_backward(grad, logits, targets, stats, core)


def _loss_gradient(backend, grad_nll, grad_divergence, logits, targets, stats, core, count):
    return backend.volume_backward(grad_divergence, logits, targets, stats, core, grad_nll, count)


# Both save for the backward: stats (3, K, N), per row the largest logit z without the target's, and
# norm and sum of exp(z − largest); core (N, m, m) with m = min(K, C), the matrix that turns the
# normalised predictions into their gradient (reference.py). particle_loss also saves count (): the
# number of valid targets, or 1, as a float.
_volume_op = define(
    "gram_volume(Tensor logits, Tensor targets, float eps, str kind) -> (Tensor, Tensor, Tensor)",
    _fake_volume,
    compute=_volume,
)
_volume_backward_op = define(
    "gram_volume_backward(Tensor grad, Tensor logits, Tensor targets, Tensor stats, Tensor core)"
    " -> Tensor",
    _fake_volume_backward,
    compute=_gradient,
)
_loss_op = define(
    "particle_loss(Tensor logits, Tensor targets, float eps, str kind)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_loss,
    compute=_loss,
)
_loss_backward_op = define(
    "particle_loss_backward(Tensor grad_nll, Tensor grad_divergence, Tensor logits,"
    " Tensor targets, Tensor stats, Tensor core, Tensor count) -> Tensor",
    _fake_loss_backward,
    compute=_loss_gradient,
)


def _setup_context(ctx, inputs, output):
    logits, targets, _, _ = inputs
    # The outputs after the public ones: gram_volume has one of those, particle_loss two.
    saved = output[1:] if len(output) == 3 else output[2:]
    ctx.mark_non_differentiable(*saved)
    # Zeros for the saved outputs, of the core's size, would cost more than the loss.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, targets, *saved)


def _volume_backward(ctx, grad, _stats, _core):
    if grad is None:
        return (None,) * 4
    return _volume_backward_op(grad, *ctx.saved_tensors), None, None, None


def _loss_backward(ctx, grad_nll, grad_divergence, _stats, _core, _count):
    if grad_nll is None and grad_divergence is None:
        return (None,) * 4
    logits, *_, count = ctx.saved_tensors
    if grad_nll is None:
        grad_nll = count.new_zeros(logits.shape[0])
    if grad_divergence is None:
        grad_divergence = torch.zeros_like(count)
    return _loss_backward_op(grad_nll, grad_divergence, *ctx.saved_tensors), None, None, None


_volume_op.register_autograd(_volume_backward, _setup_context)
_loss_op.register_autograd(_loss_backward, _setup_context)
_volume_backward_op.refuse_gradient()
_loss_backward_op.refuse_gradient()


def gram_volume(logits: Tensor, targets: Tensor, eps: float = 1e-4, kind: str = "logdet") -> Tensor:
    """How little the particles' non-target predictions differ, per example; lower is more diverse.

    With f_i the softmax of particle i without the target class, scaled to unit length, and
    G = (⟨f_i, f_j⟩) (K, K): kind "logdet" gives −log det(I + G/eps) (that is −log det(G + eps·I)
    up to the constant K log eps, and finite for K > C − 1 too), kind "det" gives −det G.

    The gradient with respect to the target logit is zero. Examples with target −100 give 0, and
    so does every example where C = 2 (the one remaining class leaves no direction to differ in; a
    warning says so once) or, for "det", K > C − 1. Identical particles have a zero gradient.

    Source: IBDR (Pham et al. 2025), the divergence loss, with the sign that lets diversity grow.

    Args:
        logits: (K, N, C).
        targets: (N,) int64 in [0, C), or −100 for an example that is left out.
        eps: at least 1e-6 (for float64 logits 1e-12, and K² times float64's eps).
        kind: "logdet" or "det".

    Returns:
        (N,) float32 (float64 for float64 logits).

    Raises:
        ValueError: for shapes, devices, eps, kind or a target outside [0, C). On a GPU a target out
            of range is reported at the next synchronisation instead.
        TypeError: for dtypes that do not fit.
        NotImplementedError: for forward-mode derivatives.
    """
    _check("gram_volume", logits, targets, eps, kind)
    return _volume_op(logits, targets, float(eps), kind)[0]


def particle_loss(
    logits: Tensor, targets: Tensor, eps: float = 1e-4, kind: str = "logdet"
) -> tuple[Tensor, Tensor]:
    """Every particle's cross-entropy and the mean `gram_volume`, in one pass over the logits.

    Args and Raises are those of `gram_volume`.

    Returns:
        nll (K,) and divergence (), float32 (float64 for float64 logits). Both are means over the
        valid targets, in nats; without a valid target both are 0, with zero gradient.
    """
    _check("particle_loss", logits, targets, eps, kind)
    return _loss_op(logits, targets, float(eps), kind)[:2]


def _check(name, logits, targets, eps, kind) -> None:
    refuse_forward_mode(name, logits)
    shapes = f"logits {tuple(logits.shape)}, targets {tuple(targets.shape)}"
    if logits.ndim != 3 or targets.ndim != 1 or targets.shape[0] != logits.shape[1]:
        raise ValueError(f"{name} needs logits (K, N, C) and targets (N,); got {shapes}")
    if logits.shape[0] < 1 or logits.shape[2] < 2:
        raise ValueError(f"{name} needs K >= 1 particles and C >= 2 classes; got {shapes}")
    if not logits.dtype.is_floating_point or targets.dtype != torch.int64:
        raise TypeError(
            f"{name} needs floating logits and int64 targets; "
            f"got {logits.dtype} and {targets.dtype} for {shapes}"
        )
    if logits.device != targets.device:
        raise ValueError(
            f"{name} needs logits and targets on one device; "
            f"got {logits.device} and {targets.device} for {shapes}"
        )
    smallest = 1e-12 if logits.dtype == torch.float64 else 1e-6
    # G is rounded in float64, in sums of up to K terms that are up to K in size.
    smallest = max(smallest, logits.shape[0] ** 2 * torch.finfo(torch.float64).eps)
    if not smallest <= eps <= 1e6:
        raise ValueError(
            f"{name} needs {smallest:.2g} <= eps <= 1e6 for {logits.dtype} logits of "
            f"{logits.shape[0]} particles (below it, rounding drowns the volume); got eps = {eps} "
            f"for {shapes}"
        )
    if kind not in _KINDS:
        raise ValueError(f"{name} needs kind in {_KINDS}; got {kind!r}")
    global _warned_two_classes
    if logits.shape[2] == 2 and not _warned_two_classes and not torch.compiler.is_compiling():
        _warned_two_classes = True
        warnings.warn(
            f"{name}: with C = 2 classes one is left without the target, so the divergence is "
            f"constant: it contributes zero ({shapes})",
            stacklevel=3,
        )
