"""Which operators' kernels are the default, and for which arguments."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from multilora.ops.triton import configs
from multilora.ops.triton.common import chip, precision
from multilora.ops.triton.volume import is_aligned


def is_proven(op: str, args: tuple[Any, ...]) -> bool:
    """Whether a record on this kind of chip says that the kernel of `op` is right, and ahead of the
    reference, for arguments like these."""
    # The low-rank part alone has no record of its own.
    if op == "lora_add_" or (op == "lora_linear_backward" and args[2] is None):
        return False
    rule, arguments = _question(op, args)
    # Float32 is measured with full products.
    if rule is configs.lora_gemm and precision(args[0].dtype) == "tf32":
        return False
    return configs.is_proven(rule, arguments)


def _question(op: str, args: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...]]:
    """The rule of `configs` that decides about the operator's main kernel, and its arguments."""
    if op.startswith("lora_linear"):
        backward = op.endswith("backward")
        x, weight, lora_A = args[1:4] if backward else args[:3]
        particles, rank, _ = lora_A.shape
        d_out, d_in = weight.shape
        shared = "" if x.shape[0] == particles else "in" if backward else "out"
        depth, cols = (d_out, d_in) if backward else (d_in, d_out)
        sizes = (particles, x.shape[1], depth, cols, rank)
        return configs.lora_gemm, (*sizes, x.dtype, chip(x.device), shared, backward)
    if op.startswith(("gram_volume", "particle_loss")):
        backward = op.endswith("backward")
        logits = args[0 if not backward else 1 if op.startswith("gram") else 2]
        return configs.volume, (
            *logits.shape, logits.dtype, is_aligned(logits), chip(logits.device), backward
        )  # fmt: skip
    factors = [arg for arg in args if isinstance(arg, list) and isinstance(arg[0], Tensor)]
    lora_A, lora_B = factors[-2:]
    ranks = tuple(A.shape[1] for A in lora_A)
    widths = tuple(t.shape[2] for t in lora_A) + tuple(t.shape[1] for t in lora_B)
    first = lora_A[0]
    return configs.geometry, (first.shape[0], ranks, widths, first.dtype, chip(first.device))
