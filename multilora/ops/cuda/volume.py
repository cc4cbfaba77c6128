"""The Gram volume and its fusion with cross-entropy, which csrc/cuda/volume.cu computes."""

import torch
from torch import Tensor

from multilora import _C_cuda
from multilora.ops.common import accumulator, check_targets, core_dtype
from multilora.ops.native import DTYPES, dense_classes, stream, volume_kind


def gram_volume(
    logits: Tensor, targets: Tensor, eps: float, kind: str
) -> tuple[Tensor, Tensor, Tensor]:
    """-> value (N,), stats (3, K, N), core (N, m, m)."""
    value = logits.new_empty(logits.shape[1], dtype=accumulator(logits.dtype))
    return value, *_forward(logits, targets, eps, kind, value, None)


def gram_volume_backward(
    grad: Tensor, logits: Tensor, targets: Tensor, stats: Tensor, core: Tensor
) -> Tensor:
    """grad (N,) -> the gradient of the logits (K, N, C)."""
    return _backward(grad, grad.stride(0), None, None, logits, targets, stats, core)


def particle_loss(
    logits: Tensor, targets: Tensor, eps: float, kind: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> nll (K,), divergence (), stats (3, K, N), core (N, m, m), count ()."""
    particles, examples, _ = logits.shape
    rows = logits.new_empty((particles + 1, examples), dtype=accumulator(logits.dtype))
    stats, core = _forward(logits, targets, eps, kind, rows[particles], rows)
    nll, divergence, count = rows.new_empty(particles), rows.new_empty(()), rows.new_empty(())
    _C_cuda.volume_means(
        rows.data_ptr(), targets.data_ptr(), targets.stride(0),
        nll.data_ptr(), divergence.data_ptr(), count.data_ptr(),
        DTYPES[rows.dtype], particles, examples, *stream(logits),
    )  # fmt: skip
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
    value: Tensor,
    losses: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Fills value (N,) and the first rows of losses (K + 1, N). -> stats, core"""
    particles, examples, classes = logits.shape
    if particles > _C_cuda.most_particles:
        raise NotImplementedError(
            f"the CUDA kernels hold at most {_C_cuda.most_particles} particles at once; got logits "
            f"{tuple(logits.shape)}, targets {tuple(targets.shape)}: use_backend('reference') has "
            "no limit"
        )
    # On a GPU the kernel itself reports it, at the next synchronisation.
    if targets.device.type == "cpu":
        check_targets(logits, targets)
    logits = dense_classes(logits)
    side = min(particles, classes)
    stats = value.new_empty((3, particles, examples))
    core = value.new_empty((examples, side, side), dtype=core_dtype(logits))
    dtype = DTYPES[logits.dtype]
    parts = logits.new_empty(
        _C_cuda.volume_parts(particles, examples, classes, dtype), dtype=torch.float64
    )
    _C_cuda.volume_forward(
        logits.data_ptr(), targets.data_ptr(), parts.data_ptr(), value.data_ptr(),
        0 if losses is None else losses.data_ptr(), stats.data_ptr(), core.data_ptr(),
        dtype, *logits.stride()[:2], targets.stride(0), particles, examples, classes, eps,
        volume_kind(logits, kind), *stream(logits),
    )  # fmt: skip
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
    of_loss = (0, 0) if grad_nll is None else (grad_nll.data_ptr(), count.data_ptr())
    _C_cuda.volume_backward(
        grad.data_ptr(), *of_loss, logits.data_ptr(), targets.data_ptr(), stats.data_ptr(),
        core.data_ptr(), out.data_ptr(), DTYPES[logits.dtype],
        stride, 0 if grad_nll is None else grad_nll.stride(0), *logits.stride()[:2],
        targets.stride(0), *logits.shape, *stream(logits),
    )  # fmt: skip
    return out
