"""The tables of the report, in Markdown that a terminal shows well."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from multilora.app.compare.analysis import PRIMARY, Analysis, Comparison, Measure
from multilora.app.compare.sentences import interval, number, p_value, times
from multilora.app.compare.statistics import difference, paired
from multilora.robustness import BUDGETS

#: Columns of the tables of a task, by caption. None but the primary ones is tested.
_GROUPS: dict[str, tuple[Measure, ...]] = {
    "Quality": (
        Measure("accuracy ↑", ("accuracy",)),
        *PRIMARY[:2],
        Measure("Brier ↓", ("brier",)),
        Measure("ECE ↓", ("ece",)),
    ),
    "Uncertainty": (
        Measure("entropy, right", ("entropy_correct",)),
        Measure("entropy, wrong", ("entropy_incorrect",)),
        Measure("AUROC of errors ↑", ("auroc_misclassification",)),
        Measure("AURC ↓", ("aurc",)),
        PRIMARY[2],
        Measure("OOD AUROC (MI) ↑", ("auroc_ood_mi",)),
        Measure("OOD FPR95 ↓", ("fpr95_ood",)),
    ),
    "Diversity of the particles": (
        Measure("MI", ("mutual_information",)),
        Measure("jensen gap", ("jensen_gap",)),
        Measure("disagreement", ("disagreement",)),
        Measure("Vendi, predictions", ("vendi_prediction",)),
        Measure("Vendi, weights", ("vendi_weights",)),
    ),
    "Shifts and attacks": (
        Measure("corrupted accuracy ↑", ("corrupted", "accuracy")),
        Measure("corrupted NLL ↓", ("corrupted", "nll")),
        *(Measure(f"accuracy, FGSM ε = {e} ↑", ("fgsm", str(e))) for e in BUDGETS),
    ),
}
#: Columns of a table of shifted sets.
_WIDTH = 6


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table with aligned columns; the first is on the left, the others on the right."""
    cells = [list(headings), *map(list, rows)]
    widths = [max(3, *map(len, column)) for column in zip(*cells)]

    def line(row: Sequence[str]) -> str:
        first, *others = (cell.replace("|", "\\|") for cell in row)
        right = [cell.rjust(width) for cell, width in zip(others, widths[1:])]
        return f"| {' | '.join([first.ljust(widths[0]), *right])} |"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([line(cells[0]), f"| {' | '.join(rule)} |", *map(line, cells[1:])])


# --- the summary ---------------------------------------------------------------------------------


def at_equal_k(analysis: Analysis) -> str:
    """Every row against the reference in the primary measures, in the order of the mean ranks."""
    shown = [row for row, entry in analysis.rows.items() if entry["table"] != "compute"]
    # The order of the plan where there are no ranks.
    shown.sort(key=lambda row: analysis.ranks.get(row, (math.inf,))[0])
    places = {measure: _places(analysis, shown, measure) for measure in PRIMARY}
    rows = []
    for row in shown:
        cells = ["reference"] * len(PRIMARY)
        if row != analysis.reference:
            cells = [_difference(test) for test in analysis.tests[row]]
        cells = [
            f"{places[m][row]}. {cell}" if row in places[m] else cell
            for m, cell in zip(PRIMARY, cells)
        ]
        rows.append([analysis.label(row), times(analysis.cost(row)), _rank(analysis, row), *cells])
    return table(["", "training", "mean rank", *(m.heading for m in PRIMARY)], rows)


def _places(analysis: Analysis, rows: Sequence[str], measure: Measure) -> dict[str, int]:
    """The place of each row in a measure, by its difference to the reference, which has 0."""
    index = PRIMARY.index(measure)
    gains = {analysis.reference: 0.0}
    for row in rows:
        if row != analysis.reference and (d := analysis.tests[row][index].difference) is not None:
            gains[row] = measure.sign * d.mean
    if len(gains) == 1:
        return {}
    return {row: 1 + sum(other > gain for other in gains.values()) for row, gain in gains.items()}


def _rank(analysis: Analysis, row: str) -> str:
    if row not in analysis.ranks:
        return ""
    mean, low, high = analysis.ranks[row]
    return f"{mean:.1f} [{low:.1f}, {high:.1f}]"


def _difference(test: Comparison) -> str:
    if test.difference is None:
        return "—"
    return f"{number(test.difference.mean)} {interval(test.difference.interval)} {p_value(test.p)}"


def at_equal_compute(analysis: Analysis) -> str:
    """Every dear row against the row that spends as much on the reference."""
    order = sorted(analysis.beside, key=lambda row: analysis.cost(row) or 0)
    rows = []
    for row in order:
        other, tests = analysis.beside[row]
        name = f"{analysis.label(other)} ({times(analysis.cost(other))})"
        rows.append(
            [analysis.label(row), times(analysis.cost(row)), name, *map(_difference, tests)]
        )
    return table(["", "training", "beside", *(m.heading for m in PRIMARY)], rows)


def wins(analysis: Analysis) -> str:
    """On how many tasks the interval of each row lies on the better side of 0, on both, on the
    worse."""
    rows = []
    for row, tests in analysis.tests.items():
        cells = []
        for test in tests:
            parts = test.difference.by_task.values() if test.difference is not None else ()
            signs = [
                test.measure.sign * math.copysign(1, d.mean) if d.clear else 0
                for d in parts
                if d.interval is not None
            ]
            cells.append("/".join(str(signs.count(s)) for s in (1, 0, -1)) if signs else "")
        rows.append([analysis.label(row), *cells])
    return table(["wins/ties/losses", *(m.heading for m in PRIMARY)], rows)


# --- a task --------------------------------------------------------------------------------------


def of_task(analysis: Analysis, task: str) -> list[str]:
    """The tables of all measures of a task, each with its caption."""
    found = []
    for caption, measures in {**_GROUPS, **_shifts(analysis, task)}.items():
        text = _means(analysis, task, measures)
        if text is not None:
            found.append(f"{caption}:\n\n{text}")
    return found


def _shifts(analysis: Analysis, task: str) -> dict[str, tuple[Measure, ...]]:
    """The accuracies and NLLs on each shifted set, _WIDTH sets in a table."""
    names: dict[str, None] = {}
    for row in analysis.rows:
        for result in analysis.runs("finals", task, row):
            names |= dict.fromkeys(result.get("shifted") or {})
    groups: dict[str, tuple[Measure, ...]] = {}
    for caption, key, arrow in (("Accuracy", "accuracy", "↑"), ("NLL", "nll", "↓")):
        for first in range(0, len(names), _WIDTH):
            own = [*names][first : first + _WIDTH]
            more = ", continued" if first else ""
            groups[f"{caption} on each shifted set{more}"] = tuple(
                Measure(f"{name} {arrow}", ("shifted", name, key)) for name in own
            )
    return groups


def _means(analysis: Analysis, task: str, measures: Sequence[Measure]) -> str | None:
    """The mean ± standard error over the seeds of each row; None where nothing is measured."""
    columns = {
        measure: {
            row: [v for r in analysis.runs("finals", task, row) if (v := measure.of(r)) is not None]
            for row in analysis.rows
        }
        for measure in measures
    }
    shown = {m: values for m, values in columns.items() if any(values.values())}
    rows = [row for row in analysis.rows if analysis.runs("finals", task, row)]
    if not shown or not rows:
        return None
    body = [[analysis.label(r), *(mean(values[r]) for values in shown.values())] for r in rows]
    return table(["", *(measure.heading for measure in shown)], body)


def mean(values: Sequence[float]) -> str:
    """ ".912 ± .004", the mean and its standard error; without the latter for one value."""
    if not values:
        return ""
    if len(values) == 1:
        return number(values[0])
    error = statistics.stdev(values) / math.sqrt(len(values))
    return f"{number(statistics.fmean(values))} ± {number(error)}"


# --- cost and configurations ---------------------------------------------------------------------

_COSTS = {
    "step_ms": ("step ms", 1),
    "ratio": ("× single", 2),
    "memory_mb": ("memory MB", 0),
    "trainable": ("trained numbers", 0),
    "forward_rows": ("forward rows", 0),
    "seconds_tuning": ("tuning s", 0),
}


def costs(analysis: Analysis, task: str) -> str | None:
    own = analysis.evidence["costs"].get(task, {})
    rows = [
        [analysis.label(row), str(entry.get("steps", 1))]
        + [_plain(own[row].get(key), decimals) for key, (_, decimals) in _COSTS.items()]
        for row, entry in analysis.plan["rows"].items()
        if row in own
    ]
    headings = ["", "× steps", *(heading for heading, _ in _COSTS.values())]
    return table(headings, rows) if rows else None


def _plain(value: float | None, decimals: int) -> str:
    return "" if value is None else f"{value:,.{decimals}f}"


def configurations(analysis: Analysis, task: str) -> str | None:
    """What was chosen, what the tuning changed, and how much the trials differ."""
    rows = []
    for row, chosen in analysis.evidence["chosen"].get(task, {}).items():
        settings = ", ".join(f"{n} {_setting(v)}" for n, v in chosen["settings"].items())
        trials = analysis.evidence["trials"].get(task, {}).get(row, [])
        rows.append(
            [
                analysis.label(row),
                settings,
                str(chosen["trial"]),
                "at the edge" if chosen["edge"] else "",
                _tuned(analysis, task, row),
                _spread(trials),
            ]
        )
    if not rows:
        return None
    nll = PRIMARY[0].heading
    headings = ["", "chosen", "trial", "lr", f"{nll} tuned − default", f"{nll} of the trials"]
    return table(headings, rows)


def _setting(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _tuned(analysis: Analysis, task: str, row: str) -> str:
    own, base = (analysis.values(part, row, PRIMARY[0]) for part in ("finals", "defaults"))
    d = difference(paired({task: own[task]}, base))
    return "" if d is None else f"{number(d.mean)} {interval(d.interval)}"


def _spread(trials: Sequence[Any]) -> str:
    """The least, the median and the largest mean validation NLL of the trials."""
    means = [
        statistics.fmean(trial["nll"])
        for trial in trials
        if trial["nll"] and all(v is not None for v in trial["nll"])
    ]
    text = " / ".join(number(f(means)) for f in (min, statistics.median, max)) if means else ""
    lost = sum(any(v is None for v in trial["nll"]) for trial in trials)
    return f"{text} ({lost} undefined)" if lost else text
