"""Which launch configuration a problem gets: pure functions of its sizes, dtype and chip.

Each function here is a rule with an answer for every size and every chip, known or not. table.json,
which `python -m bench.tune` writes and which is absent until then, goes before it: an entry answers
the question that has its operator, capability, dtype and sizes; rows and examples may differ up to
the next power of two. An entry names the "record" that it was measured in. If backend "cuda" was
the faster one there, the entry also has "backend": "cuda".
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import torch

from multilora.ops.triton.common import Chip, cdiv

TABLE = Path(__file__).with_name("table.json")

Rule = TypeVar("Rule", bound=Callable[..., Any])


def in_table(rule: Rule) -> Rule:
    """The rule, or the configuration of the table's entry for these arguments."""
    signature = inspect.signature(rule)

    @functools.wraps(rule)
    def answer(*args: Any, **kwargs: Any) -> Any:
        question = signature.bind(*args, **kwargs)
        question.apply_defaults()
        entry = table().get(_key(rule.__name__, **question.arguments))
        config = rule(*args, **kwargs)
        return config if entry is None else dataclasses.replace(config, **entry["config"])

    # As a rule is pure, and a training step asks the same few questions.
    return cast(Rule, functools.lru_cache(maxsize=4096)(answer))


@functools.cache
def table() -> dict[tuple[Any, ...], dict[str, Any]]:
    """The entries of table.json by what they answer; an absent file is an empty table."""
    entries = json.loads(TABLE.read_text()) if TABLE.exists() else []
    return {
        _key(e["op"], Chip(e["capability"], 0), getattr(torch, e["dtype"]), **e["sizes"]): e
        for e in entries
    }


def _key(op: str, chip: Chip, dtype: torch.dtype, **sizes: Any) -> tuple[Any, ...]:
    for name in ("rows", "examples"):
        if name in sizes:
            sizes[name] = power_of_two(sizes[name])
    plain = {n: tuple(v) if isinstance(v, (list, tuple)) else v for n, v in sizes.items()}
    return op, chip.capability, dtype, *sorted(plain.items())


@functools.lru_cache(maxsize=4096)
def proven_backend(rule: Rule, arguments: tuple[Any, ...]) -> str | None:
    """The backend that a record says is right, and ahead of the reference, for just these arguments
    of `rule`, but for rows and examples as in the table; or None."""
    question = inspect.signature(rule).bind(*arguments)
    question.apply_defaults()
    entry = table().get(_key(rule.__name__, **question.arguments))
    if entry is None or entry["record"] is None or not entry["ahead"]:
        return None
    return entry.get("backend", "triton")


def power_of_two(value: int) -> int:
    """The smallest power of two that is not below `value`."""
    return 1 << max(value - 1, 0).bit_length()


@dataclass(frozen=True)
class LoraGemm:
    """path: "shrink inside" the GEMM's loop, "shrink first" in a separate pass, or "accumulate":
    shrink and expand first, then the vendor's GEMM adds to y. block_r: depth of a low-rank step.
    programs: how many share a processor, so that one's end overlaps another's loop. flatten: the
    loop over tiles and the loop over the depth as one, which loads the next tile's first blocks
    early, but which ptxas 13 answers with serialised products."""

    path: str
    block_m: int
    block_n: int
    block_k: int
    block_r: int
    group: int
    warps: int
    stages: int
    programs: int = 1
    flatten: bool = False


@in_table
def lora_gemm(
    particles: int,
    rows: int,
    depth: int,
    cols: int,
    rank: int,
    dtype: torch.dtype,
    chip: Chip,
    shared: str = "",
    backward: bool = False,
) -> LoraGemm:
    """For y (K, rows, cols) from x (K, rows, depth); `shared` as in the kernel."""
    if dtype.itemsize > 2:
        # Full float32 products go through plain registers, and there are not enough for more; the
        # vendor's GEMM does better.
        path = "shrink first" if shared else "accumulate"
        m = 64 if dtype == torch.float32 else 32
        stages = 3 if chip.is_hopper_sized else 2
        return LoraGemm(path, m, 32, 16, 16, 8, 4, stages, programs=3)
    block_r = 16 if rank <= 16 else 32
    # A second product costs 16/block_n of the first one's time, a separate pass reads x again.
    inside = not shared and not backward and rank <= block_r and cols < 2900
    path = "shrink inside" if inside else "shrink first"
    # Where both sides are long, the passes over y cost less than the vendor's GEMM gains.
    if not shared and min(depth, cols) >= 4096:
        path = "accumulate"
    if depth % 8 or cols % 8:
        # Rows that are not on 16-byte boundaries are loaded through registers.
        path = path if path == "accumulate" else "shrink first"
        return LoraGemm(path, 64, 64, 32, block_r, 8, 8, 2)
    if not chip.is_hopper_sized:
        n, r = (64, 64) if rank > 32 else (128, block_r)
        return LoraGemm(path, 128, n, 32, r, 8, 8, 3)
    # The wide tile fills the shared memory with ranks up to 16, and where all particles share an
    # accumulator it has to live twice.
    if shared or rank > 16:
        return LoraGemm(path, 128, 128, 64, 64 if rank > 32 else block_r, 8, 8, 3)
    return LoraGemm(path, 128, 256, 64, block_r, 8, 8, 3)


@dataclass(frozen=True)
class LoraExpand:
    """block_m by block_n elements of y per program; block_r is the depth of a low-rank step."""

    block_m: int
    block_n: int
    block_r: int
    warps: int


def lora_expand(rank: int, dtype: torch.dtype) -> LoraExpand:
    """For y = bias + S·E, before the vendor's GEMM adds to it."""
    if dtype.itemsize > 2:
        return LoraExpand(64 if dtype == torch.float32 else 32, 32, 16, 4)
    return LoraExpand(128, 128, 16 if rank <= 16 else 32, 8)


@dataclass(frozen=True)
class LoraPass:
    """rows_each: the rows of one partial sum, where the products along the rows go alone."""

    block_m: int
    block_n: int
    block_r: int
    rows_each: int
    warps: int
    stages: int


@in_table
def lora_pass(
    members: int,
    rows: int,
    width: int,
    columns: int,
    dtype: torch.dtype,
    chip: Chip,
    shrink: bool,
    outer: bool,
) -> LoraPass:
    """For one pass over g (members, rows, width) with `columns` thin columns."""
    r = 16 if columns <= 16 else 32 if columns <= 32 else 64
    if dtype.itemsize > 2:
        m, n, warps, stages = 32, 128 // dtype.itemsize, 4, 2
        r = min(r, 32 if dtype == torch.float32 else 16)
    elif not chip.is_hopper_sized or width % 8:
        m, n, warps, stages = 64, 64, 8, 3 if width % 8 == 0 else 2
    elif shrink and outer:
        # A partial sum is as wide as g: the more rows in each, the less they cost.
        # With two stages two programs share a processor.
        tall = columns <= 32 and members * rows >= 256 * chip.processors
        m, n, warps, stages = 256 if tall else 128, 64, 8, 2
    else:
        m, n, warps, stages = (128, 64, 4, 4) if shrink else (128, 128, 4, 3)
    if shrink:
        return LoraPass(m, n, r, m, warps, stages)
    # Four programs for every processor, or as many as there are blocks.
    programs = members * cdiv(width, n) * cdiv(columns, r)
    chunks = min(cdiv(rows, m), cdiv(4 * chip.processors, programs))
    return LoraPass(m, n, r, cdiv(cdiv(rows, m), chunks) * m, warps, stages)


def lora_pass_together(
    members: int, rows: int, width: int, rank: int, dtype: torch.dtype, chip: Chip
) -> bool:
    """Whether one pass over g (members, rows, width) gives both thin products: its partial sums,
    written and read once, must not be more than half of g's bytes."""
    config = lora_pass(members, rows, width, rank, dtype, chip, True, True)
    return 2 * max(4, dtype.itemsize) * rank <= config.block_m * dtype.itemsize


@dataclass(frozen=True)
class Grouped:
    """block_m: rows of one group, or of the gradient of a matrix; block_n: their columns; block_k:
    one step along the sum."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int


def grouped_rows(
    groups: int, rows: int, depth: int, cols: int, dtype: torch.dtype, chip: Chip
) -> Grouped:
    """For y (rows, cols) from x (rows, depth) and a matrix for each group. A rule that has not been
    measured."""
    if dtype.itemsize > 2:
        # As lora_gemm: full products go through plain registers.
        return Grouped(_side(rows // groups, 64 if dtype.itemsize == 4 else 32), 32, 16, 4, 2)
    k = _side(depth, 64 if chip.is_hopper_sized else 32)
    # Groups are of any sizes: a tile that is as high as most of them wastes the least.
    m, n = _side(rows // groups, 128), _side(cols, 128)
    return Grouped(m, n, k, 8 if m * n >= 128 * 128 else 4, 3)


def grouped_outer(
    groups: int, rows: int, height: int, width: int, dtype: torch.dtype, chip: Chip
) -> Grouped:
    """For gradients (groups, height, width), each a sum over the rows of its group. A rule that has
    not been measured."""
    if dtype.itemsize > 2:
        return Grouped(32, 32, 16, 4, 2)
    m, n = _side(height, 128), _side(width, 128)
    # Nothing splits the rows of a group: smaller tiles where there are few programs.
    while n > 32 and groups * cdiv(height, m) * cdiv(width, n) < 2 * chip.processors:
        n //= 2
    return Grouped(m, n, 64 if chip.is_hopper_sized else 32, 8 if m * n >= 128 * 128 else 4, 3)


def _side(size: int, most: int) -> int:
    """The side of a tile: a power of two of 16 at least, which tensor cores need."""
    return min(most, max(16, power_of_two(size)))


@dataclass(frozen=True)
class Geometry:
    """block: the sides of a tile of the Gram matrix; block_d: features in one step of its loop;
    chunk: features in one partial sum, at most. apply_block: rows of the stacked factor, and
    apply_block_d features, that one program writes."""

    block: int
    block_d: int
    chunk: int
    warps: int
    apply_block: int
    apply_block_c: int
    apply_block_d: int
    apply_warps: int
    stages: int

    def apply_registers(self, rank: int) -> int | None:
        """The limit per thread of the kernel that writes the gradients, for `Volume.registers`'
        reason: it computes more addresses where the rank (then 0) is not known to the compiler."""
        return None if rank else 255


@in_table
def geometry(
    particles: int,
    ranks: tuple[int, ...],
    widths: tuple[int, ...],
    dtype: torch.dtype,
    chip: Chip,
) -> Geometry:
    """For the stacked factors of all layers; widths: all d_in and d_out."""
    rows = particles * max(ranks)
    block = 16 if rows <= 16 else 32 if rows <= 32 else 64
    pairs = cdiv(rows, block) * (cdiv(rows, block) + 1) // 2
    # Longer chunks write fewer partial sums; stop when too few programs would fill the chip.
    chunk = 4096
    while chunk > 256 and pairs * sum(cdiv(d, chunk) for d in widths) < 2 * chip.processors:
        chunk //= 2
    # Eight warps for float64: with four, the operands of two sides do not fit in registers.
    double = dtype == torch.float64
    block_d = 16 if double or block == 16 else 32
    # Other chips have no tensor cores for float64, and keep its products in registers.
    apply_block_d = 64 if chip.capability in (80, 90, 100, 103) else 32
    return Geometry(block, block_d, chunk, 8 if double else 4, block, 16, apply_block_d, 4, 3)


@dataclass(frozen=True)
class GeometryTrace:
    """Padded: all particles and their rank; block_a: components of particle i in one step."""

    block_j: int
    block_a: int
    block_b: int
    warps: int


def geometry_trace(particles: int, rank: int) -> GeometryTrace:
    block_j, block_b = power_of_two(particles), power_of_two(rank)
    block_a = max(1, min(block_b, 1024 // (block_j * block_b)))
    return GeometryTrace(block_j, block_a, block_b, 8 if block_j * block_b > 2048 else 4)


@dataclass(frozen=True)
class Volume:
    """A tile of block_k particles, block_n examples and lanes·classes_each classes.

    aligned: a thread's classes lie side by side. class_side: the padded side of the Gram matrix
    over the classes, or 0 where the one over the particles is smaller. dot: the products run on
    tensor cores. splits: the parts that an example's classes are divided into, merged by a second
    kernel of merge_warps warps, or 0 where one program does it all.
    """

    block_k: int
    block_n: int
    lanes: int
    classes_each: int
    aligned: bool
    class_side: int
    dot: bool
    splits: int
    warps: int
    merge_warps: int

    @property
    def registers(self) -> int | None:
        """The limit per thread in the forward. With a factorisation in every warp, ptxas may spill
        to fit one more block on an SM, unless a thread may use all the registers there are."""
        return 255 if self.block_n > 1 else None


@in_table
def volume(
    particles: int,
    examples: int,
    classes: int,
    dtype: torch.dtype,
    aligned: bool,
    chip: Chip,
    backward: bool = False,
) -> Volume:
    """For logits (K, N, C)."""
    block_k, width = power_of_two(particles), power_of_two(classes)
    if particles >= classes:
        side = max(16, width)
        return Volume(max(16, block_k), 1, 1, side, aligned, side, True, 0, 4, 1)
    threads = 128
    # Up to K² sums and the factorisation of a K² matrix are held by one thread. The second has no
    # room for 8 particles, which therefore need a second kernel: only for many classes.
    alone = block_k <= 4
    dot = not alone and (block_k > 8 or dtype.itemsize > 4 or (classes <= 512 and not backward))
    if dot:
        block_k, block_n, lanes = max(16, block_k), 1, 1
        each = min(1024 // block_k, max(16, width))
    else:
        # One load of 16 bytes at most: the classes of two loads would belong to two threads.
        unaligned = 8 if chip.capability >= 90 else 4
        each = min(32 // block_k, 16 // dtype.itemsize if aligned else unaligned)
        # Few examples of few classes: rather more programs than more work for each thread.
        while each > 1 and examples * width < threads * each * chip.processors:
            each //= 2
        lanes = min(threads, max(1, width // each))
        block_n = threads // lanes
    chunks = cdiv(classes, lanes * each)
    # Four programs for every processor, of four chunks or more; a thread of the second kernel
    # holds K²/threads numbers of every part.
    wanted = cdiv(4 * chip.processors, max(1, cdiv(examples, block_n)))
    merge_warps = 1 if block_k <= 4 else 4
    most = 16 * 32 * merge_warps // block_k**2
    splits = min(wanted, max(1, chunks // 4), most)
    # Every part has a chunk.
    splits = cdiv(chunks, cdiv(chunks, splits))
    if splits == 1 and (alone or dot):
        splits = 0
    return Volume(
        block_k, block_n, lanes, each, aligned, 0, dot, splits, threads // 32, merge_warps
    )


@dataclass(frozen=True)
class VolumeMean:
    block: int
    warps: int


def volume_mean(examples: int) -> VolumeMean:
    """For means over rows of N."""
    return VolumeMean(min(4096, max(128, power_of_two(examples))), 8 if examples > 2048 else 4)
