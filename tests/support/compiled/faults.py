"""Faults planted in the PTX of Triton's kernels, which the emulator has to find.

Each is what a compiler, or a hand, might get wrong; a GPU would answer with wrong numbers, now and
then, or with a hang.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass

from compiled import problems
from ptx import EmulationError

_ATTEMPTS = (("late", 0), *(("random", seed) for seed in range(6)))


@dataclass(frozen=True)
class Problem:
    """A function of problems.py, its arguments, and more roundings than a right result needs."""

    function: str
    arguments: tuple
    roundings: float


# The depth is several times that of the pipeline.
_GEMM = Problem("forward", ((1, 140, 320, 264, 16), "bfloat16"), 4)
_GRAM = Problem("gram", ((48, 40, 4), 3, "float32"), 4)
_GROUPED = Problem("grouped", (((37, 0, 201), 80, 48), "bfloat16", "bfloat16"), 4)
_LOSS = Problem("loss", ((4, 3, 100), "float32", "logdet", 2.0), 200)


@dataclass(frozen=True)
class Fault:
    """In `kernel`, as compiled for `capability`, every match of `pattern` becomes `new`."""

    kernel: str
    capability: int
    pattern: str
    new: str | Callable[[re.Match], str]
    problem: Problem = _GEMM

    def plant(self, text: str) -> str:
        return re.sub(self.pattern, self.new, text)


def _other_swizzle(match: re.Match) -> str:
    """A matrix descriptor's 128-byte swizzle as one of 64 bytes."""
    bits = int(match[0]) % 2**64
    if bits >> 62 != 1:
        return match[0]
    return str((bits ^ 3 << 62) - 2**64)


def _from_zero(match: re.Match) -> str:
    """A product that starts from zeros in place of its accumulators."""
    return match[1] + re.sub(r"%\w+", "0d0000000000000000", match[2]) + ";"


_KERNEL = "_lora_linear_gemm_kernel"
FAULTS = {
    "the fence before products and stores is missing": Fault(
        _KERNEL, 90, r"fence\.proxy\.async\.shared::cta;", ""
    ),
    "one more group of products may be pending": Fault(
        _KERNEL, 90, r"(wgmma\.wait_group\.sync\.aligned) 2;", r"\1 3;"
    ),
    "the last products are not waited for": Fault(
        _KERNEL, 90, r"(wgmma\.wait_group\.sync\.aligned) 0;", r"\1 1;"
    ),
    "half of the bytes are expected": Fault(_KERNEL, 90, r"(expect_tx[^;]*,) 49152;", r"\1 24576;"),
    "the barrier's parity stays the same": Fault(
        _KERNEL, 90, r"(try_wait\.parity[^;]*,) %r\d+;", r"\1 0;"
    ),
    "barriers are set up for two arrivals": Fault(
        _KERNEL, 90, r"(mbarrier\.init[^;]*,) 1;", r"\1 2;"
    ),
    "a descriptor has another swizzle": Fault(_KERNEL, 90, r"(?<![\w-])-?\d{19}\b", _other_swizzle),
    "an operand is taken for transposed": Fault(
        _KERNEL, 90, r"(wgmma\.mma_async[^;]*m64n256[^;]*, 1, 1, 0,) 0;", r"\1 1;"
    ),
    "the tile's staging is reused at once": Fault(
        _KERNEL, 90, r"cp\.async\.bulk\.wait_group\.read\s+0;", ""
    ),
    "the stores are not committed": Fault(_KERNEL, 90, r"cp\.async\.bulk\.commit_group;", ""),
    "the tile is staged 16 bytes further": Fault(
        _KERNEL, 90, r"(stmatrix[^;]*\[%r\d+)\]", r"\1+16]"
    ),
    "threads do not wait for each other": Fault(_KERNEL, 90, r"bar\.sync\s+0;", ""),
    "the copies are not waited for": Fault(_KERNEL, 80, r"cp\.async\.wait_group\s+\d+;", ""),
    "one more stage may be pending": Fault(
        _KERNEL, 80, r"(cp\.async\.wait_group\s+)3;", r"\g<1>6;"
    ),
    "copies of other threads are not waited for": Fault(
        _KERNEL, 80, r"(cp\.async\.wait_group\s+\d+;[^;]*)bar\.sync\s+0;", r"\1"
    ),
    "copies do not end with the row": Fault(
        _KERNEL, 80, r"(cp\.async\.cg[^;]*, 0x10), %r\d+;", r"\1;"
    ),
    "a matrix is loaded from 16 bytes further": Fault(
        _KERNEL, 80, r"(ldmatrix[^;]*\[%r\d+)\]", r"\1+16]"
    ),
    "stores have no mask": Fault(_KERNEL, 80, r"@%p\d+ (st\.global)", r"\1"),
    "every program does the first tile": Fault(_KERNEL, 80, r"%ctaid\.x;", "0;"),
    "rows of the next group are stored over": Fault(
        "_grouped_linear_kernel", 90, r"@%p\d+ (st\.global)", r"\1", _GROUPED
    ),
    "the copies of a group's rows are not waited for": Fault(
        "_grouped_outer_kernel", 90, r"cp\.async\.wait_group\s+\d+;", "", _GROUPED
    ),
    "sums are of other lanes": Fault(
        "_volume_forward_kernel",
        90,
        r"(shfl\.sync\.bfly[^;]*), 1, 31, -1;",
        r"\1, 2, 31, -1;",
        _LOSS,
    ),
    "loads of logits have no mask": Fault(
        "_volume_backward_kernel", 80, r"@%p\d+ (ld\.global)", r"\1", _LOSS
    ),
    "products of float64 are not added up": Fault(
        "_lora_gram_partial_kernel",
        90,
        r"(mma\.sync[^;]*\.f64 .*, )(\{[^}]*\});",
        _from_zero,
        _GRAM,
    ),
}


def found(name: str) -> tuple[str, int, str] | None:
    """The first mode and seed in which the fault shows, and how: an error or a wrong value."""
    fault = FAULTS[name]
    changes = 0

    def change(kernel: str, text: str) -> str:
        nonlocal changes
        if kernel != fault.kernel:
            return text
        planted = fault.plant(text)
        changes += planted != text
        return planted

    for mode, seed in _ATTEMPTS:
        try:
            is_right = _is_right(fault.problem, fault.capability, mode, seed, change)
        except EmulationError as error:
            return mode, seed, str(error)
        finally:
            assert changes, f"nothing in {fault.kernel} matches {fault.pattern}"
        if not is_right:
            return mode, seed, "a wrong value"
    return None


def right(name: str, mode: str, seed: int) -> bool:
    """Whether the fault's problem comes out right as it is compiled."""
    return _right(FAULTS[name].problem, FAULTS[name].capability, mode, seed)


@functools.cache
def _right(problem: Problem, capability: int, mode: str, seed: int) -> bool:
    return _is_right(problem, capability, mode, seed, None)


def _is_right(
    problem: Problem, capability: int, mode: str, seed: int, change: Callable | None
) -> bool:
    function = getattr(problems, problem.function)
    errors = function(*problem.arguments, capability, mode, seed, change=change)
    return all(error <= problem.roundings for error in errors.values())


def names() -> list[str]:
    return list(FAULTS)
