"""Products of matrices on tensor cores: mma of a warp, wgmma of a warp group."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np

from ptx.errors import EmulationError
from ptx.instructions.registry import Run, instruction, listed
from ptx.instructions.warps import whole_warps
from ptx.memory import swizzled
from ptx.numeric import DTYPES, from_half, unpack
from ptx.parse import Instruction

if TYPE_CHECKING:
    from ptx.block import Block

_SHAPE = re.compile(r"m(\d+)n(\d+)k(\d+)")
# A warp's lanes in groups of four: the group's number and the place in it.
_GROUP, _PLACE = np.arange(32) // 4, np.arange(32) % 4


def _shape(text: Instruction) -> tuple[int, int, int]:
    match = next(filter(None, (_SHAPE.fullmatch(part) for part in text.parts)))
    return tuple(map(int, match.groups()))


@instruction("mma")
def mma(block: Block, text: Instruction) -> Run:
    """D = A·B + C of a warp; PTX, "Matrix Fragments for mma"."""
    m, n, k = _shape(text)
    kinds = text.parts[-4:]
    double = kinds == ["f64"] * 4
    half = kinds[1] in ("bf16", "f16") and kinds[0] == kinds[3] == "f32"
    if n != 8 or m not in (8, 16) or not (double or half):
        raise EmulationError(f"no instruction {text.name}")
    names = [listed(operand) for operand in text.operands]
    real = "f64" if double else "f32"
    outs = [block.register(name).view(DTYPES[real]) for name in names[0]]
    left, right = ([block.read(q, real if double else "u32") for q in some] for some in names[1:3])
    start = [block.read(q, real) for q in names[3]]
    # Where every element that a lane holds lies in its matrix, the matrix seen as a row.
    tall, each = m // 8, 1 if double else 2
    a_places = _places(
        len(left),
        each,
        lambda i, e: (_GROUP + i % tall * 8, (i // tall * 4 + _PLACE) * each + e),
        k,
    )
    b_places = _places(len(right), each, lambda i, e: ((4 * i + _PLACE) * each + e, _GROUP), n)
    c_places = _places(len(start), 1, lambda i, e: (_GROUP + i // 2 * 8, 2 * _PLACE + i % 2), n)

    def matrices(reads: list, own: np.ndarray | slice, places: np.ndarray) -> np.ndarray:
        """(warps, elements of a matrix), in float64."""
        held = np.stack([read()[own] for read in reads], 1)
        if held.dtype == np.uint32:
            held = from_half(held.view(np.uint16), kinds[1])
        out = np.empty((len(held) // 32, places.size))
        out[:, places] = held.reshape(len(out), -1)
        return out

    def run(mask):
        whole_warps(block, mask, text.name)
        own = slice(None) if mask.all() else np.nonzero(mask)[0]
        a = matrices(left, own, a_places).reshape(-1, m, k)
        b = matrices(right, own, b_places).reshape(-1, k, n)
        c = matrices(start, own, c_places)
        product = (a @ b).reshape(c.shape) + c
        held = product[:, c_places].reshape(-1, len(outs))
        for i, out in enumerate(outs):
            out[own] = held[:, i]

    return run


def _places(registers: int, each: int, place, columns: int) -> np.ndarray:
    """The flat index of a matrix's element by lane, register and element of the register."""
    out = np.empty((32, registers, each), np.int64)
    for i in range(registers):
        for e in range(each):
            row, column = place(i, e)
            out[:, i, e] = row * columns + column
    return out.reshape(-1)


# --- warp groups


@instruction("wgmma")
def wgmma(block: Block, text: Instruction) -> Run:
    kind = text.parts[1]
    if kind == "fence":

        def fence(mask):
            block.wgmma_fenced.update(_warp_groups(mask))

        return fence
    if kind == "commit_group":

        def commit(mask):
            for group in _warp_groups(mask):
                block.wgmma_groups.commit(group)

        return commit
    if kind == "wait_group":
        left = int(text.operands[0], 0)

        def wait(mask):
            for group in _warp_groups(mask):
                block.wgmma_groups.wait(group, left)
                if left == 0:
                    # Its registers are again anybody's.
                    block.wgmma_fenced.discard(group)

        return wait
    return _wgmma_product(block, text)


def _warp_groups(mask: np.ndarray) -> list[int]:
    groups = mask.reshape(-1, 128)
    if (groups.any(1) != groups.all(1)).any():
        raise EmulationError("wgmma by a part of a warp group")
    return np.nonzero(groups.all(1))[0].tolist()


def _wgmma_product(block: Block, text: Instruction) -> Run:
    _, n, k = _shape(text)
    kinds = text.parts[-3:]
    outs = [block.register(name).view(np.float32) for name in listed(text.operands[0])]
    from_registers = text.operands[1].startswith("{")
    scales, turned = text.operands[4:6], [int(t) for t in text.operands[6:]]
    if kinds[0] != "f32" or kinds[1] not in ("bf16", "f16") or set(scales) != {"1"}:
        raise EmulationError(f"no instruction {text.name}")
    if len(outs) != n // 2 or len(turned) != (1 if from_registers else 2):
        raise EmulationError(f"operands of {text.name}")
    half = kinds[1]
    left = None if from_registers else _Uniform(block, text.operands[1], "u64")
    words = [block.read(q, "u32") for q in listed(text.operands[1])] if from_registers else []
    right = _Uniform(block, text.operands[2], "u64")
    accumulates = _Uniform(block, text.operands[3], "pred")
    # Thread t holds, as its accumulator 4·i + 2·j + c, row 16·warp + 8·j + group and column
    # 8·i + 2·place + c.
    warp = np.arange(4)[:, None]
    rows = [(16 * warp + 8 * j + _GROUP).reshape(-1) for j in range(2)]
    place = np.tile(_PLACE, 4)

    def read_operand(at: np.ndarray) -> np.ndarray:
        bits = block.shared.bytes.view(np.uint16)[at // 2]
        return from_half(bits, half).astype(np.float64)

    def start(group: int) -> None:
        if group not in block.wgmma_fenced:
            raise EmulationError("a wgmma without wgmma.fence after other uses of its registers")
        own = slice(128 * group, 128 * group + 128)
        held = [read()[own].copy() for read in words]
        at_a = _operand(left.of(own), 64, k, turned[0]) if left else None
        at_b = _operand(right.of(own), n, k, turned[-1])
        adds = bool(accumulates.of(own))
        over = []
        for at in (at_a, at_b):
            if at is not None:
                block.shared.check(int(at.min()), int(at.max()) + 2, text.name)
                both = np.concatenate([at, at + 1])
                block.shared.check_async_read(both, text.name)
                over.append(block.shared.use(both, False, text.name))

        def work():
            for use in over:
                use()
            if left:
                a = read_operand(at_a)
            else:
                a = np.empty((64, k))
                for i, word in enumerate(held):
                    row, column = rows[i % 2], 8 * (i // 2) + 2 * place
                    a[row, column], a[row, column + 1] = unpack(word, half)
            product = a @ read_operand(at_b).T
            for i, out in enumerate(outs):
                column = 8 * (i // 4) + 2 * place + i % 2
                value = product[rows[i // 2 % 2], column]
                out[own] = value + out[own] if adds else value

        if block.mode == "early":
            work()
        else:
            block.wgmma_groups.add(group, work)

    def run(mask):
        for group in _warp_groups(mask):
            start(group)

    return run


class _Uniform:
    """An operand that all threads of a warp group must agree about."""

    def __init__(self, block: Block, operand: str, kind: str):
        self._read, self._operand = block.read(operand, kind), operand

    def of(self, threads: slice) -> int:
        values = self._read()[threads]
        if (values != values[0]).any():
            raise EmulationError(f"{self._operand} differs within a warp group")
        return int(values[0])


def _operand(descriptor: int, rows: int, k: int, turned: int) -> np.ndarray:
    """The addresses of the 16-bit elements (rows, k) that a matrix descriptor means.

    PTX, "Matrix-Descriptor" and the canonical layouts of wgmma.
    """
    start = (descriptor & 0x3FFF) << 4
    leading, stride = (descriptor >> 16 & 0x3FFF) << 4, (descriptor >> 32 & 0x3FFF) << 4
    if descriptor >> 49 & 7:
        raise EmulationError("matrix descriptors with a base offset are not emulated")
    span = (0, 128, 64, 32)[descriptor >> 62 & 3]
    r, d = np.arange(rows)[:, None], np.arange(k)[None, :]
    if turned:
        wide = span // 2 or 8
        # Without a swizzle the two strides change places.
        along, down = (leading, stride) if span else (stride, leading)
        at = start + r // wide * along + 2 * (r % wide) + d % 8 * (span or 16) + d // 8 * down
    elif span:
        at = start + r // 8 * stride + r % 8 * span + 2 * d
    else:
        at = start + r // 8 * stride + r % 8 * 16 + d // 8 * leading + 2 * (d % 8)
    return swizzled(at, span)
