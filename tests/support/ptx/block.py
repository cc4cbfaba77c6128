"""One block of threads: its registers and memories, what operands mean, which warp runs next."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ptx import instructions
from ptx.asynchronous import Copies, Groups
from ptx.errors import EmulationError
from ptx.instructions.registry import Step
from ptx.memory import (
    PARAMETER_BASE,
    PARAMETER_STRIDE,
    SHARED_BASE,
    GlobalMemory,
    SharedMemory,
    Struct,
    TensorMap,
)
from ptx.numeric import DTYPES, UNSIGNED, resized
from ptx.parse import Kernel

#: When asynchronous work is done: "early", as it is started; "late", when a thread waits for it;
#: "random", at any moment after its start, with warps in a random order too; "threads", as that,
#: and the threads of a warp go their own ways between the instructions that bring them together.
MODES = ("early", "late", "random", "threads")

#: A parameter's value: its bits as an integer, a number of its type, its bytes, a CPU tensor.
Value = int | float | bytes | torch.Tensor | TensorMap | Struct

_INTEGER = re.compile(r"-?(?:0x[0-9A-Fa-f]+|\d+)U?")
_ADDRESS = re.compile(r"\[\s*([%\w$.]+)\s*(?:\+\s*(-?\w+)\s*)?\]")
_LANES = np.arange(32, dtype=np.uint32)
_FAMILY = re.compile(r"(.*?)\d+")
# More than any kernel of a test needs: a loop that does not end.
_LIMIT = 2_000_000


def execute(
    kernel: Kernel,
    grid: Sequence[int],
    threads: int | Sequence[int],
    shared_bytes: int,
    parameters: Sequence[Value],
    mode: str = "late",
    seed: int = 0,
    memory: GlobalMemory | None = None,
) -> int:
    """Run a kernel; its stores go to this process's memory. Returns the instructions executed.

    grid, threads: up to three numbers. shared_bytes: of dynamic shared memory. parameters: in the
    kernel's order. seed: of mode "random". memory: what may be touched beside the tensors among
    the parameters, and beside tensors that pointers in memory lead to.

    Raises EmulationError where the program does what a GPU does not allow or define.
    """
    if mode not in MODES:
        raise ValueError(f"mode {mode!r} is none of {MODES}")
    if len(parameters) != len(kernel.parameters):
        raise ValueError(
            f"{kernel.name} takes {len(kernel.parameters)} parameters; got {len(parameters)}"
        )
    grid = (*grid, 1, 1)[:3]
    block = Block(kernel, grid, threads, shared_bytes, parameters, mode, memory or GlobalMemory())
    with np.errstate(all="ignore"):
        for z in range(grid[2]):
            for y in range(grid[1]):
                for x in range(grid[0]):
                    block.run((x, y, z), np.random.default_rng((seed, x, y, z)))
    return block.time


@dataclass
class _Barrier:
    """Who has come to a named barrier, who waits there, and for how many threads in all."""

    arrived: np.ndarray
    waiting: np.ndarray
    count: int | None


class Block:
    """The threads of one block; reused for all blocks of a launch.

    Instructions are decoded once: `read`, `write` and `address` give functions that know the
    operand's place, and every instruction becomes a function of the mask of its threads.
    """

    def __init__(
        self,
        kernel: Kernel,
        grid: Sequence[int],
        threads: int | Sequence[int],
        shared_bytes: int,
        parameters: Sequence[Value],
        mode: str,
        memory: GlobalMemory,
    ):
        shape = (threads,) if isinstance(threads, int) else tuple(threads)
        shape = (*shape, 1, 1)[:3]
        self.kernel, self.mode, self.memory = kernel, mode, memory
        self.threads = n = int(np.prod(shape))
        if n % 32:
            raise EmulationError(f"{n} threads are not whole warps")
        self.warps = n // 32
        self.lane = np.arange(n) % 32
        self.warp = np.arange(n) // 32
        self.none = np.zeros(n, bool)

        self._registers: dict[str, np.ndarray] = {}
        self._symbols = self._place(shared_bytes)
        self.local = np.zeros((n, self._local_bytes), np.uint8)
        self._parameters: dict[str, int] = {}
        self._parameter_bytes: list[bytes] = []
        self.tensor_maps: dict[int, TensorMap] = {}
        for parameter, value in zip(kernel.parameters, parameters):
            self._set_parameter(parameter.name, parameter.bytes, value)
        self._special = self._special_registers(grid, shape)

        #: The next instruction of every thread, and who has left or waits.
        self.counters = np.zeros(n, np.int64)
        self.exited = np.zeros(n, bool)
        self.blocked = np.zeros(n, bool)
        #: Instructions executed, by all blocks so far; when each thread last left a barrier.
        self.time = 0
        self.synchronised = np.zeros(n, np.int64)
        self._reset()
        self._program = [instructions.decode(self, i) for i in kernel.code]

    def _reset(self) -> None:
        self.counters[:] = 0
        self.exited[:] = self.blocked[:] = False
        self.synchronised[:] = self.time
        for register in self._registers.values():
            register[:] = 0
        self.shared.reset()
        self.copies = Copies(self.threads, self._wake)
        self.cp_groups, self.store_groups, self.wgmma_groups = Groups(), Groups(), Groups()
        #: The warp groups whose registers wgmma may use.
        self.wgmma_fenced: set[int] = set()
        self._barriers: dict[int, _Barrier] = {}
        self._held: dict[tuple[int, int], np.ndarray] = {}
        #: The threads that the random modes favour.
        self._ahead = self.none

    # --- memories and parameters

    def _place(self, shared_bytes: int) -> dict[str, int]:
        """Where declared names lie; makes the shared memory."""
        symbols, at = {}, SHARED_BASE
        for name, (size, align) in self.kernel.static_shared.items():
            at = -(-at // align) * align
            symbols[name] = at
            at += size
        if self.kernel.static_shared and self.kernel.extern_shared:
            at = -(-at // 128) * 128
        for name in self.kernel.extern_shared:
            symbols[name] = at
        # The kernels only hand these on, to a failed assertion.
        symbols |= dict.fromkeys(self.kernel.globals, 0)
        self.shared = SharedMemory(at + shared_bytes - SHARED_BASE)
        at = 0
        for name, (size, align) in self.kernel.local.items():
            at = -(-at // align) * align
            symbols[name] = at
            at += size
        self._local_bytes = at
        return symbols

    def _set_parameter(self, name: str, size: int, value: Value) -> None:
        address = PARAMETER_BASE + PARAMETER_STRIDE * len(self._parameters)
        self._parameters[name] = address
        if isinstance(value, torch.Tensor):
            self.memory.add_tensor(value)
            value = value.data_ptr()
        if isinstance(value, TensorMap):
            # Its format is nobody's business but the copy engine's.
            self.tensor_maps[address] = value
            data = b""
        elif isinstance(value, Struct):
            for offset, tensor_map in value.maps.items():
                self.tensor_maps[address + offset] = tensor_map
            data = value.data
        elif isinstance(value, float):
            data = struct.pack("<f" if size == 4 else "<d", value)
        elif isinstance(value, bytes):
            data = value
        else:
            data = (int(value) % 2 ** (8 * size)).to_bytes(size, "little")
        self._parameter_bytes.append(data)

    def parameter_bytes(self, address: int, size: int) -> bytes:
        """A load from the parameters' memory."""
        number, offset = divmod(address - PARAMETER_BASE, PARAMETER_STRIDE)
        data = self._parameter_bytes[number][offset : offset + size]
        if len(data) != size:
            raise EmulationError(f"parameter {number}: {size} bytes at {offset} are not its own")
        return data

    # --- operands

    def _special_registers(self, grid: Sequence[int], shape: Sequence[int]):
        thread = np.arange(self.threads)
        x, y = shape[0], shape[1]
        places = {"x": thread % x, "y": thread // x % y, "z": thread // (x * y)}
        special = {"%laneid": self.lane, "%warpid": self.warp}
        self._block_index = {}
        for axis, blocks, size in zip("xyz", grid, shape):
            self._block_index[axis] = np.zeros(self.threads, np.uint32)
            special[f"%tid.{axis}"] = places[axis]
            special[f"%ntid.{axis}"] = np.full(self.threads, size)
            special[f"%nctaid.{axis}"] = np.full(self.threads, blocks)
            special[f"%ctaid.{axis}"] = self._block_index[axis]
        return {name: values.astype(np.uint32, copy=False) for name, values in special.items()}

    def register(self, name: str) -> np.ndarray:
        """The bits of a register in all threads: unsigned, or bool for a predicate."""
        if name not in self._registers:
            family = _FAMILY.fullmatch(name)
            kind = self.kernel.registers.get(name)
            if kind is None and family is not None:
                kind = self.kernel.registers.get(family[1])
            if kind is None or kind not in DTYPES:
                raise EmulationError(f"operand {name!r} (.{kind})")
            dtype = DTYPES[kind]
            dtype = dtype if kind == "pred" else UNSIGNED[dtype.itemsize]
            self._registers[name] = np.zeros(self.threads, dtype)
        return self._registers[name]

    def read(self, operand: str, kind: str) -> Callable[[], np.ndarray]:
        """A function that gives the operand's values as PTX type `kind`; not to be written to."""
        dtype = DTYPES[kind]
        constant = self._constant(operand, dtype)
        if constant is not None:
            return lambda: constant
        if operand.startswith("!"):
            positive = self.read(operand[1:], kind)
            return lambda: ~positive()
        register = self._special.get(operand)
        if register is None:
            register = self.register(operand)
        if register.dtype == dtype:
            return lambda: register
        if register.dtype == np.bool_:
            return lambda: register.astype(dtype)
        if register.itemsize == dtype.itemsize:
            view = register.view(dtype)
            return lambda: view
        return lambda: resized(register, dtype.itemsize).view(dtype)

    def _constant(self, operand: str, dtype: np.dtype) -> np.ndarray | None:
        if re.fullmatch(r"0[fF][0-9A-Fa-f]{8}", operand):
            return self._bits(int(operand[2:], 16), 4, dtype)
        if re.fullmatch(r"0[dD][0-9A-Fa-f]{16}", operand):
            return self._bits(int(operand[2:], 16), 8, dtype)
        if _INTEGER.fullmatch(operand):
            value = int(operand.rstrip("U"), 0)
            if dtype.kind in "fb":
                return np.full(self.threads, value, dtype)
            return self._bits(value, dtype.itemsize, dtype)
        address = self._symbols.get(operand, self._parameters.get(operand))
        if address is not None:
            return self._bits(address, dtype.itemsize, dtype)
        return None

    def _bits(self, value: int, size: int, dtype: np.dtype) -> np.ndarray:
        bits = np.full(self.threads, value % 2 ** (8 * size), UNSIGNED[size])
        return (bits if size == dtype.itemsize else resized(bits, dtype.itemsize)).view(dtype)

    def write(self, operand: str, kind: str) -> Callable[[np.ndarray, np.ndarray], None]:
        """A function (values, mask) that sets the operand, whose values are of PTX type `kind`.

        A wider register is filled up with the sign of a signed type, else with zeros.
        """
        if operand == "_":
            return lambda values, mask: None
        register, dtype = self.register(operand), DTYPES[kind]
        if register.itemsize == dtype.itemsize:
            view = register.view(dtype)
            return lambda values, mask: np.copyto(view, values, casting="same_kind", where=mask)
        wide = f"{'i' if kind[0] == 's' else 'u'}{register.itemsize}"
        view = register.view(wide)

        def extended(values: np.ndarray, mask: np.ndarray) -> None:
            narrow = np.asarray(values, dtype)
            if kind[0] != "s":
                narrow = narrow.view(UNSIGNED[dtype.itemsize])
            np.copyto(view, narrow.astype(wide), where=mask)

        return extended

    def address(self, operand: str) -> Callable[[], np.ndarray]:
        """A function that gives the addresses (int64) that [base + offset] means."""
        match = _ADDRESS.fullmatch(operand)
        if match is None:
            raise EmulationError(f"address {operand}")
        offset = int(match[2], 0) if match[2] else 0
        base = match[1]
        if base in self._symbols or base in self._parameters or base.isdigit():
            constant = self.read(base, "s64")() + offset
            return lambda: constant
        register = self.register(base)
        if register.itemsize == 8:
            wide = register.view(np.int64)
            return (lambda: wide + offset) if offset else (lambda: wide)
        return lambda: register.astype(np.int64) + offset

    # --- threads

    def exit(self, mask: np.ndarray) -> None:
        self.exited |= mask
        # Nobody has to wait for these threads any more.
        for held in self._held.values():
            self.blocked &= ~held
        self._held.clear()
        self._open_barriers()

    def arrive(self, name: int, mask: np.ndarray, count: int | None, waits: bool) -> None:
        """The threads come to a barrier of `count` threads, or of all that have not left."""
        barrier = self._barriers.setdefault(name, _Barrier(self.none, self.none, count))
        if (barrier.arrived & mask).any() or barrier.count != count:
            raise EmulationError(f"barrier {name} is used in two ways at once")
        barrier.arrived = barrier.arrived | mask
        if waits:
            barrier.waiting = barrier.waiting | mask
            self.blocked |= mask
        self._open_barriers()

    def _open_barriers(self) -> None:
        """Let go of the threads whose barrier is complete."""
        for name, barrier in list(self._barriers.items()):
            needed = int((~self.exited).sum()) if barrier.count is None else barrier.count
            if barrier.arrived.sum() >= needed:
                del self._barriers[name]
                self.blocked &= ~barrier.waiting
                self.synchronised[barrier.waiting] = self.time

    def _wake(self, mask: np.ndarray) -> None:
        self.blocked &= ~mask

    def warps_of(self, mask: np.ndarray) -> np.ndarray:
        """The warps that have a thread in the mask."""
        return np.nonzero(mask.reshape(-1, 32).any(1))[0]

    def _gather(self, mask: np.ndarray, counter: int, step: Step) -> np.ndarray:
        """The threads whose neighbours have all come to this instruction too.

        The others wait: a warp that went several ways comes together where it must.
        """
        width = step.together
        members = step.members() if step.members else None
        if members is not None and not (members[mask] >> self.lane[mask] & 1).all():
            raise EmulationError("a thread that its own mask of members leaves out")
        here = mask.reshape(-1, width)
        if not self._held and (here.any(1) == here.all(1)).all():
            return mask
        complete = np.zeros(self.threads, bool)
        for i in np.nonzero(here.any(1))[0]:
            group = slice(i * width, (i + 1) * width)
            arrived = np.zeros(self.threads, bool)
            arrived[group] = mask[group]
            if (i, counter) in self._held:
                arrived |= self._held.pop((i, counter))
            missing = ~(arrived | self.exited)[group]
            if members is not None:
                lacks = (members[group, None] >> _LANES & 1).astype(bool) & missing
                waits = np.zeros(self.threads, bool)
                waits[group] = arrived[group] & lacks.any(1)
            else:
                waits = arrived if missing.any() else self.none
            complete |= arrived & ~waits
            self.blocked &= ~arrived
            if waits.any():
                self._held[i, counter] = waits
                self.blocked |= waits
        return complete

    # --- running

    def run(self, index: tuple[int, int, int], rng: np.random.Generator) -> None:
        """Run the block at `index` of the grid to its end."""
        if self.time:
            self._reset()
        for axis, value in zip("xyz", index):
            self._block_index[axis][:] = value
        # Faults show where one kind of work is much faster than another.
        self._rates = rng.choice([0.0, 0.02, 0.5], 3)
        limit = self.time + _LIMIT
        while True:
            ready = ~(self.exited | self.blocked)
            if not ready.any():
                if self.exited.all():
                    break
                # If no thread can run, they must be waiting for a copy that has not arrived.
                if self.copies.land_all():
                    continue
                raise EmulationError(self._deadlock())
            burst = _LIMIT
            if self.mode in ("random", "threads"):
                burst = int(2 ** rng.uniform(0, 9))
                ready = self._some(ready, rng)
                self._finish_something(burst, rng)
            counter = int(self.counters[ready].min())
            mask = ready & (self.counters == counter)
            later = self.counters[ready & ~mask]
            stop = int(later.min()) if len(later) else -1
            self._run_straight(mask, counter, stop, burst)
            if self.time > limit:
                raise EmulationError("the kernel does not end")
        self.store_groups.check_waited_for()

    def _run_straight(self, mask: np.ndarray, counter: int, stop: int, burst: int) -> None:
        """Run threads that are together until they may part or meet others, at `stop`."""
        for _ in range(burst):
            if counter == len(self._program):
                self.exit(mask)
                return
            step = self._program[counter]
            if step.together:
                gathered = self._gather(mask, counter, step)
                if gathered is not mask:
                    self.counters[mask] = counter
                    mask = gathered
                    if not mask.any():
                        return
            self.time += 1
            active = mask if step.guard is None else mask & step.guard()
            counter += 1
            if step.moves:
                self.counters[mask] = counter
            try:
                if active is mask or active.any():
                    step.run(active)
            except EmulationError as error:
                text = self.kernel.code[counter - 1].text
                raise EmulationError(
                    f"{error}\n  in {self.kernel.name}, instruction {counter - 1}: {text[:160]}"
                ) from None
            if step.moves:
                return
            # The threads of a warp may part after an instruction that they do together.
            if counter == stop or (step.together and self.mode == "threads"):
                break
        self.counters[mask] = counter

    def _some(self, ready: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """The threads that run for a while: often the same ones again, so that they get far ahead.

        They are a warp, and half of the warps that stand where it does: together they cost no
        more. In mode "threads" often only the lanes of them that have a bit in common.
        """
        if rng.random() < 0.05 or not (ready & self._ahead).any():
            places = np.where(ready, self.counters, np.iinfo(np.int64).max).reshape(-1, 32).min(1)
            warp = rng.choice(self.warps_of(ready))
            chosen = (places == places[warp]) & (rng.random(self.warps) < 0.5)
            chosen[warp] = True
            self._ahead = chosen[self.warp]
            if self.mode == "threads":
                some = self._ahead & (self.lane >> rng.integers(6) & 1 == rng.integers(2))
                self._ahead = some if (ready & some).any() else self._ahead
        return ready & self._ahead

    def _finish_something(self, burst: int, rng: np.random.Generator) -> None:
        """Some of the asynchronous work that was started gets done, each kind at its own rate."""
        loads, stores, products = rng.binomial(burst, self._rates)
        for _ in range(min(loads, len(self.copies.loads))):
            self.copies.land(self.copies.loads[int(rng.integers(len(self.copies.loads)))])
        for count, groups in ((stores, self.store_groups), (products, self.wgmma_groups)):
            for group in groups.started():
                for work in [group.pop(0) for _ in range(min(count, len(group)))]:
                    work()

    def _deadlock(self) -> str:
        places = sorted({int(counter) for counter in self.counters[~self.exited]})
        texts = [self.kernel.code[place].text[:80] for place in places[:4]]
        return f"{self.kernel.name}: nobody can go on; threads wait at {texts}"
