"""A run that is under way in a place of the model."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from multilora.many.arguments import RunArguments
from multilora.many.data import Batches
from multilora.many.runs import Planned
from multilora.many.table import Row

#: Names of parameters that Trainer does not decay.
_NOT_DECAYED = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")


@dataclass
class Active:
    """A run in a place of the model, and all that it needs to go on.

    Attributes:
        number: which of the runs it is.
        micro: the micro-batches of the step that it is in; `done` of them have run.
        items: the number of labels in them, over which the step's loss is a mean; None where it is
            the mean of their means.
        waiting: evaluations since the best one.
        best_parameters: of the best evaluation, where the run is to end with them.
    """

    planned: Planned
    number: int
    batches: Batches
    schedule: Any = None
    step: int = 0
    micro: list[Any] = field(default_factory=list)
    done: int = 0
    items: float | None = None
    step_loss: float = 0.0
    loss_sum: float = 0.0
    rows: int = 0
    seconds: float = 0.0
    measures: dict[str, float] = field(default_factory=dict)
    best: float | None = None
    best_step: int | None = None
    waiting: int = 0
    best_parameters: list[Tensor] | None = None
    best_measures: dict[str, float] = field(default_factory=dict)

    @property
    def arguments(self) -> RunArguments:
        return self.planned.arguments

    @property
    def name(self) -> str:
        return self.planned.name

    @property
    def steps(self) -> int:
        return self.batches.steps

    def next_batch(self, count: Callable[[list[Any]], float | None]) -> Any:
        """The micro-batch that is due. Errors of the data come through.

        count: the number of labels in micro-batches, as `items` has it.
        """
        if not self.micro:
            self.micro, self.done, self.step_loss = self.batches.window(), 0, 0.0
            self.items = count(self.micro)
        return self.micro[self.done]

    def scale(self, sums_means: bool) -> float:
        """The weight of a micro-batch in its step, where the labels do not say it."""
        return 1.0 if self.items or sums_means else 1 / len(self.micro)

    def ran(self, loss: float, rows: int) -> bool:
        """A micro-batch has run. -> Whether the step is complete."""
        self.done += 1
        self.rows += rows
        self.step_loss += loss
        if self.done < len(self.micro):
            return False
        self.step, self.micro = self.step + 1, []
        self.loss_sum += self.step_loss
        return True

    def is_due_for_evaluation(self) -> bool:
        how = self.arguments.eval_strategy
        if how == "no":
            return False
        if self.step == self.steps:  # the last epoch may be a part of one
            return True
        if how == "epoch":
            return self.batches.at_epochs_end
        return self.step % self.arguments.eval_interval(self.steps) == 0

    def measured(self, measures: dict[str, float]) -> bool:
        """Take the measures of an evaluation. -> Whether they are the best so far.

        Raises:
            ValueError: the metric is not among them.
        """
        name, greater = self.arguments.metric, self.arguments.greater
        self.measures, missing = measures, f"the metric {name} is none of {sorted(measures)}"
        if self.arguments.eval_strategy == "no":
            if name not in measures:  # it has been trained, and is not to be lost
                warnings.warn(f"fit_many: run {self.name!r}: {missing}", stacklevel=2)
            return False
        if name not in measures:
            raise ValueError(missing)
        value = measures[name]
        if not math.isfinite(value):
            self.waiting += self.best is not None
            return False
        gain = None if self.best is None else (value - self.best) * (1 if greater else -1)
        threshold = self.arguments.early_stopping_threshold
        self.waiting = 0 if gain is None or gain > max(threshold, 0) else self.waiting + 1
        if gain is None or gain > 0:
            self.best, self.best_step, self.best_measures = value, self.step, measures
            return True
        return False

    @property
    def is_out_of_patience(self) -> bool:
        return 0 < (self.arguments.early_stopping_patience or 0) <= self.waiting

    def row(self, status: str, error: str | None = None) -> Row:
        """Its row in the table."""
        loss = self.loss_sum / self.step if self.step else None
        at_best = self.best_parameters is not None
        measures = self.best_measures if at_best else self.measures
        metric = measures.get(self.arguments.metric) if measures else loss
        return Row(
            self.name,
            status,
            self.step,
            loss,
            dict(measures),
            None if status == "failed" else metric,
            self.best_step if at_best else None,
            self.rows,
            self.seconds,
            error,
        )

    #: What a checkpoint holds as it is.
    _STORED = (
        "step micro done items step_loss loss_sum rows seconds measures best best_step waiting "
        "best_parameters best_measures"
    ).split()

    def state_dict(self) -> dict[str, Any]:
        stored = {name: getattr(self, name) for name in self._STORED}
        return stored | {
            "number": self.number,
            "batches": self.batches.state_dict(),
            "schedule": self.schedule.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name in self._STORED:
            setattr(self, name, state[name])
        self.batches.load_state_dict(state["batches"])
        self.schedule.load_state_dict(state["schedule"])


def decayed(model: nn.Module) -> set[int]:
    """The ids of the parameters that Trainer decays: no biases, nothing in a normalisation."""
    norms = tuple(n for n, m in model.named_modules() if isinstance(m, nn.LayerNorm))
    return {
        id(p)
        for name, p in model.named_parameters()
        if not _NOT_DECAYED.search(name.lower())
        and not any(name.startswith(f"{norm}.") for norm in norms)
    }
