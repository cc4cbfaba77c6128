"""Work beside the threads: groups of asynchronous work, mbarriers, and copies under way."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable
from dataclasses import dataclass

import numpy as np

from ptx.errors import EmulationError

Work = Callable[[], None]


class Groups:
    """Work that is committed in groups and waited for by how many groups may be left.

    The owner of a group is a thread, a warp or a warp group, after the kind of work.
    """

    def __init__(self):
        self._open: dict[Hashable, list[Work]] = defaultdict(list)
        self._closed: dict[Hashable, list[list[Work]]] = defaultdict(list)

    def add(self, owner: Hashable, work: Work) -> None:
        self._open[owner].append(work)

    def commit(self, owner: Hashable) -> None:
        self._closed[owner].append(self._open.pop(owner, []))

    def wait(self, owner: Hashable, left: int) -> None:
        """Do the oldest groups until `left` of them are left."""
        groups = self._closed[owner]
        while len(groups) > left:
            for work in groups.pop(0):
                work()

    def started(self) -> list[list[Work]]:
        """The oldest group of every owner, where something of it is left to do."""
        return [groups[0] for groups in self._closed.values() if groups and groups[0]]

    def check_waited_for(self) -> None:
        """Raise where something is left: what it reads does not outlive the block."""
        if any(self._closed.values()) or any(self._open.values()):
            raise EmulationError("the kernel ends with copies that nobody has waited for")


@dataclass
class MBarrier:
    """count: arrivals of a phase; missing: those that have not come; bytes: still expected."""

    count: int
    missing: int
    bytes: int = 0
    phase: int = 0


@dataclass
class Load:
    """A bulk copy into shared memory that was started."""

    barrier: int
    work: Work
    bytes: int


class Copies:
    """The mbarriers of a block, and the bulk loads that will arrive at them."""

    def __init__(self, threads: int, wake: Callable[[np.ndarray], None]):
        self._barriers: dict[int, MBarrier] = {}
        self._waiting: dict[int, np.ndarray] = {}
        self._wake = wake
        self._threads = threads
        self.loads: list[Load] = []

    def init(self, address: int, count: int) -> None:
        self._barriers[address] = MBarrier(count, count)

    def invalidate(self, address: int) -> None:
        self.barrier(address)
        if address in self._waiting:
            raise EmulationError(f"mbarrier {address} is invalidated while a thread waits on it")
        if any(load.barrier == address for load in self.loads):
            raise EmulationError(f"mbarrier {address} is invalidated while a copy is under way")
        del self._barriers[address]

    def barrier(self, address: int) -> MBarrier:
        if address not in self._barriers:
            raise EmulationError(f"there is no mbarrier at {address}")
        return self._barriers[address]

    def arrive(self, address: int, arrivals: int, expected: int) -> None:
        """`arrivals` threads come, and `expected` bytes are announced."""
        barrier = self.barrier(address)
        barrier.bytes += expected
        barrier.missing -= arrivals
        if barrier.missing < 0:
            raise EmulationError(f"mbarrier {address}: more arrivals than it was set up for")
        self._flip(address, barrier)

    def start(self, load: Load, at_once: bool) -> None:
        self.barrier(load.barrier)
        self.loads.append(load)
        if at_once:
            self.land(load)

    def land(self, load: Load) -> None:
        """The copy arrives."""
        self.loads.remove(load)
        load.work()
        barrier = self.barrier(load.barrier)
        barrier.bytes -= load.bytes
        self._flip(load.barrier, barrier)

    def land_all(self) -> bool:
        """All copies arrive; whether there was one."""
        under_way = list(self.loads)
        for load in under_way:
            self.land(load)
        return bool(under_way)

    def land_last(self, address: int) -> None:
        """The copies arrive that are all that this barrier's phase still waits for."""
        if self.barrier(address).missing == 0:
            for load in [load for load in self.loads if load.barrier == address]:
                self.land(load)

    def wait(self, address: int, threads: np.ndarray) -> None:
        """The threads (a mask) sleep until the barrier's phase ends."""
        asleep = self._waiting.setdefault(address, np.zeros(self._threads, bool))
        asleep |= threads

    def _flip(self, address: int, barrier: MBarrier) -> None:
        if barrier.missing == 0 and barrier.bytes == 0:
            barrier.missing, barrier.phase = barrier.count, barrier.phase ^ 1
            if address in self._waiting:
                self._wake(self._waiting.pop(address))
