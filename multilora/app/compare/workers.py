"""The training of one run of a comparison, and the processes that do it."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import shutil
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from multilora.app import soup
from multilora.app.evaluation import evaluate, validate
from multilora.app.folders import CHECKPOINT, METRICS, SET, write_json
from multilora.app.run import load_run, make_task, train
from multilora.app.settings import Settings

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
    for name in (CHECKPOINT, SET):
        (folder / name).unlink(missing_ok=True)


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
    if job.measure == "validation":
        return {"diverged": True, **validate(model, task, combine=job.settings.combine)}
    return {"diverged": True, **evaluate(model, task, combine=job.settings.combine)[0]}


# --- processes -----------------------------------------------------------------------------------


def run_all(
    jobs: Sequence[Job],
    processes: int,
    threads: int,
    stop: Callable[[], bool],
    progress: Callable[[Job], None],
) -> bool:
    """Execute jobs, as many at a time as there are processes; one process is this one.

    Args:
        threads: of each process.
        stop: no further job starts when it returns True.
        progress: is called with each finished job.

    Returns:
        Whether all are done.

    Raises:
        RuntimeError: A job failed, or its process died. The others that were under way are done.
    """
    left = []
    for job in jobs:
        if job.done:
            progress(job)
        else:
            left.append(job)
    failures: list[str] = []

    def end(job: Job, error: str | None) -> None:
        if error:
            failures.append(f"{job.folder}: {error}")
        else:
            progress(job)

    def next_job() -> Job | None:
        return None if failures or not left or stop() else left.pop(0)

    (_here if processes == 1 else _beside)(next_job, end, processes, threads)
    if failures:
        raise RuntimeError("; ".join(failures))
    return not left


def in_a_process(threads: int, function: Callable[..., Any], *args: Any) -> Any:
    """function(*args) in a process of its own, which starts and ends with it.

    Raises:
        RuntimeError: It failed.
    """
    worker = _Worker(threads)
    try:
        worker.start(function, *args)
        error, result = worker.end()
    finally:
        worker.stop()
    if error:
        raise RuntimeError(error)
    return result


_Next = Callable[[], "Job | None"]
_End = Callable[[Job, "str | None"], None]


def _here(next_job: _Next, end: _End, processes: int, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        while job := next_job():
            end(job, _attempt(execute, job)[0])
    finally:
        torch.set_num_threads(before)


def _beside(next_job: _Next, end: _End, processes: int, threads: int) -> None:
    idle: list[_Worker] = []
    busy: dict[Any, tuple[_Worker, Job]] = {}
    try:
        while True:
            while len(busy) < processes and (job := next_job()):
                worker = idle.pop() if idle else _Worker(threads)
                worker.start(execute, job)
                busy[worker.connection] = worker, job
            if not busy:
                return
            for connection in wait(list(busy)):
                worker, job = busy.pop(connection)
                error, _ = worker.end()
                if worker.process.is_alive():
                    idle.append(worker)
                end(job, error)
    finally:
        for worker in [*idle, *(worker for worker, _ in busy.values())]:
            worker.stop()


class _Worker:
    """A process that calls one function after the other, and ends when this process does."""

    def __init__(self, threads: int):
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, threads), daemon=True)
        self.process.start()
        theirs.close()

    def start(self, function: Callable[..., Any], *args: Any) -> None:
        self.connection.send((function, args))

    def end(self) -> tuple[str | None, Any]:
        """Wait for the function's end: (error, None) or (None, result)."""
        try:
            return self.connection.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            return f"its process ended with exit code {self.process.exitcode}", None

    def stop(self) -> None:
        self.connection.close()
        self.process.join()


def _work(connection: Connection, threads: int) -> None:
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    torch.set_num_threads(threads)
    # The other side closes the connection, or has died.
    with contextlib.suppress(EOFError, ConnectionError, KeyboardInterrupt):
        while True:
            function, args = connection.recv()
            connection.send(_attempt(function, *args))


def _end_with_the_parent() -> None:
    """End this process at once when its parent is gone, whatever it is doing.

    It would otherwise finish its run beside a comparison that has been started again on that run.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _attempt(function: Callable[..., Any], *args: Any) -> tuple[str | None, Any]:
    try:
        return None, function(*args)
    except Exception as error:
        return f"{type(error).__name__}: {error}", None


def read_json(file: Path) -> dict[str, Any] | None:
    """What a file holds; None where it is not there."""
    return json.loads(file.read_text()) if file.is_file() else None
