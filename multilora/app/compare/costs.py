"""What a step of each row costs, measured side by side, and how much memory it needs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from multilora.app.compare.plan import Run
from multilora.app.compare.stages import Stages
from multilora.app.compare.suite import Row, known_rows
from multilora.app.compare.workers import Job, execute, in_a_process, read_json
from multilora.app.folders import METRICS, write_json
from multilora.app.run import make_task
from multilora.app.settings import Settings
from multilora.app.steps import Training

#: Steps that are timed, and those before that are not.
_STEPS, _WARM_UP = 20, 3


def measure(stages: Stages) -> bool:
    """Write costs/TASK.json for every task that lacks it. Whether all are there at the end.

    Each row's step is timed in turn with that of the single adapter, in one process, so that a busy
    machine slows both. Its memory is that of three steps in a process of its own.
    """
    for task in stages.plan.tasks:
        file = file_of(stages.root, task)
        if file.is_file():
            continue
        rows = {name: row for name, row in stages.plan.rows.items() if row.part is None}
        settings = {name: _settings(stages, task, row) for name, row in rows.items()}
        single = _settings(stages, task, known_rows()["single"])
        threads = stages.plan.threads
        costs = in_a_process(threads, _side_by_side, settings, single, stages.device)
        for name, own in settings.items():
            if time.monotonic() > stages.deadline:
                return False
            costs[name] |= in_a_process(threads, _needed, _short(stages, task, name, own))
        write_json(file, costs)
    return True


def file_of(root: Path, task: str) -> Path:
    return root / "costs" / f"{task.replace('/', '_')}.json"


def _short(stages: Stages, task: str, name: str, settings: Settings) -> Job:
    return Job(
        replace(settings, steps=_WARM_UP),
        file_of(stages.root, task).with_suffix("") / name,
        measure=stages.plan.tasks[task].measure,
        device=stages.device,
    )


def _needed(job: Job) -> dict[str, Any]:
    """What a short run says of its memory and its particles."""
    execute(job)
    result = read_json(job.folder / METRICS) or {}
    particles = job.settings.entry.trained(job.settings.particles)
    return {
        "memory_mb": result["peak_memory_mb"],
        "trainable": result["trainable_per_particle"] * particles,
        "forward_rows": result["forward_rows"],
    }


def _settings(stages: Stages, task: str, row: Row) -> Settings:
    plan = stages.plan
    plan = replace(plan, rows={row.name: row}, trials={task: {row.source: [{}]}})
    return plan.settings(Run(task, row.name, "final", 0, plan.seeds[0]))


def _side_by_side(
    rows: dict[str, Settings], single: Settings, device: str
) -> dict[str, dict[str, float]]:
    """By row, the median milliseconds of a step, and how many times that of `single` it is."""
    found = {}
    for name, settings in rows.items():
        both = [_steps(settings, device), _steps(single, device)]
        taken: list[list[float]] = [[], []]
        for step in range(_WARM_UP + _STEPS):
            for own, steps in zip(taken, both):
                started = time.perf_counter()
                next(steps)
                if device != "cpu":
                    torch.cuda.synchronize(device)
                if step >= _WARM_UP:
                    own.append(1000 * (time.perf_counter() - started))
        ratios = [ms / of_single for ms, of_single in zip(*taken)]
        found[name] = {"step_ms": statistics.median(taken[0]), "ratio": statistics.median(ratios)}
    return found


def _steps(settings: Settings, device: str) -> Iterator[None]:
    settings = replace(settings, steps=max(settings.steps, _WARM_UP + _STEPS))
    training = Training(settings, make_task(settings, lambda line: None), device)
    training.model.train()
    for x, y in training.batches():
        training.step(x, y)
        yield
