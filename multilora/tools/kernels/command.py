"""The command `multilora kernels`: its arguments, what it checks and what it prints."""

from __future__ import annotations

import argparse
import json
import os
import time
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from multilora import atomic, checks
from multilora.tools.kernels import machine_code

if TYPE_CHECKING:
    from multilora.tools.kernels.calls import Problem

# Functions import the other modules of this package: they import Triton, which is optional.

#: The largest numbers that the command takes.
_MOST = {"particles": 2**10, "rank": 2**14, "batch_size": 2**20, "classes": 2**24, "jobs": 256}


def add_parser(commands: Any) -> None:
    """Add the command to the subparsers of `multilora`."""
    default = " [%(default)s]"
    parser = commands.add_parser(
        "kernels",
        help="compile every GPU kernel without a GPU and report registers and spills",
    )
    parser.add_argument(
        "--target",
        choices=("sm_80", "sm_90"),
        help="GPU architecture [sm_90; with --precompile, that of this machine]",
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="write a JSON record; an older one is replaced"
    )
    parser.add_argument("--only", default="", metavar="TEXT", help="only names with TEXT")
    parser.add_argument(
        "--precompile",
        action="store_true",
        help="only fill Triton's cache (TRITON_CACHE_DIR) with the Triton kernels for the built-in "
        "sizes, or for --model, so that no step has to wait for the compiler",
    )
    parser.add_argument(
        "--jobs", type=int, metavar="N", help="processes that compile [one per core, at most 16]"
    )
    parser.add_argument("--model", metavar="NAME", help="a timm model, for the sizes of its steps")
    parser.add_argument(
        "--targets",
        nargs="+",
        default=["qkv"],
        metavar="NAME",
        help="adapted layers of --model [qkv]",
    )
    parser.add_argument(
        "--particles", type=int, default=4, metavar="K", help="number of particles" + default
    )
    parser.add_argument("--rank", type=int, default=8, help="rank of the adapters" + default)
    parser.add_argument("--batch-size", type=int, default=16, help="images per step" + default)
    parser.add_argument(
        "--classes", type=int, default=1000, metavar="C", help="number of classes" + default
    )
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        default="bfloat16",
        help="dtype of the model, or of autocast" + default,
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command -> 1 if a kernel failed, else 0."""
    for name, most in _MOST.items():
        value = getattr(args, name)
        if value is not None:
            checks.integer(f"--{name.replace('_', '-')}", value, 1, most)
    if args.precompile:
        return _precompile(args)
    if args.model is not None or args.jobs is not None:
        raise ValueError("--model and --jobs are options of --precompile")
    return _inspect(args)


def _inspect(args: argparse.Namespace) -> int:
    from triton import knobs

    from multilora.tools.kernels.compile import TARGETS, compile_all, to_json

    if args.out is not None:
        _check_record(args.out)
    target = args.target or "sm_90"
    chip, limit = TARGETS[target]
    try:
        tool = knobs.nvidia.cuobjdump.path
        native = list(machine_code.native_reports(target, tool, args.only))
    except FileNotFoundError as missing:
        native = []
        print(f"no CUDA C++ kernels: {missing}")
    chosen = _problems_with(args.only)
    if not chosen and not native:
        raise ValueError(f"no problem and no kernel has {args.only!r} in its name")
    print(f"{'kernel':<28}registers spills  shared  wgmma  mma  bulk  first problem, configuration")
    reports, failures = [], 0
    for report in chain(native, compile_all(chip, chosen)):
        reports.append(report)
        failures += _print_report(report, limit)
    print(
        f"{len(native)} CUDA C++ codes and {len(reports) - len(native)} Triton codes for "
        f"{len(chosen)} problems on {target}, {failures} failed"
    )
    if args.out is not None:
        nvcc = machine_code.native_build() if native else ""
        atomic.write_text(args.out, to_json(target, nvcc, reports))
    return 1 if failures else 0


def _print_report(report: machine_code.Report, shared_limit: int) -> bool:
    """Print one line about a code, and one more if something is wrong -> whether it failed."""
    print(
        f"{report.kernel.strip('_').removesuffix('_kernel'):<28}{report.registers:9}"
        f"{report.spills:7}{report.shared:8}{report.wgmma:7}{report.mma:5}"
        f"{report.bulk_copies:6}  {report.problem}, {report.configuration}"
    )
    reason = report.failure(shared_limit)
    if reason is not None:
        print(f"  FAILED: {reason}")
    elif report.note() is not None:
        print(f"  note: {report.note()}")
    return reason is not None


def _precompile(args: argparse.Namespace) -> int:
    from triton import knobs

    from multilora.ops.triton import common
    from multilora.tools.kernels.compile import TARGETS
    from multilora.tools.kernels.precompile import fill, model_problem

    if args.out is not None:
        raise ValueError("--precompile writes no record: leave --out away")
    jobs = min(16, os.cpu_count() or 1) if args.jobs is None else args.jobs
    if args.target is not None:
        chip = TARGETS[args.target][0]
    elif torch.cuda.is_available():
        chip = common.chip(torch.device("cuda"))
    else:
        raise ValueError("no GPU is at hand: say which chip is meant, with --target")
    if args.model is None:
        chosen = _problems_with(args.only)
    else:
        sizes = (args.particles, args.rank, args.batch_size)
        dtype = getattr(torch, args.dtype)
        chosen = [model_problem(args.model, args.targets, *sizes, dtype, args.classes)]
    if not chosen:
        raise ValueError(f"no problem has {args.only!r} in its name")
    start = time.perf_counter()
    filled = fill(chip, chosen, jobs)
    for name, why in filled.failures.items():
        print(f"  FAILED: {name}: {why}")
    print(
        f"{filled.compiled} Triton codes compiled for sm_{chip.capability}, {filled.present} were "
        f"there, {len(filled.failures)} failed: {len(chosen)} problems, {jobs} processes, "
        f"{time.perf_counter() - start:.0f} s, in {knobs.cache.dir}"
    )
    if filled.launchers is not None:
        print(f"their C launchers are left to the first launch of each: {filled.launchers}")
    return 1 if filled.failures else 0


def _problems_with(text: str) -> list[Problem]:
    from multilora.tools.kernels.calls import problems

    return [problem for problem in problems() if text in str(problem)]


def _check_record(out: Path) -> None:
    """Raise ValueError if `out` is a file, but not a record of `multilora kernels`."""
    if not out.exists():
        return
    try:
        keys = json.loads(out.read_text()).keys()
        ours = keys == {"target", "triton", "ptxas", "nvcc", "kernels"}
    except (OSError, ValueError, AttributeError):
        ours = False
    if not ours:
        raise ValueError(
            f"{out} exists already and is not a record of kernels; choose another --out"
        )
