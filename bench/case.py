"""A case: peers that do the same task on the same input, and the work that the task needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from multilora.tools.kernels.calls import Problem

OURS = "multilora"


def is_ours(name: str) -> bool:
    """Whether a peer is multilora, on whichever backend: "multilora (triton)"."""
    return name.split(" (")[0] == OURS


class Unavailable(Exception):
    """A peer that cannot take part here; the message says why."""


#: One repetition of a peer. What it returns is checked, not timed; a list holds one tensor per
#: particle or per layer, and stands for the stacked tensor.
Repetition = Callable[[], dict[str, Tensor | list[Tensor]]]


@dataclass(frozen=True)
class Work:
    """The least that one repetition needs.

    flops64 are those of float64 products, flops32 those outside the tensor cores, flops the rest.
    """

    flops: float = 0.0
    bytes: float = 0.0
    launches: int = 1
    flops64: float = 0.0
    flops32: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.flops + other.flops,
            self.bytes + other.bytes,
            self.launches + other.launches,
            self.flops64 + other.flops64,
            self.flops32 + other.flops32,
        )


@dataclass(frozen=True, eq=False)
class Case:
    """One comparison on one input.

    group, name: what is measured, and the sizes.
    inputs: (dtype, device) -> the inputs, which hold the same numbers in every dtype.
    peers: name -> (inputs -> Repetition). `OURS` is multilora, the others are plain PyTorch; the
        first of them, in float64, is the oracle.
    yardstick: name and maker of a run that does less than the task: a copy, the base GEMM alone.
    goals: peer -> how many times faster than it multilora is to be.
    half_precision: whether the case means something in bfloat16 too.
    work: what one repetition needs at least, if that is known.
    rate: what multilora's speed is given in on a CPU: "flops" or "bytes" of the work.
    problem: makes the problem whose Triton launches are multilora's in this case.
    asides: peers that are shown and not compared with, because they do another task.
    stand_in: a smaller case that is checked, in float32, in place of this one.
    cost: seconds that the case is expected to take on a GPU.
    memory: bytes that the case may hold at once, the oracle and its float64 included.
    """

    group: str
    name: str
    inputs: Callable[[torch.dtype, torch.device], Any]
    peers: dict[str, Callable[[Any], Repetition]]
    yardstick: tuple[str, Callable[[Any], Repetition]] | None = None
    goals: dict[str, float] = field(default_factory=dict)
    half_precision: bool = False
    work: Work | None = None
    rate: str = "flops"
    problem: Callable[[], Problem] | None = None
    asides: frozenset[str] = frozenset()
    stand_in: Case | None = None
    cost: float = 4.0
    memory: float = 0.0

    @property
    def ours_is_absent(self) -> bool:
        """Whether only plain peers take part."""
        return not any(map(is_ours, self.peers))

    def __str__(self) -> str:
        return f"{self.group}, {self.name}"


def case_dtype(case: Case) -> torch.dtype:
    return torch.bfloat16 if case.half_precision else torch.float32
