"""python -m bench: multilora against plain PyTorch, one line per case, and a JSON record.

All peers of a case take turns in one process. A speed-up is the median over rounds of
peer / multilora within the round, with its quartiles. No ratio is printed for a case whose check
failed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from bench import growth
from bench.case import OURS, Case, case_dtype
from bench.cases import CASES, gpu_cases
from bench.check import check
from bench.clocks import clock, interleave, peak_memory, quartiles
from bench.device import default_device
from bench.record import RESULTS, committed, machine, write
from bench.roofline import floor


def measure_case(
    case: Case, dtype: torch.dtype, device: torch.device, seconds: float, rounds: int
) -> dict[str, Any]:
    """The record of one case: errors, quartiles of seconds and speed-ups, memory."""
    inputs = case.inputs(dtype, device)
    runs = {name: make(inputs) for name, make in case.peers.items()}
    checked = check(case, runs, dtype, device)
    record: dict[str, Any] = {
        "group": case.group,
        "name": case.name,
        "dtype": str(dtype).removeprefix("torch."),
        # The error of each peer's worst output.
        "error": {name: max(errors.values()) for name, errors in checked.errors.items()},
        "failures": checked.failures,
    }
    if checked.failures:
        return record
    peaks = {name: peak_memory(run, device) for name, run in runs.items()}
    if case.yardstick:
        name, make = case.yardstick
        runs[name] = make(inputs)
    time = clock(device)
    timings = interleave({name: time.sampler(run) for name, run in runs.items()}, seconds, rounds)
    ours = timings[OURS]
    plain = [name for name in case.peers if name != OURS]
    record["seconds"] = {name: timing.quartiles() for name, timing in timings.items()}
    record["rounds"] = len(ours.samples)
    record["peak_bytes"] = peaks
    record["speedup"] = {
        name: quartiles([a / b for a, b in zip(timings[name].samples, ours.samples)])
        for name in plain
    }
    record["fastest_plain"] = min(plain, key=lambda name: timings[name].median)
    if case.yardstick:
        record["x_yardstick"] = {case.yardstick[0]: ours.median / timings[case.yardstick[0]].median}
    if case.work is not None and case.rate == "flops":
        record["gflops"] = case.work.flops / ours.median / 1e9
    elif case.work is not None:
        # The work counts the bytes of the case's half-precision form.
        moved = case.work.bytes * dtype.itemsize / case_dtype(case).itemsize
        record["gbytes"] = moved / ours.median / 1e9
    record["goals"] = {
        name: {"factor": factor, "met": record["speedup"][name][1] >= factor}
        for name, factor in case.goals.items()
    }
    return record


def line(record: dict[str, Any]) -> str:
    """The case in one line: multilora's time, its rate, × every peer, the fastest first."""
    title = f"{record['group']:<28} {record['name']:<29}"
    if record["failures"]:
        what = "; ".join(f"{name}: {why}" for name, why in record["failures"].items())
        return f"{title} WRONG, not compared: {what}"
    low, median, high = record["seconds"][OURS]
    parts = [f"{title} {_time(median)} ±{(high - low) / median / 2:4.0%}"]
    rate = f"{record['gflops']:.0f} GFLOP/s" if "gflops" in record else ""
    rate = f"{record['gbytes']:.1f} GB/s" if "gbytes" in record else rate
    parts.append(f"{rate:>12}")
    speedup = record["speedup"]
    fastest = record["fastest_plain"]
    for name in sorted(speedup, key=lambda name: (name != fastest, speedup[name][1])):
        low, median, high = speedup[name]
        goal = record["goals"].get(name)
        mark = "" if goal is None else f" (goal {goal['factor']:g}: {_verdict(goal['met'])})"
        parts.append(f"×{median:.3g} [{low:.3g}, {high:.3g}] {name}{mark}")
    parts += [f"{ratio:.2f} of {name}" for name, ratio in record.get("x_yardstick", {}).items()]
    return "  ".join(parts)


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:8.1f} µs" if seconds < 1e-3 else f"{seconds * 1e3:8.2f} ms"


def _verdict(met: bool) -> str:
    return "met" if met else "missed"


def memory_line(result: dict[str, Any]) -> str:
    many, one = (sorted(result[key])[len(result[key]) // 2] for key in ("bytes_K8", "bytes_K1"))
    sizes = f"{many / 2**20:.0f} MiB with K8, {one / 2**20:.0f} MiB with K1"
    verdict = _verdict(result["ratio"] <= result["goal"])
    title = f"{'peak memory, ViT 192×12':<28} {result['name']:<29}"
    return f"{title} {sizes}: ×{result['ratio']:.3f} (goal {result['goal']:g}: {verdict})"


def listing(only: str = "") -> str:
    """The cases, those for a GPU with the least time on an H200, and the committed records."""
    lines = ["cases of python -m bench:"]
    lines += [f"  {case}" for case in CASES if only in str(case)]
    lines.append("cases of python -m bench.gpu, and the least µs on an H200:")
    for case in gpu_cases(backends=()):
        if only in str(case):
            least = "" if case.work is None else f"{floor(case.work) * 1e6:10.3g}"
            lines.append(f"  {least:>10}  {case}")
    return "\n".join([*lines, "records:", *(f"  {line}" for line in committed())])


def main() -> int:
    parser = argparse.ArgumentParser(
        "python -m bench", description="multilora against plain PyTorch."
    )
    parser.add_argument("--out", default="latest", help="the record is results/OUT.json")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name has TEXT")
    parser.add_argument(
        "--list", action="store_true", help="print the cases and the committed records, run nothing"
    )
    parser.add_argument("--quick", action="store_true", help="a smoke run: too short to quote")
    parser.add_argument("--threads", type=int, help="PyTorch's threads")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="dtype of the cases that have a half-precision form; the others stay in float32",
    )
    args = parser.parse_args()
    if args.list:
        print(listing(args.only))
        return 0
    if args.threads:
        torch.set_num_threads(args.threads)
    device, low = default_device(), getattr(torch, args.dtype)
    seconds, rounds = (0.2, 3) if args.quick else (6.0, 11)

    cases = [case for case in CASES if args.only in str(case)]
    with_memory = args.only in "peak memory"
    if not cases and not with_memory:
        parser.error(f"no case has {args.only!r} in its name")

    record: dict[str, Any] = {"machine": machine(device), "quick": args.quick, "cases": []}
    about = record["machine"]
    print(f"{about['device']}, {about['threads']} threads, torch {about['versions']['torch']}")
    for case in cases:
        dtype = low if case.half_precision else torch.float32
        record["cases"].append(measure_case(case, dtype, device, seconds, rounds))
        print(line(record["cases"][-1]), flush=True)
    if with_memory:
        rows, repetitions = (8, 1) if args.quick else (32, 3)
        record["memory"] = growth.compare_memory(rows, repetitions)
        for result in record["memory"]:
            print(memory_line(result))

    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"{args.out}.json"
    write(file, record)
    print(f"record: {file.relative_to(Path.cwd()) if file.is_relative_to(Path.cwd()) else file}")
    return 1 if any(r["failures"] for r in record["cases"]) else 0


if __name__ == "__main__":
    sys.exit(main())
