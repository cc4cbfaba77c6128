"""The CPU backend: C++ kernels (csrc/cpu) for the geometry, the volume and `ragged.py`."""

from typing import Any

import torch
from torch import Tensor

import multilora._C as _C
from multilora.ops.common import Parts, accumulator, core_dtype, wrong_target
from multilora.ops.native import NativeKernels, dense_classes, view

_VENDORS = "nearly all of it is the vendor's GEMM, which no kernel of ours beats on a CPU"
LEAVES = dict.fromkeys(
    (
        "lora_linear",
        "lora_linear_backward",
        "lora_add_",
        "grouped_linear",
        "grouped_linear_backward",
    ),
    _VENDORS,
)


def refuses(op: str, args: tuple[Any, ...]) -> str | None:
    """Why the kernels do not take these arguments, or None: they take all."""
    return None


class _CpuKernels(NativeKernels):
    def where(self, t: Tensor) -> int:
        return torch.get_num_threads()

    def volume(
        self, logits: Tensor, targets: Tensor, eps: float, kind: str, means: bool
    ) -> tuple[Tensor, ...]:
        logits = dense_classes(logits)
        particles, rows, classes = logits.shape
        side = min(particles, classes)
        stats = logits.new_empty(3, particles, rows, dtype=accumulator(logits.dtype))
        core = logits.new_empty(rows, side, side, dtype=core_dtype(logits))
        # The kernel fills the values, or their means alone.
        results: tuple[Tensor, ...]
        if means:
            divergence = stats.new_empty(())
            results = stats.new_empty(particles), divergence, torch.empty_like(divergence)
        else:
            results = (stats.new_empty(rows),)
        wrong = self.module.volume_forward(
            view(logits),
            view(targets),
            None if means else view(results[0]),
            tuple(map(view, results)) if means else None,
            (view(stats), view(core)),
            eps=eps,
            det=kind == "det",
            where=self.where(logits),
        )
        if wrong >= 0:
            raise wrong_target(logits, targets, wrong)
        return *results[:2], stats, core, *results[2:]


def low_rank(
    y: Tensor,
    start: Tensor | None,
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    parts: Parts,
    shrunk: Tensor | None,
) -> None:
    """y_t = start_t + s_k B_k A_k x_t, for the rows t of each particle k; start_t for the others.

    Args:
        y: (T, d_out), contiguous.
        start: y itself, for its old values; a bias (d_out,); or None for zeros.
        shrunk: gets A_k x_t (T, r), contiguous, or None.
    """
    if x.stride(-1) != 1:
        x = x.contiguous()
    # Names keep the copies alive until the call is over.
    if start is not None and start is not y:
        start = start.contiguous()
    if not lora_A.is_contiguous():
        lora_A = lora_A.contiguous()
    if not lora_B.is_contiguous():
        lora_B = lora_B.contiguous()
    if parts.native is None:
        parts.native = _C.Parts(parts)
    tensors = map(view, (y, start, x, lora_A, lora_B, shrunk))
    _C.low_rank(*tensors, parts.native, where=_kernels.where(x))


_kernels = _CpuKernels(_C)
traces = _kernels.traces
factor_gradients = _kernels.factor_gradients
volume = _kernels.volume
volume_backward = _kernels.volume_backward

__all__ = [
    "LEAVES",
    "factor_gradients",
    "low_rank",
    "refuses",
    "traces",
    "volume",
    "volume_backward",
]
