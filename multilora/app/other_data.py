"""The data sets beside a task's own that a command measures: --shift, --ood and --corrupt."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch.utils.data import Dataset

from multilora.app.settings import Settings
from multilora.app.tasks.task import Report, Task
from multilora.integrations import corruptions, shifts


def add_sets(task: Task, settings: Settings, report: Report) -> Task:
    """The task with the sets that the settings name beside its own.

    Raises:
        ValueError: The task has no examples from files; a folder or a file does not fit the task;
            or two sets have one name.
        FileNotFoundError: A folder or a file is missing.
    """
    shifted, ood = dict(task.shifted), dict(task.ood)
    for name, path in settings.shift:
        if task.read_set is not None:
            _add(shifted, {name: task.read_set(path, True)})
            continue
        found = shifts.shifted_sets(path, _transform(task, settings), task.classes, report)
        _add(shifted, {f"{name}/{part}" if part else name: d for part, d in found.items()})
    for name, path in settings.ood:
        if task.read_set is not None:
            _add(ood, {name: task.read_set(path, False)})
        else:
            _add(ood, {name: shifts.unlabelled(path, _transform(task, settings))})
    if settings.corrupt:
        if task.normalisation is None:
            raise ValueError(f"--corrupt is for tasks of images; got the task {settings.task!r}")
        _add(shifted, corruptions.corrupted_sets(task.test, *task.normalisation))
    return replace(task, shifted=shifted, ood=ood)


def _transform(task: Task, settings: Settings) -> Callable[[Any], Any]:
    if task.transform is None:
        raise ValueError(
            "--shift and --ood are for tasks that read images or texts from files: images, vtab, "
            f"clip, text, sentiment; got the task {settings.task!r}"
        )
    return task.transform


def _add(sets: dict[str, Dataset], more: dict[str, Dataset]) -> None:
    twice = sorted(sets.keys() & more.keys())
    if twice:
        raise ValueError(f"the set {twice[0]!r} is there already: give it another NAME")
    sets.update(more)
