"""The sentences of the report, made from the numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from multilora.app.compare.analysis import LEVEL, PRIMARY, Analysis, Comparison
from multilora.app.compare.statistics import pairs_needed


def number(value: float, decimals: int = 3) -> str:
    """0.0237 -> ".024", -1.5 -> "−1.500"."""
    text = f"{abs(value):.{decimals}f}"
    sign = "−" if value < 0 and float(text) else ""
    return sign + (text.removeprefix("0") or "0")


def interval(ends: tuple[float, float] | None) -> str:
    return "[no interval]" if ends is None else f"[{number(ends[0])}, {number(ends[1])}]"


def p_value(p: float | None) -> str:
    if p is None:
        return ""
    return "<.001" if p < 0.001 else "1" if p > 0.9995 else number(p)


def times(factor: float | None) -> str:
    return "" if factor is None else f"{factor:.1f} ×"


def joined(words: Sequence[str]) -> str:
    """["a", "b", "c"] -> "a, b and c"."""
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last


def named(analysis: Analysis, row: str) -> str:
    """The row within a sentence: "the ensemble"."""
    label = analysis.label(row)
    return "the single adapter" if label == "single" else f"the {label}"


RULE = (
    "A row is called better only if the 95 % interval of its paired differences leaves out zero, "
    f"the sign-flip p is below {number(LEVEL, 2)} after Holm's correction over all rows, it beats "
    "its control as well (the reference at the row's own learning rate and weight decay; by "
    "interval and uncorrected p, since a control can only take a claim back), the tunings of both "
    "are finished, and no final run of theirs is missing. It is called worse by its interval and p "
    "alone."
)


# --- a sentence for each row ---------------------------------------------------------------------


def of_row(analysis: Analysis, row: str) -> str:
    """What the comparison says of a row, in words."""
    tests = analysis.tests[row]
    reference = named(analysis, analysis.reference)
    clauses = _clauses(tests, reference)
    parts = [f"**{analysis.label(row)}** {'; it '.join([*clauses, *_cost(analysis, row)])}."]
    if row in analysis.beside:
        other, own = analysis.beside[row]
        parts.append(
            f"Beside {named(analysis, other)} ({times(analysis.cost(other))}), it "
            f"{'; it '.join(_clauses(own))}."
        )
    if edges := analysis.edges(row):
        parts.append(f"Its tuning is unfinished: {_at_the_edge(analysis, edges)}.")
    gains = any(test.verdict in ("better", "unfinished") for test in tests)
    if gains and not analysis.shares_lr(row):
        parts.append("It has no control, since its learning rates are its own.")
    diverged, runs = analysis.diverged("finals", row)
    if diverged:
        parts.append(f"{diverged} of its {runs} runs diverged.")
    return " ".join(parts)


def _at_the_edge(analysis: Analysis, tasks: Sequence[str]) -> str:
    where = joined([analysis.task_label(task) for task in tasks])
    return f"the learning rate is the smallest or the largest tried ({where})"


def _gain(test: Comparison) -> str:
    assert test.difference is not None
    mean, ends = test.gain(test.difference)
    return f"{number(mean)} {interval(ends)} {test.measure.name}"


def _loss(test: Comparison) -> str:
    assert test.difference is not None
    mean, ends = test.gain(test.difference)
    turned = None if ends is None else (-ends[1], -ends[0])
    return f"{number(-mean)} {interval(turned)} {test.measure.name}"


def _taken_back(test: Comparison) -> str:
    if test.control is None:
        return f"{_gain(test)} (its control is missing)"
    mean, ends = test.gain(test.control)
    return f"{_gain(test)} (against the control {number(mean)} {interval(ends)})"


def _name(test: Comparison) -> str:
    return test.measure.name


#: verdict -> the clause after "it", around the other row's name, and what it says of each measure.
_CLAUSES: dict[str, tuple[str, str, str, Callable[[Comparison], str]]] = {
    "better": ("is better", " than", " by {}", _gain),
    "worse": ("is worse", " than", " by {}", _loss),
    "control": ("is ahead", " of", " by {}, but its control takes that back", _taken_back),
    "unfinished": ("is ahead", " of", " by {}, but a tuning is unfinished", _gain),
    "incomplete": ("is ahead", " of", " by {}, but final runs are missing", _gain),
    "uncounted": (
        "is ahead",
        " of",
        " by {}, which does not count, since it is not better than the reference itself",
        _gain,
    ),
    "equal": ("cannot be told apart", " from", " in {}", _name),
    "none": ("has no run to pair", " with one of", " in {}", _name),
}


def _clauses(tests: Sequence[Comparison], other: str = "") -> list[str]:
    """A clause for each verdict; only the first one names the other row, if any does."""
    found: list[str] = []
    for verdict, (verb, preposition, rest, each) in _CLAUSES.items():
        own = [each(test) for test in tests if test.verdict == verdict]
        if own:
            name = f"{preposition} {other}" if other and not found else ""
            found.append(verb + name + rest.format(joined(own)))
    return found


def _cost(analysis: Analysis, row: str) -> list[str]:
    cost = analysis.cost(row)
    if cost is None:
        return ["has no measured cost"]
    clause = f"costs {times(cost)} the reference's training"
    own, other = analysis.forward_rows(row), analysis.forward_rows(analysis.reference)
    if own and other and own != other:
        particles = "particle" if own == 1 else "particles"
        clause += f", and a prediction runs {own} {particles} in place of {other}"
    return [clause]


# --- of the whole comparison ---------------------------------------------------------------------


def headline(analysis: Analysis) -> list[str]:
    """Which rows are better than the reference, or that none is and which to take."""
    reference = named(analysis, analysis.reference)
    if analysis.reference not in analysis.rows:
        return [f"**Nothing can be said yet:** {reference} has no final run."]
    lines = []
    winners = [row for row in analysis.tests if _won(analysis.tests[row])]
    methods = [row for row in winners if analysis.rows[row]["table"] != "compute"]
    if methods:
        lines.append(f"**Better than {reference}:**")
        lines.append("\n".join(f"- {_winner(analysis, row)}" for row in methods))
    else:
        lines.append(f"**No row is shown to be better than {reference}.** {_cheapest(analysis)}")
    if dearer := [row for row in winners if row not in methods]:
        names = joined([analysis.label(row) for row in dearer])
        lines.append(f"More compute makes these better than {reference}: {names}.")
    if edges := analysis.edges(analysis.reference):
        lines.append(
            f"The tuning of {reference} is unfinished, so no row counts as better: "
            f"{_at_the_edge(analysis, edges)}."
        )
    if analysis.evidence["missing"]:
        lines.append("The comparison is not complete; the end of the report says what is missing.")
    return [*lines, *_too_few(analysis)]


def _won(tests: Sequence[Comparison]) -> list[str]:
    return [test.measure.name for test in tests if test.verdict == "better"]


def _winner(analysis: Analysis, row: str) -> str:
    """In which measures a row is better, at what cost, and whether it is at equal compute."""
    text = f"**{analysis.label(row)}** in {joined(_won(analysis.tests[row]))}"
    if (cost := analysis.cost(row)) is not None:
        text += f", at {times(cost)} the training"
    if row in analysis.beside:
        other, tests = analysis.beside[row]
        still = _won(tests)
        kept = f"still in {joined(still)}" if still else "in none"
        text += f"; beside {named(analysis, other)} ({times(analysis.cost(other))}), {kept}"
    return f"{text}."


def _cheapest(analysis: Analysis) -> str:
    """The cheapest row that is not shown to be worse."""
    candidates = [
        (round(cost, 1), analysis.forward_rows(row) or 0, i, row)
        for i, row in enumerate(analysis.rows)
        if (cost := analysis.cost(row)) is not None
        and all(test.verdict not in ("worse", "none") for test in _measured(analysis, row))
    ]
    if not candidates:
        return "The costs are not measured, so the cheapest is not known."
    row = min(candidates)[-1]
    text = f"Take the cheapest that is not shown to be worse: **{analysis.label(row)}**."
    shown = [
        f"{number(test.difference.detectable)} {test.measure.name}"
        for test in analysis.tests.get(row, [])
        if test.difference is not None and test.difference.detectable is not None
    ]
    if shown:
        text += f" With these seeds, a loss of up to {joined(shown)} could go unseen."
    return text


def _measured(analysis: Analysis, row: str) -> list[Comparison]:
    """The tests of a row in the measures that any row has."""
    every = analysis.tests.values()
    there = {t.measure for tests in every for t in tests if t.difference is not None}
    return [test for test in analysis.tests.get(row, []) if test.measure in there]


def _too_few(analysis: Analysis) -> list[str]:
    """Whether there are too few pairs for any difference to be significant."""
    pairs = [
        test.difference.pairs
        for tests in analysis.tests.values()
        for test in tests
        if test.difference is not None
    ]
    needed = pairs_needed(max(1, len(analysis.tests)), LEVEL)
    if not pairs or max(pairs) >= needed:
        return []
    return [
        f"With {max(pairs)} pairs no difference can have p < {number(LEVEL, 2)} after Holm's "
        f"correction over {len(analysis.tests)} rows; that takes {needed} pairs."
    ]


def scope(analysis: Analysis) -> str:
    """How much was run."""
    plan = analysis.plan
    tasks = [entry["label"] for entry in analysis.tasks.values()]
    of = "task" if len(tasks) == 1 else "tasks"
    return (
        f"Every method was tuned in {plan['trials']} trials on {len(plan['tune_seeds'])} seeds, "
        f"then trained on {len(plan['seeds'])} fresh seeds, on the {of} {joined(tasks)}."
    )


def power(analysis: Analysis, task: str) -> str:
    """The differences that the seeds of a task would have shown."""
    found = []
    for i, measure in enumerate(PRIMARY):
        own = {
            row: d.detectable
            for row, tests in analysis.tests.items()
            if (whole := tests[i].difference) is not None
            and (d := whole.by_task.get(task)) is not None
            and d.detectable is not None
        }
        if own:
            low, high = min(own, key=own.__getitem__), max(own, key=own.__getitem__)
            found.append(
                f"{measure.name} {number(own[low])} ({analysis.label(low)}) to "
                f"{number(own[high])} ({analysis.label(high)})"
            )
    reference = named(analysis, analysis.reference)
    if not found:
        return f"No row has two seeds in common with {reference}, so nothing could have shown."
    return (
        f"These seeds show a difference to {reference} of 2.8 · s / √n in four of five experiments "
        f"(at the 5 % level, before Holm's correction): {'; '.join(found)}."
    )
