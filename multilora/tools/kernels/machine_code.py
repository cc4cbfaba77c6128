"""The machine code of kernels: what it needs, and what must not be in it. No GPU is needed."""

from __future__ import annotations

import importlib
import importlib.util
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

#: The `problem` field of a report on a CUDA C++ kernel.
NATIVE = "CUDA C++"

#: The code in multilora._C_cuda that runs on each chip.
NATIVE_CODES = {"sm_80": "sm_80", "sm_90": "sm_90a"}

#: Kernels that have a body on some chips only.
_ONLY_ON = {"lora_gemm_kernel": ("sm_90",)}

#: Kernels whose first warp group gives registers to the other groups, and their threads.
_THREADS = {"lora_gemm_kernel": 384}

# The kernel's name before the arguments, and its template arguments.
_NAME = r"(\w+)(?:<(.*?)>)?\("


@dataclass(frozen=True)
class Report:
    """One code of a kernel, as ptxas and nvdisasm see it.

    Attributes:
        problem: the first problem that needs the code.
        spills: bytes that are stored to local memory.
        wgmma, mma: tensor core instructions of a warp group and of a warp.
        bulk_copies: the copy engine's tensor copies into and out of shared memory.
        serialized: whether ptxas has put a wait behind every wgmma.
        programs, resident: for a persistent kernel, how many programs are launched per processor,
            and how many fit on one.
        pool: for a kernel whose warp groups exchange registers, its threads and the registers that
            they ask for in total. A launch that brings fewer registers hangs.
    """

    kernel: str
    problem: str
    configuration: str
    registers: int
    spills: int
    shared: int
    wgmma: int
    mma: int
    bulk_copies: int
    serialized: bool
    programs: int = 0
    resident: int = 0
    pool: tuple[int, int] | None = None

    def failure(self, shared_limit: int) -> str | None:
        """Why this code must not ship, or None."""
        if self.spills:
            return f"spills {self.spills} bytes"
        if self.shared > shared_limit:
            return f"needs {self.shared} bytes of shared memory, the chip has {shared_limit}"
        if self.serialized:
            return "its wgmma instructions are serialised"
        if self.pool is not None and self.pool[0] * self.registers < self.pool[1]:
            threads, wanted = self.pool
            return f"its groups wait for {wanted} registers, {threads * self.registers} are there"
        return None

    def note(self) -> str | None:
        """The reason why this code is slower than intended, or None."""
        if self.resident < self.programs:
            return f"a processor holds {self.resident} of {self.programs} programs at a time"
        return None


def count(code: str, instruction: str) -> int:
    """How often an instruction occurs in the output of nvdisasm or cuobjdump."""
    return len(re.findall(rf"\b{instruction}\b", code))


def match(pattern: str, text: str) -> re.Match[str]:
    """The first match. Raises RuntimeError if a tool has printed something else."""
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"no {pattern!r} in {text[:200]!r}")
    return found


def is_serialized(code: str) -> bool:
    """Whether machine code waits behind every wgmma. (ptxas reports it while it compiles only.)"""
    products = count(code, "HGMMA")
    return products > 1 and count(code, "WARPGROUP.DEPBAR") >= products


def register_pool(code: str, threads: int) -> tuple[int, int] | None:
    """The field `pool` of a report, from the machine code of a kernel with so many threads."""
    given = re.findall(r"USETMAXREG\.DEALLOC\S* (0x\w+)", code)
    taken = re.findall(r"USETMAXREG\.TRY_ALLOC\S* \w+, (0x\w+)", code)
    if not given or not taken:
        return None
    return threads, 128 * int(given[0], 16) + (threads - 128) * int(taken[0], 16)


def run_tool(*command: str) -> str:
    """The output of a tool. Raises RuntimeError if it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{Path(command[0]).name} failed: {done.stderr.strip()}")
    return done.stdout + done.stderr


def native_build() -> str:
    """How multilora._C_cuda was built: compiler and targets."""
    try:
        module = importlib.import_module("multilora._C_cuda")
    except ImportError as error:
        return f"missing ({error})"
    return ", ".join(module.build_info().values())


def native_reports(target: str, cuobjdump: str, only: str = "") -> Iterator[Report]:
    """One report per CUDA C++ kernel of the installed module whose name contains `only`.

    `spills` is the whole stack frame: a kernel of ours has nothing else to keep there. `shared` is
    what is allocated statically.

    cuobjdump: the tool's path. Raises FileNotFoundError where there is no module.
    """
    spec = importlib.util.find_spec("multilora._C_cuda")
    if spec is None or spec.origin is None:
        raise FileNotFoundError(
            "multilora._C_cuda is not built: MULTILORA_BUILD=cuda pip install builds it"
        )
    dump = (cuobjdump, "-arch", NATIVE_CODES[target])
    pattern = r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)"
    kernels = []
    for symbol, *usage in re.findall(pattern, run_tool(*dump, "-res-usage", spec.origin)):
        name, configuration = match(_NAME, torch._C._demangle(symbol)).groups()
        if only in f"{NATIVE} {name}" and target in _ONLY_ON.get(name, NATIVE_CODES):
            kernels.append((symbol, name, configuration, *map(int, usage)))
    if not kernels:
        return
    # The tool takes longer for selected kernels than for all.
    listing = run_tool(*dump, "-sass", spec.origin)
    code = dict(re.findall(r"Function : (\S+)\n(.*?)(?=Function : |\Z)", listing, re.S))
    for symbol, name, configuration, registers, stack, shared, local in kernels:
        text = code[symbol]
        yield Report(
            name,
            NATIVE,
            (configuration or "").replace("multilora::", ""),
            registers=registers,
            spills=stack + local,
            shared=shared,
            wgmma=count(text, "HGMMA"),
            mma=count(text, "HMMA") + count(text, "DMMA"),
            bulk_copies=count(text, "UTMALDG") + count(text, "UTMASTG"),
            serialized=is_serialized(text),
            pool=register_pool(text, _THREADS.get(name, 0)),
        )
