"""The training of one run of a comparison, and the processes that do it."""

from __future__ import annotations

import json
import multiprocessing
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from multilora.app import soup
from multilora.app.evaluation import evaluate
from multilora.app.folders import METRICS, write_json
from multilora.app.resume import CHECKPOINT
from multilora.app.run import load_run, make_task, train
from multilora.app.settings import Settings
from multilora.app.tasks.task import Task

#: The measures of the soups of a run, by the soup's kind.
SOUPS = "soups.json"


@dataclass(frozen=True)
class Job:
    """A run to be trained, and what is measured of it.

    Attributes:
        soups: the kinds that are measured.
        measure: as in `train`.
        keep: whether the particles stay in the folder.
    """

    settings: Settings
    folder: Path
    measure: str = "test"
    soups: tuple[str, ...] = ()
    keep: bool = False
    device: str = "cpu"

    @property
    def done(self) -> bool:
        files = [METRICS, *([SOUPS] if self.soups else [])]
        return all((self.folder / name).is_file() for name in files)


def execute(job: Job) -> None:
    """Train the run, unless it is done, and go on with one that was stopped.

    A run that diverges is measured as a prediction of the training set's class frequencies,
    whatever the input is; its metrics.json has "diverged".
    """
    if not job.done:
        try:
            if not (job.folder / METRICS).is_file():
                train(
                    job.settings,
                    job.folder,
                    resume=True,
                    device=job.device,
                    save_every=500,
                    report=_nothing,
                    measure=job.measure,
                    pictures=False,
                )
            if job.soups:
                write_json(job.folder / SOUPS, _soups(job))
        except FloatingPointError:
            result = _of_the_prior(job)
            if job.soups:
                write_json(job.folder / SOUPS, dict.fromkeys(job.soups, result))
            write_json(job.folder / METRICS, result)
    if not job.keep:
        _forget(job.folder)


def _nothing(line: str) -> None:
    pass


def _soups(job: Job) -> dict[str, Any]:
    model, task, settings = load_run(job.folder, _nothing)
    return {kind: soup.measured(model, task, settings, kind)[0][1] for kind in job.soups}


def _forget(folder: Path) -> None:
    """Remove the particles and the checkpoint of a run, which take most of its place."""
    for particle in folder.glob("particle_*"):
        shutil.rmtree(particle)
    (folder / CHECKPOINT).unlink(missing_ok=True)


class _Prior(nn.Module):
    """One particle that predicts the same log-probabilities (C,) for every input."""

    num_particles = 1

    def __init__(self, log_p: Tensor):
        super().__init__()
        self.log_p = log_p

    def in_chunks(self, size: int, run: Callable[[], Tensor]) -> Tensor:
        return run()

    def forward(self, x: Any) -> Tensor:
        first = x if isinstance(x, Tensor) else next(iter(x.values()))
        return self.log_p.expand(1, len(first), -1)


def _of_the_prior(job: Job) -> dict[str, Any]:
    task = replace(make_task(job.settings, _nothing), predict=lambda model, x: model(x))
    examples: Any = task.train
    labels = torch.tensor([int(examples[i][1]) for i in range(len(examples))])
    counts = labels.bincount(minlength=len(task.classes)).float()
    # A class without a training example is possible all the same.
    model: Any = _Prior(((counts + 1) / (counts + 1).sum()).log())
    return {"diverged": True, **_measured(model, task, job)}


def _measured(model: Any, task: Task, job: Job) -> dict[str, Any]:
    return evaluate(model, task, combine=job.settings.combine)[0]


# --- processes -----------------------------------------------------------------------------------


def run_all(
    jobs: Sequence[Job],
    processes: int,
    threads: int,
    stop: Callable[[], bool],
    progress: Callable[[Job], None],
) -> bool:
    """Execute jobs, as many at a time as there are processes.

    Args:
        threads: of each process.
        stop: no further job starts when it returns True.
        progress: is called with each finished job.

    Returns:
        Whether all are done.

    Raises:
        RuntimeError: A job failed, or its process died. The others that were under way are done.
    """
    left = [job for job in jobs if not job.done]
    for job in jobs:
        if job.done:
            progress(job)
    workers: dict[Connection, tuple[Any, Job]] = {}
    context = multiprocessing.get_context("spawn")
    idle: list[tuple[Connection, Any]] = []
    failures: list[str] = []
    try:
        while workers or (left and not failures and not stop()):
            while left and not failures and not stop() and len(workers) < processes:
                connection, process = idle.pop() if idle else _started(context, threads)
                job = left.pop(0)
                connection.send(job)
                workers[connection] = process, job
            for ready in wait(list(workers)):
                process, job = workers.pop(ready)  # type: ignore[index]
                try:
                    error = ready.recv()  # type: ignore[union-attr]
                except EOFError:
                    process.join()
                    error = f"its process ended with {process.exitcode}"
                else:
                    idle.append((ready, process))  # type: ignore[arg-type]
                if error:
                    failures.append(f"{job.folder}: {error}")
                else:
                    progress(job)
    finally:
        for connection, process in [*idle, *((c, p) for c, (p, _) in workers.items())]:
            connection.close()
            process.join()
    if failures:
        raise RuntimeError("; ".join(failures))
    return not left


def _started(context: Any, threads: int) -> tuple[Connection, Any]:
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs, threads), daemon=True)
    process.start()
    theirs.close()
    return ours, process


def _work(connection: Connection, threads: int) -> None:
    """Execute the jobs that come, until the other side is closed or has died."""
    torch.set_num_threads(threads)
    while True:
        try:
            job = connection.recv()
        except (EOFError, OSError, KeyboardInterrupt):
            return
        error = None
        try:
            execute(job)
        except KeyboardInterrupt:
            return
        except Exception as failure:
            error = f"{type(failure).__name__}: {failure}"
        connection.send(error)


def metrics_of(folder: Path) -> dict[str, Any] | None:
    """What a run's metrics.json holds; None where the run is not done."""
    file = folder / METRICS
    if not file.is_file():
        return None
    return json.loads(file.read_text())

