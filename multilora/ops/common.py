"""Conventions and checks that all backends and callers share."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

#: The target that is left out, as in torch.nn.functional.cross_entropy.
IGNORE_INDEX = -100

#: The error of the geometry, where it would have to copy its table of sizes during a capture.
TABLE_IS_NOT_THERE = (
    "multilora: call the operator once with these shapes before it is captured in a CUDA graph: "
    "its table of sizes has to be copied to the device first"
)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype that losses and geometry are computed and returned in: float32 or better."""
    return torch.float64 if dtype == torch.float64 else torch.float32


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
    """The error for the target at `place`."""
    return ValueError(
        f"targets must be in [0, {logits.shape[-1]}) or {IGNORE_INDEX}; got "
        f"{targets[place].item()} for logits {tuple(logits.shape)}, targets {tuple(targets.shape)}"
    )


def row_counts(ends: Tensor, rows: int) -> list[int]:
    """The numbers of rows of the groups that end at `ends` (G,); waits for a GPU.

    Raises ValueError where the ends do not ascend from 0 to `rows`.
    """
    counts, start = [], 0
    for end in ends.tolist():
        counts.append(end - start)
        start = end
    if start != rows or min(counts) < 0:
        raise ValueError(
            f"the ends of groups must ascend, from 0 or more to the number of rows, which is "
            f"{rows}; got {ends.tolist()[:8]}{' ...' if len(counts) > 8 else ''}, {start} at last"
        )
    return counts


#: Which argument of an operator the logits are.
LOGITS_OF = {
    "gram_volume": 0,
    "gram_volume_backward": 1,
    "particle_loss": 0,
    "particle_loss_backward": 2,
}


def too_many_particles(op: str, args: tuple[Any, ...], most: int) -> str | None:
    """Why kernels that hold `most` particles refuse these logits, or None; so they do backward."""
    particles = args[LOGITS_OF[op]].shape[0]
    return f"the kernels hold at most {most} particles at once" if particles > most else None


def empty_linear(x: Tensor, weight: Tensor, lora_A: Tensor, bias: Tensor | None):
    """y and S of a linear without rows or without features: a sum over nothing is zero."""
    particles, rank, _ = lora_A.shape
    y = x.new_zeros(particles, x.shape[1], weight.shape[0])
    # Without output features S is not zero, but nothing reads it.
    shrunk = x.new_zeros(particles, x.shape[1], rank)
    return y if bias is None else y.add_(bias), shrunk


def empty_gradients(
    x: Tensor, lora_A: Tensor, lora_B: Tensor, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dA and dB of a linear without rows or without features; empty where not needed."""
    dx, dA, dB = (
        t.new_zeros(t.shape if need else 0) for t, need in zip((x, lora_A, lora_B), needs)
    )
    return dx, dA, dB


def expand_gradient(d_shrunk: Tensor, lora_A: Tensor, shared: bool) -> Tensor:
    """dX = dS·A (K, T, d_in); (1, T, d_in), summed over the particles, where they share x."""
    if shared:
        return torch.mm(by_row(d_shrunk), lora_A.flatten(0, 1)).unsqueeze(0)
    return torch.bmm(d_shrunk, lora_A)


def by_row(d_shrunk: Tensor) -> Tensor:
    """(K, T, r) -> (T, K·r)."""
    return d_shrunk.mT.flatten(0, 1).T


class Part(NamedTuple):
    """The rows start … end − 1 belong to a particle, whose adapter has this rank and scaling."""

    particle: int
    start: int
    end: int
    rank: int
    scaling: float


class Parts(tuple[Part, ...]):
    """The particles that have rows, and an adapter, in the order of their rows, each once."""

    #: What the kernel makes of them, once for all the layers that have them.
    native: Any = None
