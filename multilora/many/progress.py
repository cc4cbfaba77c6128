"""A bar for each run, on a terminal with rich; nothing elsewhere."""

from __future__ import annotations

import sys
from typing import Any


class Bars:
    """Bars of the runs that are under way; quiet where `shown` is False or rich is missing."""

    def __init__(self, shown: bool):
        self._progress: Any = None
        self._tasks: dict[str, Any] = {}
        if not shown or not sys.stderr.isatty():
            return
        try:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
        except ModuleNotFoundError:
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[stats]}"),
        )
        self._progress = Progress(*columns, console=Console(stderr=True))

    def __enter__(self) -> Bars:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            self._progress.stop()

    def step(self, name: str, step: int, steps: int, loss: float) -> None:
        """A run has taken a step."""
        if self._progress is None:
            return
        if name not in self._tasks:
            self._tasks[name] = self._progress.add_task(name, total=steps, stats="")
        self._progress.update(self._tasks[name], completed=step, stats=f"loss {loss:.3g}")

    def end(self, name: str, how: str) -> None:
        """A run has ended."""
        if self._progress is not None and name in self._tasks:
            self._progress.update(self._tasks[name], stats=how)
