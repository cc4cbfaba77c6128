"""An emulator that executes the PTX of one kernel launch on a CPU, in numpy.

    kernel = Kernel(ptx)
    execute(kernel, grid=(4,), threads=128, shared_bytes=0, parameters=[x, y, 1000], mode="late")

All threads of a block go through an instruction together, as arrays; blocks go one after another.
Beside values it checks that global accesses stay inside tensors and shared ones inside what the
launch requested, that they are aligned, that what the asynchronous proxy reads was fenced, and that
mbarriers are used as they were set up.

It is not ptxas, not the memory model between SMs, and not a clock.
"""

from ptx.block import MODES, execute
from ptx.errors import EmulationError
from ptx.memory import GlobalMemory, Struct, TensorMap
from ptx.parse import Kernel, entries

__all__ = [
    "MODES",
    "EmulationError",
    "GlobalMemory",
    "Kernel",
    "Struct",
    "TensorMap",
    "entries",
    "execute",
]
