"""What holds a kernel back: Nsight Compute's numbers for every kernel of some calls at full size.

`python -m bench.profiles BACKEND` runs these calls, each once to compile and once between the
profiler's marks; the job `profile` runs it under `ncu`.
"""

from __future__ import annotations

import csv
import shutil
import sys
from typing import Any

import torch

from bench.case import OURS, Case, Repetition, case_dtype
from bench.cases import families
from bench.check import reason
from bench.device import default_device, synchronize
from bench.jobs import Context
from bench.outside import failed, run

#: Groups of cases, and the cases of each that are profiled: of those with goals.
CHOSEN = {
    "ViT-B linears": ("768→768 K4 T12608 r16", "768→2304 K4 T12608 r16"),
    "LLM linears": ("4096→4096 K4 T4096 r16",),
    "geometry": ("ViT-B, 72 linears K8 r8",),
    "particle loss": ("K4 N1024 C100", "K4 N64 C32000"),
}
SECTIONS = (
    "SpeedOfLight",
    "ComputeWorkloadAnalysis",
    "MemoryWorkloadAnalysis",
    "Occupancy",
    "LaunchStats",
    "WarpStateStats",
)
#: What the record keeps of a kernel; NAME.commands.log has all.
METRICS = (
    "Duration",
    "Memory Throughput",
    "DRAM Throughput",
    "L2 Cache Throughput",
    "Compute (SM) Throughput",
    "Achieved Occupancy",
    "Registers Per Thread",
    "Dynamic Shared Memory Per Block",
    "Executed Ipc Active",
)
SECONDS = 100


def profile(context: Context, backend: str) -> dict[str, Any]:
    """Nsight Compute over the chosen calls of one backend. The card's clocks stay as they are."""
    program = shutil.which("ncu")
    if program is None:
        return {"failures": {}, "skipped": {"": "ncu is not there"}}
    command = [program, "--clock-control", "none", "--profile-from-start", "off", "--csv"]
    command += ["--print-details", "all", "--page", "details", "--launch-count", "120"]
    for section in SECTIONS:
        command += ["--section", section]
    command += [sys.executable, "-m", "bench.profiles", backend]
    code, text = run(command, context, "ncu", SECONDS)
    return {"failures": failed(code, text, SECONDS), "kernels": kernels(text)}


def kernels(text: str) -> list[dict[str, Any]]:
    """ncu's CSV -> the kernels in their order: name, grid, and metrics with their units."""
    lines = text.splitlines()
    begin = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    found: dict[str, dict[str, Any]] = {}
    for row in csv.DictReader(line for line in lines[begin:] if line.startswith('"')):
        kernel = found.setdefault(
            row["ID"], {"kernel": row["Kernel Name"][:120], "grid": row["Grid Size"]}
        )
        name = row["Metric Name"]
        if name in METRICS or "tensor" in name.lower():
            kernel[name] = f"{row['Metric Value']} {row['Metric Unit']}".strip()
    return list(found.values())


def chosen(backend: str) -> list[Case]:
    found = families([backend])
    return [
        case
        for group, names in CHOSEN.items()
        for case in found[group]
        if case.group.endswith("fwd + bwd") and case.name in names
    ]


def main(backend: str) -> int:
    device, wrong = default_device(), 0
    for case in chosen(backend):
        make = case.peers[f"{OURS} ({backend})"]
        try:
            once(make(case.inputs(case_dtype(case), device)), device)
            print(case, flush=True)
        except Exception as error:
            print(f"{case} FAILED {reason(error)}", flush=True)
            wrong = 1
    return wrong


def once(call: Repetition, device: torch.device) -> None:
    """A call between the profiler's marks, after one that compiles."""
    call()
    synchronize(device)
    torch.cuda.profiler.start()
    call()
    synchronize(device)
    torch.cuda.profiler.stop()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
