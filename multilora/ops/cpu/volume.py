"""The Gram volume and its fusion with cross-entropy, which csrc/cpu/volume.cpp computes."""

import torch
from torch import Tensor

from multilora import _C
from multilora.ops.common import accumulator, core_dtype, wrong_target
from multilora.ops.native import DTYPES, dense_classes, volume_kind


def gram_volume(
    logits: Tensor, targets: Tensor, eps: float, kind: str
) -> tuple[Tensor, Tensor, Tensor]:
    """-> value (N,), stats (3, K, N), core (N, m, m)."""
    value = logits.new_empty(logits.shape[1], dtype=accumulator(logits.dtype))
    stats, core = _forward(logits, targets, eps, kind, value, None)
    return value, stats, core


def gram_volume_backward(
    grad: Tensor, logits: Tensor, targets: Tensor, stats: Tensor, core: Tensor
) -> Tensor:
    """grad (N,) -> the gradient of the logits (K, N, C)."""
    return _backward(grad, grad.stride(0), None, None, logits, targets, stats, core)


def particle_loss(
    logits: Tensor, targets: Tensor, eps: float, kind: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> nll (K,), divergence (), stats (3, K, N), core (N, m, m), count ()."""
    nll = logits.new_empty(logits.shape[0], dtype=accumulator(logits.dtype))
    divergence, count = nll.new_empty(()), nll.new_empty(())
    stats, core = _forward(logits, targets, eps, kind, None, (nll, divergence, count))
    return nll, divergence, stats, core, count


def particle_loss_backward(
    grad_nll: Tensor,
    grad_divergence: Tensor,
    logits: Tensor,
    targets: Tensor,
    stats: Tensor,
    core: Tensor,
    count: Tensor,
) -> Tensor:
    """grad_nll (K,), grad_divergence () -> the gradient of the logits (K, N, C)."""
    return _backward(grad_divergence, 0, grad_nll, count, logits, targets, stats, core)


def _forward(
    logits: Tensor,
    targets: Tensor,
    eps: float,
    kind: str,
    value: Tensor | None,
    means: tuple[Tensor, Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor]:
    """Fills value, or means (nll, divergence, count). -> stats, core"""
    logits = dense_classes(logits)
    particles, rows, classes = logits.shape
    side = min(particles, classes)
    stats = logits.new_empty((3, particles, rows), dtype=accumulator(logits.dtype))
    core = logits.new_empty((rows, side, side), dtype=core_dtype(logits))
    wrong = _C.volume_forward(
        logits.data_ptr(), targets.data_ptr(), value.data_ptr() if means is None else 0,
        stats.data_ptr(), core.data_ptr(),
        *((0, 0, 0) if means is None else (t.data_ptr() for t in means)),
        DTYPES[logits.dtype], *logits.stride()[:2], targets.stride(0), *logits.shape, eps,
        volume_kind(logits, kind), torch.get_num_threads(),
    )  # fmt: skip
    if wrong >= 0:
        raise wrong_target(logits, targets, wrong)
    return stats, core


def _backward(
    grad: Tensor,
    stride: int,
    grad_nll: Tensor | None,
    count: Tensor | None,
    logits: Tensor,
    targets: Tensor,
    stats: Tensor,
    core: Tensor,
) -> Tensor:
    logits = dense_classes(logits)
    out = logits.new_empty(logits.shape)
    # Names keep the copies alive until the call is over.
    stats, core = stats.contiguous(), core.contiguous()
    loss = (0, 0) if grad_nll is None else (grad_nll.data_ptr(), count.data_ptr())
    _C.volume_backward(
        grad.data_ptr(), *loss, logits.data_ptr(), targets.data_ptr(), stats.data_ptr(),
        core.data_ptr(), out.data_ptr(), DTYPES[logits.dtype],
        stride, 0 if grad_nll is None else grad_nll.stride(0), *logits.stride()[:2],
        targets.stride(0), *logits.shape, torch.get_num_threads(),
    )  # fmt: skip
    return out
