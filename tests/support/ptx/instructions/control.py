"""Branches, barriers between threads, fences, and what has no effect here."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ptx.errors import EmulationError
from ptx.instructions.registry import Run, instruction
from ptx.parse import Instruction

if TYPE_CHECKING:
    from ptx.block import Block


@instruction("bra")
def bra(block: Block, text: Instruction) -> Run:
    target = block.kernel.labels[text.operands[0]]

    def run(mask):
        block.counters[mask] = target

    return run


@instruction("ret", "exit")
def ret(block: Block, text: Instruction) -> Run:
    return block.exit


@instruction("trap", "call")
def trap(block: Block, text: Instruction) -> Run:
    def run(mask):
        raise EmulationError("a trap, or a call as of a failed assertion")

    return run


@instruction("prefetch", "setmaxnreg", "nanosleep", "membar", "griddepcontrol", "discard")
def nothing(block: Block, text: Instruction) -> Run:
    return lambda mask: None


@instruction("fence")
def fence(block: Block, text: Instruction) -> Run:
    if "proxy" not in text.parts:
        return lambda mask: None
    return lambda mask: block.shared.fence(mask, int(block.synchronised[mask].max()))


@instruction("bar", "barrier")
def bar(block: Block, text: Instruction) -> Run:
    if "warp" in text.parts:
        return lambda mask: None
    if "red" in text.parts:
        raise EmulationError(f"no instruction {text.name}")
    name = block.read(text.operands[0], "u32") if text.operands else None
    count = block.read(text.operands[1], "u32") if len(text.operands) > 1 else None
    waits = "arrive" not in text.parts

    def run(mask):
        first = int(np.argmax(mask))
        needed = int(count()[first]) if count else None
        block.arrive(int(name()[first]) if name else 0, mask, needed, waits)

    return run
