"""One case, with all its peers: checked against float64, then timed in turns.

Nothing is timed whose outputs are wrong. What fails costs its own peer: the reason is recorded.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from bench.floors import Ceilings, floor
from bench.measure import (
    Case,
    Unavailable,
    capture,
    check,
    clock,
    interleave,
    is_ours,
    outputs_of,
    peak_memory,
    quartiles,
    reason,
)

Note = Callable[[str], None]
#: Repetitions that a number to quote has at least.
ROUNDS = 30


class BrokenDevice(BaseException):
    """The CUDA context no longer works; only a new process helps. No handler of errors stops it."""


def check_device(error: Exception, device: torch.device) -> None:
    """Free what the failed peer held, and see whether CUDA still works."""
    error.__traceback__ = None
    try:
        free_memory(device)
        if device.type == "cuda":
            torch.cuda.synchronize()
    except Exception as broken:
        raise BrokenDevice(reason(error)) from broken


def measure_case(
    case: Case,
    without: dict[str, str],
    ceilings: Ceilings | None,
    device: torch.device,
    seconds: float,
    note: Note = lambda peer: None,
    beat: Note = lambda peer: None,
) -> dict[str, Any]:
    """The record of one case. Times are quartiles of seconds.

    without: peers that are left out, and why. seconds: for the timing, once there are three rounds.
    note: is told which peer comes next; beat: which is sampled.
    """
    dtype = case_dtype(case)
    record: dict[str, Any] = {
        "group": case.group,
        "name": case.name,
        "dtype": str(dtype).removeprefix("torch."),
        "failures": {name: why for name, why in without.items() if name in case.peers},
        "skipped": {},
        "not_captured": {},
        "peak_bytes": {},
        "host_us": {},
    }
    failures = record["failures"]

    def attempt(name: str, action: Callable[[], Any]) -> Any:
        note(name)
        try:
            value = action()
            if device.type == "cuda":
                # What went wrong on the device is raised here, not in the next peer.
                torch.cuda.synchronize()
            return value
        except Unavailable as error:
            record["skipped"][name] = str(error)
        except Exception as error:
            failures[name] = reason(error)
            check_device(error, device)
        return None

    makers = {name: make for name, make in case.peers.items() if name not in failures}
    if case.stand_in is not None:
        _check_stand_in(case, makers, record, device, attempt)
        makers = {name: make for name, make in makers.items() if name not in failures}
    inputs = case.inputs(dtype, device)
    runs = {name: attempt(name, lambda make=make: make(inputs)) for name, make in makers.items()}
    runs = {name: run for name, run in runs.items() if run is not None}
    if case.stand_in is None:
        record["errors"] = {}
        _check_all(case, runs, dtype, device, record, attempt)
    else:
        _compare_losses(runs, record, attempt)
    out = (failures, record["skipped"])
    runs = {name: run for name, run in runs.items() if not any(name in one for one in out)}
    if case.yardstick is not None:
        name, make = case.yardstick
        run = attempt(name, lambda: make(inputs))
        runs |= {} if run is None else {name: run}

    timer = clock(device)
    samplers: dict[tuple[str, str], Callable[[], float]] = {}
    pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
    for name, run in runs.items():
        sampler = attempt(name, lambda run=run: timer.sampler(run))
        if sampler is None:
            continue
        samplers["launched", name] = sampler
        record["peak_bytes"][name] = attempt(name, lambda run=run: peak_memory(run, device))
        if device.type != "cuda":
            record["not_captured"][name] = "no CUDA graphs on a CPU"
            continue
        record["host_us"][name] = attempt(name, lambda run=run: host_microseconds(run))
        try:
            graph, outputs = capture(run, pool, torch.cuda.current_stream())
            if is_ours(name) and case.stand_in is None:
                record.setdefault("repeatable", {})[name] = _repeatable(run, graph, outputs)
            outputs = None
            samplers["kernel", name] = timer.replay_sampler(graph)
        except Exception as error:
            record["not_captured"][name] = reason(error)
            outputs = None
            check_device(error, device)
            # A capture that broke off may keep its pool locked.
            pool = torch.cuda.graph_pool_handle()
    # A peer may have failed in a later step than its first sample.
    samplers = {key: s for key, s in samplers.items() if key[1] not in failures}
    until = time.perf_counter() + seconds
    while any(is_ours(name) or case.ours_is_absent for _, name in samplers):
        sampled = [""]

        def tell(key: tuple[str, str], sampled: list[str] = sampled) -> None:
            sampled[0] = key[1]
            beat(key[1])

        limit = max(0.0, until - time.perf_counter())
        try:
            timings = interleave(samplers, 0.0, ROUNDS, limit=limit, beat=tell)
        except Exception as error:
            if not sampled[0]:
                raise
            # Out of memory, say: the others start again without it.
            failures[sampled[0]] = f"while it was timed: {reason(error)}"
            check_device(error, device)
            samplers = {key: s for key, s in samplers.items() if key[1] != sampled[0]}
            continue
        _add_times(case, record, {key: t.samples for key, t in timings.items()}, ceilings)
        break
    if record.get("rounds", ROUNDS) < ROUNDS:
        record["short_of_rounds"] = f"{record['rounds']} of {ROUNDS}: its time was over"
    return record


def case_dtype(case: Case) -> torch.dtype:
    return torch.bfloat16 if case.half_precision else torch.float32


def host_microseconds(run: Callable[[], Any], calls: int = 15) -> float:
    """The median of what a call takes the host, which does not wait for the device; of a run that
    waits by itself, the whole time."""
    spent = []
    for _ in range(calls):
        # An empty queue: a full one makes the host wait.
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        spent.append(time.perf_counter() - start)
    torch.cuda.synchronize()
    return statistics.median(spent) * 1e6


def _check_all(case, runs, dtype, device, record, attempt) -> None:
    """Every output against float64, each peer noted before it runs."""
    noted = {
        name: lambda name=name, run=run: _run_noted(name, run, attempt)
        for name, run in runs.items()
    }
    oracle = next(iter(case.peers))
    if oracle not in runs:
        record["failures"] |= dict.fromkeys(runs, f"unchecked: {oracle} cannot run")
        return
    checked = check(case, noted, dtype, device)
    record["errors"] |= {name: max(errors.values()) for name, errors in checked.errors.items()}
    for name, why in checked.failures.items():
        if name not in record["skipped"]:
            record["failures"].setdefault(name, why)


def _run_noted(name, run, attempt):
    outputs = attempt(name, run)
    if outputs is None:
        raise RuntimeError("it failed")
    return outputs


def _check_stand_in(case, makers, record, device, attempt) -> None:
    """The small case in float32 against float64, in place of the large one."""
    small = case.stand_in
    inputs = small.inputs(torch.float32, device)
    runs = {name: attempt(name, lambda make=make: make(inputs)) for name, make in makers.items()}
    runs = {name: run for name, run in runs.items() if run is not None}
    record["errors"] = {}
    record["checked_as"] = "a smaller batch in float32"
    _check_all(small, runs, torch.float32, device, record, attempt)


def _compare_losses(runs, record, attempt) -> None:
    """At full size, in half precision: that nothing overflows, and that all train the same."""
    losses = {
        name: attempt(name, lambda run=run: run()["loss"].item()) for name, run in runs.items()
    }
    record["loss"] = losses = {name: loss for name, loss in losses.items() if loss is not None}
    first = next(iter(losses.values()), math.nan)
    for name, loss in losses.items():
        # Written so that NaN fails.
        if not abs(loss - first) <= 0.1 * abs(first):
            record["failures"][name] = (
                f"loss {loss:.4g}, that of {next(iter(losses))} is {first:.4g}"
            )


def _repeatable(run, graph, outputs) -> dict[str, bool]:
    """Whether two runs, and a replay of the graph, give the same bits."""
    first, second = outputs_of(run, poisoned=False), outputs_of(run, poisoned=False)
    graph.replay()
    torch.cuda.synchronize()
    replayed = outputs_of(lambda: outputs, poisoned=False)
    return {
        "run": all(torch.equal(first[name], second[name]) for name in first),
        "replay": all(torch.equal(first[name], replayed[name]) for name in first),
    }


def _add_times(
    case: Case,
    record: dict[str, Any],
    samples: dict[tuple[str, str], list[float]],
    ceilings: Ceilings | None,
) -> None:
    """The columns, for kernel times and for times with launches.

    x_yardstick: a peer's time over the yardstick's. x_best_peer: the fastest plain peer's over
    ours, quartiles over the rounds. roofline: the floor at this run's ceilings over the time.
    """
    work = case.work
    yardstick = None if case.yardstick is None else case.yardstick[0]
    for kind in ("kernel", "launched"):
        times = {name: s for (k, name), s in samples.items() if k == kind}
        medians = {name: quartiles(s)[1] for name, s in times.items()}
        if not medians:
            continue
        record["rounds"] = len(next(iter(times.values())))
        record[kind] = {name: quartiles(s) for name, s in times.items()}
        columns: dict[str, Any] = {}
        if yardstick in medians:
            base = medians[yardstick]
            columns["x_yardstick"] = {n: m / base for n, m in medians.items() if n != yardstick}
        plain = [n for n in medians if not is_ours(n) and n != yardstick and n not in case.asides]
        if plain:
            best = min(plain, key=medians.get)
            columns["best_peer"] = best
            columns["x_best_peer"] = {
                name: quartiles([b / o for b, o in zip(times[best], times[name])])
                for name in medians
                if is_ours(name)
            }
        if work is not None:
            flops = work.flops + work.flops64
            columns["tflops"] = {n: flops / m / 1e12 for n, m in medians.items() if n != yardstick}
            columns["gbytes"] = {
                n: work.bytes / m / 1e9 for n, m in medians.items() if n != yardstick
            }
            if ceilings is not None:
                least = floor(work, ceilings)
                record["floor"] = least
                columns["roofline"] = {n: least / m for n, m in medians.items() if n != yardstick}
        if case.goal and "x_yardstick" in columns:
            columns["goal"] = {
                name: {"at_most": case.goal, "met": ratio <= case.goal}
                for name, ratio in columns["x_yardstick"].items()
                if is_ours(name)
            }
        record[f"{kind}_columns"] = columns


def measure_ceilings(
    device: torch.device,
    tiny: bool,
    shapes: Sequence[tuple[int, int, int]] = (),
    seconds: float = 10.0,
) -> dict[str, float]:
    """What this machine reaches: bytes a second of a copy, operations a second of products.

    shapes: (rows, d_in, d_out) of base products, whose seconds are listed too.
    """
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    shapes = ((8192, 8192, 8192), *shapes)
    side, rows, numbers = 4096, 64 * 197 * 4, 2**29
    if tiny:
        shapes, side, rows, numbers = ((64, 64, 64), *shapes[1:]), 64, 64, 2**12
    source, target = normal(numbers), normal(numbers)
    runs = {"copy": lambda: {"copy": target.copy_(source)}}
    for m, k, n in shapes:
        x, w = normal(m, k), normal(n, k)
        runs[f"F.linear {m}x{k}x{n}"] = lambda x=x, w=w: {"y": torch.nn.functional.linear(x, w)}
    x, a = normal(4, rows // 4, 768), normal(4, 768, 16)
    runs["bmm N=16"] = lambda: {"y": torch.bmm(x, a)}
    d = normal(side, side, dtype=torch.float64)
    runs["float64 mm"] = lambda: {"y": d @ d}
    timer = clock(device)
    samplers = {}
    for name, run in runs.items():
        samplers[name] = timer.sampler(run)
        if device.type == "cuda":
            graph, _ = capture(run, None, torch.cuda.current_stream())
            samplers[name] = timer.replay_sampler(graph)
    times = {n: t.median for n, t in interleave(samplers, 0.0, ROUNDS, limit=seconds).items()}
    result = {f"{name} seconds": value for name, value in times.items()}
    result["bytes"] = 2 * 2 * numbers / times["copy"]
    result["flops"] = max(2 * m * k * n / times[f"F.linear {m}x{k}x{n}"] for m, k, n in shapes)
    result["flops64"] = 2 * side**3 / times["float64 mm"]
    result["bmm N=16 bytes"] = 2 * (x.numel() + 4 * (rows // 4) * 16) / times["bmm N=16"]
    return result


def ceilings_of(result: dict[str, Any]) -> Ceilings | None:
    if "bytes" not in result:
        return None
    return Ceilings(result["flops"], result["bytes"], result["flops64"])


def free_memory(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def line(record: dict[str, Any]) -> str:
    """The case in one line, each peer by kernel time where there is one."""
    parts = [f"{record['group']:<28} {record['name']:<36}"]
    for name in (n for n in record.get("launched", {}) if is_ours(n)):
        kind = "kernel" if name in record.get("kernel", {}) else "launched"
        columns = record.get(f"{kind}_columns", {})
        text = f"{name}: {record[kind][name][1] * 1e6:.1f} µs {kind}"
        if name in columns.get("x_yardstick", {}):
            text += f", {columns['x_yardstick'][name]:.2f} × yardstick"
        if name in columns.get("x_best_peer", {}):
            text += f", ×{columns['x_best_peer'][name][1]:.2f} {columns['best_peer']}"
        if name in columns.get("roofline", {}):
            text += f", {columns['roofline'][name]:.0%} of roofline"
        if record.get("host_us", {}).get(name):
            text += f", host {record['host_us'][name]:.0f} µs"
        parts.append(text)
    parts += [f"FAILED {name}: {why}" for name, why in record.get("failures", {}).items()]
    return "  ".join(parts)
