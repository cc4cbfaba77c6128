"""Evaluations of several runs at once: their batches share every pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from multilora.many.active import Active
from multilora.methods import Independent
from multilora.ops.common import IGNORE_INDEX

_END = object()


class Evaluation:
    """What an eval_dataset says of a run, batch by batch."""

    def __init__(self, active: Active):
        self.run = active.planned.run
        self.stream = active.batches.evaluation()
        self.loss, self.examples = 0.0, 0
        self.right, self.labels = 0, 0
        self.outputs: list[tuple[Tensor, Tensor]] = []

    def add(self, loss: Tensor, logits: Tensor, targets: Any) -> None:
        """A batch, whose loss counts once for each of its examples, as in Trainer."""
        self.loss += loss.item() * len(logits)
        self.examples += len(logits)
        if isinstance(targets, Tensor) and targets.shape == logits.shape[:-1]:
            valid = targets != IGNORE_INDEX
            self.right += int((logits.argmax(-1) == targets)[valid].sum())
            self.labels += int(valid.sum())
        if self.run.metrics is not None:
            self.outputs.append((logits.cpu(), targets.cpu()))

    def measures(self) -> dict[str, float]:
        """Raises ValueError where there was no example."""
        if not self.examples:
            raise ValueError("the eval_dataset is empty")
        found = {"eval_loss": self.loss / self.examples}
        if self.labels:
            found["eval_accuracy"] = self.right / self.labels
        if self.run.metrics is not None:
            logits, targets = zip(*self.outputs)
            if len({t.shape[1:] for t in logits}) > 1:
                logits = tuple(z.flatten(0, -2) for z in logits)
                targets = tuple(t.flatten() for t in targets)
            own = self.run.metrics(torch.cat(logits), torch.cat(targets))
            found |= {f"eval_{name}": float(value) for name, value in own.items()}
        return found


def evaluate(
    method: Independent,
    due: Mapping[int, Active],
    attempt: Callable[..., dict[int, Any]],
    failed: Callable[[int, Exception], None],
) -> dict[int, dict[str, float]]:
    """The measures of these runs, by particle, without those that fail.

    Args:
        attempt: attempt(call, batches) -> call(batches), without the runs that break it.
        failed: is told what a run failed with.
    """
    states = {k: Evaluation(active) for k, active in due.items()}
    open_ones, found = dict(states), {}

    def of_one(k: int, act: Callable[[], Any]) -> Any:
        """act(), or None where it raises: whatever a dataset or a measure raises is that run's."""
        try:
            return act()
        except Exception as error:
            open_ones.pop(k)
            failed(k, error)
            return None

    method.model.eval()
    try:
        while open_ones:
            nexts = {k: of_one(k, partial(next, s.stream, _END)) for k, s in [*open_ones.items()]}
            batches = {k: batch for k, batch in nexts.items() if k in open_ones}
            for k in [k for k, batch in batches.items() if batch is _END]:
                batches.pop(k)
                measures = of_one(k, states[k].measures)
                if open_ones.pop(k, None) is not None:
                    found[k] = measures
            answered = attempt(method.predict, batches) if batches else {}
            for k in batches:
                if k in answered:
                    of_one(k, partial(states[k].add, *answered[k]))
                else:
                    open_ones.pop(k)
    finally:
        method.model.train()
    return found
