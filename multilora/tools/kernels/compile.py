"""Compile every Triton kernel to machine code without a GPU, and report on the code.

Host functions run as they are, on meta tensors; each launch becomes a compilation. What is
compiled is therefore what would run. It needs its own process, because it replaces Triton's driver.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas, get_ptxas_version
from triton.runtime import driver

from multilora.ops.triton import common
from multilora.ops.triton.common import A100, H200, Chip
from multilora.tools.kernels.calls import Problem
from multilora.tools.kernels.machine_code import Report, count, match, run_tool

#: What `multilora kernels --target` knows: the chip, and the bytes of shared memory that one
#: thread block can have on it (CUDA programming guide, technical specifications).
TARGETS: dict[str, tuple[Chip, int]] = {
    "sm_80": (A100, 163 * 1024),
    "sm_90": (H200, 227 * 1024),
}


# An address as a GPU's memory has it: 64 bits, aligned.
_ADDRESS = 1 << 40


def resident(chip: Chip, registers: int, shared: int, warps: int) -> int:
    """How many thread blocks a processor holds at a time.

    A processor has 65536 registers, 2048 threads, 32 blocks and one KB of shared memory more than
    one block can have; every block takes one KB for itself.
    """
    limit = next(limit for known, limit in TARGETS.values() if known.capability == chip.capability)
    of_warp = -(-registers // 8) * 8 * 32
    return min(65536 // (warps * of_warp), (limit + 1024) // (shared + 1024), 64 // warps, 32)


class AbsentGPU:
    """Triton's view of a GPU that is not there."""

    def __init__(self, chip: Chip):
        self.chip = chip

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.chip.capability, 32)

    def get_current_device(self) -> int:
        # Triton keeps its compiled kernels apart by device.
        return self.chip.capability

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


def compile_all(chip: Chip, problems: Iterable[Problem]) -> Iterator[Report]:
    """Compile every launch of the problems for `chip`; one report for each different code.

    Raises RuntimeError in Triton's interpreter, which compiles nothing.
    """
    if common.INTERPRETED.value:
        raise RuntimeError("TRITON_INTERPRET is set: the interpreter does not compile; unset it")
    reports: dict[str, Report] = {}

    def compile_launch(kernel: Any, grid: tuple[int, ...], args: Any, meta: dict[str, Any]) -> None:
        compiled = kernel.warmup(*as_on_a_gpu(args), grid=grid, **meta)
        if compiled.hash not in reports:
            report = _report(kernel.__name__, str(problem), meta, compiled)
            if kernel.__name__ == "_lora_linear_gemm_kernel":
                report = _of_persistent(report, chip, grid[0], meta["num_warps"])
            reports[compiled.hash] = report

    with playing(chip, compile_launch):
        for problem in problems:
            known = len(reports)
            problem.run()
            yield from list(reports.values())[known:]


@contextlib.contextmanager
def playing(chip: Chip, launcher: Callable[..., Any]) -> Iterator[None]:
    """Inside, `launcher` gets every launch, made as for this chip."""
    driver.set_active(AbsentGPU(chip))
    common.compile_only(chip, launcher)
    try:
        yield
    finally:
        common.compile_only(None, None)


def as_on_a_gpu(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """A launch's arguments with a GPU's addresses in place of zeros, for which Triton would compile
    another type. Addresses come in tuples; those of meta tensors are zero."""
    return tuple(
        tuple(x or _ADDRESS for x in arg) if isinstance(arg, tuple) else arg for arg in args
    )


def _of_persistent(report: Report, chip: Chip, programs: int, warps: int) -> Report:
    return dataclasses.replace(
        report,
        programs=common.cdiv(programs, chip.processors),
        resident=resident(chip, report.registers, report.shared, warps),
    )


def to_json(target: str, nvcc: str, reports: Iterable[Report]) -> str:
    """The reports as a record, with the compilers that they depend on."""
    record = {
        "target": target,
        "triton": triton.__version__,
        "ptxas": get_ptxas_version(TARGETS[target][0].capability).strip().splitlines()[-1],
        "nvcc": nvcc,
        "kernels": [dataclasses.asdict(report) for report in reports],
    }
    return json.dumps(record, indent=1, ensure_ascii=False) + "\n"


def _report(name: str, problem: str, meta: dict[str, Any], compiled: Any) -> Report:
    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        ptx.write_text(compiled.asm["ptx"])
        cubin.write_bytes(compiled.asm["cubin"])
        target = match(r"\.target (sm_\w+)", compiled.asm["ptx"])[1]
        ptxas = get_ptxas(int(target[3:5])).path
        said = run_tool(ptxas, f"-arch={target}", "-v", "-o", f"{folder}/again.cubin", str(ptx))
        # The instructions alone, without the analysis that takes most of the tool's time.
        code = run_tool(triton.knobs.nvidia.nvdisasm.path, "-ndf", str(cubin))
    stored = match(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
    return Report(
        name,
        problem,
        " ".join(f"{key}={value}" for key, value in meta.items() if value not in ("", None)),
        registers=int(match(r"Used (\d+) registers", said)[1]),
        spills=max(map(int, stored.groups())),
        shared=compiled.metadata.shared,
        wgmma=count(code, "HGMMA"),
        mma=count(code, "HMMA") + count(code, "DMMA"),
        bulk_copies=count(code, "UTMALDG") + count(code, "UTMASTG"),
        serialized="serialized" in said,
    )
