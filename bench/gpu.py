"""python -m bench.gpu: is multilora right on this GPU, and how fast, in one command.

First the operators' tests run on the device; then a worker process measures the ceilings, makes
the checks of bench.checks and times the cases of bench.gpu_cases, the most important ones first,
until the minutes are over. The worker writes a line a result into a journal. Where it crashes or
hangs (an illegal access ends a CUDA process), another one goes on behind, without the peer that
was running. The record is complete after every job, so that a killed run leaves what it had.

No peer is compared whose outputs are wrong.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench import checks
from bench.floors import RESULTS, Ceilings, floor
from bench.gpu_cases import gpu_cases
from bench.measure import (
    Case,
    Unavailable,
    capture,
    check,
    clock,
    default_device,
    interleave,
    is_ours,
    machine,
    outputs_of,
    peak_memory,
    quartiles,
    reason,
)
from multilora.ops.dispatch import available_backends

ROOT = Path(__file__).parent.parent
TESTS = ("lora_linear", "geometry", "volume", "svgd_update")
#: Seconds without a line in the journal after which the worker is taken to hang.
SILENCE = 120.0
#: A worker ends so where its CUDA context is broken.
BROKEN = 3

Note = Callable[[str], None]


# --- the worker ----------------------------------------------------------------------------------


class BrokenDevice(BaseException):
    """The CUDA context no longer works; only a new process helps. No handler of errors stops it."""


class Worker:
    def __init__(self, journal: Path, until: float, device: torch.device, tiny: bool):
        self.journal, self.until = journal, until
        self.device, self.tiny = device, tiny
        self.job = ""
        self.ceilings: Ceilings | None = None

    def run(self) -> None:
        events = list(read_journal(self.journal))
        finished = {e["job"]: e["result"] for e in events if e["event"] == "done"}
        crashes = [e for e in events if e["event"] == "crash"]
        if "ceilings" in finished:
            self.ceilings = _ceilings_of(finished["ceilings"])
        if self.device.type == "cuda":
            # A capture needs a stream of its own, and a backward runs where its forward ran.
            torch.cuda.set_stream(torch.cuda.Stream())
            # Of convolutions it is the default; the float32 checks would see nothing smaller.
            torch.backends.cudnn.allow_tf32 = False
        for name, cost, work in self._jobs(crashes):
            if name in finished or time.time() + cost > self.until:
                continue
            self.job = name
            self._note("")
            try:
                result = work()
            except Exception as error:
                result = {"failures": {"": reason(error)}}
                self._check_device(error)
            self._write(event="done", result=result)
            _free_memory(self.device)

    def _jobs(self, crashes: list[dict]) -> Iterator[tuple[str, float, Callable[[], Any]]]:
        yield "ceilings", 0.0, self._measure_ceilings
        for job, function in check_jobs(self.device).items():
            crash = next((c for c in crashes if c["job"] == job), None)
            if crash is None:
                yield job, 10.0, lambda function=function: function(self.device, self.tiny)
            else:
                yield job, 0.0, lambda crash=crash: {"failures": {"": crash["why"]}}
        backends = available_backends(self.device.type)
        for case in gpu_cases(backends, self.tiny):
            # By operator: a kernel that broke the process once is not called again. A process that
            # broke outside the peers would do so again.
            without = {
                c["peer"]: f"{c['why']} (in {c['job']})"
                for c in crashes
                if c["job"] == str(case)
                or (c["peer"] in case.peers and c["job"].split()[0] == case.group.split()[0])
            }
            cost = 0.0 if self.tiny else case.cost
            yield str(case), cost, lambda case=case, without=without: self._measure(case, without)

    def _measure_ceilings(self) -> dict[str, float]:
        result = measure_ceilings(self.device, self.tiny)
        self.ceilings = _ceilings_of(result)
        return result

    def _measure(self, case: Case, without: dict[str, str]) -> dict[str, Any]:
        for peer, why in without.items():
            if peer not in case.peers:
                raise RuntimeError(why)
        quick = 1.0 if self.tiny else case.cost / 2
        return measure_case(
            case, without, self.ceilings, self.device, quick, self._note, self._check_device
        )

    def _note(self, peer: str) -> None:
        self._write(event="at", peer=peer)

    def _write(self, **event: Any) -> None:
        with self.journal.open("a") as file:
            file.write(json.dumps({"job": self.job, **event}) + "\n")

    def _check_device(self, error: Exception) -> None:
        """Free what the failed peer held, and see whether CUDA still works."""
        error.__traceback__ = None
        try:
            _free_memory(self.device)
            if self.device.type == "cuda":
                torch.cuda.synchronize()
        except Exception as broken:
            raise BrokenDevice(reason(error)) from broken


def check_jobs(device: torch.device) -> dict[str, Callable[[torch.device, bool], dict[str, Any]]]:
    """Every check on every backend of multilora that runs here."""
    return {
        f"check: {name} ({backend})": partial(function, backend)
        for name, function in checks.CHECKS.items()
        for backend in available_backends(device.type)
    }


def measure_case(
    case: Case,
    without: dict[str, str],
    ceilings: Ceilings | None,
    device: torch.device,
    seconds: float,
    note: Note,
    check_device: Callable[[Exception], None],
) -> dict[str, Any]:
    """The record of one case. Times are quartiles of seconds.

    without: peers that are left out, and why. note: is told which peer comes next. check_device:
    is called with what a peer raised.
    """
    dtype = torch.bfloat16 if case.half_precision else torch.float32
    record: dict[str, Any] = {
        "group": case.group,
        "name": case.name,
        "dtype": str(dtype).removeprefix("torch."),
        "failures": dict(without),
        "skipped": {},
        "not_captured": {},
        "peak_bytes": {},
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
            check_device(error)
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
    runs = {name: run for name, run in runs.items() if name not in failures}
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
        try:
            graph, outputs = capture(run, pool, torch.cuda.current_stream())
            if is_ours(name) and case.stand_in is None:
                record.setdefault("repeatable", {})[name] = _repeatable(run, graph, outputs)
            outputs = None
            samplers["kernel", name] = timer.replay_sampler(graph)
        except Exception as error:
            record["not_captured"][name] = reason(error)
            outputs = None
            check_device(error)
            # A capture that broke off may keep its pool locked.
            pool = torch.cuda.graph_pool_handle()
    # A peer may have failed in a later step than its first sample.
    samplers = {key: s for key, s in samplers.items() if key[1] not in failures}
    if any(is_ours(name) for _, name in samplers):
        timings = attempt("timing", lambda: interleave(samplers, 0.0, 30, limit=seconds))
        if timings is not None:
            _add_times(case, record, {key: t.samples for key, t in timings.items()}, ceilings)
    return record


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


def measure_ceilings(device: torch.device, tiny: bool) -> dict[str, float]:
    """What this machine reaches: bytes a second of a copy, operations a second of products."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    shapes = ((8192, 8192, 8192), (4096 * 4, 4096, 11008), (64 * 197 * 4, 768, 3072))
    side, rows, numbers = 4096, 64 * 197 * 4, 2**29
    if tiny:
        shapes, side, rows, numbers = ((64, 64, 64),), 64, 64, 2**12
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
    times = {n: t.median for n, t in interleave(samplers, 0.0, 30, limit=10.0).items()}
    result = {f"{name} seconds": value for name, value in times.items()}
    result["bytes"] = 2 * 2 * numbers / times["copy"]
    result["flops"] = max(2 * m * k * n / times[f"F.linear {m}x{k}x{n}"] for m, k, n in shapes)
    result["flops64"] = 2 * side**3 / times["float64 mm"]
    result["bmm N=16 bytes"] = 2 * (x.numel() + 4 * (rows // 4) * 16) / times["bmm N=16"]
    return result


def _ceilings_of(result: dict[str, Any]) -> Ceilings | None:
    if "bytes" not in result:
        return None
    return Ceilings(result["flops"], result["bytes"], result["flops64"])


def _free_memory(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def read_journal(journal: Path) -> Iterator[dict[str, Any]]:
    if not journal.exists():
        return
    for line in journal.read_text().splitlines():
        # The last line of a killed worker may be half a line.
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue


# --- the tests -----------------------------------------------------------------------------------


def run_tests(device: torch.device, seconds: float) -> dict[str, Any]:
    """The operators' tests on the device, in a process of their own."""
    files = [f"tests/test_{name}.py" for name in TESTS]
    present = [name for name in files if (ROOT / name).exists()]
    command = [sys.executable, "-m", "pytest", *present, "-v", "-rfE", "-p", "no:cacheprovider"]
    command += ["--maxfail=20", "--color=no", "--tb=short"]
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(min(8, os.cpu_count() or 1))]
    environment = {**os.environ, "MULTILORA_TEST_DEVICE": device.type, "COLUMNS": "300"}
    if device.type == "cuda":
        environment["TRITON_INTERPRET"] = "0"
    started = time.time()
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
            # Its workers too.
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        log.seek(0)
        lines = log.read().splitlines()
    return {
        "files": present,
        "missing": [name for name in files if name not in present],
        # None: stopped, because its time was over.
        "exit_code": code,
        "seconds": time.time() - started,
        **summary(lines),
        "tail": lines[-3:],
    }


#: A finished test, as pytest -v and pytest-xdist write it.
_OUTCOME = re.compile(
    r"^(?:\[gw\d+\] \[ *\d+%\] (?P<state>[A-Z]+) (?P<test>\S.*)"
    r"|(?P<name>\S+::.*?) (?P<outcome>[A-Z]+)\b.*\[ *\d+%\])$"
)


def summary(lines: list[str]) -> dict[str, Any]:
    """How many tests had which outcome, also of a run that was stopped, and what failed."""
    found = [match for match in map(_OUTCOME.match, lines) if match]
    states = [(m["state"] or m["outcome"], m["test"] or m["name"]) for m in found]
    # The lines at the end say why, too.
    why = [one[:300] for one in lines if one.startswith(("FAILED ", "ERROR "))]
    return {
        "outcomes": dict(Counter(state for state, _ in states)),
        "failed": why or [test for state, test in states if state in ("FAILED", "ERROR")],
    }


# --- the run -------------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser("python -m bench.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="gpu", metavar="NAME", help="the record is NAME.json")
    parser.add_argument("--out-dir", type=Path, default=RESULTS, metavar="DIR", help="[results/]")
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything [9]")
    parser.add_argument("--device", type=torch.device, default=default_device())
    parser.add_argument("--tiny", action="store_true", help="a smoke test: nothing to quote")
    parser.add_argument("--no-tests", action="store_true", help="leave out the operators' tests")
    parser.add_argument("--commit", help="for the record, where no repository can tell")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.device.type == "cpu" and not args.tiny:
        parser.error("the sizes are a GPU's; on a CPU, add --tiny for a smoke test")
    if args.worker is not None:
        try:
            Worker(args.worker, args.until, args.device, args.tiny).run()
        except BrokenDevice as error:
            print(error, file=sys.stderr, flush=True)
            # At once: the destructors of a broken context can hang.
            os._exit(BROKEN)
        return 0
    return Run(args).run()


class Run:
    """The parent: it starts workers, reads their journal and writes the record."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.until = time.time() + 60 * args.minutes
        self.file = args.out_dir / f"{args.out}.json"
        self.journal = args.out_dir / f"{args.out}.journal.jsonl"
        self.record: dict[str, Any] = {
            "kind": "gpu" if args.device.type == "cuda" else "smoke",
            "tiny": args.tiny,
            "machine": machine(args.device),
            "backends": available_backends(args.device.type),
            "tests": None,
            "ceilings": None,
            "checks": {},
            "cases": [],
            "crashes": [],
            "left_out": [],
        }
        self.record["machine"]["commit"] = args.commit or self.record["machine"]["commit"]
        if args.device.type == "cuda":
            properties = torch.cuda.get_device_properties()
            self.record["machine"] |= {
                "capability": 10 * properties.major + properties.minor,
                "processors": properties.multi_processor_count,
                "memory_bytes": properties.total_memory,
                "cuda": torch.version.cuda,
            }
        self.jobs = ["ceilings", *check_jobs(args.device)]
        self.jobs += [str(case) for case in gpu_cases(self.record["backends"], args.tiny)]
        self.seen = 0

    def run(self) -> int:
        self.args.out_dir.mkdir(parents=True, exist_ok=True)
        self.journal.unlink(missing_ok=True)
        self._write()
        if not self.args.no_tests:
            limit = 0.3 * (self.until - time.time())
            self.record["tests"] = run_tests(self.args.device, limit)
            tests = self.record["tests"]
            over = " (stopped: out of time)" if tests["exit_code"] is None else ""
            print(f"tests: {tests['outcomes']}{over}", *tests["failed"], sep="\n  ", flush=True)
            self._write()
        starts = 0
        while self.until - time.time() > 0 and starts < 10 and not self._work():
            starts += 1
        self._read()
        self._write()
        self.journal.unlink(missing_ok=True)
        left_out = self.record["left_out"]
        if left_out:
            print(f"left out, for want of time: {len(left_out)} of {len(self.jobs)} jobs")
        print(f"record: {self.file}")
        return 0 if self._right() else 1

    def _work(self) -> bool:
        """One worker until it ends; whether it did all that it had time for."""
        command = [sys.executable, "-m", "bench.gpu", "--worker", str(self.journal.resolve())]
        # It ends by itself; the rest is for the last job.
        command += ["--until", str(self.until - 5), "--device", str(self.args.device)]
        command += ["--tiny"] if self.args.tiny else []
        with tempfile.TemporaryFile("w+") as errors:
            process = subprocess.Popen(
                command, cwd=ROOT, stderr=errors, stdout=subprocess.DEVNULL, start_new_session=True
            )
            heard, why = time.time(), ""
            while process.poll() is None:
                time.sleep(0.2)
                if self._read():
                    heard = time.time()
                if time.time() > self.until + 10:
                    why = "the time was over"
                elif time.time() - heard > SILENCE:
                    why = f"nothing was heard for {SILENCE:.0f} s"
                if why:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
            self._read()
            if process.returncode == 0:
                return True
            errors.seek(0)
            last = (errors.read().strip().splitlines() or [""])[-1]
        if why == "the time was over":
            return True
        self._blame(why or f"the process ended with {process.returncode}: {last}"[:300])
        # Without a line, it ended before its first job, and so would the next one.
        return self.seen == 0

    def _blame(self, why: str) -> None:
        """Say in the journal which peer was running when the worker ended."""
        events = list(read_journal(self.journal))
        if not events:
            job, peer = "start", ""
        else:
            job, peer = events[-1]["job"], events[-1].get("peer", "")
        crash = {"event": "crash", "job": job, "peer": peer, "why": why}
        with self.journal.open("a") as file:
            # On a line of its own, behind what may be half a line.
            file.write("\n" + json.dumps(crash) + "\n")
        print(f"CRASH in {job}, {peer}: {why}", flush=True)

    def _read(self) -> bool:
        """Take what is new in the journal into the record; whether anything was."""
        events = list(read_journal(self.journal))
        new, self.seen = events[self.seen :], len(events)
        for event in new:
            if event["event"] == "crash":
                self.record["crashes"].append(event)
            elif event["event"] == "done":
                self._take(event["job"], event["result"])
        finished = {e["job"] for e in events if e["event"] == "done"}
        self.record["left_out"] = [job for job in self.jobs if job not in finished]
        if any(event["event"] != "at" for event in new):
            self._write()
        return bool(new)

    def _take(self, job: str, result: dict[str, Any]) -> None:
        if job == "ceilings":
            self.record["ceilings"] = result
            print(f"ceilings: {result}", flush=True)
        elif job.startswith("check: "):
            self.record["checks"][job.removeprefix("check: ")] = result
            print(f"{job}: {result}", flush=True)
        else:
            group, _, name = job.partition(", ")
            result = {"group": group, "name": name, **result}
            self.record["cases"].append(result)
            print(line(result), flush=True)

    def _write(self) -> None:
        # Six digits are more than any of these numbers has.
        short = json.loads(
            json.dumps(self.record), parse_float=lambda text: float(f"{float(text):.6g}")
        )
        fresh = self.file.with_suffix(".part")
        fresh.write_text(json.dumps(short, indent=1, ensure_ascii=False) + "\n")
        fresh.replace(self.file)

    def _right(self) -> bool:
        """Whether the tests passed and nothing of multilora failed."""
        tests = self.record["tests"]
        checked = list(self.record["checks"].values())
        results = [*checked, *self.record["cases"]]
        failed = [
            name
            for r in results
            for name in r.get("failures", {})
            if r in checked or not name or is_ours(name)
        ]
        changing = [
            r for r in results if not all(all(v.values()) for v in r.get("repeatable", {}).values())
        ]
        failed += [r["name"] for r in changing]
        return (tests is None or tests["exit_code"] == 0) and not failed


def line(record: dict[str, Any]) -> str:
    """The case in one line, by kernel time where there is one."""
    parts = [f"{record['group']:<28} {record['name']:<36}"]
    kind = "kernel" if "kernel" in record else "launched"
    columns = record.get(f"{kind}_columns", {})
    for name in (n for n in record.get(kind, {}) if is_ours(n)):
        text = f"{name}: {record[kind][name][1] * 1e6:.1f} µs {kind}"
        if name in columns.get("x_yardstick", {}):
            text += f", {columns['x_yardstick'][name]:.2f} × yardstick"
        if name in columns.get("x_best_peer", {}):
            text += f", ×{columns['x_best_peer'][name][1]:.2f} {columns['best_peer']}"
        if name in columns.get("roofline", {}):
            text += f", {columns['roofline'][name]:.0%} of roofline"
        parts.append(text)
    parts += [f"FAILED {name}: {why}" for name, why in record.get("failures", {}).items()]
    return "  ".join(parts)


if __name__ == "__main__":
    sys.exit(main())
