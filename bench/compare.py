"""One case, with all its peers: checked against float64, then timed in turns.

Nothing is timed whose outputs are wrong. What fails costs its own peer: the reason is recorded.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from bench.case import Case, Repetition, Unavailable, case_dtype, is_ours
from bench.check import check, outputs_of, reason
from bench.clocks import (
    capture,
    clock,
    host_microseconds,
    interleave,
    launches,
    peak_memory,
    quartiles,
)
from bench.device import check_device, synchronize
from bench.roofline import Ceilings, floor
from multilora import BackendUnavailableError

Note = Callable[[str], None]
#: The fewest repetitions for a number to quote.
ROUNDS = 30
#: What a sampler measures, "kernel" or "launched", and of which peer.
Sampler = tuple[str, str]


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

    Args:
        without: the peers that are left out, and why.
        seconds: for the timing, once there are three rounds.
        note: called with the peer that comes next.
        beat: called with the peer that is sampled.
    """
    return Measurement(case, without, ceilings, device, note, beat).run(seconds)


class Measurement:
    """The measurement of one case, and its record as far as it is known."""

    def __init__(
        self,
        case: Case,
        without: dict[str, str],
        ceilings: Ceilings | None,
        device: torch.device,
        note: Note,
        beat: Note,
    ):
        self.case, self.ceilings, self.device = case, ceilings, device
        self.note, self.beat = note, beat
        self.dtype = case_dtype(case)
        self.failures = {name: why for name, why in without.items() if name in case.peers}
        self.skipped: dict[str, str] = {}
        self.record: dict[str, Any] = {
            "group": case.group,
            "name": case.name,
            "dtype": str(self.dtype).removeprefix("torch."),
            "failures": self.failures,
            "skipped": self.skipped,
            "not_captured": {},
            "peak_bytes": {},
            "host_us": {},
            "launches": {},
        }

    def run(self, seconds: float) -> dict[str, Any]:
        case, record = self.case, self.record
        makers = {name: make for name, make in case.peers.items() if name not in self.failures}
        record["errors"] = {}
        if case.stand_in is not None:
            self.check_stand_in(case.stand_in, makers)
            makers = {name: make for name, make in makers.items() if name not in self.failures}
        inputs = case.inputs(self.dtype, self.device)
        runs = self.make(makers, inputs)
        if case.stand_in is None:
            self.check_all(case, runs, self.dtype)
        else:
            self.compare_losses(runs)
        runs = {n: r for n, r in runs.items() if n not in self.failures and n not in self.skipped}
        if case.yardstick is not None:
            name, make = case.yardstick
            runs |= self.make({name: make}, inputs)
        samplers = self.samplers(runs)
        self.time(samplers, seconds)
        if record.get("rounds", ROUNDS) < ROUNDS:
            record["short_of_rounds"] = f"{record['rounds']} of {ROUNDS}: its time was over"
        return record

    def attempt(self, name: str, action: Callable[[], Any]) -> Any:
        """action(), or None with the reason in the record."""
        self.note(name)
        try:
            value = action()
            # Raise here what went wrong on the device, not in the next peer.
            synchronize(self.device)
            return value
        except (Unavailable, BackendUnavailableError) as error:
            self.skipped[name] = str(error)
        except Exception as error:
            self.failures[name] = reason(error)
            check_device(error, self.device)
        return None

    def make(
        self, makers: dict[str, Callable[[Any], Repetition]], inputs: Any
    ) -> dict[str, Repetition]:
        runs = {n: self.attempt(n, lambda make=make: make(inputs)) for n, make in makers.items()}
        return {name: run for name, run in runs.items() if run is not None}

    # --- correctness -----------------------------------------------------------------------------

    def check_all(self, case: Case, runs: dict[str, Repetition], dtype: torch.dtype) -> None:
        """Every output against float64; each peer is noted before it runs."""

        def noted(name: str, run: Repetition) -> Repetition:
            def attempted() -> Any:
                outputs = self.attempt(name, run)
                if outputs is None:
                    raise RuntimeError("it failed")
                return outputs

            return attempted

        oracle = next(iter(case.peers))
        if oracle not in runs:
            self.failures |= dict.fromkeys(runs, f"unchecked: {oracle} cannot run")
            return
        checked = check(case, {n: noted(n, run) for n, run in runs.items()}, dtype, self.device)
        worst = {name: max(errors.values()) for name, errors in checked.errors.items()}
        self.record["errors"] |= worst
        for name, why in checked.failures.items():
            if name not in self.skipped:
                self.failures.setdefault(name, why)

    def check_stand_in(self, small: Case, makers: dict[str, Callable[[Any], Repetition]]) -> None:
        """Check the small case in float32 against float64, in place of the large one."""
        runs = self.make(makers, small.inputs(torch.float32, self.device))
        self.record["checked_as"] = "a smaller batch in float32"
        self.check_all(small, runs, torch.float32)
        # A backend without kernels for float32 is checked by its loss at full size, and by smoke.
        self.record["unchecked"] = dict(self.skipped)
        self.skipped.clear()

    def compare_losses(self, runs: dict[str, Repetition]) -> None:
        """At full size, in half precision: nothing overflows, and all peers train the same."""
        losses = {n: self.attempt(n, lambda r=r: r()["loss"].item()) for n, r in runs.items()}
        losses = {name: loss for name, loss in losses.items() if loss is not None}
        self.record["loss"] = losses
        first = next(iter(losses.values()), math.nan)
        for name, loss in losses.items():
            # Written so that NaN fails.
            if not abs(loss - first) <= 0.1 * abs(first):
                self.failures[name] = (
                    f"loss {loss:.4g}, that of {next(iter(losses))} is {first:.4g}"
                )

    # --- time ------------------------------------------------------------------------------------

    def samplers(self, runs: dict[str, Repetition]) -> dict[Sampler, Callable[[], float]]:
        """For every peer, a sampler with its launches and, on a GPU, one of a graph's replay."""
        timer = clock(self.device)
        samplers: dict[Sampler, Callable[[], float]] = {}
        pool = torch.cuda.graph_pool_handle() if self.device.type == "cuda" else None
        for name, run in runs.items():
            sampler = self.attempt(name, lambda run=run: timer.sampler(run))
            if sampler is None:
                continue
            samplers["launched", name] = sampler
            self.record["peak_bytes"][name] = self.attempt(
                name, lambda run=run: peak_memory(run, self.device)
            )
            if self.device.type != "cuda":
                self.record["not_captured"][name] = "no CUDA graphs on a CPU"
                continue
            self.record["host_us"][name] = self.attempt(
                name, lambda run=run: host_microseconds(run)
            )
            try:
                graph, outputs = capture(run, pool, torch.cuda.current_stream())
                if is_ours(name) and self.case.stand_in is None:
                    same = _repeatable(run, graph, outputs)
                    self.record.setdefault("repeatable", {})[name] = same
                outputs = None
                samplers["kernel", name] = timer.replay_sampler(graph)
                self.record["launches"][name] = launches(graph)
            except Exception as error:
                self.record["not_captured"][name] = reason(error)
                outputs = None
                check_device(error, self.device)
                # A capture that broke off may keep its pool locked.
                pool = torch.cuda.graph_pool_handle()
        return samplers

    def time(self, samplers: dict[Sampler, Callable[[], float]], seconds: float) -> None:
        # A peer may have failed in a later step than its first sample.
        samplers = {key: s for key, s in samplers.items() if key[1] not in self.failures}
        until = time.perf_counter() + seconds
        while any(is_ours(name) or self.case.ours_is_absent for _, name in samplers):
            sampled = [""]

            def tell(key: Sampler, sampled: list[str] = sampled) -> None:
                sampled[0] = key[1]
                self.beat(key[1])

            limit = max(0.0, until - time.perf_counter())
            try:
                timings = interleave(samplers, 0.0, ROUNDS, limit=limit, beat=tell)
            except Exception as error:
                if not sampled[0]:
                    raise
                # Out of memory, say: the others start again without it.
                self.failures[sampled[0]] = f"while it was timed: {reason(error)}"
                check_device(error, self.device)
                samplers = {key: s for key, s in samplers.items() if key[1] != sampled[0]}
                continue
            samples = {key: t.samples for key, t in timings.items()}
            for kind in ("kernel", "launched"):
                self.add_times(kind, {name: s for (k, name), s in samples.items() if k == kind})
            return

    def add_times(self, kind: str, times: dict[str, list[float]]) -> None:
        """The columns of kernel times, or of times with launches.

        x_yardstick: a peer's time over the yardstick's. x_best_peer: the fastest plain peer's over
        ours, quartiles over the rounds. roofline: the least time at this run's ceilings over the
        time.
        """
        case, record = self.case, self.record
        medians = {name: quartiles(s)[1] for name, s in times.items()}
        if not medians:
            return
        record["rounds"] = len(next(iter(times.values())))
        record[kind] = {name: quartiles(s) for name, s in times.items()}
        columns: dict[str, Any] = {}
        yardstick = None if case.yardstick is None else case.yardstick[0]
        peers = {name: m for name, m in medians.items() if name != yardstick}
        if yardstick in medians:
            columns["x_yardstick"] = {n: m / medians[yardstick] for n, m in peers.items()}
        plain = [name for name in peers if not is_ours(name) and name not in case.asides]
        if plain:
            best = min(plain, key=medians.get)
            columns["best_peer"] = best
            columns["x_best_peer"] = {
                name: quartiles([b / o for b, o in zip(times[best], times[name])])
                for name in medians
                if is_ours(name)
            }
        if case.work is not None:
            flops = case.work.flops + case.work.flops64
            columns["tflops"] = {n: flops / m / 1e12 for n, m in peers.items()}
            columns["gbytes"] = {n: case.work.bytes / m / 1e9 for n, m in peers.items()}
            if self.ceilings is not None:
                record["floor"] = least = floor(case.work, self.ceilings)
                columns["roofline"] = {n: least / m for n, m in peers.items()}
        record[f"{kind}_columns"] = columns


def _repeatable(run: Repetition, graph: Any, outputs: Any) -> dict[str, bool]:
    """Whether two runs, and a replay of the graph, give the same bits."""
    first, second = outputs_of(run, poisoned=False), outputs_of(run, poisoned=False)
    graph.replay()
    torch.cuda.synchronize()
    replayed = outputs_of(lambda: outputs, poisoned=False)
    return {
        "run": all(torch.equal(first[name], second[name]) for name in first),
        "replay": all(torch.equal(first[name], replayed[name]) for name in first),
    }


def measure_ceilings(
    device: torch.device,
    tiny: bool,
    shapes: Sequence[tuple[int, int, int]] = (),
    seconds: float = 10.0,
) -> dict[str, float]:
    """The machine's rates: bytes per second in a copy, operations per second in products.

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


def line(record: dict[str, Any]) -> str:
    """The case in one line, with each peer's kernel time if there is one."""
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
