"""Asynchronous copies, and the mbarriers that say when they have arrived."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from ptx.asynchronous import Load
from ptx.errors import EmulationError
from ptx.instructions.registry import Run, instruction, listed
from ptx.memory import TensorMap, check_aligned, swizzled
from ptx.parse import Instruction

if TYPE_CHECKING:
    from ptx.block import Block

# The addresses of mbarriers and of shared memory have 32 bits.
_LOW = 0xFFFFFFFF
_TENSOR = re.compile(r"\[\s*([%\w$]+)\s*,\s*\{([^}]*)\}\s*\]")


@instruction("cp")
def cp(block: Block, text: Instruction) -> Run:
    for beginning, decoder in _COPIES.items():
        if text.name.startswith(beginning):
            return decoder(block, text)
    raise EmulationError(f"no instruction {text.name}")


def _small(block: Block, text: Instruction) -> Run:
    """cp.async: 4, 8 or 16 bytes of a thread, of which the last may be zeros."""
    size = int(text.operands[2], 0)
    to, source = block.address(text.operands[0]), block.address(text.operands[1])
    valid = block.read(text.operands[3], "s32") if len(text.operands) > 3 else None

    def run(mask):
        n = valid()[mask] if valid else np.full(int(mask.sum()), size)
        at, target = source()[mask], to()[mask]
        data = np.zeros((len(n), size), np.uint8)
        whole = n == size
        words = block.memory.load(at[whole], min(size, 8), size // min(size, 8), text.name)
        data[whole] = words.view(np.uint8)
        for i in np.nonzero(~whole & (n > 0))[0]:
            bytes_ = at[i] + np.arange(n[i])
            data[i, : n[i]] = block.memory.load(bytes_, 1, 1, text.name)[:, 0]
        warp = block.warp[mask]
        for owner in np.unique(warp):
            own = warp == owner
            work = _writer(block, target[own], data[own])
            if block.mode == "early":
                work()
            else:
                block.cp_groups.add(int(owner), work)

    return run


def _writer(block: Block, targets: np.ndarray, data: np.ndarray) -> Callable[[], None]:
    places = targets[:, None] + np.arange(data.shape[1])
    block.shared.check(int(places.min()), int(places.max()) + 1, "cp.async")
    check_aligned(targets, data.shape[1], "cp.async")
    # Triton puts no proxy fence between cp.async and wgmma, and CUTLASS neither.
    return lambda: block.shared.write_async(places, data)


def _small_commit(block: Block, text: Instruction) -> Run:
    def run(mask):
        for warp in _agreeing(block, mask, text):
            block.cp_groups.commit(warp)

    return run


def _small_wait(block: Block, text: Instruction) -> Run:
    left = int(text.operands[0], 0) if text.operands else 0
    takes_open = "wait_all" in text.parts

    def run(mask):
        for warp in _agreeing(block, mask, text):
            if takes_open:
                block.cp_groups.commit(warp)
            block.cp_groups.wait(warp, left)

    return run


def _agreeing(block: Block, mask: np.ndarray, text: Instruction) -> list[int]:
    """The warps of the mask; groups are counted by warp here, by thread on a GPU."""
    warps = (mask | block.exited).reshape(-1, 32).all(1) & mask.reshape(-1, 32).any(1)
    if (warps != mask.reshape(-1, 32).any(1)).any():
        raise EmulationError(f"{text.name} by a part of a warp is not emulated")
    return np.nonzero(warps)[0].tolist()


def _bulk_commit(block: Block, text: Instruction) -> Run:
    def run(mask):
        for thread in np.nonzero(mask)[0].tolist():
            block.store_groups.commit(thread)

    return run


def _bulk_wait(block: Block, text: Instruction) -> Run:
    left = int(text.operands[0], 0)

    def run(mask):
        for thread in np.nonzero(mask)[0].tolist():
            block.store_groups.wait(thread, left)

    return run


class _Tensor:
    """The operand [tensor map, {coordinates}]."""

    def __init__(self, block: Block, operand: str):
        base, coordinates = _TENSOR.fullmatch(operand).groups()
        self._block = block
        self._address = block.address(f"[{base}]")
        self._coordinates = [block.read(name, "s32") for name in listed(coordinates)]

    def of(self, thread: int) -> tuple[TensorMap, list[int]]:
        address = int(self._address()[thread])
        if address not in self._block.tensor_maps:
            raise EmulationError(f"there is no tensor map at {address:#x}")
        tensor_map = self._block.tensor_maps[address]
        coordinates = [int(read()[thread]) for read in self._coordinates]
        if len(coordinates) != len(tensor_map.dims):
            raise EmulationError(f"{len(coordinates)} coordinates for {tensor_map}")
        return tensor_map, coordinates


def _box(
    block: Block, tensor_map: TensorMap, start: list[int], shared: int, what: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For every element of a box: its place in shared and global memory, and whether it is inside.

    Outside of the tensor a load gives zeros, and a store nothing.
    """
    if shared % 128:
        raise EmulationError(f"{what}: {shared} in shared memory is not a multiple of 128")
    size = tensor_map.element_bytes
    axes = np.meshgrid(*(np.arange(side) for side in reversed(tensor_map.box)), indexing="ij")
    # Innermost first again.
    at = [axis.reshape(-1) + first for axis, first in zip(reversed(axes), start)]
    inside = np.ones(len(at[0]), bool)
    offset = at[0] * size
    for axis, side in zip(at, tensor_map.dims):
        inside &= (axis >= 0) & (axis < side)
    for axis, stride in zip(at[1:], tensor_map.strides):
        offset = offset + axis * stride
    places = swizzled(shared + np.arange(len(inside)) * size, tensor_map.swizzle)
    block.shared.check(shared, shared + len(inside) * size, what)
    return places[:, None] + np.arange(size), tensor_map.base + offset, inside


def _bulk_tensor(block: Block, text: Instruction) -> Run:
    if any(part in text.parts for part in ("multicast::cluster", "im2col", "reduce")):
        raise EmulationError(f"no instruction {text.name}")
    return (_bulk_load if "complete_tx" in text.name else _bulk_store)(block, text)


def _bulk_load(block: Block, text: Instruction) -> Run:
    to, barrier = block.address(text.operands[0]), block.address(text.operands[2])
    tensor = _Tensor(block, text.operands[1])

    def start(thread: int) -> None:
        tensor_map, coordinates = tensor.of(thread)
        target = int(to()[thread]) & _LOW
        size = tensor_map.element_bytes
        places, at, inside = _box(block, tensor_map, coordinates, target, text.name)

        over = block.shared.use(places, True, text.name)

        def work():
            over()
            data = np.zeros((len(at), size), np.uint8)
            loaded = block.memory.load(at[inside], size, 1, text.name)
            data[inside] = loaded.view(np.uint8).reshape(-1, size)
            block.shared.write_async(places, data)

        load = Load(int(barrier()[thread]) & _LOW, work, places.size)
        block.copies.start(load, block.mode == "early")

    def run(mask):
        for thread in np.nonzero(mask)[0].tolist():
            start(thread)

    return run


def _bulk_store(block: Block, text: Instruction) -> Run:
    tensor, source = _Tensor(block, text.operands[0]), block.address(text.operands[1])

    def start(thread: int) -> None:
        tensor_map, coordinates = tensor.of(thread)
        first = int(source()[thread]) & _LOW
        places, at, inside = _box(block, tensor_map, coordinates, first, text.name)
        block.shared.check_async_read(places, text.name)

        over = block.shared.use(places, False, text.name)

        def work():
            over()
            data = np.ascontiguousarray(block.shared.bytes[places[inside]])
            elements = data.view(f"u{tensor_map.element_bytes}")
            block.memory.store(at[inside], elements, text.name)

        if block.mode == "early":
            work()
            work = _done
        block.store_groups.add(thread, work)

    def run(mask):
        for thread in np.nonzero(mask)[0].tolist():
            start(thread)

    return run


def _done() -> None:
    """The rest of work that was done at once."""


_COPIES = {
    "cp.async.bulk.tensor": _bulk_tensor,
    "cp.async.bulk.commit_group": _bulk_commit,
    "cp.async.bulk.wait_group": _bulk_wait,
    "cp.async.commit_group": _small_commit,
    "cp.async.wait_group": _small_wait,
    "cp.async.wait_all": _small_wait,
    "cp.async.cg": _small,
    "cp.async.ca": _small,
}


# --- mbarriers


@instruction("mbarrier")
def mbarrier(block: Block, text: Instruction) -> Run:
    kind = text.parts[1]
    if kind not in _MBARRIERS:
        raise EmulationError(f"no instruction {text.name}")
    return _MBARRIERS[kind](block, text)


def _init(block: Block, text: Instruction) -> Run:
    address, count = block.address(text.operands[0]), block.read(text.operands[1], "u32")

    def run(mask):
        for thread in np.nonzero(mask)[0].tolist():
            at = int(address()[thread]) & _LOW
            if at % 8:
                raise EmulationError(f"an mbarrier at {at}, which is not a multiple of 8")
            block.shared.check(at, at + 8, text.name)
            block.copies.init(at, int(count()[thread]))

    return run


def _inval(block: Block, text: Instruction) -> Run:
    address = block.address(text.operands[0])

    def run(mask):
        for thread in np.nonzero(mask)[0].tolist():
            block.copies.invalidate(int(address()[thread]) & _LOW)

    return run


def _arrive(block: Block, text: Instruction) -> Run:
    if "noComplete" in text.parts:
        raise EmulationError(f"no instruction {text.name}")
    address = block.address(text.operands[1])
    number = block.read(text.operands[2], "u32") if len(text.operands) > 2 else None
    announces = "expect_tx" in text.parts

    def run(mask):
        at, numbers = address(), number() if number else None
        for thread in np.nonzero(mask)[0].tolist():
            n = int(numbers[thread]) if number else 1
            arrivals, expected = (1, n) if announces else (n, 0)
            block.copies.arrive(int(at[thread]) & _LOW, arrivals, expected)

    return run


def _expect(block: Block, text: Instruction) -> Run:
    address, number = block.address(text.operands[0]), block.read(text.operands[1], "u32")

    def run(mask):
        for thread in np.nonzero(mask)[0].tolist():
            block.copies.arrive(int(address()[thread]) & _LOW, 0, int(number()[thread]))

    return run


def _wait(block: Block, text: Instruction) -> Run:
    if "parity" not in text.parts:
        raise EmulationError(f"no instruction {text.name}")
    address, parity = block.address(text.operands[1]), block.read(text.operands[2], "u32")
    write = block.write(text.operands[0], "pred")

    def run(mask):
        places = address() & _LOW
        for at in np.unique(places[mask]).tolist():
            here = mask & (places == at)
            wanted = parity() & np.uint32(1)
            if block.mode == "late" and (wanted[here] == block.copies.barrier(at).phase).any():
                block.copies.land_last(at)
            done = wanted != block.copies.barrier(at).phase
            write(done, here)
            asleep = here & ~done
            if asleep.any():
                # They come back when the phase ends, and ask again.
                block.copies.wait(at, asleep)
                block.blocked |= asleep
                block.counters[asleep] -= 1

    return run


_MBARRIERS = {
    "init": _init,
    "inval": _inval,
    "arrive": _arrive,
    "expect_tx": _expect,
    "try_wait": _wait,
    "test_wait": _wait,
}
