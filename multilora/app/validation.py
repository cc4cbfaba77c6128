"""What a run learns from its validation examples while it trains."""

from __future__ import annotations

import contextlib
import copy
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from multilora import metrics
from multilora.app.evaluation import predictions, predictive
from multilora.app.settings import Settings
from multilora.app.steps import Training
from multilora.app.tasks.task import Task
from multilora.methods import Method
from multilora.model import ParticleModel


@dataclass
class Best:
    """The lowest NLL so far.

    Attributes:
        step: after which it was measured; 0 before the first measurement.
        waiting: measurements since then.
        parameters: what was measured, where the run is to end with it.
    """

    step: int = 0
    nll: float = math.inf
    waiting: int = 0
    parameters: dict[str, Tensor] | None = None

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def ends(self, settings: Settings) -> bool:
        """Whether the run's patience is over."""
        return 0 < settings.patience <= self.waiting

    @torch.no_grad()
    def use(self, model: ParticleModel) -> None:
        """Put the parameters into the model."""
        own = trained(model)
        for name, value in (self.parameters or {}).items():
            own[name].copy_(value)


def check(settings: Settings, task: Task) -> None:
    """Raise ValueError where the settings need validation examples and the task has none."""
    if settings.validation_interval and task.validation is None:
        named = [
            f"{name} = {value!r}"
            for name, value, unset in (
                ("select", settings.select, "last"),
                ("patience", settings.patience, 0),
                ("validate_every", settings.validate_every, None),
            )
            if value != unset
        ]
        raise ValueError(
            f"{', '.join(named)}: the task {settings.task!r} has no validation examples of its "
            "own; hold some out from training with validation = N (--validation N)"
        )


def measure(step: int, training: Training, best: Best) -> dict[str, float]:
    """The validation examples' NLL and accuracy under what the run would end with at this step.

    Without what comes after the training, as in laplace. The training goes on as if nothing had
    been measured. `best` is brought up to date.
    """
    model, task, settings = training.model, training.task, training.settings
    chunk = settings.particle_chunk
    with _unchanged(training.method, model):
        training.method.sample()
        assert task.validation is not None
        with predictive(model, settings):
            log_p, targets = predictions(model, task, task.validation, None, chunk)
        found = metrics.evaluate(log_p, targets, settings.combine)
        best.waiting += 1
        if found["nll"] < best.nll:
            best.step, best.nll, best.waiting = step, found["nll"], 0
            if settings.select == "best":
                best.parameters = {n: p.detach().clone() for n, p in trained(model).items()}
    return {"validation_nll": found["nll"], "validation_accuracy": found["accuracy"]}


def trained(model: ParticleModel) -> dict[str, Tensor]:
    """The parameters that a run trains, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@contextlib.contextmanager
def _unchanged(method: Method, model: ParticleModel) -> Iterator[None]:
    """Afterwards the particles, the method and all random states are as they were before.

    Examples that are held out of an augmented training set are augmented too.
    """
    before = {name: p.detach().clone() for name, p in trained(model).items()}
    state = copy.deepcopy(method.state_dict())
    numpy_state, python_state = np.random.get_state(), random.getstate()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        np.random.set_state(numpy_state)
        random.setstate(python_state)
        method.load_state_dict(state)
        Best(parameters=before).use(model)
