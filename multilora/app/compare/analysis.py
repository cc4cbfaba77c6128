"""What the evidence of a comparison says: differences, verdicts, ranks and costs.

The evidence is what `Stages.evidence` returns, or a compare.json.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from multilora.app.compare.statistics import Difference, difference, holm, mean_ranks, paired

LEVEL = 0.05
#: Rows whose training computes differ by less than this factor are said to have the same.
SAME_COMPUTE = 1.25


class Measure(NamedTuple):
    """One of the numbers of metrics.json."""

    heading: str  # ↑: higher is better; ↓: lower is better; neither: neither is
    path: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.heading.rstrip(" ↑↓")

    @property
    def sign(self) -> int:
        """The sign of a difference that is a gain."""
        return 1 if self.heading.endswith("↑") else -1

    def of(self, result: Any) -> float | None:
        for key in self.path:
            result = result.get(key) if isinstance(result, dict) else None
        undefined = result is None or not math.isfinite(result)
        return None if undefined else result


#: The measures that decide, fixed in advance. All others are descriptive.
PRIMARY = (
    Measure("NLL ↓", ("nll",)),
    Measure("calibrated NLL ↓", ("calibrated_nll",)),
    Measure("OOD AUROC ↑", ("auroc_ood",)),
)


@dataclass(frozen=True)
class Comparison:
    """A row against another one in one measure.

    Attributes:
        difference: row − other; None without a pair.
        p: Holm's adjusted p over the rows of the same question.
        verdict: "better" or "worse"; "equal", which means that they cannot be told apart; "none"
            without a pair. Four others say why a gain does not count: "control", it does not beat
            its control; "unfinished", a tuning is not; "incomplete", final runs are missing, and
            who looks before the end finds too much; "uncounted", the row is not better than the
            reference itself.
        control: against the reference at the row's own learning rate and weight decay, where the
            row has such a control.
    """

    measure: Measure
    difference: Difference | None
    p: float | None
    verdict: str
    control: Difference | None = None

    def gain(self, d: Difference) -> tuple[float, tuple[float, float] | None]:
        """A difference and its interval, such that positive is better."""
        sign = self.measure.sign
        if d.interval is None:
            return sign * d.mean, None
        low, high = sorted(sign * end for end in d.interval)
        return sign * d.mean, (low, high)


class Analysis:
    """The statistics of a comparison. Evidence that is missing is left out.

    Attributes:
        reference: the row that all others are compared to.
        rows: the plan's rows that have a final run, in the plan's order, with the reference first.
        tasks: the plan's tasks.
    """

    def __init__(self, evidence: Mapping[str, Any]):
        self.evidence = evidence
        self.plan = evidence["plan"]
        self.reference: str = self.plan["reference"]
        self.tasks: dict[str, Any] = self.plan["tasks"]
        found = {row for runs in evidence["finals"].values() for row in runs if runs[row]}
        order = dict.fromkeys([self.reference, *self.plan["rows"]])
        self.rows = {row: self.plan["rows"][row] for row in order if row in found}

    def label(self, row: str) -> str:
        return self.plan["rows"][row]["label"]

    def task_label(self, task: str) -> str:
        return self.tasks[task]["label"]

    # --- values ----------------------------------------------------------------------------------

    def runs(self, part: str, task: str, row: str) -> list[dict[str, Any]]:
        """The measures of the runs of "finals", "defaults" or "controls", in the order of seeds."""
        return [r for r in self._by_seed(part, task, row).values() if r is not None]

    def _by_seed(self, part: str, task: str, row: str) -> dict[str, dict[str, Any] | None]:
        found = self.evidence[part].get(task, {}).get(row) or {}
        return {str(seed): found.get(str(seed)) for seed in self.plan["seeds"]}

    def values(self, part: str, row: str, measure: Measure) -> dict[str, dict[str, float | None]]:
        """task -> seed -> the value of each run; None where it is undefined or not there."""
        return {
            task: {s: measure.of(r) for s, r in self._by_seed(part, task, row).items()}
            for task in self.tasks
        }

    def undefined(self, row: str, measure: Measure) -> dict[str, int]:
        """How many final runs of each task do not have the measure, where others of it have."""
        found = {}
        for task in self.tasks:
            own = [measure.of(r) for r in self.runs("finals", task, row)]
            any_row = [measure.of(r) for name in self.rows for r in self.runs("finals", task, name)]
            if own.count(None) and any(v is not None for v in any_row):
                found[task] = own.count(None)
        return found

    def diverged(self, part: str, row: str) -> tuple[int, int]:
        """How many runs diverged, of how many."""
        results = [r for task in self.tasks for r in self.runs(part, task, row)]
        return sum(bool(r.get("diverged")) for r in results), len(results)

    def complete(self, row: str) -> bool:
        """Whether all its final runs are there, and those of its control."""
        controlled = row != self.reference and self.shares_lr(row)
        parts = ["finals", "controls"] if controlled else ["finals"]
        return all(
            result is not None
            for part in parts
            for task in self.tasks
            for result in self._by_seed(part, task, row).values()
        )

    # --- verdicts --------------------------------------------------------------------------------

    def against(self, row: str, part: str, other: str, measure: Measure) -> Difference | None:
        """The row's final runs − the runs `part` of `other`."""
        own, base = self.values("finals", row, measure), self.values(part, other, measure)
        return difference(paired(own, base))

    def shares_lr(self, row: str) -> bool:
        """Whether its learning rates are those of all, so that it has a control."""
        source = self.plan["rows"][row].get("of") or row
        return "lr" not in self.plan["rows"][source].get("space", {})

    def edges(self, row: str) -> list[str]:
        """The tasks where the chosen learning rate is the smallest or the largest tried."""
        source = self.plan["rows"][row].get("of") or row
        chosen = self.evidence["chosen"]
        return [t for t in self.tasks if chosen.get(t, {}).get(source, {}).get("edge")]

    @functools.cached_property
    def tests(self) -> dict[str, list[Comparison]]:
        """row -> its tests against the reference, in the order of PRIMARY."""
        others = [row for row in self.rows if row != self.reference]
        found: dict[str, list[Comparison]] = {row: [] for row in others}
        for measure in PRIMARY:
            own = {r: self.against(r, "finals", self.reference, measure) for r in others}
            controls = {
                r: self.against(r, "controls", r, measure) for r in others if self.shares_lr(r)
            }
            p = _adjusted(own)
            for row in others:
                verdict = self._verdict(row, measure, own[row], p.get(row), controls.get(row))
                found[row].append(
                    Comparison(measure, own[row], p.get(row), verdict, controls.get(row))
                )
        return found

    def _verdict(
        self,
        row: str,
        measure: Measure,
        own: Difference | None,
        p: float | None,
        control: Difference | None,
    ) -> str:
        verdict = _told(measure, own, p)
        if verdict != "better":
            return verdict
        # A control can only take a claim back, so its p needs no correction.
        beaten = control is not None and _told(measure, control, control.p) == "better"
        if self.shares_lr(row) and not beaten:
            return "control"
        if self.edges(row) or self.edges(self.reference):
            return "unfinished"
        return "better" if self.complete(row) and self.complete(self.reference) else "incomplete"

    # --- compute ---------------------------------------------------------------------------------

    def compute(self, row: str) -> float | None:
        """The training compute, in runs of the single adapter: the ratio of a step times steps.

        It is the geometric mean over the tasks where the costs of all rows are known.
        """
        costs = self.evidence["costs"]
        complete = [
            task
            for task in self.tasks
            if all(costs.get(task, {}).get(r, {}).get("ratio") for r in self.rows)
        ]
        if not complete:
            return None
        logs = [math.log(costs[task][row]["ratio"]) for task in complete]
        return self.rows[row].get("steps", 1) * math.exp(sum(logs) / len(logs))

    def cost(self, row: str) -> float | None:
        """The training compute, in runs of the reference."""
        own, of_reference = self.compute(row), self.compute(self.reference)
        return None if own is None or of_reference is None else own / of_reference

    def forward_rows(self, row: str) -> int | None:
        """The particles that a prediction runs."""
        costs = self.evidence["costs"].values()
        found = [c[row].get("forward_rows") for c in costs if row in c]
        return found[0] if found else None

    @functools.cached_property
    def beside(self) -> dict[str, tuple[str, list[Comparison]]]:
        """row -> the row of the reference with nearest compute, and the tests against that.

        It holds the rows that cost more than the reference, where the plan has rows that spend more
        on the reference. Holm's correction is over the rows of this question.
        """
        spent = [
            row
            for row, entry in self.rows.items()
            if entry["table"] == "compute" and entry.get("of") == self.reference
        ]
        cost = {row: c for row in self.rows if (c := self.cost(row)) is not None}
        nearest = {
            row: min(spent, key=lambda other: abs(math.log(cost[other] / cost[row])))
            for row in self.rows
            if spent and row in cost and row not in spent and cost[row] > SAME_COMPUTE
        }
        found: dict[str, tuple[str, list[Comparison]]] = {r: (o, []) for r, o in nearest.items()}
        for i, measure in enumerate(PRIMARY):
            own = {r: self.against(r, "finals", o, measure) for r, o in nearest.items()}
            p = _adjusted(own)
            for row in nearest:
                verdict = _told(measure, own[row], p.get(row))
                if verdict == "better" and self.tests[row][i].verdict != "better":
                    verdict = "uncounted"
                found[row][1].append(Comparison(measure, own[row], p.get(row), verdict))
        return found

    # --- ranks -----------------------------------------------------------------------------------

    @functools.cached_property
    def ranks(self) -> dict[str, tuple[float, float, float]]:
        """row -> its mean rank over tasks and primary measures, with its interval.

        Ranked are the rows that spend no additional compute, in the tasks and measures and on the
        seeds that all of them have.
        """
        ranked = [row for row, entry in self.rows.items() if entry["table"] != "compute"]
        every = {(row, m): self.values("finals", row, m) for row in ranked for m in PRIMARY}
        losses = []
        for task in self.tasks:
            values = np.array(
                [
                    [[_nan(v) * -m.sign for v in every[row, m][task].values()] for m in PRIMARY]
                    for row in ranked
                ]
            )
            values = values[:, ~np.isnan(values).all(-1).any(0)]
            values = values[:, :, ~np.isnan(values).any((0, 1))]
            if values.size:
                losses.append(values)
        if not losses:
            return {}
        means, intervals = mean_ranks(losses)
        return {
            row: (float(mean), float(low), float(high))
            for row, mean, (low, high) in zip(ranked, means, intervals)
        }

    # --- everything, for compare.json ------------------------------------------------------------

    def flat(self) -> dict[str, Any]:
        def plain(test: Comparison) -> dict[str, Any]:
            return {**asdict(test), "measure": test.measure.path[-1]}

        return {
            "tests": {row: [plain(t) for t in tests] for row, tests in self.tests.items()},
            "equal_compute": {
                row: {"beside": other, "tests": [plain(t) for t in tests]}
                for row, (other, tests) in self.beside.items()
            },
            "mean_ranks": {
                row: {"mean": mean, "interval": [low, high]}
                for row, (mean, low, high) in self.ranks.items()
            },
            "compute": {row: self.compute(row) for row in self.rows},
            "diverged": {row: self.diverged("finals", row)[0] for row in self.rows},
        }


def _adjusted(differences: Mapping[str, Difference | None]) -> dict[str, float]:
    return holm({row: d.p for row, d in differences.items() if d is not None})


def _told(measure: Measure, d: Difference | None, p: float | None) -> str:
    """Whether interval and adjusted p tell the two apart."""
    if d is None or p is None:
        return "none"
    if not d.clear or p >= LEVEL:
        return "equal"
    return "better" if measure.sign * d.mean > 0 else "worse"


def _nan(value: float | None) -> float:
    return math.nan if value is None else value
