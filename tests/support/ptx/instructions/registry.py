"""From an instruction's text to a function of the threads that execute it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ptx.errors import EmulationError
from ptx.parse import Instruction

if TYPE_CHECKING:
    from ptx.block import Block

Run = Callable[[np.ndarray], None]
Decoder = Callable[["Block", Instruction], Run]

_DECODERS: dict[str, Decoder] = {}

# Warps come together at these, whatever ways their threads went; warp groups at wgmma's.
_OF_WARPS = ("shfl", "redux", "vote", "elect", "match", "activemask", "ldmatrix", "stmatrix", "mma")
# After these a thread's next instruction may be another than the following one.
_MOVING = ("bra", "ret", "exit", "bar", "barrier", "mbarrier")


@dataclass(frozen=True)
class Step:
    """A decoded instruction.

    run: does it for a mask of threads. guard: the predicate, or None. together: how many
    neighbours must have come, and members: of a warp those only that each thread names, or None.
    moves: whether `run` may change where threads go on.
    """

    run: Run
    guard: Callable[[], np.ndarray] | None
    together: int
    members: Callable[[], np.ndarray] | None
    moves: bool


def instruction(*opcodes: str) -> Callable[[Decoder], Decoder]:
    """Register a function (block, instruction) -> run(mask) for these opcodes."""

    def register(decoder: Decoder) -> Decoder:
        for opcode in opcodes:
            _DECODERS[opcode] = decoder
        return decoder

    return register


def decode(block: Block, text: Instruction) -> Step:
    opcode = text.parts[0]
    together = 128 if opcode == "wgmma" else 32 if opcode in _OF_WARPS else 0
    if text.name.startswith("bar.warp"):
        together = 32
    members = None
    if together == 32 and "sync" in text.parts and opcode in ("bar", "shfl", "vote", "redux"):
        members = block.read(text.operands[-1], "u32")
    guard = None
    if text.guard is not None:
        name, negated = text.guard
        guard = block.read(f"!{name}" if negated else name, "pred")
    try:
        if opcode not in _DECODERS:
            raise EmulationError(f"no instruction {text.name}")
        run = _DECODERS[opcode](block, text)
    except EmulationError as error:
        # It may stand where no thread comes.
        run = _raise(str(error))
    return Step(run, guard, together, members, opcode in _MOVING)


def _raise(message: str) -> Run:
    def run(mask: np.ndarray) -> None:
        raise EmulationError(message)

    return run


def listed(operand: str) -> list[str]:
    """{a, b} -> a, b; a -> a."""
    return [part.strip() for part in operand.strip("{} ").split(",")]
