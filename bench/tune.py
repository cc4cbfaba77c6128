"""python -m bench.tune: which launch configuration is the fastest on this GPU, at each size.

The host functions of the Triton backend ask multilora.ops.triton.configs. For every question that
a case of bench.gpu_cases makes them ask, the answer is changed one property at a time; what gives
the same outputs in less time is kept. The table is written after every case.

With --predict, which needs no GPU, the table instead restates the rules for the sizes of
`multilora kernels`, wherever nothing was measured.

Every entry: op (the function of configs), capability, dtype, sizes (what it was asked), config,
record (where the times are), us (the whole case, by graph replay), ahead (whether the case is then
faster than on the reference backend).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import inspect
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.gpu import RESULTS
from bench.gpu_cases import gpu_cases
from bench.measure import (
    Case,
    Run,
    capture,
    check,
    clock,
    default_device,
    interleave,
    outputs_of,
    reason,
)
from multilora.ops import triton as backend
from multilora.ops.triton import common, configs
from multilora.ops.triton.common import A100, H200, cdiv
from multilora.ops.triton.problems import problems

OURS, REFERENCE = "multilora (triton)", "multilora (reference)"
TABLE = Path(backend.__file__).with_name("table.json")

#: A change of some of a configuration's properties.
Change = dict[str, Any]
#: What configs was asked: the function and its arguments by name.
Question = tuple[str, tuple[tuple[str, Any], ...]]


# --- what to try ---------------------------------------------------------------------------------


def _lora_gemm(config: Any, asked: dict[str, Any]) -> list[list[Change]]:
    # In the loop only the forward can shrink, and only rows of its own particle.
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
            # A pass that shrinks has one block of rows a program; others have some blocks.
            {
                "block_m": m,
                "block_n": n,
                "warps": warps,
                "rows_each": m if asked["shrink"] else cdiv(rows, m) * m,
            }
            for m, n, warps in tiles
        ],
        [{"stages": stages} for stages in (2, 3, 4)],
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
def answering(
    answers: dict[Question, Any], asked: dict[Question, Any], rules: bool = False
) -> Iterator[None]:
    """Let the host functions get `answers`, or else what configs says (with `rules`, without its
    table); what they asked and got is added to `asked`."""
    # The package's functions hide its modules of the same names.
    modules = [
        sys.modules[f"{backend.__name__}.{n}"] for n in ("geometry", "lora_linear", "volume")
    ]
    replaced = []
    for name in CHANGES:
        rule = getattr(configs, name)
        own = inspect.unwrap(rule) if rules else rule

        def answer(*args: Any, _name: str = name, _rule: Callable = own, **kwargs: Any) -> Any:
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


class Tuner:
    def __init__(self, device: torch.device, until: float, record: str | None):
        self.device, self.until, self.record = device, until, record
        self.clock = clock(device)

    def tune(self, case: Case) -> list[dict[str, Any]]:
        """The entries of all questions of one case."""
        dtype = torch.bfloat16 if case.half_precision else torch.float32
        inputs = case.inputs(dtype, self.device)
        oracle = next(iter(case.peers))
        runs = {name: case.peers[name](inputs) for name in (oracle, OURS)}
        best: dict[Question, Any] = {}
        with answering({}, best):
            failures = check(case, runs, dtype, self.device).failures
        if OURS in failures:
            raise RuntimeError(f"wrong before any change: {failures[OURS]}")
        right = outputs_of(runs[OURS])
        # Sums in another order differ by roundings.
        tolerance = max(torch.finfo(dtype).eps, 1e-5)
        seconds = self._time(runs[OURS], best)
        for question in list(best):
            name, arguments = question
            for changes in CHANGES[name](best[question], dict(arguments)):
                for change in changes:
                    if time.time() > self.until:
                        break
                    tried = best | {question: dataclasses.replace(best[question], **change)}
                    if tried[question] == best[question]:
                        continue
                    found = self._try(runs[OURS], tried, right, tolerance)
                    # Less is noise.
                    if found < 0.98 * seconds:
                        seconds, best = found, tried
        ahead = self._ahead(runs[OURS], best, case.peers[REFERENCE](inputs), seconds)
        return [self._entry(q, config, seconds, ahead) for q, config in best.items()]

    def _ahead(
        self, ours: Run, answers: dict[Question, Any], reference: Run, seconds: float
    ) -> bool:
        try:
            return seconds < self._time(reference, {})
        except Exception:
            # It waits for the device, so no graph can hold it: both with their launches.
            seconds = self._time(ours, answers, launched=True)
            return seconds < self._time(reference, {}, launched=True)

    def _try(
        self, run: Run, answers: dict[Question, Any], right: dict[str, Tensor], tolerance: float
    ) -> float:
        """Seconds, or infinity for a configuration that does not compile or is wrong."""
        try:
            with answering(answers, {}):
                outputs = outputs_of(run)
            for name, exact in right.items():
                error = (outputs[name].double() - exact.double()).norm()
                # Written so that NaN fails.
                if not error <= tolerance * exact.double().norm():
                    return float("inf")
            return self._time(run, answers)
        except Exception as error:
            print(f"  {reason(error)}", flush=True)
            return float("inf")

    def _time(self, run: Run, answers: dict[Question, Any], launched: bool = False) -> float:
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
        return _entry(question, config) | {"record": self.record, "us": us, "ahead": ahead}


def _entry(question: Question, config: Any) -> dict[str, Any]:
    """What was asked and answered; not measured."""
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


def predict() -> list[dict[str, Any]]:
    """The rules' answers to all that the problems of `multilora kernels` ask, for its chips."""
    entries = []
    for chip in (A100, H200):
        asked: dict[Question, Any] = {}
        common.compile_only(chip, lambda *_: None)
        try:
            with answering({}, asked, rules=True):
                for problem in problems():
                    problem.run()
        finally:
            common.compile_only(None, None)
        entries += [_entry(question, config) for question, config in asked.items()]
    return entries


def merge(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`old` with the entries of `new` in the place of those that answer the same question."""

    def question(entry: dict[str, Any]) -> str:
        asked = [entry[key] for key in ("op", "capability", "dtype", "sizes")]
        return json.dumps(asked, sort_keys=True)

    return list(({question(e): e for e in old} | {question(e): e for e in new}).values())


def write(table: Path, entries: list[dict[str, Any]]) -> None:
    """One line an entry, so that a diff shows what has changed."""
    lines = ",\n".join(json.dumps(entry) for entry in entries)
    table.write_text(f"[\n{lines}\n]\n")
    print(f"table: {table}, {len(entries)} entries")


def main() -> int:
    parser = argparse.ArgumentParser("python -m bench.tune", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything [9]")
    parser.add_argument(
        "--table", type=Path, default=TABLE, help="is read and written [%(default)s]"
    )
    parser.add_argument("--record", help="the name of the record that the table is to cite")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name has TEXT")
    parser.add_argument("--predict", action="store_true", help="restate the rules; no GPU")
    parser.add_argument("--device", type=torch.device, default=default_device())
    parser.add_argument("--tiny", action="store_true", help="a smoke test: nothing to use")
    args = parser.parse_args()
    if args.tiny and args.table == TABLE:
        parser.error("a smoke test must not write the table; give --table")
    if args.record and not (RESULTS / f"{args.record}.json").exists():
        parser.error(f"there is no record {args.record}.json in {RESULTS}")
    entries = json.loads(args.table.read_text()) if args.table.exists() else []
    if args.predict:
        entries = merge(predict(), [e for e in entries if e["record"] is not None])
        write(args.table, entries)
        return 0
    if args.device.type == "cuda":
        # A capture needs a stream of its own.
        torch.cuda.set_stream(torch.cuda.Stream())
    until = time.time() + 60 * args.minutes
    tuner = Tuner(args.device, until, args.record)
    for case in gpu_cases(["triton", "reference"], args.tiny):
        # Both directions at once would only tune the same kernels again.
        tuned = case.group.startswith(("lora_linear", "particle_loss", "pairwise_frobenius"))
        whole = case.group.endswith("fwd + bwd") and not case.group.startswith(
            ("particle_loss", "pairwise_frobenius")
        )
        extra = case.name.endswith(("torch.compile", "other libraries"))
        if not tuned or whole or extra or args.only not in str(case) or time.time() > until:
            continue
        try:
            found = tuner.tune(case)
        except Exception as error:
            print(f"{case}: FAILED {reason(error)}", flush=True)
            continue
        entries = merge(entries, found)
        write(args.table, entries)
        for entry in found:
            print(f"{case}: {entry['op']} {entry['config']} {entry['us']} µs", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
