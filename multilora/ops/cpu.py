"""The CPU backend: C++ kernels (csrc/cpu) for the geometry and the volume."""

from typing import Any

import torch
from torch import Tensor

import multilora._C as _C
from multilora.ops.common import accumulator, core_dtype, wrong_target
from multilora.ops.native import DTYPES, NativeKernels, dense_classes, volume_kind

_VENDORS = "its products are the vendor's GEMM, which no kernel of ours beats on a CPU"
LEAVES = dict.fromkeys(("lora_linear", "lora_linear_backward", "lora_add_"), _VENDORS)


def refuses(op: str, args: tuple[Any, ...]) -> str | None:
    """Why the kernels do not take these arguments, or None: they take all."""
    return None


class _CpuKernels(NativeKernels):
    def where(self, t: Tensor) -> tuple[int, ...]:
        return (torch.get_num_threads(),)

    def volume(
        self, logits: Tensor, targets: Tensor, eps: float, kind: str, means: bool
    ) -> tuple[Tensor, ...]:
        logits = dense_classes(logits)
        particles, rows, classes = logits.shape
        side = min(particles, classes)
        stats = logits.new_empty((3, particles, rows), dtype=accumulator(logits.dtype))
        core = logits.new_empty((rows, side, side), dtype=core_dtype(logits))
        # The kernel fills the values, or their means alone.
        results: tuple[Tensor, ...] = (stats.new_empty(rows),)
        if means:
            results = stats.new_empty(particles), stats.new_empty(()), stats.new_empty(())
        pointers = [t.data_ptr() for t in results]
        wrong = self.module.volume_forward(
            logits.data_ptr(),
            targets.data_ptr(),
            0 if means else pointers[0],
            stats.data_ptr(),
            core.data_ptr(),
            *(pointers if means else (0, 0, 0)),
            DTYPES[logits.dtype],
            *logits.stride()[:2],
            targets.stride(0),
            *logits.shape,
            eps,
            volume_kind(logits, kind),
            *self.where(logits),
        )
        if wrong >= 0:
            raise wrong_target(logits, targets, wrong)
        return *results[:2], stats, core, *results[2:]


_kernels = _CpuKernels(_C)
traces = _kernels.traces
factor_gradients = _kernels.factor_gradients
volume = _kernels.volume
volume_backward = _kernels.volume_backward

__all__ = [
    "LEAVES",
    "factor_gradients",
    "refuses",
    "traces",
    "volume",
    "volume_backward",
]
