"""The memories that a kernel sees: this process's tensors, a block's shared memory, parameters."""

from __future__ import annotations

import bisect
import contextlib
import ctypes
import functools
import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from ptx.errors import EmulationError

#: Where shared memory begins, as an address; a null pointer into it is then an error.
SHARED_BASE = 1024
#: Where the parameters, shared and local memory begin as generic addresses: behind this process's
#: own, which end at 2⁴⁷.
PARAMETER_BASE = 1 << 48
WINDOWS = {"shared": 1 << 49, "local": 1 << 50}
#: The room between two parameters.
PARAMETER_STRIDE = 1 << 16


@dataclass(frozen=True)
class TensorMap:
    """A tensor as bulk copies see it: innermost axis first, as cuTensorMapEncodeTiled takes it.

    base: the address. dims: elements. strides: bytes, of all axes but the first. box: elements of
    one copy. swizzle: 0, 32, 64 or 128 bytes. element_bytes: of one element.
    """

    base: int
    dims: Sequence[int]
    strides: Sequence[int]
    box: Sequence[int]
    swizzle: int
    element_bytes: int

    def __post_init__(self):
        inner = self.box[0] * self.element_bytes
        if (
            self.base % 16
            or any(stride % 16 for stride in self.strides)
            or any(not 0 < side <= 256 for side in self.box)
            or inner % 16
            or (self.swizzle and inner > self.swizzle)
        ):
            raise EmulationError(f"the driver would refuse {self}")


@dataclass(frozen=True)
class Struct:
    """A parameter passed by value as a struct: its bytes, and the tensor maps at some offsets."""

    data: bytes
    maps: dict[int, TensorMap] = field(default_factory=dict)


def swizzled(address: np.ndarray, span: int) -> np.ndarray:
    """Where the byte at `address` lies in shared memory under a swizzle of `span` bytes."""
    if span == 0:
        return address
    return address ^ (((address >> 7) & (span // 16 - 1)) << 4)


def check_aligned(addresses: np.ndarray, size: int, what: str) -> None:
    if size > 1 and (addresses & (size - 1)).any():
        raise EmulationError(f"misaligned access of {size} bytes: {what}")


class _Region:
    """Bytes of this process from `start` to `end`."""

    def __init__(self, start: int, end: int, name: str):
        self.start, self.end, self.name = start, end, name
        # From an aligned address, so that the memory can be seen as elements of any size.
        self.base = start & ~15
        room = -(-(end - self.base) // 16) * 16
        self.bytes = np.frombuffer((ctypes.c_byte * room).from_address(self.base), np.uint8)
        self._views = {size: self.bytes.view(f"u{size}") for size in (1, 2, 4, 8)}

    def elements(self, addresses: np.ndarray, size: int, count: int) -> tuple[np.ndarray, tuple]:
        """The memory as elements of `size` bytes, and the index of `count` from each address."""
        first = (addresses - self.base) // size
        return self._views[size], first if count == 1 else first[:, None] + np.arange(count)


class GlobalMemory:
    """The memory of this process, of which only bytes of tensors that are alive may be touched.

    A tensor that no argument names is looked for when its address comes up: a table of pointers
    may hold it. Memory that is not a CPU tensor's is made known by `add`.
    """

    def __init__(self):
        self._regions: list[_Region] = []
        self._starts: list[int] = []

    def add(self, start: int, size: int, name: str) -> None:
        """Make `size` bytes from the address `start` accessible."""
        at = bisect.bisect_left(self._starts, start)
        if size == 0 or (at < len(self._starts) and self._starts[at] == start):
            return
        self._regions.insert(at, _Region(start, start + size, name))
        self._starts.insert(at, start)

    def add_tensor(self, tensor: torch.Tensor) -> None:
        """Make the whole storage of a CPU tensor accessible."""
        storage = tensor.untyped_storage()
        if storage.data_ptr():
            self.add(storage.data_ptr(), storage.nbytes(), f"a tensor {tuple(tensor.shape)}")

    def load(self, addresses: np.ndarray, size: int, count: int, what: str) -> np.ndarray:
        """`count` elements of `size` bytes from each address: (addresses, count), unsigned."""
        check_aligned(addresses, size * count, what)
        out = np.empty((len(addresses), count), f"u{size}")
        for region, chosen in self._located(addresses, size * count, what):
            elements, index = region.elements(addresses[chosen], size, count)
            out[chosen] = elements[index].reshape(-1, count)
        return out

    def store(self, addresses: np.ndarray, data: np.ndarray, what: str) -> None:
        """data: (addresses, count), unsigned."""
        size, count = data.itemsize, data.shape[1]
        check_aligned(addresses, size * count, what)
        for region, chosen in self._located(addresses, size * count, what):
            elements, index = region.elements(addresses[chosen], size, count)
            elements[index] = data[chosen, 0] if count == 1 else data[chosen]

    def _located(self, addresses: np.ndarray, size: int, what: str):
        """Pairs of a region and which of the addresses lie in it."""
        if len(addresses) == 0:
            return
        low, high = int(addresses.min()), int(addresses.max())
        region = self._at(low, size, what)
        if high + size <= region.end:
            yield region, slice(None)
            return
        left = np.ones(len(addresses), bool)
        while left.any():
            region = self._at(int(addresses[left].min()), size, what)
            chosen = left & (addresses + size <= region.end)
            if not chosen.any():
                raise self._illegal(int(addresses[left].min()), size, what)
            left &= ~chosen
            yield region, chosen

    def _at(self, address: int, size: int, what: str) -> _Region:
        at = bisect.bisect_right(self._starts, address) - 1
        if at >= 0 and address + size <= self._regions[at].end:
            return self._regions[at]
        if not self._found(address):
            raise self._illegal(address, size, what)
        at = bisect.bisect_right(self._starts, address) - 1
        if address + size > self._regions[at].end:
            raise self._illegal(address, size, what)
        return self._regions[at]

    def _illegal(self, address: int, size: int, what: str) -> EmulationError:
        at = bisect.bisect_right(self._starts, address) - 1
        near = self._regions[max(at, 0)] if self._regions else None
        beside = f"; the nearest is {near.name}, {near.start:#x} to {near.end:#x}" if near else ""
        return EmulationError(f"illegal access of {size} bytes at {address:#x}: {what}{beside}")

    def _found(self, address: int) -> bool:
        for tensor in self._alive:
            # functorch's wrappers share torch.Tensor's type, and have no memory.
            with contextlib.suppress(RuntimeError):
                storage = tensor.untyped_storage()
                start = storage.data_ptr()
                if start and start <= address < start + storage.nbytes():
                    self.add_tensor(tensor)
                    return True
        return False

    @functools.cached_property
    def _alive(self) -> list[torch.Tensor]:
        """All CPU tensors of this process, as of the first time that one was looked for."""
        # By its type: a subclass may have no memory, and of a proxy isinstance would ask what it
        # stands for.
        kinds = (torch.Tensor, torch.nn.Parameter)
        found = [thing for thing in gc.get_objects() if type(thing) in kinds]
        return [t for t in found if t.device.type == "cpu" and t.layout == torch.strided]


class SharedMemory:
    """A block's shared memory, and which bytes the asynchronous proxy cannot see yet.

    What a thread writes is seen by bulk copies and wgmma only after that thread, or one that a
    barrier has shown the write to, has executed fence.proxy.async. What they read must not be
    written, nor what they write be touched, until somebody has waited for them.
    """

    def __init__(self, size: int):
        self.bytes = np.empty(-(-(SHARED_BASE + size) // 16) * 16, np.uint8)
        self.end = SHARED_BASE + size
        self._views = {n: self.bytes.view(f"u{n}") for n in (1, 2, 4, 8)}
        #: The thread that wrote a byte and has not fenced, or -1; and when it wrote.
        self._writer = np.empty(len(self.bytes), np.int32)
        self._written = np.empty(len(self.bytes), np.int64)
        self._unfenced = False
        #: How many asynchronous operations that nobody has waited for read and write a byte.
        self._readers = np.empty(len(self.bytes), np.int16)
        self._writers = np.empty(len(self.bytes), np.int16)
        self.reset()

    def reset(self) -> None:
        # NaN, whatever the type.
        self.bytes[:] = 0xFF
        self._writer[:] = -1
        self._unfenced = False
        self._readers[:] = self._writers[:] = self._users = 0

    def check(self, low: int, high: int, what: str) -> None:
        """Raise unless the bytes from `low` to `high` are inside."""
        if low < SHARED_BASE or high > self.end:
            raise EmulationError(
                f"illegal shared access: {what}: bytes {low} to {high} of {SHARED_BASE} to "
                f"{self.end}"
            )

    def _index(self, addresses, size: int, count: int, what: str) -> np.ndarray:
        self.check(int(addresses.min()), int(addresses.max()) + size * count, what)
        check_aligned(addresses, size * count, what)
        return (addresses // size)[:, None] + np.arange(count)

    def load(self, addresses: np.ndarray, size: int, count: int, what: str) -> np.ndarray:
        """`count` elements of `size` bytes from each address: (addresses, count), unsigned."""
        index = self._index(addresses, size, count, what)
        if self._users:
            self._check_free(addresses[:, None] + np.arange(size * count), False, what)
        return self._views[size][index]

    def store(
        self, addresses: np.ndarray, data: np.ndarray, threads: np.ndarray, now: int, what: str
    ) -> None:
        """data (addresses, count), unsigned, at the time `now`.

        threads: who writes: (addresses,), or of every byte (addresses, bytes).
        """
        size, count = data.itemsize, data.shape[1]
        self._views[size][self._index(addresses, size, count, what)] = data
        at = addresses[:, None] + np.arange(size * count)
        if self._users:
            self._check_free(at, True, what)
        self._writer[at] = threads if threads.ndim == 2 else threads[:, None]
        self._written[at] = now
        self._unfenced = True

    def write_async(self, at: np.ndarray, data: np.ndarray) -> None:
        """Bytes that need no proxy fence, because a copy engine writes them."""
        self.bytes[at] = data
        self._writer[at] = -1

    def use(self, at: np.ndarray, writes: bool, what: str) -> Callable[[], None]:
        """An asynchronous operation on the bytes `at` begins; the function says that it is over."""
        self._check_free(at, writes, what)
        users = self._writers if writes else self._readers
        users[at] += 1
        self._users += 1

        def over() -> None:
            users[at] -= 1
            self._users -= 1

        return over

    def _check_free(self, at: np.ndarray, writes: bool, what: str) -> None:
        if self._writers[at].any():
            raise EmulationError(f"{what} uses shared memory that a copy under way will write")
        if writes and self._readers[at].any():
            raise EmulationError(f"{what} writes shared memory that is still read asynchronously")

    def fence(self, threads: np.ndarray, shown: int) -> None:
        """fence.proxy.async by the threads (a mask), which a barrier at time `shown` preceded."""
        if not self._unfenced:
            return
        at = np.nonzero(self._writer >= 0)[0]
        done = threads[self._writer[at]] | (self._written[at] <= shown)
        self._writer[at[done]] = -1
        self._unfenced = not done.all()

    def check_async_read(self, at: np.ndarray, what: str) -> None:
        """The asynchronous proxy reads the bytes `at`."""
        self.check(int(at.min()), int(at.max()) + 1, what)
        if self._unfenced and (self._writer[at] >= 0).any():
            raise EmulationError(f"{what} reads shared memory written without fence.proxy.async")
