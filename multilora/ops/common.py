"""What every backend and caller agrees on."""

import math

import torch
from torch import Tensor

#: The target that is left out, as in torch.nn.functional.cross_entropy.
IGNORE_INDEX = -100

#: What the geometry says where it has to copy its table of sizes while a CUDA graph is captured.
TABLE_IS_NOT_THERE = (
    "multilora: call the operator once with these shapes before it is captured in a CUDA graph: "
    "its table of sizes has to be copied to the device first"
)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype that losses and geometry are computed and returned in: float32 or better."""
    return torch.promote_types(dtype, torch.float32)


def finite(scaling: float) -> float:
    """The scaling of one layer's adapters."""
    if not torch.compiler.is_compiling() and not math.isfinite(scaling):
        raise ValueError(f"scaling must be a finite number; got {scaling!r}")
    return float(scaling)


def core_dtype(logits: Tensor) -> torch.dtype:
    """The dtype of the volume's core, and of what is multiplied with it, for logits (K, N, C)."""
    particles, _, classes = logits.shape
    # reference.py says why.
    return torch.float64 if particles >= classes else accumulator(logits.dtype)


def check_targets(logits: Tensor, targets: Tensor) -> None:
    """Raise ValueError for a target outside [0, C) other than IGNORE_INDEX."""
    classes = logits.shape[-1]
    valid = (targets == IGNORE_INDEX) | ((targets >= 0) & (targets < classes))
    if targets.is_cuda:
        # Reported at the next synchronisation: waiting for the device here would stall it.
        torch._assert_async(valid.all(), "multilora: a target is outside [0, C)")
    elif not valid.all():
        raise wrong_target(logits, targets, int((~valid).int().argmax()))


def wrong_target(logits: Tensor, targets: Tensor, place: int) -> ValueError:
    """The error that the target at `place` is."""
    return ValueError(
        f"targets must be in [0, {logits.shape[-1]}) or {IGNORE_INDEX}; got "
        f"{targets[place].item()} for logits {tuple(logits.shape)}, targets {tuple(targets.shape)}"
    )
