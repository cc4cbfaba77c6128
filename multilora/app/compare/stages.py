"""The stages of a comparison: tuning, choice, final runs, cost."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from multilora.app.compare.plan import Plan, Run, at_edge
from multilora.app.compare.workers import SOUPS, Job, read_json, run_all

#: progress(stage, done, of)
OnRun = Callable[[str, int, int], None]


@dataclass
class Stages:
    """A comparison's runs in its folder.

    Attributes:
        jobs: runs at a time.
        keep: whether the particles of the final runs stay on the disk.
        deadline: no run starts after this time of time.monotonic().
    """

    plan: Plan
    root: Path
    jobs: int = 1
    device: str = "cpu"
    keep: bool = False
    deadline: float = math.inf
    on_run: OnRun = field(default=lambda stage, done, of: None)

    def run(self) -> bool:
        """Train what is not trained yet, task by task. Whether everything is there at the end."""
        for task in self.plan.tasks:
            if not self._train(f"{task}: tuning", self.plan.tuning_runs(task)):
                return False
            if not self._train(f"{task}: final", self.plan.final_runs(task, self.chosen(task))):
                return False
        return True

    def _train(self, stage: str, runs: Sequence[Run]) -> bool:
        finished = 0

        def progress(job: Job) -> None:
            nonlocal finished
            finished += 1
            self.on_run(stage, finished, len(runs))

        return run_all(
            [self.job(run) for run in runs],
            self.jobs,
            self.plan.threads,
            lambda: time.monotonic() > self.deadline,
            progress,
        )

    def job(self, run: Run) -> Job:
        final = run.stage == "final"
        parts = [row.part for row in self.plan.rows.values() if row.of == run.row and row.part]
        return Job(
            self.plan.settings(run),
            run.folder(self.root),
            measure="test" if final else self.plan.tasks[run.task].measure,
            soups=tuple(part for part in parts if part != "calibrated") if final else (),
            keep=self.keep and final,
            device=self.device,
        )

    def trials(self, task: str) -> dict[str, list[dict[str, Any]]]:
        """What the tuning of a task found, by row: the settings, NLL by seed and seconds."""
        found: dict[str, list[dict[str, Any]]] = {}
        for row in self.plan.tuned:
            found[row.name] = []
            for trial, config in enumerate(self.plan.trials[task][row.name]):
                results = [
                    result
                    for seed in self.plan.tune_seeds
                    if (result := self._result(Run(task, row.name, "tune", trial, seed)))
                ]
                found[row.name].append(
                    {
                        "settings": config,
                        "nll": [_validation_nll(result) for result in results],
                        "seconds": sum(result.get("seconds") or 0 for result in results),
                    }
                )
        return found

    def chosen(self, task: str) -> dict[str, int]:
        """The trial of the lowest mean NLL, by tuned row; the first of equal ones.

        A row is left out while one of its tuning runs is missing.
        """
        found = {}
        for row, trials in self.trials(task).items():
            if all(len(trial["nll"]) == len(self.plan.tune_seeds) for trial in trials):
                means = [statistics.fmean(trial["nll"]) for trial in trials]
                found[row] = means.index(min(means))
        return found

    def evidence(self) -> dict[str, Any]:
        """All that the runs in the folder measured; see `report`."""
        parts: dict[str, Any] = {
            name: {} for name in ("finals", "defaults", "controls", "trials", "chosen", "costs")
        }
        missing = []
        for task in self.plan.tasks:
            trials, chosen = self.trials(task), self.chosen(task)
            parts["trials"][task] = trials
            parts["chosen"][task] = {
                row: {
                    "trial": trial,
                    "settings": self._shown(task, row, trial),
                    "edge": at_edge(self.plan, task, row, trial),
                }
                for row, trial in chosen.items()
            }
            for name in ("finals", "defaults", "controls"):
                parts[name][task] = {}
            for row in self.plan.rows.values():
                tried = chosen.get(row.source)
                if tried is None:
                    missing.append(f"{task}, {row.label}: the tuning is not complete.")
                    continue
                finals = self._finals(task, row.name, tried)
                lacking = len(self.plan.seeds) - len(finals)
                if lacking:
                    missing.append(f"{task}, {row.label}: {lacking} final runs.")
                parts["finals"][task][row.name] = finals
                if row.of is None:
                    parts["defaults"][task][row.name] = self._finals(task, row.name, 0)
                if self.plan.shares_lr(row):
                    control = self._finals(task, self.plan.reference, tried)
                    parts["controls"][task][row.name] = control
            parts["costs"][task] = self._costs(task, trials)
        return {"plan": self._plan(), **parts, "missing": missing}

    def _finals(self, task: str, row: str, trial: int) -> dict[str, dict[str, Any]]:
        """The measures of a row's final runs, by seed."""
        part, source = self.plan.rows[row].part, self.plan.rows[row].source
        found = {}
        for seed in self.plan.seeds:
            run = Run(task, source if part else row, "final", trial, seed)
            result = self._result(run)
            if result and part == "calibrated":
                result = result | result.get("calibrated", {})
            elif result and part:
                result = (read_json(run.folder(self.root) / SOUPS) or {}).get(part)
            if result:
                found[str(seed)] = result
        return found

    def _result(self, run: Run) -> dict[str, Any] | None:
        return read_json(run.folder(self.root) / "metrics.json")

    def _shown(self, task: str, row: str, trial: int) -> dict[str, Any]:
        """The configuration of a trial, with the learning rate and weight decay of the defaults."""
        settings = self.plan.settings(Run(task, row, "final", trial, self.plan.seeds[0]))
        own = {"lr": settings.lr, "weight_decay": settings.weight_decay}
        return own | self.plan.trials[task][row][trial]

    def _costs(self, task: str, trials: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        costs = read_json(self.root / "costs" / f"{task.replace('/', '_')}.json") or {}
        for row in self.plan.rows.values():
            own = costs.get(row.name, costs.get(row.source))
            if own is not None:
                tried = trials.get(row.source, [])
                costs[row.name] = own | {"seconds_tuning": sum(t["seconds"] for t in tried)}
        return costs

    def _plan(self) -> dict[str, Any]:
        plan, flat = self.plan, self.plan.flat()
        own = ("hash", "suite", "reference", "tune_seeds", "seeds", "rows", "tasks", "threads")
        return {name: flat[name] for name in own} | {
            "trials": len(next(iter(next(iter(plan.trials.values())).values())))
        }


def _validation_nll(result: Mapping[str, Any]) -> float:
    found = result.get("validation", result)["nll"]
    return math.inf if found is None else found
