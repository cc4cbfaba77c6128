"""python -m bench.tune: which launch configuration is the fastest on this GPU, at each size.

The host functions of the Triton backend ask multilora.ops.triton.configs. For every question that
a case of bench.cases makes them ask, the answer is changed one property at a time; what gives
the same outputs in less time is kept. Every case runs in its own process, and its configurations
are compiled beforehand by many; one that ends the process is left out. The table is written after
every case, and a second call goes on behind the first, as bench.gpu's does.

Every entry: op (the function of configs), capability, dtype, sizes (what it was asked), config,
record (where the times are), us (the whole case, by graph replay), ahead (whether the case is then
faster than on the reference backend).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from bench.case import Case, Unavailable
from bench.cases import families
from bench.device import default_device
from bench.jobs import Context, Group, Job, Stage
from bench.journal import Journal, state
from bench.plan import machine_stage
from bench.record import RESULTS
from bench.supervise import Supervisor, Task
from bench.tuning import Tuner
from multilora.ops.dispatch import missing_reason
from multilora.ops.triton.configs import TABLE

#: Seconds that one case is tuned for.
SECONDS = 75.0
#: Tuned first: the widths that a ViT-B has most of.
FIRST = ("768→768 K4", "768→2304 K4")


def stages(device: str, tiny: bool, only: str = "") -> list[Stage]:
    """One group per case, the main shapes first. Cases of both directions are left out: they have
    the same kernels."""
    found = families(["triton", "reference"], tiny)
    linears = [c for name in ("ViT-B linears", "LLM linears", "more linears") for c in found[name]]
    linears = [case for case in linears if not case.group.endswith("fwd + bwd")]
    linears.sort(key=lambda case: not case.name.startswith(FIRST))
    others = [c for c in found["particle loss"] if c.group.endswith(("forward", "fwd + bwd"))]
    others += [c for c in found["geometry"] if c.group.startswith("pairwise_frobenius")]
    groups = []
    for case in [*linears, *others]:
        if only in str(case):
            job = Job(
                f"tune: {case}",
                partial(_tune, case),
                seconds=SECONDS,
                silence=90.0,
                memory=case.memory,
            )
            groups.append(Group(job.name, [job]))
    return [machine_stage(), Stage("tuning", "the table", groups)]


def _tune(case: Case, context: Context) -> dict[str, Any]:
    missing = missing_reason("triton")
    if missing is not None:
        raise Unavailable(missing)
    return Tuner(context, 5.0 if context.tiny else SECONDS).tune(case)


def merge(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The entries of `old`, replaced by those of `new` that answer the same question."""

    def question(entry: dict[str, Any]) -> str:
        asked = [entry[key] for key in ("op", "capability", "dtype", "sizes")]
        return json.dumps(asked, sort_keys=True)

    return list(({question(e): e for e in old} | {question(e): e for e in new}).values())


def write(table: Path, entries: list[dict[str, Any]]) -> None:
    """Write one line per entry, so that a diff shows what has changed."""
    lines = ",\n".join(json.dumps(entry) for entry in entries)
    table.write_text(f"[\n{lines}\n]\n")
    print(f"table: {table}, {len(entries)} entries")


def main() -> int:
    parser = argparse.ArgumentParser("python -m bench.tune", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8.5, help="for this call [8.5]")
    parser.add_argument(
        "--out-dir",
        type=Path,
        metavar="DIR",
        help="of the record, the journal and the table, table.json [results/ and the package's]",
    )
    parser.add_argument("--table", type=Path, help="is read and written")
    parser.add_argument("--record", required=True, help="the record that the table is to cite")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name has TEXT")
    parser.add_argument("--device", choices=("cuda", "cpu"), default=default_device().type)
    parser.add_argument("--tiny", action="store_true", help="a smoke test: nothing to use")
    args = parser.parse_args()
    table = args.table or (TABLE if args.out_dir is None else args.out_dir / "table.json")
    folder = args.out_dir or RESULTS
    if args.tiny and table == TABLE:
        parser.error("a smoke test must not write the table; give --table or --out-dir")
    if not (folder / f"{args.record}.json").exists():
        parser.error(f"there is no record {args.record}.json in {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    known = next((file for file in (table, TABLE) if file.exists()), None)
    entries = [] if known is None else json.loads(known.read_text())
    plan = stages(args.device, args.tiny, args.only)
    journal = Journal(folder / f"{args.record}-tune.journal.jsonl")
    told: set[str] = set()

    def changed() -> None:
        nonlocal entries
        for job, result in state(journal.events).results.items():
            if job in told or not job.startswith("tune: "):
                continue
            told.add(job)
            found = [{**e, "record": args.record} for e in result.get("entries", ())]
            entries = merge(entries, found)
            write(table, entries)
            print(f"{job}: {_summary(result)}", flush=True)

    options = {"only": args.only}
    task = Task("bench.tune", args.device, args.tiny, folder, f"{args.record}-tune", options)
    supervisor = Supervisor(plan, journal, time.time() + 60 * args.minutes, task, changed)
    # The table also gets what an earlier call found.
    changed()
    why = supervisor.run([])
    changed()
    if why is not None:
        print(why)
        return 2
    left = [name for name in supervisor.jobs if name not in state(journal.events).results]
    print(f"left out: {len(left)} of {len(supervisor.jobs)} jobs")
    return 0


def _summary(result: dict[str, Any]) -> str:
    if "entries" not in result:
        return "; ".join(f"FAILED {name}: {why}" for name, why in result["failures"].items())
    lost = {key: len(result[key]) for key in ("wrong", "refused") if result[key]}
    text = f"{result['before_us']:.1f} → {result['us']:.1f} µs, {result['tried']} tried, {lost}"
    return text + (f", cut {result['cut']}" if "cut" in result else "")


if __name__ == "__main__":
    sys.exit(main())
