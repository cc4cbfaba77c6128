"""Instructions that the threads of a warp do together: shuffles, votes, moves of small matrices."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ptx.errors import EmulationError
from ptx.instructions.registry import Run, instruction, listed
from ptx.parse import Instruction

if TYPE_CHECKING:
    from ptx.block import Block

# Where lane l keeps its two elements of an 8×8 matrix.
_ROW, _COLUMN = np.arange(32) // 4, 2 * (np.arange(32) % 4)


def whole_warps(block: Block, mask: np.ndarray, what: str) -> np.ndarray:
    """The warps of the mask, of which no thread may be missing."""
    warps = mask.reshape(-1, 32)
    if (warps.any(1) != warps.all(1)).any():
        raise EmulationError(f"{what} by a part of a warp")
    return np.nonzero(warps.all(1))[0]


@instruction("elect")
def elect(block: Block, text: Instruction) -> Run:
    lane, predicate = text.operands[0].split("|")
    write, write_lane = block.write(predicate, "pred"), block.write(lane, "u32")

    def run(mask):
        elected = np.zeros(block.threads, bool)
        leaders = np.zeros(block.threads, np.uint32)
        for warp in block.warps_of(mask):
            first = int(np.argmax(mask[32 * warp : 32 * warp + 32]))
            elected[32 * warp + first] = True
            leaders[32 * warp : 32 * warp + 32] = first
        write(elected, mask)
        write_lane(leaders, mask)

    return run


@instruction("shfl")
def shfl(block: Block, text: Instruction) -> Run:
    mode = text.parts[2]
    destination, *inside = text.operands[0].split("|")
    value = block.read(text.operands[1], "b32")
    by, clamp = (block.read(operand, "u32") for operand in text.operands[2:4])
    write = block.write(destination, "b32")
    write_inside = block.write(inside[0], "pred") if inside else None
    lane = block.lane

    def run(mask):
        b, c = by().astype(np.int64), clamp().astype(np.int64)
        segment = c >> 8 & 31
        last = (lane & segment) | (c & 31 & ~segment)
        first = lane & segment
        source, ok = {
            "up": lambda: (lane - b, lane - b >= last),
            "down": lambda: (lane + b, lane + b <= last),
            "bfly": lambda: (lane ^ b, (lane ^ b) <= last),
            "idx": lambda: (first | (b & 31 & ~segment), (first | (b & 31 & ~segment)) <= last),
        }[mode]()
        source = block.warp * 32 + np.where(ok, source, lane)
        if not mask[source[mask]].all():
            raise EmulationError("a shuffle from a lane that does not take part")
        write(value()[source], mask)
        if write_inside:
            write_inside(ok, mask)

    return run


@instruction("redux")
def redux(block: Block, text: Instruction) -> Run:
    kind = text.parts[-1]
    functions = {"add": np.sum, "min": np.min, "max": np.max}
    function = functions.get(text.parts[2])
    if function is None:
        raise EmulationError(f"no instruction {text.name}")
    read, write = block.read(text.operands[1], kind), block.write(text.operands[0], kind)

    def run(mask):
        values = read()
        out = np.zeros_like(values)
        for warp in block.warps_of(mask):
            s = slice(32 * warp, 32 * warp + 32)
            out[s] = function(values[s][mask[s]].astype(np.int64)).astype(values.dtype)
        write(out, mask)

    return run


@instruction("vote")
def vote(block: Block, text: Instruction) -> Run:
    mode = text.parts[2]
    read = block.read(text.operands[1], "pred")
    write = block.write(text.operands[0], "b32" if mode == "ballot" else "pred")

    def run(mask):
        votes = (read() & mask).reshape(-1, 32)
        here = mask.reshape(-1, 32)
        if mode == "ballot":
            result = (votes.astype(np.uint32) << np.arange(32, dtype=np.uint32)).sum(1)
            result = result.astype(np.uint32)
        elif mode == "any":
            result = votes.any(1)
        elif mode == "all":
            result = (votes | ~here).all(1)
        else:
            raise EmulationError(f"no instruction {text.name}")
        write(np.repeat(result, 32), mask)

    return run


@instruction("activemask")
def activemask(block: Block, text: Instruction) -> Run:
    write = block.write(text.operands[0], "b32")

    def run(mask):
        bits = mask.reshape(-1, 32).astype(np.uint32) << np.arange(32, dtype=np.uint32)
        write(np.repeat(bits.sum(1).astype(np.uint32), 32), mask)

    return run


def _matrices(text: Instruction) -> int:
    return next(int(part[1]) for part in text.parts if part in ("x1", "x2", "x4"))


@instruction("ldmatrix")
def ldmatrix(block: Block, text: Instruction) -> Run:
    turned = "trans" in text.parts
    registers = [block.register(name) for name in listed(text.operands[0])]
    address = block.address(text.operands[1])
    if len(registers) != _matrices(text) or "b16" not in text.parts:
        raise EmulationError(f"no instruction {text.name}")

    def run(mask):
        whole_warps(block, mask, text.name)
        # The rows of matrix i are where lanes 8·i to 8·i + 7 say.
        rows = address()[mask].reshape(-1, 32)[:, : 8 * len(registers)].reshape(-1)
        matrices = block.shared.load(rows, 2, 8, text.name).reshape(-1, len(registers), 8, 8)
        matrices = matrices.swapaxes(2, 3) if turned else matrices
        low, high = matrices[..., _ROW, _COLUMN], matrices[..., _ROW, _COLUMN + 1]
        words = low.astype(np.uint32) | high.astype(np.uint32) << np.uint32(16)
        for i, register in enumerate(registers):
            register[mask] = words[:, i].reshape(-1)

    return run


@instruction("stmatrix")
def stmatrix(block: Block, text: Instruction) -> Run:
    turned = "trans" in text.parts
    reads = [block.read(name, "u32") for name in listed(text.operands[1])]
    address = block.address(text.operands[0])
    if len(reads) != _matrices(text) or "b16" not in text.parts:
        raise EmulationError(f"no instruction {text.name}")
    # The layout of a matrix's bytes.
    lane = 4 * np.arange(8)[:, None] + np.arange(8) // 2
    lane = np.repeat(lane.T if turned else lane, 2, axis=1)

    def run(mask):
        warps = whole_warps(block, mask, text.name)
        rows = address()[mask].reshape(-1, 32)[:, : 8 * len(reads)].reshape(-1)
        words = np.stack([read()[mask].reshape(-1, 32) for read in reads], 1)
        matrices = np.empty((len(warps), len(reads), 8, 8), np.uint16)
        matrices[..., _ROW, _COLUMN] = words & np.uint32(0xFFFF)
        matrices[..., _ROW, _COLUMN + 1] = words >> np.uint32(16)
        matrices = matrices.swapaxes(2, 3) if turned else matrices
        # Taken as written by the lane that had the element: all lanes have to fence.
        lanes = np.broadcast_to(lane, (len(warps), len(reads), 8, 16))
        writers = (32 * warps[:, None, None, None] + lanes).reshape(-1, 16)
        block.shared.store(rows, matrices.reshape(-1, 8), writers, block.time, text.name)

    return run
