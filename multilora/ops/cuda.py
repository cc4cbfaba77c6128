"""The CUDA backend: C++ kernels (csrc/cuda) for the geometry, the volume and, on Hopper, the
linear's large products (hopper.py)."""

from typing import Any

import torch
from torch import Tensor

import multilora._C_cuda as _C_cuda
from multilora.ops import hopper
from multilora.ops.common import (
    LOGITS_OF,
    accumulator,
    check_targets,
    core_dtype,
    too_many_particles,
)
from multilora.ops.hopper import lora_linear, lora_linear_backward
from multilora.ops.native import DTYPES, NativeKernels, dense_classes, stream, volume_kind

LEAVES = {"lora_add_": "its products are thin, and bound by reading x and y: the vendor's GEMM's"}


def refuses(op: str, args: tuple[Any, ...]) -> str | None:
    """Why the kernels do not take these arguments, or None."""
    if op in LOGITS_OF:
        return too_many_particles(op, args, _C_cuda.most_particles)
    if op == "lora_linear":
        return hopper.refuses(*args[:3])
    if op == "lora_linear_backward":
        return hopper.refuses(*args[1:4])
    return None


class _CudaKernels(NativeKernels):
    def where(self, t: Tensor) -> tuple[int, ...]:
        return stream(t)

    def workspace(self, factors: list[Tensor], sizes: list[int]) -> list[Tensor]:
        """Room for the layers' Gram matrices, in parts."""
        count = self.module.geometry_workspace(factors[0].shape[0], sizes)
        return [factors[0].new_empty(count, dtype=torch.float64)]

    def volume(
        self, logits: Tensor, targets: Tensor, eps: float, kind: str, means: bool
    ) -> tuple[Tensor, ...]:
        particles, examples, _ = logits.shape
        dtype = accumulator(logits.dtype)
        if not means:
            value = logits.new_empty(examples, dtype=dtype)
            return value, *self._forward(logits, targets, eps, kind, value, None)
        # The particles' losses, and behind them the values: what the means are taken of.
        rows = logits.new_empty((particles + 1, examples), dtype=dtype)
        stats, core = self._forward(logits, targets, eps, kind, rows[particles], rows)
        nll, divergence, count = rows.new_empty(particles), rows.new_empty(()), rows.new_empty(())
        self.module.volume_means(
            rows.data_ptr(),
            targets.data_ptr(),
            targets.stride(0),
            nll.data_ptr(),
            divergence.data_ptr(),
            count.data_ptr(),
            DTYPES[rows.dtype],
            particles,
            examples,
            *self.where(logits),
        )
        return nll, divergence, stats, core, count

    def _forward(
        self,
        logits: Tensor,
        targets: Tensor,
        eps: float,
        kind: str,
        value: Tensor,
        losses: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Fill value (N,) and the first rows of losses (K + 1, N). -> stats, core"""
        particles, examples, classes = logits.shape
        # On a GPU the kernel itself reports it, at the next synchronisation.
        if targets.device.type == "cpu":
            check_targets(logits, targets)
        logits = dense_classes(logits)
        side = min(particles, classes)
        stats = value.new_empty((3, particles, examples))
        core = value.new_empty((examples, side, side), dtype=core_dtype(logits))
        dtype = DTYPES[logits.dtype]
        parts = logits.new_empty(
            self.module.volume_parts(particles, examples, classes, dtype), dtype=torch.float64
        )
        self.module.volume_forward(
            logits.data_ptr(),
            targets.data_ptr(),
            parts.data_ptr(),
            value.data_ptr(),
            0 if losses is None else losses.data_ptr(),
            stats.data_ptr(),
            core.data_ptr(),
            dtype,
            *logits.stride()[:2],
            targets.stride(0),
            particles,
            examples,
            classes,
            eps,
            volume_kind(logits, kind),
            *self.where(logits),
        )
        return stats, core


_kernels = _CudaKernels(_C_cuda)
traces = _kernels.traces
factor_gradients = _kernels.factor_gradients
volume = _kernels.volume
volume_backward = _kernels.volume_backward

__all__ = [
    "LEAVES",
    "factor_gradients",
    "lora_linear",
    "lora_linear_backward",
    "refuses",
    "traces",
    "volume",
    "volume_backward",
]
