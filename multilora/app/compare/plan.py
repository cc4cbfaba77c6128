"""The runs of a comparison, all of them decided before the first one starts."""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from multilora import checks
from multilora.app.compare.suite import Row, TaskEntry
from multilora.app.folders import write_json
from multilora.app.options import described
from multilora.app.settings import Settings, recommended

PLAN = "plan.json"
#: The first seeds of the final runs and of the tuning, which share none. Those of the first
#: hundred served to choose defaults.
_FINAL, _TUNING = 100, 100_000


@dataclass(frozen=True)
class Run:
    """One run: its folder is runs/TASK/ROW/STAGE-TRIAL-SEED."""

    task: str
    row: str
    stage: str  # "tune" or "final"
    trial: int
    seed: int

    def folder(self, root: Path) -> Path:
        name = f"{self.stage}-{self.trial:02d}-{self.seed}"
        return root / "runs" / self.task.replace("/", "_") / self.row / name


@dataclass(frozen=True)
class Plan:
    """What a comparison trains.

    Attributes:
        reference: the row that all others are compared to.
        trials: the configurations that each tuned row tries on each task: task -> row -> list.
            Number 0 is empty: the documented defaults. Trial t has the same learning rate and
            weight decay in all rows that take them from the shared space.
        tune_seeds, seeds: of the tuning and of the final runs; they share none.
        threads: of every run on a CPU, so that its numbers do not depend on how many run at a time.
    """

    suite: str
    tasks: Mapping[str, TaskEntry]
    rows: Mapping[str, Row]
    reference: str
    trials: Mapping[str, Mapping[str, list[dict[str, Any]]]]
    tune_seeds: list[int]
    seeds: list[int]
    threads: int = 1

    @property
    def tuned(self) -> list[Row]:
        return [row for row in self.rows.values() if row.of is None]

    def tuning_runs(self, task: str) -> list[Run]:
        """The same number for each tuned row."""
        return [
            Run(task, row.name, "tune", trial, seed)
            for row in self.tuned
            for trial in range(len(self.trials[task][row.name]))
            for seed in self.tune_seeds
        ]

    def final_runs(self, task: str, chosen: Mapping[str, int]) -> list[Run]:
        """Every row at its chosen trial and each tuned one at its defaults, and the controls.

        The control of a row is the reference at the row's learning rate and weight decay. As the
        reference has no other numbers, that is the reference at the row's trial.
        """
        pairs = [(row.name, chosen[row.source]) for row in self.rows.values() if not row.part]
        pairs += [(row.name, 0) for row in self.tuned]
        pairs += [(self.reference, chosen[row.name]) for row in self.tuned if self.shares_lr(row)]
        return [
            Run(task, row, "final", trial, seed)
            for row, trial in dict.fromkeys(pairs)
            for seed in self.seeds
        ]

    def shares_lr(self, row: Row) -> bool:
        """Whether the row's learning rates are those of all, so that it has a control."""
        return "lr" not in self.rows[row.source].space

    def settings(self, run: Run) -> Settings:
        task, row = self.tasks[run.task], self.rows[run.row]
        given: dict[str, Any] = {**task.settings, **row.settings}
        if run.stage == "tune":
            given |= task.tuning
        own = dict(self.trials[run.task][row.source][run.trial])
        known = described(Settings)
        given |= {name: own.pop(name) for name in [*own] if name in known}
        kind = given.pop("task")
        if "steps" in given or row.steps > 1:
            steps = given.get("steps") or recommended(kind, row.method, **given).steps
            given["steps"] = steps * row.steps
        args = own | dict(row.method_args)
        return recommended(kind, row.method, seed=run.seed, method_args=args, **given)

    def check(self) -> None:
        """Raise ValueError where a row has settings that mean nothing."""
        for task in self.tasks:
            for row in self.rows.values():
                if not row.part:
                    self.settings(Run(task, row.name, "final", 0, self.seeds[0]))

    def flat(self) -> dict[str, Any]:
        """The plan as plan.json holds it, with the hash of all the rest."""
        values = json.loads(json.dumps(asdict(self)))
        text = json.dumps(values, sort_keys=True)
        return {"hash": hashlib.sha256(text.encode()).hexdigest()[:16], **values}


def make_plan(
    suite: str,
    tasks: Mapping[str, TaskEntry],
    rows: Mapping[str, Row],
    reference: str,
    space: Mapping[str, Any],
    trials: int,
    tune_seeds: int,
    seeds: int,
) -> Plan:
    """Draw the configurations of every tuned row on every task; the same arguments give the same.

    Args:
        space: what all rows share: a number's name -> {"log": [low, high]}, a range on a
            logarithmic scale, or {"choices": [...]}.
        trials: configurations a row, with the defaults.
    """
    checks.integer("--trials", trials, 1, 1000)
    checks.integer("--tune-seeds", tune_seeds, 1, 1000)
    checks.integer("--seeds", seeds, 1, 10_000)
    return Plan(
        suite=suite,
        tasks=tasks,
        rows=rows,
        reference=reference,
        trials={
            name: {
                row.name: [{}] + [_drawn(row, {**space, **task.space}, t) for t in range(1, trials)]
                for row in rows.values()
                if row.of is None
            }
            for name, task in tasks.items()
        },
        tune_seeds=[_TUNING + i for i in range(tune_seeds)],
        seeds=[_FINAL + i for i in range(seeds)],
    )


def _drawn(row: Row, shared: Mapping[str, Any], trial: int) -> dict[str, Any]:
    """Configuration number `trial`. What all rows share is drawn without the row's name."""
    space = {name: ("", values) for name, values in shared.items()}
    space |= {name: (row.name, values) for name, values in row.space.items()}
    return {
        name: _draw(random.Random(f"{owner} {name} {trial}"), values)
        for name, (owner, values) in space.items()
    }


def _draw(generator: random.Random, values: Mapping[str, Any]) -> Any:
    if "choices" in values:
        return generator.choice(values["choices"])
    low, high = map(math.log, values["log"])
    return float(f"{math.exp(generator.uniform(low, high)):.3g}")


def keep(plan: Plan, root: Path, command: str) -> None:
    """Write the plan into the folder, with the command, or make sure that the one there is this.

    Raises:
        ValueError: The folder holds another comparison, or other files.
    """
    file, flat = root / PLAN, plan.flat()
    if not file.is_file():
        # One that was killed at once leaves a temporary file.
        if root.is_dir() and any(not f.match(f".{PLAN}.*.tmp") for f in root.iterdir()):
            raise ValueError(f"{root} holds files but no comparison; choose another --out")
        root.mkdir(parents=True, exist_ok=True)
        write_json(file, {"command": command, **flat})
        return
    there = read(root)
    if there["hash"] != flat["hash"]:
        different = sorted(n for n in flat if n != "hash" and there.get(n) != flat[n])
        raise ValueError(
            f"{root} holds another comparison, with other {', '.join(different)}: give the options "
            "that it was started with, or another --out"
        )


def read(root: Path) -> dict[str, Any]:
    """The plan.json of a comparison's folder."""
    file = root / PLAN
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: {root} holds no comparison")
    try:
        values = json.loads(file.read_text())
        plan_of(values)
        return values
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{file} is damaged: {error}") from error


def plan_of(values: Mapping[str, Any]) -> Plan:
    """The plan that `Plan.flat` gave."""
    own = {name: value for name, value in values.items() if name not in ("hash", "command")}
    return Plan(
        **own
        | {
            "tasks": {name: TaskEntry(**entry) for name, entry in own["tasks"].items()},
            "rows": {name: Row(**row) for name, row in own["rows"].items()},
        }
    )


def at_edge(plan: Plan, task: str, row: str, trial: int) -> bool:
    """Whether the learning rate of a trial is the smallest or the largest of those tried."""
    rates = [
        plan.settings(Run(task, row, "tune", t, plan.tune_seeds[0])).lr
        for t in range(len(plan.trials[task][row]))
    ]
    return len(rates) > 1 and rates[trial] in (min(rates), max(rates))
