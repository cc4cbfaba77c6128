"""python -m bench.many_runs: K unrelated fine-tunings in one pass, against PEFT.

Three questions, at random weights:
- training: a step of K = 4, 8, 16 runs of their own rank, lora_alpha, targets, learning rate and
  data. `ml.Independent` with `optim.ParticleAdamW` takes turns with one PEFT model whose adapter is
  switched for every step ("in turn"), and with K PEFT models, each of which takes its steps in a
  row ("one by one"). A case is timed where the losses of two steps, and then the adapters, are
  equal.
- memory: the peak of two steps of K runs against that of one PEFT run on as many rows, each in a
  process of its own.
- mixed batches: 16 rows over 8 adapters, `model(x, particle=index)` against PEFT's `adapter_names`,
  and a few tokens of generation. A case is timed where the outputs are equal. The base alone says
  what adapters that cost nothing would gain.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.clocks import interleave, peak_memory, quartiles
from bench.device import default_device, synchronize
from bench.growth import status
from bench.processes import ROOT
from bench.record import RESULTS, machine, write
from bench.unrelated import (
    InTurn,
    OneByOne,
    Ours,
    Runs,
    name_of,
    networks,
)

#: Goals: a step against PEFT's adapters in turn, anywhere, and of eight runs of the embedded ViT;
#: a mixed batch against adapter_names; at most so many times the memory of one run.
GOAL, EMBEDDED_GOAL, MIXED_GOAL, MEMORY_GOAL = 1.0, 2.0, 2.0, 1.2
OURS, CHUNKED = "multilora", "multilora, 2 at a time"
IN_TURN, ONE_BY_ONE = "PEFT in turn", "PEFT one by one"
ADAPTER_NAMES, FROZEN = "adapter_names", "the base alone"
PARTS = ("training", "memory", "mixed")
#: Seconds of a clock on the wall, or of this process on all cores, which fits one thread on a
#: machine that other programs share.
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
#: Steps that are compared.
CHECKED = 2
UNEQUAL = (2, 16, 4, 8, 12, 6, 10, 6)
#: Of a value in float32, and of a movement of AdamW: it divides each gradient by its own size, so
#: that numbers whose gradient is all rounding may move either way, by as much as the others.
LOSS_TOLERANCE, MOVEMENT_TOLERANCE = 2e-5, 2e-2
#: Values of models in bfloat16, which round at other places.
HALF_TOLERANCE = 3e-2


@dataclass(frozen=True)
class Training:
    """A case: runs with these batch sizes.

    steps: in a row, for one sample.
    rounds: samples of each way.
    """

    network: str
    rows: Sequence[int]
    steps: int
    rounds: int

    @property
    def goal(self) -> float:
        embedded = self.network == "digits" and tuple(self.rows) == (8,) * 8
        return EMBEDDED_GOAL if embedded else GOAL

    def __str__(self) -> str:
        equal = len(set(self.rows)) == 1
        rows = f"{self.rows[0]} rows each" if equal else f"{', '.join(map(str, self.rows))} rows"
        return f"{networks()[self.network].name}, {len(self.rows)} runs, {rows}"


def training_cases(quick: bool) -> list[Training]:
    rounds = 3 if quick else 30
    sizes = [(8,) * 4, (8,) * 8, (8,) * 16, UNEQUAL]
    cases = [
        Training(network, rows, 1 if network == "decoder" else 3, rounds)
        for network in ("digits", "decoder", "experts")
        for rows in ([sizes[1], UNEQUAL] if quick else sizes)
    ]
    vit = [(1,) * 4] if quick else [(1,) * 4, (1,) * 8, (1,) * 16, (2,) * 4, (1, 3, 1, 2)]
    return cases + [Training("vit", rows, 1, 3 if quick else 5) for rows in vit]


# --- training ------------------------------------------------------------------------------------


def measure_training(
    case: Training, dtype: torch.dtype, device: torch.device, tiny: bool, clock: str
) -> dict[str, Any]:
    network = networks(tiny)[case.network]
    record: dict[str, Any] = {"group": "training", "name": str(case), "failures": {}}
    runs = Runs(network, case.rows, torch.float32, device)
    ways = ways_of(case, runs)
    record["failures"] = compare_trainings(ways)
    if dtype != torch.float32 and not record["failures"]:
        runs = Runs(network, case.rows, dtype, device)
        ways = ways_of(case, runs)
        record["failures"] = compare_losses(ways, HALF_TOLERANCE)
    if record["failures"]:
        return record
    taken = dict.fromkeys(ways, CHECKED)

    def sample(name: str) -> float:
        start = CLOCKS[clock]()
        ways[name].steps(taken[name], case.steps)
        synchronize(device)
        taken[name] += case.steps
        return (CLOCKS[clock]() - start) / case.steps

    timings = interleave({name: partial(sample, name) for name in ways}, 0.0, case.rounds)
    return record | compared(timings, case.steps, IN_TURN, case.goal)


def ways_of(case: Training, runs: Runs) -> dict[str, Any]:
    """multilora and PEFT; of larger models, whose passes leave a CPU's caches, also in parts."""
    ways: dict[str, Any] = {OURS: Ours(runs), IN_TURN: InTurn(runs), ONE_BY_ONE: OneByOne(runs)}
    if case.network in ("decoder", "vit"):
        ways[CHUNKED] = Ours(runs, particle_chunk=2)
    return ways


def compared(timings: dict[str, Any], steps: int, peer: str, goal: float) -> dict[str, Any]:
    """The part of a record that has times: seconds, and how many times as fast multilora is."""
    ours = timings[OURS].samples

    def against(name: str, own: list[float]) -> tuple[float, float, float]:
        return quartiles([a / b for a, b in zip(timings[name].samples, own)])

    peers = [name for name in timings if name not in (OURS, CHUNKED, FROZEN)]
    speedup = {name: against(name, ours) for name in peers}
    more = {}
    if CHUNKED in timings:
        more = {"in_parts": {n: against(n, timings[CHUNKED].samples) for n in peers}}
    if FROZEN in timings:  # what adapters that cost nothing would gain
        more = {"ceiling": against(peer, timings[FROZEN].samples)}
    return more | {
        "seconds": {name: timing.quartiles() for name, timing in timings.items()},
        "rounds": len(ours),
        "steps": steps,
        "speedup": speedup,
        "goal": goal,
        "met": speedup[peer][1] >= goal,
    }


def compare_losses(ways: dict[str, Any], tolerance: float) -> dict[str, str]:
    """Two steps of each way; what differs, by peer. (The later losses show the earlier step.)"""
    losses = {name: torch.stack(way.steps(0, CHECKED)) for name, way in ways.items()}
    ours, failures = losses.pop(OURS), {}
    for name, others in losses.items():
        error = ((ours - others).abs() / others.abs()).max().item()
        if not error <= tolerance:
            failures[name] = f"losses differ by {error:.1e}"
    return failures


def compare_trainings(ways: dict[str, Any]) -> dict[str, str]:
    """As `compare_losses`, and how far the trained adapters are apart, of how far they went."""
    before = ways[IN_TURN].adapters()
    failures = compare_losses(ways, LOSS_TOLERANCE)
    ours = ways[OURS].adapters()
    for name in ways.keys() - {OURS, *failures}:
        for k, theirs in enumerate(ways[name].adapters()):
            if theirs.keys() != ours[k].keys():
                failures[name] = f"run {k} has other tensors"
                continue
            apart = _norm(ours[k][n] - t for n, t in theirs.items())
            moved = _norm(t - before[k][n] for n, t in theirs.items())
            if not apart <= MOVEMENT_TOLERANCE * moved:
                failures[name] = f"run {k}: trained adapters differ by {apart / moved:.1e}"
    return failures


def _norm(parts: Any) -> float:
    return sum(t.double().square().sum().item() for t in parts) ** 0.5


# --- mixed batches -------------------------------------------------------------------------------


def mixed_indices() -> dict[str, list[int]]:
    """16 rows over 8 adapters, out of order."""
    return {
        "2 rows each": [0, 3, 1, 7, 2, 5, 4, 6, 3, 0, 6, 2, 7, 1, 5, 4],
        "1 to 5 rows": [0, 3, 0, 7, 2, 5, 0, 6, 3, 0, 6, 2, 0, 1, 3, 4],
    }


@torch.no_grad()
def measure_mixed(
    network: str,
    counts: str,
    longest: int,
    tokens: int,
    rounds: int,
    dtype: torch.dtype,
    device: torch.device,
    tiny: bool,
    clock: str,
) -> dict[str, Any]:
    """longest: of the prompts. tokens: how many to generate; 0 for one forward."""
    index = mixed_indices()[counts]
    runs = Runs(networks(tiny)[network], (1,) * 8, dtype, device)
    model, peers = runs.particles().eval(), runs.peft_model(range(8)).eval()
    base = runs.shared_base().eval()
    generator = torch.Generator().manual_seed(1)
    if runs.network.prompts is None:
        x, _ = runs.on_device(runs.network.batch(generator, 0, len(index)))
        inputs = {"x": x}
    else:
        inputs = runs.on_device(runs.network.prompts(generator, len(index), longest))
    names = [name_of(k) for k in index]
    options = {"min_new_tokens": tokens, "max_new_tokens": tokens, "do_sample": False}

    def ours() -> Any:
        if tokens:
            return model.call("generate", **inputs, **options, particle=index)
        return model(**inputs, particle=index)

    def theirs() -> Any:
        if tokens:
            return peers.generate(**inputs, **options, adapter_names=names)
        return peers(**inputs, adapter_names=names)

    def alone() -> Any:
        return base.generate(**inputs, **options) if tokens else base(**inputs)

    what = f"generation of {tokens} tokens" if tokens else "forward"
    if longest:
        what = f"prompts of {longest // 2} to {longest} tokens, {what}"
    record: dict[str, Any] = {
        "group": "mixed batch",
        "name": f"{runs.network.name}, 16 rows over 8 adapters, {counts}, {what}",
        "failures": {},
    }
    own, other = (getattr(y, "logits", y) for y in (ours(), theirs()))
    tolerance = HALF_TOLERANCE if dtype.itemsize < 4 else LOSS_TOLERANCE
    if tokens:
        # In half precision one other token changes all that follow.
        wrong = dtype.itemsize >= 4 and not own.equal(other)
    else:
        own, other = (_shown(y, inputs) for y in (own, other))
        wrong = not (own - other).abs().max() <= tolerance * other.abs().max()
    if wrong:
        record["failures"][ADAPTER_NAMES] = "the outputs differ"
        return record

    def sample(run: Callable[[], Any]) -> float:
        start = CLOCKS[clock]()
        run()
        synchronize(device)
        return CLOCKS[clock]() - start

    ways = {OURS: ours, ADAPTER_NAMES: theirs, FROZEN: alone}
    timings = interleave({name: partial(sample, run) for name, run in ways.items()}, 0.0, rounds)
    return record | compared(timings, 1, ADAPTER_NAMES, MIXED_GOAL)


def _shown(logits: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    """Without the places of padding, which hold anything."""
    mask = inputs.get("attention_mask")
    return logits if mask is None else logits * mask[..., None]


# --- memory --------------------------------------------------------------------------------------


def peak_of(
    who: str, network: str, count: int, rows: int, device: torch.device, tiny: bool
) -> dict:
    """Bytes at the highest point of two steps, of the runs or of one PEFT run on as many rows.

    resident: the process's peak over what it had before the model was built, after a step of one
        row; None on a GPU.
    allocated: what PyTorch's allocator held at once beyond the model and the data.
    """
    each = (rows,) * count if who == OURS else (rows * count,)

    def build(rows: Sequence[int]) -> Any:
        return (Ours if who == OURS else OneByOne)(
            Runs(networks(tiny)[network], rows, torch.float32, device)
        )

    resident = None
    if device.type == "cpu":
        build((1,)).steps(0, 1)
        before = status("VmRSS")
        build(each).steps(0, 2)
        resident = status("VmHWM") - before
    runs = build(each)
    allocated = peak_memory(lambda: runs.steps(0, 2), device)
    return {"resident": resident, "allocated": allocated}


def measure_memory(
    network: str, count: int, rows: int, repetitions: int, options: Sequence[str]
) -> list[dict[str, Any]]:
    found: dict[str, list[dict[str, int | None]]] = {OURS: [], "one PEFT run": []}
    for _ in range(repetitions):
        for who, measured in found.items():
            own = ["--peak", who, "--network", network, "--runs", str(count), "--rows", str(rows)]
            command = [sys.executable, "-m", "bench.many_runs", *own, *options]
            done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
            measured.append(json.loads(done.stdout.splitlines()[-1]))
    records = []
    for kind in ("allocated", "resident"):
        samples = {who: [m[kind] for m in measured] for who, measured in found.items()}
        if None in samples[OURS]:
            continue
        ours, one = (statistics.median(values) for values in samples.values())
        records.append(
            {
                "group": "memory",
                "name": f"{networks()[network].name}, {count} runs of {rows} rows, {kind}",
                "failures": {},
                "bytes": samples,
                "ratio": ours / one,
                "goal": MEMORY_GOAL,
                "met": ours <= MEMORY_GOAL * one,
            }
        )
    return records


# --- the command ---------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m bench.many_runs", description=__doc__)
    parser.add_argument("part", nargs="?", choices=PARTS, help="one question alone")
    parser.add_argument("--quick", action="store_true", help="fewer cases and rounds")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name has TEXT")
    parser.add_argument("--threads", type=int, default=2, help="PyTorch's threads [%(default)s]")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="[%(default)s]")
    parser.add_argument("--device", type=torch.device, default=default_device())
    parser.add_argument("--out", type=Path, help=f"[{RESULTS}/many_runs/DEVICE.json]")
    parser.add_argument("--tiny", action="store_true", help="a smoke test: nothing to quote")
    parser.add_argument("--peak", choices=(OURS, "one PEFT run"), help="memory, in this process")
    parser.add_argument("--network", choices=[*networks()], help="with --peak")
    parser.add_argument("--runs", type=int, help="with --peak")
    parser.add_argument("--rows", type=int, help="with --peak: of each run")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    if args.peak:
        found = peak_of(args.peak, args.network, args.runs, args.rows, args.device, args.tiny)
        print(json.dumps(found))
        return 0
    file = args.out or RESULTS / "many_runs" / f"{args.device.type}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {"cases": []}
    if file.exists() and (args.only or args.part):
        record = json.loads(file.read_text())
    for make in _makers(args):
        for case in make():
            print(told(case), flush=True)
            same = [(c["group"], c["name"]) for c in record["cases"]]
            key = (case["group"], case["name"])
            if key in same:
                record["cases"][same.index(key)] = case
            else:
                record["cases"].append(case)
            write(
                file,
                {"machine": machine(args.device), "clock": args.clock, "cases": record["cases"]},
            )
    return 1 if any(case["failures"] for case in record["cases"]) else 0


def _makers(args: argparse.Namespace) -> list[Callable[[], list[dict[str, Any]]]]:
    """What measures the cases that are wanted, one after another."""
    dtype = torch.bfloat16 if args.device.type == "cuda" else torch.float32
    about = (dtype, args.device, args.tiny, args.clock)
    found: list[tuple[str, str, Callable[[], list[dict[str, Any]]]]] = []
    for case in training_cases(args.quick):
        found.append(("training", str(case), lambda c=case: [measure_training(c, *about)]))
    options = ["--threads", str(args.threads), "--device", str(args.device)]
    options += ["--tiny"] if args.tiny else []
    repetitions = 1 if args.quick else 3
    for name, rows in (("digits", 8), ("decoder", 8), ("experts", 8), ("vit", 1)):
        measure = partial(measure_memory, name, 8, rows, repetitions, options)
        found.append(("memory", networks()[name].name, measure))
    rounds = 5 if args.quick else 30
    lengths = ((8, 0), (8, 8)) if args.quick else ((8, 0), (8, 16), (48, 0), (48, 16))
    for name, longest, tokens in (("digits", 0, 0), *(("decoder", *both) for both in lengths)):
        for counts in mixed_indices():
            mixed = partial(measure_mixed, name, counts, longest, tokens, rounds, *about)
            found.append(("mixed", networks()[name].name, lambda mixed=mixed: [mixed()]))
    return [make for part, name, make in found if args.part in (None, part) and args.only in name]


def told(case: dict[str, Any]) -> str:
    """A case in one line."""
    name = f"{case['group']}: {case['name']}"
    if case["failures"]:
        return f"{name}: WRONG, not compared: {case['failures']}"
    goal = f"(goal {case['goal']}: {'met' if case['met'] else 'missed'})"
    if "ratio" in case:
        return f"{name}: ×{case['ratio']:.3f} memory {goal}"
    ratios = [
        f"×{middle:.2f} [{low:.2f}, {high:.2f}] {peer}"
        for peer, (low, middle, high) in case["speedup"].items()
    ]
    if "in_parts" in case:
        low, middle, high = case["in_parts"][IN_TURN]
        ratios.append(f"2 at a time ×{middle:.2f} [{low:.2f}, {high:.2f}] {IN_TURN}")
    if "ceiling" in case:
        ratios.append(f"at most ×{case['ceiling'][1]:.2f}")
    return f"{name}: {case['seconds'][OURS][1] * 1e3:.1f} ms, {', '.join(ratios)} {goal}"


if __name__ == "__main__":
    sys.exit(main())
