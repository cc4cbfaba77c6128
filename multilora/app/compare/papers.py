"""The tables of the source papers, in their layout, from what a comparison measured."""

from __future__ import annotations

import statistics
from typing import Any

from multilora.app import recipes
from multilora.app.compare.analysis import Analysis, Measure
from multilora.app.compare.tables import table


def of_papers(analysis: Analysis) -> list[str]:
    """Each table of recipes/papers.json of whose data sets the comparison has one.

    A cell is the mean over the final runs. What was not measured is empty, and so is an average
    over data sets of which one was not.
    """
    known = recipes.read("papers")
    found = []
    for layout in known["tables"]:
        names = recipes.read(layout["data"])["datasets"]
        tasks = {layout["prefix"] + name: entry for name, entry in names.items()}
        if tasks.keys() & analysis.tasks.keys():
            rows = known["rows"][layout["rows"]]
            found.append(f"{layout['title']}:\n\n{_of(analysis, layout, tasks, rows)}")
    return found


def _of(
    analysis: Analysis, layout: dict[str, Any], tasks: dict[str, Any], rows: dict[str, str | None]
) -> str:
    measure = Measure("", tuple(layout["measure"]))

    def cells(row: str | None) -> list[str]:
        values = [_mean(analysis, measure, task, row) for task in tasks]
        complete = [v for v in values if v is not None]
        values.append(statistics.fmean(complete) if len(complete) == len(tasks) else None)
        return [
            "" if v is None else f"{layout['scale'] * v:.{layout['decimals']}f}" for v in values
        ]

    headings = [entry.get("name", task) for task, entry in tasks.items()]
    return table(["", *headings, "AVG"], [[label, *cells(row)] for label, row in rows.items()])


def _mean(analysis: Analysis, measure: Measure, task: str, row: str | None) -> float | None:
    if row is None:
        return None
    values = [v for r in analysis.runs("finals", task, row) if (v := measure.of(r)) is not None]
    return statistics.fmean(values) if values else None
