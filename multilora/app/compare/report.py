"""The report of a comparison: compare.md, compare.png and compare.json."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from multilora import atomic
from multilora.app.compare import sentences, tables
from multilora.app.compare.analysis import PRIMARY, Analysis
from multilora.app.compare.figure import pareto_diagram
from multilora.app.compare.papers import of_papers
from multilora.app.folders import to_json

MARKDOWN, FIGURE, JSON = "compare.md", "compare.png", "compare.json"


def write(evidence: Mapping[str, Any], folder: Path) -> None:
    """Write compare.md, compare.png and compare.json; the same evidence gives the same texts.

    Args:
        evidence: what `Stages.evidence` returns with "environment" and "command". Any part may be
            incomplete: what is missing is said.
        folder: exists.
    """
    analysis = _analysis(evidence)
    atomic.write_text(folder / MARKDOWN, _markdown(analysis))
    parts = {**analysis.evidence, "statistics": analysis.flat()}
    lines = [f"{json.dumps(name)}: {_compact(part)}" for name, part in parts.items()]
    atomic.write_text(folder / JSON, "{\n" + ",\n".join(lines) + "\n}\n")
    pareto_diagram(analysis, folder / FIGURE)


def _compact(part: Any) -> str:
    return json.dumps(json.loads(to_json(part)), separators=(",", ":"))


def headline(evidence: Mapping[str, Any]) -> str:
    """What a reader must know first: which rows are better, and on what that rests.

    Args:
        evidence: as for `write`, or a compare.json.
    """
    analysis = _analysis(evidence)
    return "\n\n".join([*sentences.headline(analysis), sentences.scope(analysis)])


def summary(evidence: Mapping[str, Any]) -> str:
    """The first section of compare.md: the rows that are better, the tables, and a sentence each.

    Args:
        evidence: as for `write`, or a compare.json.
    """
    return _summary(_analysis(evidence))


def _analysis(evidence: Mapping[str, Any]) -> Analysis:
    parts = {n: v for n, v in evidence.items() if n != "statistics"}
    for part in ("finals", "defaults", "controls"):
        names = None if part == "finals" else _TESTED
        parts[part] = {
            task: {
                row: {seed: _brief(run, names) for seed, run in runs.items()}
                for row, runs in by_row.items()
            }
            for task, by_row in evidence[part].items()
        }
    # As a compare.json has it: undefined numbers are null, and the seeds are texts.
    return Analysis(json.loads(to_json(parts)))


#: What is compared of runs that are in no table.
_TESTED = (*(measure.path[0] for measure in PRIMARY), "diverged")
#: Numbers of metrics.json that no table has.
_LEFT_OUT = {"diversity", "ambiguity", "mce", "ece_adaptive", "validation", "calibrated", "entropy"}
_LEFT_OUT |= {"method", "particles", "rank", "seed", "combine", "num_examples"}


def _brief(result: Any, names: Collection[str] | None = None) -> Any:
    """What a report reads of a run's measures, with six digits; `names` are all that is wanted."""
    if isinstance(result, float):
        return float(f"{result:.6g}")
    if not isinstance(result, dict):
        return result
    return {
        name: _brief(value)
        for name, value in result.items()
        if (name in names if names else name not in _LEFT_OUT)
        and not isinstance(value, list)
        and not name.startswith(("aupr", "member"))
    }


def _markdown(analysis: Analysis) -> str:
    sections = {
        "Comparison of methods": [_summary(analysis), f"![]({FIGURE})", *_over_tasks(analysis)],
        **({"Tables of the papers": papers} if (papers := of_papers(analysis)) else {}),
        "Cost": _costs(analysis),
        "Chosen configurations": _configurations(analysis),
        "What is behind this": _origin(analysis),
    }
    tasks = {
        analysis.task_label(task): [
            *tables.of_task(analysis, task),
            sentences.power(analysis, task),
        ]
        for task in analysis.tasks
        if any(analysis.runs("finals", task, row) for row in analysis.rows)
    }
    first, *rest = sections.items()
    text = []
    for i, (title, parts) in enumerate([first, *tasks.items(), *rest]):
        text += [f"{'#' if i == 0 else '##'} {title}", *parts]
    return "\n\n".join(text) + "\n"


def _summary(analysis: Analysis) -> str:
    parts = sentences.headline(analysis)
    if analysis.tests:
        reference = sentences.named(analysis, analysis.reference)
        parts.append(
            f"{sentences.scope(analysis)} A cell has the row's place in the measure, the mean "
            f"paired difference to {reference} with its 95 % interval, and Holm's p. Training is "
            f"the compute in runs of {reference}; the mean rank is over tasks and measures."
        )
        parts.append(tables.at_equal_k(analysis))
        if analysis.beside:
            parts.append(
                f"At equal training compute: the rows that cost more than {reference}, against "
                f"the row that spends most nearly as much on {reference}."
            )
            parts.append(tables.at_equal_compute(analysis))
        parts.append("\n".join(f"- {sentences.of_row(analysis, row)}" for row in analysis.tests))
        parts.append(sentences.RULE)
    return "\n\n".join(parts)


def _over_tasks(analysis: Analysis) -> list[str]:
    if len(analysis.tasks) < 2 or not analysis.tests:
        return []
    text = "Tasks where the interval lies on the better side of 0, on both, and on the worse:"
    return [text, tables.wins(analysis)]


def _costs(analysis: Analysis) -> list[str]:
    found = {task: tables.costs(analysis, task) for task in analysis.tasks}
    text = (
        "A step is timed in turn with one of the single adapter; tuning is the time of all trials."
    )
    return [text, *_by_task(analysis, found)]


def _configurations(analysis: Analysis) -> list[str]:
    found = {task: tables.configurations(analysis, task) for task in analysis.tasks}
    text = (
        "Trial 0 is the documented defaults. A learning rate at the edge of those tried means that "
        "the tuning is unfinished. The last columns show what the tuning changed on the final "
        "seeds, and the lowest, median and highest validation NLL of the trials."
    )
    return [text, *_by_task(analysis, found)]


def _by_task(analysis: Analysis, found: Mapping[str, str | None]) -> list[str]:
    return [
        f"{analysis.task_label(task)}:\n\n{text}"
        for task, text in found.items()
        if text is not None
    ] or ["Not measured yet."]


def _origin(analysis: Analysis) -> list[str]:
    evidence, plan = analysis.evidence, analysis.plan
    facts = {"command": f"`{evidence['command']}`", "plan": plan["hash"], **evidence["environment"]}
    missing = [*evidence["missing"], *_undefined(analysis)]
    return [
        "\n".join(f"- {name}: {value}" for name, value in facts.items()),
        _diverged(analysis),
        "\n".join(["Missing:", "", *(f"- {line}" for line in missing)])
        if missing
        else "Nothing is missing.",
    ]


def _undefined(analysis: Analysis) -> list[str]:
    """The pairs that a measure left out."""
    return [
        f"{analysis.task_label(task)}, {analysis.label(row)}: {count} final runs have no "
        f"{measure.name}, so these pairs are left out."
        for measure in PRIMARY
        for row in analysis.rows
        for task, count in analysis.undefined(row, measure).items()
    ]


def _diverged(analysis: Analysis) -> str:
    """How many runs diverged; none is left out."""
    counts = []
    for row in analysis.rows:
        for part in ("finals", "defaults"):
            number, of = analysis.diverged(part, row)
            if number:
                counts.append(f"{analysis.label(row)}, {part}: {number} of {of}")
    if not counts:
        return "No final run diverged."
    return (
        "Runs that diverged, which count as a prediction of the class frequencies: "
        f"{'; '.join(counts)}."
    )
