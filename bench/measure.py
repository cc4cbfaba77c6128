"""What a case is, its check against float64, interleaved timing, peak memory, the machine."""

from __future__ import annotations

import contextlib
import gc
import json
import math
import os
import platform
import random
import statistics
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.floors import Work

OURS = "multilora"


def is_ours(name: str) -> bool:
    """Whether a peer is multilora, on whichever backend: "multilora (triton)"."""
    return name.split(" (")[0] == OURS


class Unavailable(Exception):
    """A peer that cannot take part here; the message says why."""


#: One repetition of a peer. What it returns is checked, not timed; a list holds one tensor a
#: particle or a layer, and stands for the stacked tensor.
Run = Callable[[], dict[str, Tensor | list[Tensor]]]


@dataclass(frozen=True, eq=False)
class Case:
    """One comparison on one input.

    group, name: what is measured, and the sizes.
    inputs: (dtype, device) -> the inputs, which hold the same numbers in every dtype.
    peers: name -> (inputs -> Run). `OURS` is multilora, the others are plain PyTorch; the first of
        them, in float64, is the oracle.
    yardstick: name and maker of a run that does less than the task: a copy, the base GEMM alone.
    flops, traffic: what one repetition needs at least: operations, and numbers read and written.
    goals: peer -> how many times faster than it multilora is to be.
    half_precision: whether the case means something in bfloat16 too.
    work: what one repetition needs at least, where a floor is known.
    goal: at most how many times as long as the yardstick multilora is to take; 0: none is set.
    asides: peers that are shown and not compared with, because they do another task.
    stand_in: a smaller case that is checked, in float32, in place of this one.
    cost: seconds that the case is expected to take on a GPU.
    memory: bytes that the case may hold at once, the oracle and its float64 included.
    """

    group: str
    name: str
    inputs: Callable[[torch.dtype, torch.device], Any]
    peers: dict[str, Callable[[Any], Run]]
    yardstick: tuple[str, Callable[[Any], Run]] | None = None
    flops: float = 0.0
    traffic: float = 0.0
    goals: dict[str, float] = field(default_factory=dict)
    half_precision: bool = False
    work: Work | None = None
    goal: float = 0.0
    asides: frozenset[str] = frozenset()
    stand_in: Case | None = None
    cost: float = 4.0
    memory: float = 0.0

    @property
    def ours_is_absent(self) -> bool:
        """Whether only plain peers take part."""
        return not any(map(is_ours, self.peers))

    def __str__(self) -> str:
        return f"{self.group}, {self.name}"


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


# --- correctness ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Check:
    """errors: peer -> output -> ‖output − oracle‖ / ‖oracle‖; failures: peer -> why."""

    errors: dict[str, dict[str, float]]
    failures: dict[str, str]


def check(case: Case, runs: dict[str, Run], dtype: torch.dtype, device: torch.device) -> Check:
    """Every peer's outputs against the oracle's, on the same numbers.

    multilora may err twice as much as plain PyTorch in this dtype, plus rounding: four units in
    the last place. The plain peers set that scale, so all that is asked of them is half of the
    dtype's digits, which is also what every single element of multilora's must have. A peer that
    raises has failed.
    """
    make_oracle = next(iter(case.peers.values()))
    oracle = outputs_of(make_oracle(case.inputs(torch.float64, device)))
    eps = torch.finfo(dtype).eps
    errors, largest, failures = {}, {}, {}
    # One peer's outputs at a time: those of a large case fill gigabytes.
    for name, run in runs.items():
        try:
            outputs = outputs_of(run, poisoned=is_ours(name))
            errors[name] = _errors(outputs, oracle, _norm)
            largest[name] = _errors(outputs, oracle, _largest)
        except Exception as error:
            failures[name] = reason(error)
        outputs = None
    plain = [errors[name] for name in errors if not is_ours(name) and name not in case.asides]
    for name in errors:
        for output in oracle:
            budget = eps**0.5
            if is_ours(name) and plain:
                budget = min(2 * max(error[output] for error in plain) + 4 * eps, budget)
            # Written so that NaN fails.
            if not (errors[name][output] <= budget and largest[name][output] <= eps**0.5):
                failures[name] = (
                    f"{output}: error {errors[name][output]:.1e}, budget {budget:.1e}; "
                    f"largest element {largest[name][output]:.1e}, budget {eps**0.5:.1e}"
                )
    return Check(errors, failures)


def reason(error: BaseException) -> str:
    """The error in one line, short enough for a record."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:300]


def outputs_of(run: Run, poisoned: bool = True) -> dict[str, Tensor]:
    """What a repetition returns, each output as one tensor."""
    with _poisoned_memory() if poisoned else contextlib.nullcontext():
        outputs = run()
    return {
        name: _joined(t) if isinstance(t, (list, tuple)) else t.detach().clone()
        for name, t in outputs.items()
    }


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    """Particles or layers of one shape stacked; of several shapes, as one long vector."""
    if len({t.shape for t in tensors}) == 1:
        return torch.stack(list(tensors)).detach()
    return torch.cat([t.detach().flatten() for t in tensors])


def _errors(
    outputs: dict[str, Tensor], oracle: dict[str, Tensor], size: Callable[[Tensor], Tensor]
) -> dict[str, float]:
    """size(output − oracle) / size(oracle) of every output."""
    shapes, expected = ({n: tuple(t.shape) for n, t in o.items()} for o in (outputs, oracle))
    if shapes != expected:
        raise ValueError(f"outputs {shapes} are not the oracle's {expected}")
    tiny = torch.finfo(torch.float64).tiny
    return {
        name: (size(outputs[name].double() - exact) / size(exact).clamp_min(tiny)).item()
        for name, exact in oracle.items()
    }


def _norm(t: Tensor) -> Tensor:
    return torch.linalg.vector_norm(t)


def _largest(t: Tensor) -> Tensor:
    return torch.linalg.vector_norm(t, torch.inf)


@contextlib.contextmanager
def _poisoned_memory() -> Iterator[None]:
    """torch.empty is filled with NaN, so that an element that nobody writes is seen."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*deterministic.*")
            yield
    finally:
        torch.use_deterministic_algorithms(before)


# --- time ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Timing:
    """Seconds a call, one sample a round."""

    samples: list[float] = field(repr=False)

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    def quartiles(self) -> tuple[float, float, float]:
        return quartiles(self.samples)


def quartiles(values: list[float]) -> tuple[float, float, float]:
    return tuple(statistics.quantiles(values, n=4, method="inclusive"))


def interleave(
    samplers: dict[Any, Callable[[], float]],
    seconds: float,
    rounds: int,
    limit: float = math.inf,
    beat: Callable[[Any], None] = lambda name: None,
) -> dict[Any, Timing]:
    """Take samples in rounds, one of each sampler a round and in an order of its own each round.

    Rounds go on for `seconds` and for `rounds` of them at least, but not beyond `limit` seconds
    once there are three. beat: is told the name of every sampler before it is called.
    """
    samples: dict[Any, list[float]] = {name: [] for name in samplers}
    order, shuffle = list(samplers), random.Random(0).shuffle
    gc.collect()
    gc.disable()
    try:
        start, done, spent = time.perf_counter(), 0, 0.0
        while (done < rounds or spent < seconds) and (done < 3 or spent < limit):
            shuffle(order)
            for name in order:
                beat(name)
                samples[name].append(samplers[name]())
            done, spent = done + 1, time.perf_counter() - start
    finally:
        gc.enable()
    return {name: Timing(values) for name, values in samples.items()}


def clock(device: torch.device) -> CpuClock | CudaClock:
    return CudaClock() if device.type == "cuda" else CpuClock()


class CpuClock:
    def sampler(self, run: Run) -> Callable[[], float]:
        """A sample is the mean over as many calls as take 2 ms. Two calls go before."""
        for _ in range(2):
            run()
        calls = max(1, round(2e-3 / self._sample(run, 1)))
        return lambda: self._sample(run, calls)

    def _sample(self, run: Run, calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            run()
        return (time.perf_counter() - start) / calls


class CudaClock:
    """One call between two events, after the L2 cache was overwritten."""

    def __init__(self):
        self.cache = torch.empty(256 * 2**20, dtype=torch.int8, device="cuda")

    def sampler(self, run: Run) -> Callable[[], float]:
        """The call as the host launches it: what it launches late counts. Three calls go before."""
        for _ in range(3):
            run()
        return lambda: self._sample(run)

    def replay_sampler(self, graph: torch.cuda.CUDAGraph) -> Callable[[], float]:
        """The kernels alone: the device is kept busy until the host has launched the graph. Three
        replays go before."""
        for _ in range(2):
            graph.replay()
        torch.cuda.synchronize()
        launched = time.perf_counter()
        graph.replay()
        launched = time.perf_counter() - launched
        torch.cuda.synchronize()
        # In cycles of about half a nanosecond.
        delay = round((2 * launched + 5e-5) * 2e9)
        return lambda: self._sample(graph.replay, delay)

    def _sample(self, call: Callable[[], Any], delay: int = 0) -> float:
        """delay: cycles that the device is to spin; 0: it waits for the host."""
        self.cache.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if delay:
            torch.cuda._sleep(delay)
        else:
            torch.cuda.synchronize()
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) * 1e-3


def capture(
    run: Run, pool: Any, stream: torch.cuda.Stream
) -> tuple[torch.cuda.CUDAGraph, dict[str, Tensor | list[Tensor]]]:
    """One repetition as a CUDA graph, and its outputs, which every replay writes again.

    `stream` is the current one: a backward runs where its forward ran, and both must be captured.
    Raises where the run waits for the device, before anything is captured: a capture that breaks
    off leaves PyTorch's allocator and random numbers in doubt.
    """
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode(before)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=stream):
        outputs = run()
    return graph, outputs


# --- memory --------------------------------------------------------------------------------------


def peak_memory(run: Callable[[], Any], device: torch.device) -> int:
    """Bytes that PyTorch's allocator holds at the highest point of run(), above those before it.

    Exact and repeatable on both devices: CUDA's own counters, or every allocation and release on
    the CPU as the profiler reports them.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    # The profiler's library complains on stderr where a machine has no GPU.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profile:
        run()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(file))
        events = json.loads(file.read_text())["traceEvents"]
    changes = [(e["ts"], e["args"]["Bytes"]) for e in events if e["name"] == "[memory]"]
    held = peak = 0
    for _, change in sorted(changes, key=lambda c: c[0]):
        held += change
        peak = max(peak, held)
    return peak


# --- the machine ---------------------------------------------------------------------------------


def machine(device: torch.device) -> dict[str, Any]:
    """What a number depends on, without anything that names the host or its folders."""
    from multilora.ops import dispatch

    names = ("multilora", "torch", "triton", "peft", "timm", "transformers", "numpy")
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else _cpu_name(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "backend": dispatch.current_backend(device.type),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in names},
    }


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """The commit, with "+" behind it where files differ from it; None outside a repository."""

    def git(*args: str) -> str:
        call = ["git", "-C", str(Path(__file__).parent), *args]
        return subprocess.run(call, capture_output=True, text=True, check=True).stdout.strip()

    try:
        # Records are written while others are measured; they do not change what is measured.
        changed = git("status", "--porcelain", "--", ":/", ":(exclude,top)bench/results")
        return git("rev-parse", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None
