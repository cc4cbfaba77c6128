"""Numbers: moves, conversions, integer and floating-point arithmetic, comparisons, bits."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from ptx.errors import EmulationError
from ptx.instructions.registry import Run, instruction, listed
from ptx.memory import WINDOWS
from ptx.numeric import DTYPES, UNSIGNED, from_half, pack, to_half, unpack
from ptx.parse import Instruction

if TYPE_CHECKING:
    from ptx.block import Block

Function = Callable[..., np.ndarray]


def _elementwise(block: Block, text: Instruction, kind: str, function: Function) -> Run:
    """destination = function(sources), all of one type."""
    reads = [block.read(operand, kind) for operand in text.operands[1:]]
    write = block.write(text.operands[0], kind)
    if len(reads) == 1:
        (a,) = reads
        return lambda mask: write(function(a()), mask)
    if len(reads) == 2:
        a, b = reads
        return lambda mask: write(function(a(), b()), mask)
    a, b, c = reads
    return lambda mask: write(function(a(), b(), c()), mask)


def _halves(block: Block, text: Instruction, kind: str, function: Function) -> Run:
    """The same on 16-bit numbers, computed in float32; two in a word where kind ends in x2."""
    half = kind.removesuffix("x2")
    reads = [block.read(operand, kind) for operand in text.operands[1:]]
    write = block.write(text.operands[0], kind)
    if kind.endswith("x2"):

        def run(mask):
            pairs = [unpack(read(), half) for read in reads]
            low, high = (function(*side).astype(np.float32) for side in zip(*pairs))
            write(pack(low, high, half), mask)
    else:

        def run(mask):
            values = [from_half(read().view(np.uint16), half) for read in reads]
            bits = to_half(function(*values).astype(np.float32), half)
            write(bits.view(DTYPES[kind]), mask)

    return run


def _apply(block: Block, text: Instruction, function: Function) -> Run:
    kind = text.parts[-1]
    if kind in ("bf16", "f16", "bf16x2", "f16x2"):
        return _halves(block, text, kind, function)
    return _elementwise(block, text, kind, function)


# --- moves and conversions


@instruction("mov")
def mov(block: Block, text: Instruction) -> Run:
    kind = text.parts[-1]
    destination, source = text.operands
    if destination.startswith("{"):
        return _split(block, listed(destination), source, kind)
    if source.startswith("{"):
        return _join(block, destination, listed(source), kind)
    read, write = block.read(source, kind), block.write(destination, kind)
    return lambda mask: write(read(), mask)


def _split(block: Block, names: list[str], source: str, kind: str) -> Run:
    wide = DTYPES[kind].itemsize
    part = wide // len(names)
    read = block.read(source, f"u{8 * wide}")
    writes = [block.write(name, f"u{8 * part}") for name in names]

    def run(mask):
        parts = read().view(UNSIGNED[part]).reshape(-1, len(names))
        for i, write in enumerate(writes):
            write(parts[:, i], mask)

    return run


def _join(block: Block, destination: str, names: list[str], kind: str) -> Run:
    wide = DTYPES[kind].itemsize
    part = wide // len(names)
    reads = [block.read(name, f"u{8 * part}") for name in names]
    write = block.write(destination, f"u{8 * wide}")

    def run(mask):
        parts = np.stack([read() for read in reads], 1)
        write(parts.view(UNSIGNED[wide])[:, 0], mask)

    return run


@instruction("cvta")
def cvta(block: Block, text: Instruction) -> Run:
    window = next((WINDOWS[part] for part in text.parts if part in WINDOWS), 0)
    offset = np.int64(-window if "to" in text.parts else window)
    read, write = block.read(text.operands[1], "s64"), block.write(text.operands[0], "s64")
    return lambda mask: write(read() + offset, mask)


_ROUNDINGS = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


@instruction("cvt")
def cvt(block: Block, text: Instruction) -> Run:
    kinds = [part for part in text.parts[1:] if part in DTYPES]
    if len(kinds) != 2:
        raise EmulationError(f"no instruction {text.name}")
    to, source = kinds
    write = block.write(text.operands[0], to)
    if to.endswith("x2"):
        high, low = (block.read(operand, "f32") for operand in text.operands[1:])
        return lambda mask: write(pack(low(), high(), to.removesuffix("x2")), mask)
    read = block.read(text.operands[1], source)
    roundings = [_ROUNDINGS[part] for part in text.parts if part in _ROUNDINGS]

    def run(mask):
        values = read()
        if source in ("bf16", "f16"):
            values = from_half(values.view(np.uint16), source)
        if to in ("bf16", "f16"):
            # PTX rounds once, from any type; from float64 this rounds twice, which the compilers
            # do not ask for.
            write(to_half(values.astype(np.float32), to).view(DTYPES[to]), mask)
            return
        target = DTYPES[to]
        if "sat" in text.parts and target.kind == "f":
            # NaN too becomes 0.
            values = np.fmin(np.fmax(values, 0), 1)
        if values.dtype.kind == "f" and roundings:
            values = roundings[0](values)
        if values.dtype.kind == "f" and target.kind in "iu":
            values = _saturated(values, target)
        write(values.astype(target), mask)

    return run


def _saturated(values: np.ndarray, target: np.dtype) -> np.ndarray:
    """Floats as integers: NaN is 0, and what is out of range the nearest that is in."""
    limits = np.iinfo(target)
    low, high = float(limits.min), float(limits.max)
    inside = np.where((values > low) & (values < high), values, 0).astype(target)
    inside = np.where(values >= high, target.type(limits.max), inside)
    return np.where(values <= low, target.type(limits.min), inside)


# --- arithmetic


@instruction("add")
def add(block: Block, text: Instruction) -> Run:
    return _apply(block, text, operator.add)


@instruction("sub")
def sub(block: Block, text: Instruction) -> Run:
    return _apply(block, text, operator.sub)


@instruction("neg")
def neg(block: Block, text: Instruction) -> Run:
    return _apply(block, text, operator.neg)


@instruction("abs")
def absolute(block: Block, text: Instruction) -> Run:
    return _apply(block, text, np.abs)


@instruction("min")
def minimum(block: Block, text: Instruction) -> Run:
    return _apply(block, text, np.minimum if _spreads_nan(text) else np.fmin)


@instruction("max")
def maximum(block: Block, text: Instruction) -> Run:
    return _apply(block, text, np.maximum if _spreads_nan(text) else np.fmax)


def _spreads_nan(text: Instruction) -> bool:
    return "NaN" in text.parts


@instruction("mul")
def mul(block: Block, text: Instruction) -> Run:
    kind = text.parts[-1]
    if "wide" in text.parts:
        return _wide(block, text, kind, adds=False)
    if "hi" in text.parts:
        bits = 8 * DTYPES[kind].itemsize

        def high(a, b):
            product = a.astype(object) * b.astype(object) >> bits
            return (product & (1 << bits) - 1).astype(UNSIGNED[bits // 8]).view(DTYPES[kind])

        return _elementwise(block, text, kind, high)
    return _apply(block, text, operator.mul)


@instruction("mad")
def mad(block: Block, text: Instruction) -> Run:
    if "wide" in text.parts:
        return _wide(block, text, text.parts[-1], adds=True)
    if text.parts[-1][0] == "f":
        return fma(block, text)
    if "lo" not in text.parts:
        raise EmulationError(f"no instruction {text.name}")
    return _apply(block, text, lambda a, b, c: a * b + c)


def _wide(block: Block, text: Instruction, kind: str, adds: bool) -> Run:
    wide = f"{kind[0]}{2 * int(kind[1:])}"
    dtype = DTYPES[wide]
    a, b = (block.read(operand, kind) for operand in text.operands[1:3])
    write = block.write(text.operands[0], wide)
    if not adds:
        return lambda mask: write(a().astype(dtype) * b(), mask)
    c = block.read(text.operands[3], wide)
    return lambda mask: write(a().astype(dtype) * b() + c(), mask)


@instruction("fma")
def fma(block: Block, text: Instruction) -> Run:
    # One rounding: the product is exact in the wider type, and the sum nearly always is.
    wide = np.longdouble if text.parts[-1] == "f64" else np.float64
    narrow = np.float64 if text.parts[-1] == "f64" else np.float32
    if "rz" in text.parts or "rp" in text.parts:
        raise EmulationError(f"no instruction {text.name}")

    def once(a, b, c):
        exact = a.astype(wide) * b + c
        rounded = exact.astype(narrow)
        if "rm" in text.parts:
            lower = np.nextafter(rounded, narrow(-np.inf))
            rounded = np.where(rounded > exact, lower, rounded)
        return rounded

    return _apply(block, text, once)


@instruction("div")
def div(block: Block, text: Instruction) -> Run:
    def divide(a, b):
        if a.dtype.kind == "f":
            return a / b
        quotient = np.abs(a.astype(object)) // np.abs(_divisor(b).astype(object))
        sign = np.where((a < 0) != (b < 0), -1, 1)
        return (quotient * sign).astype(a.dtype)

    def divide_unsigned(a, b):
        return a // _divisor(b)

    unsigned = text.parts[-1][0] == "u"
    return _apply(block, text, divide_unsigned if unsigned else divide)


@instruction("rem")
def rem(block: Block, text: Instruction) -> Run:
    return _apply(block, text, lambda a, b: np.fmod(a, _divisor(b)))


def _divisor(b: np.ndarray) -> np.ndarray:
    """A divisor that is 1 in the threads that are masked off, so that none divides by 0."""
    return np.where(b == 0, b.dtype.type(1), b)


@instruction("ex2")
def ex2(block: Block, text: Instruction) -> Run:
    flushes = "ftz" in text.parts

    def power(x):
        y = np.exp2(x.astype(np.float64)).astype(np.float32)
        return np.where(np.abs(y) < 2.0**-126, np.float32(0), y) if flushes else y

    return _apply(block, text, power)


@instruction("lg2")
def lg2(block: Block, text: Instruction) -> Run:
    return _apply(block, text, lambda x: np.log2(x.astype(np.float64)).astype(np.float32))


@instruction("rcp")
def rcp(block: Block, text: Instruction) -> Run:
    if text.parts[-1] == "f64" and "approx" in text.parts:
        # Some 20 bits, the rest zero.
        mask = np.uint64(0xFFFFFFFF00000000)
        return _apply(block, text, lambda x: ((1 / x).view(np.uint64) & mask).view(np.float64))
    return _apply(block, text, lambda x: x.dtype.type(1) / x)


@instruction("rsqrt")
def rsqrt(block: Block, text: Instruction) -> Run:
    if text.parts[-1] == "f64" and "approx" in text.parts:
        mask = np.uint64(0xFFFFFFFF00000000)
        return _apply(
            block, text, lambda x: ((1 / np.sqrt(x)).view(np.uint64) & mask).view(np.float64)
        )
    return _apply(block, text, lambda x: x.dtype.type(1) / np.sqrt(x))


@instruction("sqrt")
def sqrt(block: Block, text: Instruction) -> Run:
    return _apply(block, text, np.sqrt)


# --- bits


@instruction("and")
def bit_and(block: Block, text: Instruction) -> Run:
    return _elementwise(block, text, text.parts[-1], operator.and_)


@instruction("or")
def bit_or(block: Block, text: Instruction) -> Run:
    return _elementwise(block, text, text.parts[-1], operator.or_)


@instruction("xor")
def bit_xor(block: Block, text: Instruction) -> Run:
    return _elementwise(block, text, text.parts[-1], operator.xor)


@instruction("not")
def bit_not(block: Block, text: Instruction) -> Run:
    return _elementwise(block, text, text.parts[-1], operator.invert)


@instruction("shl")
def shl(block: Block, text: Instruction) -> Run:
    return _shift(block, text, operator.lshift, signed=False)


@instruction("shr")
def shr(block: Block, text: Instruction) -> Run:
    return _shift(block, text, operator.rshift, signed=text.parts[-1][0] == "s")


def _shift(block: Block, text: Instruction, function: Function, signed: bool) -> Run:
    size = DTYPES[text.parts[-1]].itemsize
    bits = 8 * size
    kind = f"{'s' if signed else 'u'}{bits}"
    value, count = block.read(text.operands[1], kind), block.read(text.operands[2], "u32")
    write = block.write(text.operands[0], kind)
    dtype = DTYPES[kind]

    def run(mask):
        by = count()
        shifted = function(value(), np.minimum(by, bits - 1).astype(dtype))
        if not signed:
            # A shift by all bits or more leaves none.
            shifted = np.where(by >= bits, dtype.type(0), shifted)
        write(shifted, mask)

    return run


@instruction("shf")
def shf(block: Block, text: Instruction) -> Run:
    low, high, count = (block.read(operand, "u32") for operand in text.operands[1:])
    write = block.write(text.operands[0], "u32")
    left, wraps = "l" in text.parts, "wrap" in text.parts

    def run(mask):
        by = count().astype(np.uint64)
        by = by & np.uint64(31) if wraps else np.minimum(by, np.uint64(32))
        both = high().astype(np.uint64) << np.uint64(32) | low()
        shifted = both << by >> np.uint64(32) if left else both >> by
        write(shifted.astype(np.uint32), mask)

    return run


@instruction("bfe")
def bfe(block: Block, text: Instruction) -> Run:
    kind = text.parts[-1]
    value, start, length = (
        block.read(operand, k) for operand, k in zip(text.operands[1:], (kind, "u32", "u32"))
    )
    write = block.write(text.operands[0], kind)
    if DTYPES[kind].itemsize != 4:
        raise EmulationError(f"no instruction {text.name}")

    def run(mask):
        bits, n = value().astype(np.int64) & 0xFFFFFFFF, length().astype(np.int64)
        found = (bits >> start().astype(np.int64)) & ((1 << n) - 1)
        if kind[0] == "s":
            found = np.where(found >> np.maximum(n - 1, 0) & 1, found - (1 << n), found)
        write(found.astype(DTYPES[kind]), mask)

    return run


@instruction("bfi")
def bfi(block: Block, text: Instruction) -> Run:
    reads = [block.read(operand, "u32") for operand in text.operands[1:]]
    write = block.write(text.operands[0], "u32")

    def run(mask):
        inserted, into, start, length = (read().astype(np.int64) for read in reads)
        field = ((1 << length) - 1) << start
        write(((into & ~field) | ((inserted << start) & field)).astype(np.uint32), mask)

    return run


@instruction("prmt")
def prmt(block: Block, text: Instruction) -> Run:
    a, b, selector = (block.read(operand, "u32") for operand in text.operands[1:])
    write = block.write(text.operands[0], "u32")

    def run(mask):
        eight = np.stack([a(), b()], 1).view(np.uint8)
        chosen = selector()
        out = np.empty((len(chosen), 4), np.uint8)
        for i in range(4):
            which = (chosen >> np.uint32(4 * i)) & np.uint32(15)
            byte = np.take_along_axis(eight, (which & 7)[:, None].astype(np.int64), 1)[:, 0]
            sign = np.where(byte & 0x80, np.uint8(0xFF), np.uint8(0))
            out[:, i] = np.where(which & 8, sign, byte)
        write(out.view(np.uint32)[:, 0], mask)

    return run


@instruction("lop3")
def lop3(block: Block, text: Instruction) -> Run:
    reads = [block.read(operand, "u32") for operand in text.operands[1:4]]
    table = int(text.operands[4], 0)
    write = block.write(text.operands[0], "u32")

    def run(mask):
        x, y, z = (read() for read in reads)
        out = np.zeros(len(x), np.uint32)
        for i in range(8):
            if table >> i & 1:
                out |= (x if i & 4 else ~x) & (y if i & 2 else ~y) & (z if i & 1 else ~z)
        write(out, mask)

    return run


@instruction("popc")
def popc(block: Block, text: Instruction) -> Run:
    kind = text.parts[-1]
    read, write = block.read(text.operands[1], kind), block.write(text.operands[0], "u32")
    size = DTYPES[kind].itemsize

    def run(mask):
        bits = np.unpackbits(np.ascontiguousarray(read()).view(np.uint8).reshape(-1, size), axis=1)
        write(bits.sum(1).astype(np.uint32), mask)

    return run


# --- comparisons


@instruction("selp")
def selp(block: Block, text: Instruction) -> Run:
    kind = text.parts[-1]
    a, b = (block.read(operand, kind) for operand in text.operands[1:3])
    chooses = block.read(text.operands[3], "pred")
    write = block.write(text.operands[0], kind)
    return lambda mask: write(np.where(chooses(), a(), b()), mask)


# Ordered comparisons of floats are false with a NaN, as numpy's are; those with a "u" are true.
_COMPARISONS: dict[str, Function] = {
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
    "lo": operator.lt,
    "ls": operator.le,
    "hi": operator.gt,
    "hs": operator.ge,
    "equ": lambda a, b: ~((a < b) | (a > b)),
    "neu": operator.ne,
    "ltu": lambda a, b: ~(a >= b),
    "leu": lambda a, b: ~(a > b),
    "gtu": lambda a, b: ~(a <= b),
    "geu": lambda a, b: ~(a < b),
    "num": lambda a, b: ~(np.isnan(a) | np.isnan(b)),
    "nan": lambda a, b: np.isnan(a) | np.isnan(b),
}
_COMBINATIONS = {"and": operator.and_, "or": operator.or_, "xor": operator.xor}


@instruction("setp")
def setp(block: Block, text: Instruction) -> Run:
    kind, comparison = text.parts[-1], text.parts[1]
    function = _COMPARISONS[comparison]
    if comparison == "ne" and kind[0] == "f":
        # Ordered: numpy's is true with a NaN.
        function = lambda a, b: (a < b) | (a > b)  # noqa: E731
    if kind in ("bf16", "f16"):
        compare = function
        function = lambda a, b: compare(  # noqa: E731
            from_half(a.view(np.uint16), kind), from_half(b.view(np.uint16), kind)
        )
    a, b = (block.read(operand, kind) for operand in text.operands[1:3])
    combination = _COMBINATIONS.get(text.parts[2])
    other = block.read(text.operands[3], "pred") if combination else None
    destinations = text.operands[0].split("|")
    writes = [block.write(name, "pred") for name in destinations]

    def run(mask):
        values = function(a(), b())
        results = (values, ~values)
        for write, result in zip(writes, results):
            write(combination(result, other()) if combination else result, mask)

    return run
