"""The printed output of the command: a progress bar, a table of measures and its legend."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from multilora.robustness import BUDGETS


class _Row(NamedTuple):
    heading: str  # ↑: higher is better; ↓: lower is better
    path: tuple[str, ...]  # in metrics.json
    decimals: int = 3


_ROWS = (
    _Row("accuracy ↑", ("accuracy",)),
    _Row("NLL ↓", ("nll",)),
    _Row("calibrated NLL ↓", ("calibrated_nll",)),
    _Row("ECE ↓", ("ece",)),
    _Row("Brier ↓", ("brier",)),
    _Row("MI", ("mutual_information",)),
    _Row("corrupted accuracy ↑", ("corrupted", "accuracy")),
    _Row("corrupted NLL ↓", ("corrupted", "nll")),
    _Row("corrupted ECE ↓", ("corrupted", "ece")),
    _Row("corrupted Brier ↓", ("corrupted", "brier")),
    _Row("OOD AUROC ↑", ("auroc_ood",)),
    _Row("OOD AUROC (MI) ↑", ("auroc_ood_mi",)),
    *(_Row(f"accuracy, FGSM ε = {e} ↑", ("fgsm", str(e))) for e in BUDGETS),
    _Row("step ms ↓", ("step_ms",), 1),
)
_LEGEND = {
    "nll": "NLL: negative log-likelihood. ECE: expected calibration error. Brier: squared error of "
    "the probabilities. All are of the particles' mean prediction on the test set.",
    "calibrated_nll": "calibrated NLL: with a temperature that is fitted on one half of the test "
    "set and used on the other.",
    "mutual_information": "MI: mutual information, how much the particles disagree (in nats).",
    "corrupted": "corrupted: the same measures, averaged over disturbed copies of the test set and "
    "other shifted sets.",
    "auroc_ood": "OOD AUROC: how well the prediction's entropy, or MI, tells out-of-distribution "
    "inputs from the test set (0.5 is chance).",
    "fgsm": "FGSM: on test images that an attack on the mean prediction changed by up to ε in each "
    "pixel, whose range is 1.",
    "step_ms": "step ms: median time of a training step in milliseconds.",
}

Result = dict[str, Any]


class Progress:
    """A progress bar on a terminal, nothing elsewhere. It appears with the first step."""

    def __init__(self, title: str):
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[stats]}"),
        )
        self.progress = Progress(*columns, console=Console(stderr=True))
        self.title = title
        self.task: Any = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self.task is not None:
            self.progress.stop()

    def print(self, line: str) -> None:
        self.progress.console.print(line)

    def step(self, step: int, steps: int, stats: dict[str, float]) -> None:
        if self.task is None:
            self.task = self.progress.add_task(self.title, total=steps, stats="")
            self.progress.start()
        first = [name for name in ("loss", "divergence") if name in stats]
        names = [*first, *(name for name in stats if name not in first)]
        shown = "  ".join(f"{name} {stats[name]:.3g}" for name in names)
        self.progress.update(self.task, completed=step, total=steps, stats=shown)


def print_table(columns: Sequence[tuple[str, Result]]) -> None:
    """Print a row for each measure and a column for each result, and a legend."""
    table, console = _markdown()
    table.add_column("")
    for name, _ in columns:
        table.add_column(name, justify="right")
    shown = set()
    for row in _ROWS:
        cells = [_cell(_look_up(result, row.path), row.decimals) for _, result in columns]
        if any(cells):
            table.add_row(row.heading, *cells)
            shown.add(row.path[0])
    console.print(table)
    for key, text in _LEGEND.items():
        if key in shown:
            console.print(text)


#: The measures of one set, with their headings.
_OF_A_SET = {
    "accuracy": "accuracy ↑",
    "nll": "NLL ↓",
    "ece": "ECE ↓",
    "brier": "Brier ↓",
    "mutual_information": "MI",
    "auroc": "AUROC",
    "auroc_mi": "AUROC (MI)",
}


def print_sets(result: Result) -> None:
    """Print a row for the test set and for each shifted and out-of-distribution set of a run."""
    table, console = _markdown()
    for heading in ("set", *_OF_A_SET.values()):
        table.add_column(heading, justify="left" if heading == "set" else "right")
    sets = {"test": result, **result.get("shifted", {}), **result.get("ood", {})}
    for name, measures in sets.items():
        table.add_row(name, *(_cell(measures.get(m), 3) for m in _OF_A_SET))
    console.print(table)
    console.print(
        "AUROC: how well the prediction's entropy, or MI, tells the set from the test set (0.5 is "
        "chance)."
    )


def print_rows(rows: Sequence[dict[str, Any]]) -> None:
    """Print a table of dictionaries with the same keys, without columns that are empty."""
    table, console = _markdown()
    names = [n for n in rows[0] if n != "folder" and any(row[n] is not None for row in rows)]
    for name in names:
        numbers = all(isinstance(row[name], (int, float, type(None))) for row in rows)
        table.add_column(name, justify="right" if numbers else "left")
    for row in rows:
        cells = [row[n] for n in names]
        texts = [f"{c:.4g}" if isinstance(c, float) else str(c) for c in cells]
        table.add_row(*("" if c is None else t for c, t in zip(cells, texts)))
    console.print(table)


def _markdown() -> tuple[Any, Any]:
    """An empty table in Markdown, so that it can be pasted, and the console to print it on."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    # A pipe has no width, so give it one.
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    return Table(box=box.MARKDOWN), console


def _look_up(result: Any, path: tuple[str, ...]) -> float | None:
    for key in path:
        result = result.get(key) if isinstance(result, dict) else None
    return result


def _cell(value: float | None, decimals: int) -> str:
    return "" if value is None else f"{value:.{decimals}f}"
