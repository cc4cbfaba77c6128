"""The command `multilora compare`."""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import torch

from multilora import checks
from multilora.app import info
from multilora.app.compare import costs, plan, report
from multilora.app.compare.stages import Stages
from multilora.app.compare.suite import known_rows, recipe, rows, suites, tasks
from multilora.app.options import add_command

_ABOUT = """\
Tune every method with the same budget, train fresh seeds, test the differences, and write a report.

  1. tuning: every method tries the same number of configurations on seeds of their own. The first
     is the documented defaults; learning rates and weight decays are the same for all methods. The
     lowest NLL on validation examples decides; no test example is looked at.
  2. final: the chosen configuration and the default one, on fresh seeds. The reference is trained
     at each method's learning rate too, so that no method is credited with a learning rate.
  3. report: OUT/compare.md, compare.png and compare.json.

A comparison that was stopped goes on when the same command is given again.
"""


def add_parser(commands: Any) -> None:
    text = "find out which method is worth its cost, at equal tuning"
    epilog = f"Rows: {', '.join(known_rows())}."
    parser = add_command(commands, "compare", run, text, _ABOUT, epilog)
    parser.add_argument("--out", metavar="DIR", required=True, help="folder of the comparison")
    parser.add_argument(
        "--report",
        action="store_true",
        help="train nothing; write the report of the runs in --out, or of its compare.json",
    )
    parser.add_argument(
        "--suite",
        choices=suites(),
        default="quick",
        help="tasks, methods and numbers of runs, which the options below replace [%(default)s]",
    )
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="the tasks to train on")
    parser.add_argument("--methods", nargs="+", metavar="ROW", help="the rows of the tables")
    parser.add_argument("--trials", type=int, metavar="N", help="configurations a method")
    parser.add_argument("--tune-seeds", type=int, metavar="N", help="seeds of the tuning")
    parser.add_argument("--seeds", type=int, metavar="N", help="seeds of the final runs")
    parser.add_argument("--steps", type=int, metavar="N", help="steps of a run, in all tasks")
    parser.add_argument(
        "--reference",
        default="ensemble",
        metavar="ROW",
        help="what all are compared to [%(default)s]",
    )
    parser.add_argument("--data", metavar="PATH", help="data of the tasks that come without them")
    parser.add_argument("--model", metavar="NAME", help="model of the tasks that take one")
    parser.add_argument(
        "--jobs", type=int, metavar="N", help="runs at a time [the CPU's cores; 1 on a GPU]"
    )
    parser.add_argument(
        "--max-hours", type=float, metavar="H", help="start no run after this time, and report"
    )
    parser.add_argument("--keep", action="store_true", help="keep the particles of the final runs")
    parser.add_argument("--device", help="device of the models [cuda if there is one, else cpu]")


def run(args: argparse.Namespace) -> int:
    out = Path(args.out)
    if args.report and not (out / plan.PLAN).is_file() and (out / report.JSON).is_file():
        evidence, complete = json.loads((out / report.JSON).read_text()), True
    else:
        evidence, complete = _trained(args, out)
    report.write(evidence, out)
    print(report.summary(evidence))
    print(f"\n{out} holds {report.MARKDOWN}, {report.FIGURE} and {report.JSON}.")
    if not complete:
        print("The time is over; give the same command again to go on.")
    return 0


def _trained(args: argparse.Namespace, out: Path) -> tuple[dict[str, Any], bool]:
    """The evidence in the folder, after the runs, and whether all of them are there."""
    options = _options(args)
    if not args.report:
        planned = _plan(args)
        planned.check()
        plan.keep(planned, out, _command(args))
    kept = plan.read(out)
    stages = Stages(plan.plan_of(kept), out, **options)
    complete = args.report or (stages.run() and costs.measure(stages))
    about = {"command": kept["command"], "environment": info.environment(stages.device)}
    return stages.evidence() | about, complete


def _plan(args: argparse.Namespace) -> plan.Plan:
    known = recipe()
    suite = known["suites"][args.suite]
    given = {n: v for n in ("steps", "model") if (v := getattr(args, n)) is not None}

    def number(name: str) -> int:
        value = getattr(args, name)
        return suite[name] if value is None else value

    return plan.make_plan(
        args.suite,
        tasks(args.tasks or suite["tasks"], args.data, given),
        rows(args.methods or suite["rows"], args.reference),
        args.reference,
        known["space"],
        number("trials"),
        number("tune_seeds"),
        number("seeds"),
    )


#: The options that decide the plan.
_DECIDING = "suite tasks methods trials tune_seeds seeds steps reference data model".split()


def _command(args: argparse.Namespace) -> str:
    """The command that makes this comparison again."""
    words = ["multilora", "compare"]
    for name in _DECIDING:
        value = getattr(args, name)
        if value is not None:
            values = value if isinstance(value, list) else [str(value)]
            words += [f"--{name.replace('_', '-')}", *values]
    return shlex.join([*words, "--out", "DIR"])


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """How and where the stages run."""
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    jobs, hours = args.jobs, args.max_hours
    if jobs is None:
        jobs = len(os.sched_getaffinity(0)) if device == "cpu" else 1
    if hours is not None:
        checks.number("--max-hours", hours, 0, 10_000)
    return {
        "jobs": checks.integer("--jobs", jobs, 1, 1024),
        "device": device,
        "keep": args.keep,
        "deadline": math.inf if hours is None else time.monotonic() + 3600 * hours,
        "on_run": Progress(),
    }


class Progress:
    """Says on stderr how far a stage is: at most one line in ten seconds, and one at its end."""

    def __init__(self) -> None:
        self.last = 0.0

    def __call__(self, stage: str, done: int, of: int) -> None:
        now = time.monotonic()
        if done == of or now - self.last > 10:
            self.last = now
            print(f"{stage}: {done} of {of} runs", file=sys.stderr, flush=True)
