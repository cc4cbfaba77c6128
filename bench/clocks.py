"""Interleaved timing on CPUs and GPUs, CUDA graphs, peak memory."""

from __future__ import annotations

import ctypes
import gc
import json
import math
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from bench.case import Repetition


@dataclass(frozen=True)
class Timing:
    """Seconds per call, one sample per round."""

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
    """Take samples in rounds: one sample of each sampler per round, in a new random order.

    Rounds go on for `seconds` and for `rounds` of them at least, but not beyond `limit` seconds
    once there are three. beat: called with the name of each sampler before it runs.
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
    def sampler(self, run: Repetition) -> Callable[[], float]:
        """A sample is the mean over as many calls as take 2 ms, after two calls to warm up."""
        for _ in range(2):
            run()
        calls = max(1, round(2e-3 / self._sample(run, 1)))
        return lambda: self._sample(run, calls)

    def _sample(self, run: Repetition, calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            run()
        return (time.perf_counter() - start) / calls


class CudaClock:
    """One call between two events, after the L2 cache was overwritten."""

    def __init__(self):
        self.cache = torch.empty(256 * 2**20, dtype=torch.int8, device="cuda")

    def sampler(self, run: Repetition) -> Callable[[], float]:
        """The call as the host launches it, with late launches; three calls warm up."""
        for _ in range(3):
            run()
        return lambda: self._sample(run)

    def replay_sampler(self, graph: torch.cuda.CUDAGraph) -> Callable[[], float]:
        """The kernels alone: the device is kept busy until the host has launched the graph. Three
        replays warm up."""
        for _ in range(2):
            graph.replay()
        torch.cuda.synchronize()
        launched = time.perf_counter()
        graph.replay()
        launched = time.perf_counter() - launched
        torch.cuda.synchronize()
        # A cycle takes about half a nanosecond.
        delay = round((2 * launched + 5e-5) * 2e9)
        return lambda: self._sample(graph.replay, delay)

    def _sample(self, call: Callable[[], Any], delay: int = 0) -> float:
        """delay: cycles for which the device spins; with 0, it waits for the host."""
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
    run: Repetition, pool: Any, stream: torch.cuda.Stream
) -> tuple[torch.cuda.CUDAGraph, dict[str, Tensor | list[Tensor]]]:
    """One repetition as a CUDA graph, and its outputs, which every replay writes again.

    `stream` is the current one: a backward runs where its forward ran, and both must be captured.
    Raises where the run waits for the device, before anything is captured: a capture that breaks
    off leaves PyTorch's allocator and random numbers in doubt.
    """
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        # transformers looks at its inputs, which waits, except in a capture.
        with mock.patch("torch.cuda.is_current_stream_capturing", return_value=True):
            run()
    finally:
        torch.cuda.set_sync_debug_mode(before)
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with torch.cuda.graph(graph, pool=pool, stream=stream):
        outputs = run()
    graph.instantiate()
    return graph, outputs


def launches(graph: torch.cuda.CUDAGraph) -> int:
    """How many kernels, copies and fills a captured graph launches."""
    count = ctypes.c_size_t()
    handle = ctypes.c_void_p(graph.raw_cuda_graph())
    error = ctypes.CDLL("libcuda.so.1").cuGraphGetNodes(handle, None, ctypes.byref(count))
    if error:
        raise RuntimeError(f"cuGraphGetNodes returned the error {error}")
    return count.value


def host_microseconds(run: Callable[[], Any], calls: int = 15) -> float:
    """The median time that a call takes the host, without waiting for the device. If the run itself
    waits, that is its whole time."""
    spent = []
    for _ in range(calls):
        # Empty the queue: a full one makes the host wait.
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        spent.append(time.perf_counter() - start)
    torch.cuda.synchronize()
    return statistics.median(spent) * 1e6


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
    # The profiler's library complains on stderr if the machine has no GPU.
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
