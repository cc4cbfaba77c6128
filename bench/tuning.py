"""The changes that a launch configuration allows, and the search for the fastest in one case."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import inspect
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from bench.case import Case, Repetition, case_dtype
from bench.check import check, outputs_of, reason
from bench.clocks import capture, clock, interleave
from bench.device import check_device
from bench.jobs import Context
from bench.processes import die_with_parent
from multilora.ops import triton as backend
from multilora.ops.triton import configs
from multilora.ops.triton.common import cdiv
from multilora.tools.kernels.calls import Problem
from multilora.tools.kernels.precompile import fill_here

OURS, REFERENCE = "multilora (triton)", "multilora (reference)"
#: A change of some of a configuration's properties.
Change = dict[str, Any]
#: What configs was asked: the function and its arguments by name.
Question = tuple[str, tuple[tuple[str, Any], ...]]


# --- what to try ---------------------------------------------------------------------------------


def _lora_gemm(config: Any, asked: dict[str, Any]) -> list[list[Change]]:
    # In the loop only the forward can shrink, and only with separate rows per particle.
    own = not asked["shared"]
    paths = ["shrink first"] + ["accumulate"] * own
    paths += ["shrink inside"] * (own and not asked["backward"])
    tiles = ((128, 256, 8), (256, 128, 8), (128, 128, 8), (128, 128, 4), (64, 256, 4), (64, 128, 4))
    return [
        [{"path": path} for path in paths],
        [{"block_m": m, "block_n": n, "warps": warps} for m, n, warps in tiles],
        [{"block_k": k, "stages": s} for k, s in ((64, 2), (64, 3), (64, 4), (32, 4), (32, 5))],
        [{"group": group} for group in (4, 16)],
        [{"flatten": True}] if config.path == "shrink inside" else [],
        # Two smaller programs on a processor: what fits into its shared memory.
        [{"block_m": 128, "block_n": 128, "warps": 4, "stages": 2, "programs": 2}],
    ]


def _lora_pass(config: Any, asked: dict[str, Any]) -> list[list[Change]]:
    tiles = ((64, 64, 4), (128, 64, 4), (128, 64, 8), (128, 128, 8), (256, 64, 8))
    rows = config.rows_each
    return [
        [
            # A pass that shrinks has one block of rows per program; others have several.
            {
                "block_m": m,
                "block_n": n,
                "warps": warps,
                "rows_each": m if asked["shrink"] else cdiv(rows, m) * m,
            }
            for m, n, warps in tiles
        ],
        [{"stages": stages} for stages in (2, 3, 4)],
        # The same tile with fewer warps, which read both thin products in another order.
        [{"warps": 4}],
        [] if asked["shrink"] else [{"rows_each": 2 * rows}, {"rows_each": 4 * rows}],
    ]


def _geometry(config: Any, asked: dict[str, Any]) -> list[list[Change]]:
    return [
        [{"chunk": chunk} for chunk in (512, 1024, 2048, 4096)],
        [{"warps": warps} for warps in (2, 4, 8)],
        [{"block_d": d, "stages": s} for d, s in ((16, 3), (32, 2), (32, 4), (64, 2))],
        [{"apply_block_d": d, "apply_warps": w} for d, w in ((64, 8), (128, 4), (128, 8))],
    ]


def _volume(config: Any, asked: dict[str, Any]) -> list[list[Change]]:
    if config.splits < 2:
        return []
    return [[{"splits": config.splits * 2}, {"splits": config.splits // 2}]]


CHANGES: dict[str, Callable[[Any, dict[str, Any]], list[list[Change]]]] = {
    "lora_gemm": _lora_gemm,
    "lora_pass": _lora_pass,
    "geometry": _geometry,
    "volume": _volume,
}


# --- asking and answering ------------------------------------------------------------------------


@contextlib.contextmanager
def answering(answers: dict[Question, Any], asked: dict[Question, Any]) -> Iterator[None]:
    """Give `answers` to the host functions, or else what configs says; add what they asked and got
    to `asked`."""
    # The package's functions hide its modules of the same names.
    modules = [sys.modules[f"{backend.__name__}.{n}"] for n in ("frobenius", "linear", "loss")]
    replaced = []
    for name in CHANGES:
        rule = getattr(configs, name)

        def answer(*args: Any, _name: str = name, _rule: Callable = rule, **kwargs: Any) -> Any:
            question = _question(_name, _rule, args, kwargs)
            asked[question] = answers.get(question) or _rule(*args, **kwargs)
            return asked[question]

        for module in (configs, *modules):
            if getattr(module, name, None) is rule:
                setattr(module, name, answer)
                replaced.append((module, name, rule))
    try:
        yield
    finally:
        for module, name, rule in replaced:
            setattr(module, name, rule)


def _question(name: str, rule: Callable, args: tuple, kwargs: dict[str, Any]) -> Question:
    bound = inspect.signature(rule).bind(*args, **kwargs)
    bound.apply_defaults()
    fixed = ((k, tuple(v) if isinstance(v, list) else v) for k, v in bound.arguments.items())
    return name, tuple(fixed)


class Compilers:
    """Processes that compile the configurations of a case before they are timed: the cache is on
    disk. A process that a compilation ends costs the others nothing: what is not in the cache is
    compiled when it is timed."""

    def __init__(self, device: torch.device):
        self.pool = None
        if device.type == "cuda":
            workers = max(1, min(12, (os.cpu_count() or 1) - 2))
            self.pool = concurrent.futures.ProcessPoolExecutor(
                workers,
                multiprocessing.get_context("spawn"),
                initializer=die_with_parent,
                initargs=(os.getpid(),),
            )

    def compile(
        self,
        problem: Callable[[], Problem],
        answers: list[dict[Question, Any]],
        beat: Callable[[str], None],
    ) -> None:
        if self.pool is None:
            return
        with contextlib.suppress(concurrent.futures.BrokenExecutor):
            waiting = {self.pool.submit(_compile, problem, one) for one in answers}
            until = time.time() + 60
            while waiting and time.time() < until:
                _, waiting = concurrent.futures.wait(waiting, timeout=2)
                beat(OURS)

    def close(self) -> None:
        if self.pool is not None:
            self.pool.shutdown(wait=False, cancel_futures=True)


def _compile(problem: Callable[[], Problem], answers: dict[Question, Any]) -> None:
    with answering(answers, {}):
        fill_here([problem()])


class Tuner:
    """Tunes the questions of one case. Every configuration that is tried is first noted by its
    name: one that ends the process is left out by the next one (context.without)."""

    def __init__(self, context: Context, seconds: float):
        self.context, self.device = context, context.device
        self.until = time.time() + seconds
        self.clock = clock(self.device)

    def tune(self, case: Case) -> dict[str, Any]:
        """ "entries" of all its questions; how many configurations were tried, and what came of
        those that were not better."""
        dtype = case_dtype(case)
        inputs = case.inputs(dtype, self.device)
        oracle = next(iter(case.peers))
        self.context.note(OURS)
        runs = {name: case.peers[name](inputs) for name in (oracle, OURS)}
        best: dict[Question, Any] = {}
        with answering({}, best):
            failures = check(case, runs, dtype, self.device).failures
        if OURS in failures:
            return {"failures": {OURS: f"wrong before any change: {failures[OURS]}"}}
        right = outputs_of(runs[OURS])
        # Sums in another order differ by roundings.
        tolerance = max(torch.finfo(dtype).eps, 1e-5)
        seconds = before = self._time(runs[OURS], best)
        result: dict[str, Any] = {"failures": {}, "tried": 0, "refused": {}, "wrong": {}}
        compilers = Compilers(self.device)
        try:
            for question, changes in self._changes(best):
                candidates = self._candidates(best, question, changes)
                compilers.compile(case.problem, list(candidates.values()), self.context.beat)
                for name, tried in candidates.items():
                    if time.time() > self.until:
                        result["cut"] = f"in {name}, after {result['tried']} configurations"
                        break
                    if name in self.context.without:
                        result["refused"][name] = self.context.without[name]
                        continue
                    self.context.note(name)
                    result["tried"] += 1
                    found = self._try(runs[OURS], tried, right, tolerance, name, result)
                    # A smaller difference is noise.
                    if found < 0.98 * seconds:
                        seconds, best = found, tried
        finally:
            compilers.close()
        self.context.note(REFERENCE)
        ahead = self._ahead(runs[OURS], best, case.peers[REFERENCE](inputs), seconds)
        result |= {"us": seconds * 1e6, "before_us": before * 1e6}
        result["entries"] = [self._entry(q, config, seconds, ahead) for q, config in best.items()]
        return result

    def _changes(self, best: dict[Question, Any]) -> Iterator[tuple[Question, list[Change]]]:
        for question in list(best):
            name, arguments = question
            for changes in CHANGES[name](best[question], dict(arguments)):
                yield question, changes

    def _candidates(
        self, best: dict[Question, Any], question: Question, changes: list[Change]
    ) -> dict[str, dict[Question, Any]]:
        """Name -> the answers with one change in one of them."""
        found = {}
        for change in changes:
            changed = dataclasses.replace(best[question], **change)
            if changed != best[question]:
                found[f"{OURS}: {question[0]} {changed}"] = best | {question: changed}
        return found

    def _ahead(
        self, ours: Repetition, answers: dict[Question, Any], reference: Repetition, seconds: float
    ) -> bool:
        try:
            return seconds < self._time(reference, {})
        except Exception as error:
            check_device(error, self.device)
            # The reference waits for the device, so no graph can hold it: time both with launches.
            seconds = self._time(ours, answers, launched=True)
            return seconds < self._time(reference, {}, launched=True)

    def _try(
        self,
        run: Repetition,
        answers: dict[Question, Any],
        right: dict[str, Tensor],
        tolerance: float,
        name: str,
        result: dict[str, Any],
    ) -> float:
        """Seconds, or infinity for a configuration that does not compile or is wrong."""
        try:
            with answering(answers, {}):
                outputs = outputs_of(run)
            for output, exact in right.items():
                error = (outputs[output].double() - exact.double()).norm()
                # Written so that NaN fails.
                if not error <= tolerance * exact.double().norm():
                    result["wrong"][name] = f"{output}: error {error.item():.1e}"
                    return float("inf")
            return self._time(run, answers)
        except Exception as error:
            result["refused"][name] = reason(error)
            check_device(error, self.device)
            return float("inf")

    def _time(self, run: Repetition, answers: dict[Question, Any], launched: bool = False) -> float:
        with answering(answers, {}):
            sampler = self.clock.sampler(run)
            if self.device.type == "cuda" and not launched:
                pool = torch.cuda.graph_pool_handle()
                graph, _ = capture(run, pool, torch.cuda.current_stream())
                sampler = self.clock.replay_sampler(graph)
            return interleave({"": sampler}, 0.0, 20, limit=1.0)[""].median

    def _entry(
        self, question: Question, config: Any, seconds: float, ahead: bool
    ) -> dict[str, Any]:
        us = round(seconds * 1e6, 2)
        return entry(question, config) | {"us": us, "ahead": ahead}


def entry(question: Question, config: Any) -> dict[str, Any]:
    """The table's entry of a question and its answer, not yet measured."""
    name, arguments = question
    sizes = dict(arguments)
    capability, dtype = sizes.pop("chip").capability, sizes.pop("dtype")
    return {
        "op": name,
        "capability": capability,
        "dtype": str(dtype).removeprefix("torch."),
        "sizes": {k: list(v) if isinstance(v, tuple) else v for k, v in sizes.items()},
        "config": dataclasses.asdict(config),
        "record": None,
        "us": None,
        "ahead": False,
    }
