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
from multilora.ops.native import FactorLists, NativeKernels, dense_classes, stream, view

LEAVES = {
    "lora_add_": "its products are thin, and bound by reading x and y: the vendor's GEMM's",
    **dict.fromkeys(
        ("grouped_linear", "grouped_linear_backward"),
        "there is no kernel of its own: PyTorch's grouped product is a CUDA kernel already",
    ),
}


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
    def where(self, t: Tensor) -> tuple[int, int]:
        return stream(t)

    def workspace(self, first: Tensor, described: FactorLists) -> Tensor:
        """Room for the layers' Gram matrices, in parts."""
        return first.new_empty(self.module.traces_workspace(described), dtype=torch.float64)

    def volume(
        self, logits: Tensor, targets: Tensor, eps: float, kind: str, means: bool
    ) -> tuple[Tensor, ...]:
        particles, examples, _ = logits.shape
        dtype = accumulator(logits.dtype)
        if not means:
            value = logits.new_empty(examples, dtype=dtype)
            return value, *self._forward(logits, targets, eps, kind, value)
        # The particles' losses, then the values: the kernel takes the means of these rows.
        rows = logits.new_empty(particles + 1, examples, dtype=dtype)
        stats, core = self._forward(logits, targets, eps, kind, rows)
        nll, divergence = rows.new_empty(particles), rows.new_empty(())
        count = torch.empty_like(divergence)
        self.module.volume_means(
            view(rows),
            view(targets),
            view(nll),
            view(divergence),
            view(count),
            where=self.where(logits),
        )
        return nll, divergence, stats, core, count

    def _forward(
        self, logits: Tensor, targets: Tensor, eps: float, kind: str, rows: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Fill rows: the values (N,), or losses and values (K + 1, N). -> stats, core"""
        particles, examples, classes = logits.shape
        # On a GPU the kernel itself reports it, at the next synchronisation.
        if targets.device.type == "cpu":
            check_targets(logits, targets)
        logits = dense_classes(logits)
        side = min(particles, classes)
        stats = rows.new_empty(3, particles, examples)
        core = rows.new_empty(examples, side, side, dtype=core_dtype(logits))
        parts = rows.new_empty(self.module.volume_workspace(view(logits)), dtype=torch.float64)
        self.module.volume_forward(
            view(logits),
            view(targets),
            view(rows),
            (view(stats), view(core)),
            view(parts),
            eps=eps,
            det=kind == "det",
            where=self.where(logits),
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
