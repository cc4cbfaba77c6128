"""Loads and stores of threads."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ptx.errors import EmulationError
from ptx.instructions.registry import Run, instruction, listed
from ptx.memory import PARAMETER_BASE, WINDOWS, check_aligned
from ptx.numeric import DTYPES, UNSIGNED
from ptx.parse import Instruction

if TYPE_CHECKING:
    from ptx.block import Block

_SPACES = ("param", "shared", "global", "local", "const")


def _space(text: Instruction) -> str:
    for part in text.parts[1:]:
        if part.split("::")[0] in _SPACES:
            return part.split("::")[0]
    return "generic"


def _resolve(space: str, at: np.ndarray) -> tuple[str, np.ndarray]:
    """The memory that generic addresses are in, and the addresses there."""
    if space != "generic":
        return space, at
    first = int(at[0])
    for window in reversed(WINDOWS):
        if first >= WINDOWS[window]:
            return window, at - WINDOWS[window]
    return "param" if first >= PARAMETER_BASE else "global", at


def _local_index(block: Block, at: np.ndarray, bytes_: int, text: Instruction) -> np.ndarray:
    check_aligned(at, bytes_, text.name)
    if (at < 0).any() or (at + bytes_ > block.local.shape[1]).any():
        raise EmulationError(f"illegal access to local memory: {text.name}")
    return at[:, None] + np.arange(bytes_)


@instruction("ld", "ldu")
def ld(block: Block, text: Instruction) -> Run:
    space, kind = _space(text), text.parts[-1]
    size = DTYPES[kind].itemsize
    names = listed(text.operands[0])
    count = len(names)
    writes = [block.write(name, kind) for name in names]
    address = block.address(text.operands[1])

    def load(where: str, at: np.ndarray, mask: np.ndarray) -> np.ndarray:
        if where == "global":
            return block.memory.load(at, size, count, text.name)
        if where == "shared":
            return block.shared.load(at, size, count, text.name)
        if where == "local":
            index = _local_index(block, at, size * count, text)
            data = block.local[np.nonzero(mask)[0][:, None], index]
        elif where == "param":
            different, which = np.unique(at, return_inverse=True)
            found = [block.parameter_bytes(a, size * count) for a in different.tolist()]
            data = np.frombuffer(b"".join(found), np.uint8).reshape(len(found), -1)[which]
        else:
            raise EmulationError(f"no instruction {text.name}")
        return np.ascontiguousarray(data).view(UNSIGNED[size])

    def run(mask):
        where, at = _resolve(space, address()[mask])
        data = load(where, at, mask)
        for i, write in enumerate(writes):
            values = np.zeros(block.threads, UNSIGNED[size])
            values[mask] = data[:, i]
            write(values.view(DTYPES[kind]), mask)

    return run


@instruction("st")
def st(block: Block, text: Instruction) -> Run:
    space, kind = _space(text), text.parts[-1]
    if space == "param":
        # The arguments of a call, which would raise.
        return lambda mask: None
    size = DTYPES[kind].itemsize
    reads = [block.read(name, kind) for name in listed(text.operands[1])]
    address = block.address(text.operands[0])

    def run(mask):
        where, at = _resolve(space, address()[mask])
        data = np.stack([read()[mask].view(UNSIGNED[size]) for read in reads], 1)
        if where == "global":
            block.memory.store(at, data, text.name)
        elif where == "shared":
            block.shared.store(at, data, np.nonzero(mask)[0], block.time, text.name)
        elif where == "local":
            index = _local_index(block, at, data.itemsize * data.shape[1], text)
            block.local[np.nonzero(mask)[0][:, None], index] = data.view(np.uint8)
        else:
            raise EmulationError(f"a store to {where} memory")

    return run
