"""python -m bench.gpu: is multilora right on this GPU, and how fast, in calls of under ten minutes.

The plan (bench.plan, --plan) has stages of groups of jobs. Every group runs in a process of its
own: an illegal address, a hang, a wrong result or too little memory costs what was running, and is
recorded with its message. Everything is in a journal, NAME.journal.jsonl, when it is known, and the
record, NAME.json, is made from it; a second call with the same --out and --out-dir goes on behind
the first, also where that was killed.

No peer is compared whose outputs are wrong, and no kernel is timed that failed its correctness.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from bench import goals, record
from bench.compare import line
from bench.device import default_device
from bench.jobs import Group, Job, Stage, shown
from bench.journal import Journal, state
from bench.record import RESULTS, commit
from bench.supervise import Supervisor, Task


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m bench.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="gpu", metavar="NAME", help="the record is NAME.json")
    parser.add_argument("--out-dir", type=Path, default=RESULTS, metavar="DIR", help="[results/]")
    parser.add_argument("--minutes", type=float, default=8.5, help="for this call [8.5]")
    parser.add_argument(
        "--only",
        action="append",
        metavar="TEXT",
        help="stages, groups and jobs whose name has TEXT; may be given again",
    )
    parser.add_argument(
        "--again", action="append", default=[], metavar="TEXT", help="forget results of such jobs"
    )
    parser.add_argument(
        "--failed", action="store_true", help="forget results with a failure, and run them again"
    )
    parser.add_argument("--plan", action="store_true", help="print the plan, and run nothing")
    parser.add_argument("--device", choices=("cuda", "cpu"), default=default_device().type)
    parser.add_argument("--tiny", action="store_true", help="a smoke test: nothing to quote")
    parser.add_argument("--no-tests", action="store_true", help="leave out the operators' tests")
    parser.add_argument("--commit", help="for the record, where no repository can tell")
    # For rehearsals: a plan with faults, and the seconds that its jobs take.
    parser.add_argument("--plan-of", default="bench.plan", metavar="MODULE", help=argparse.SUPPRESS)
    parser.add_argument("--slow", type=float, default=0.0, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    own = args.plan_of == "bench.plan"
    options = {"tests": not args.no_tests} if own else {"slow": args.slow}
    plan = importlib.import_module(args.plan_of)
    if args.plan:
        print(shown(plan.stages("cuda", False, **options)))
        return 0
    if args.device == "cpu" and not args.tiny:
        parser.error("the sizes are a GPU's; on a CPU, add --tiny for a smoke test")
    return Session(args, plan.stages(args.device, args.tiny, **options), options).run()


class Session:
    """One call of the command: it adds to the journal and writes the record."""

    def __init__(self, args: argparse.Namespace, stages: list[Stage], options: dict[str, Any]):
        self.args, self.stages = args, stages
        self.until = time.time() + 60 * args.minutes
        args.out_dir.mkdir(parents=True, exist_ok=True)
        self.file = args.out_dir / f"{args.out}.json"
        self.journal = Journal(args.out_dir / f"{args.out}.journal.jsonl")
        task = Task(args.plan_of, args.device, args.tiny, args.out_dir, args.out, options)
        self.supervisor = Supervisor(stages, self.journal, self.until, task, self.write)
        self.told = len(self.journal.events)

    def run(self) -> int:
        earlier = state(self.journal.events)
        self.journal.add(
            event="call",
            date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            commit=self.args.commit or commit(),
            minutes=self.args.minutes,
            only=self.args.only,
            card=self.supervisor.card.described(),
        )
        commits = {call["commit"] for call in earlier.calls} - {None}
        if earlier.results and commits != {self.journal.events[-1]["commit"]}:
            print(f"{len(earlier.results)} results are there, of {', '.join(sorted(commits))}")
        why = self.supervisor.run(self.again(earlier.results), self.wanted)
        self.write()
        if why is not None:
            print(why)
            return 2
        return self.report()

    def wanted(self, stage: Stage, group: Group, job: Job) -> bool:
        names = (stage.name, group.name, job.name)
        # Jobs that always run: without the build, the backend "cuda" has no kernels.
        return (
            not self.args.only
            or job.always
            or any(text in name for text in self.args.only for name in names)
        )

    def again(self, results: dict[str, dict[str, Any]]) -> list[str]:
        """The jobs whose results are forgotten: those of --again, and with --failed those with a
        failure, which includes cases without a peer that failed its correctness."""
        names = [n for n in self.supervisor.jobs if any(text in n for text in self.args.again)]
        if self.args.failed:
            names += [name for name, result in results.items() if result.get("failures")]
        return names

    def write(self) -> None:
        """Write the record, and print a line about everything that is new."""
        new, self.told = self.journal.events[self.told :], len(self.journal.events)
        for event in new:
            if event["event"] == "done":
                print(told(event["job"], event["result"], self.supervisor.jobs), flush=True)
        kind = "gpu" if self.args.device == "cuda" else "smoke"
        found = record.build(self.journal.events, self.stages, kind, self.args.tiny)
        record.write(self.file, found)

    def report(self) -> int:
        found = record.build(self.journal.events, self.stages, "", self.args.tiny)
        if self.args.device == "cuda":
            print(*goals.judge(found), sep="\n")
        wrong = record.wrong(found)
        for name in wrong:
            print(f"WRONG {name}")
        left = found["left_out"]
        print(f"left out: {len(left)} of {len(self.supervisor.jobs)} jobs; cut: {found['cut']}")
        print(f"record: {self.file}")
        return 1 if wrong else 0


def told(name: str, result: dict[str, Any], jobs: dict[str, Job]) -> str:
    """A job's result in one line."""
    job = jobs.get(name)
    if job is not None and job.case is not None:
        group, _, rest = name.partition(", ")
        return line({"group": group, "name": rest, "failures": {}, **result})
    parts = [name]
    parts += [f"FAILED {peer}: {why}" for peer, why in result.get("failures", {}).items()]
    parts += [f"skipped {peer}: {why}" for peer, why in result.get("skipped", {}).items()]
    return "  ".join(parts) if len(parts) > 1 else f"{name}  ok"


if __name__ == "__main__":
    sys.exit(main())
