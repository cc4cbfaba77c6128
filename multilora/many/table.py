"""What became of the runs: a row for each."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from multilora import atomic
from multilora.many.runs import TABLE, TABLE_CSV

#: What a clock decides among the numbers of a row.
MACHINE = ("seconds", "rows_per_second")


@dataclass
class Row:
    """What became of a run.

    Attributes:
        status: "finished", "stopped early" or "failed".
        error: why it failed.
        steps: how many it took.
        train_loss: the mean over its steps.
        measures: of the eval_dataset, at the end: eval_loss, eval_accuracy, ...
        metric: the number that `keep` goes by, one of the measures, or the train_loss without any;
            a run whose evaluation does not have it is kept.
        best_step: the step of the best model, where the run ends with that.
        rows: how many examples it has trained on.
        seconds: in which it was under way, with others.
        folder: of its adapter; None if it was not kept.
        adapter: its tensors under PEFT's names, where nothing is written.
    """

    name: str
    status: str
    steps: int = 0
    train_loss: float | None = None
    measures: dict[str, float] = field(default_factory=dict)
    metric: float | None = None
    best_step: int | None = None
    rows: int = 0
    seconds: float = 0.0
    error: str | None = None
    folder: str | None = None
    adapter: dict[str, Tensor] | None = None

    def flat(self) -> dict[str, Any]:
        """The row as the table has it."""
        speed = self.rows / self.seconds if self.seconds else None
        plain = {k: v for k, v in vars(self).items() if k not in ("measures", "adapter")}
        error, folder = plain.pop("error"), plain.pop("folder")
        last = {"rows_per_second": speed, "error": error, "folder": folder}
        return {n: _defined(v) for n, v in (plain | self.measures | last).items()}


class Results(Sequence[Row]):
    """The rows of all runs, in their order; also by name. Printed, it is a table."""

    def __init__(self, rows: Sequence[Row]):
        self.rows = list(rows)

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str):
            return next(row for row in self.rows if row.name == key)
        return self.rows[key]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def table(self) -> list[dict[str, Any]]:
        """A dictionary for each run, all with the same keys."""
        flat = [row.flat() for row in self.rows]
        names = dict.fromkeys(name for row in flat for name in row)
        # Measures stand in front of what the clock and errors say.
        last = [*MACHINE, "error", "folder"]
        order = [n for n in names if n not in last] + last
        return [{name: row.get(name) for name in order} for row in flat]

    def write(self, folder: Path) -> None:
        """Write table.json and table.csv."""
        table = self.table()
        atomic.write_text(folder / TABLE, json.dumps(table, indent=2) + "\n")
        text = io.StringIO()
        writer = csv.DictWriter(text, list(table[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)
        atomic.write_text(folder / TABLE_CSV, text.getvalue())

    def __str__(self) -> str:
        table = self.table()
        names = [n for n in table[0] if n != "folder" and any(r[n] is not None for r in table)]
        cells = [names, *([_cell(row[n]) for n in names] for row in table)]
        widths = [max(len(row[i]) for row in cells) for i in range(len(names))]
        lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths)).rstrip() for row in cells]
        return "\n".join(lines)


def best(rows: Sequence[Row], greater: bool) -> list[Row]:
    """The rows with a finite metric, from the best one down; those that ended first come first."""
    ranked = [(r.metric, r) for r in rows if r.metric is not None and math.isfinite(r.metric)]
    return [row for _, row in sorted(ranked, key=lambda pair: pair[0] * (-1 if greater else 1))]


def stored(row: Row) -> dict[str, Any]:
    return dict(vars(row))


def restored(state: Mapping[str, Any]) -> Row:
    return Row(**state)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _defined(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
