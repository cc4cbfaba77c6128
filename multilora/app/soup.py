"""Soups of a run: which one an option means, and its measures beside those of the particles."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from multilora import soups
from multilora.app.evaluation import evaluate
from multilora.app.settings import Settings
from multilora.app.tasks.task import Task
from multilora.model import ParticleModel

#: The soups that `multilora evaluate` measures and that `multilora export` writes.
MEASURED = ("uniform", "greedy", "wise")
WRITTEN = ("exact", "svd", "greedy", "wise")


def weights(
    model: ParticleModel, task: Task, settings: Settings, kind: str, alpha: float | None = None
) -> Tensor | None:
    """The weights (K,) of a soup; None for 1/K each.

    Args:
        kind: "greedy" and "wise" are chosen by the accuracy on the task's validation examples.
        alpha: the weight of the mean in [0, 1], with kind "wise", in place of that choice.

    Raises:
        ValueError: There are no validation examples, or alpha is given for another kind.
    """
    if alpha is not None:
        if kind != "wise":
            raise ValueError(f"--alpha is for --soup wise; got --soup {kind}")
        return soups.wise(model, lambda w: torch.zeros(len(w)), [alpha])
    if kind not in ("greedy", "wise"):
        return None
    choose = soups.greedy if kind == "greedy" else soups.wise
    return choose(model, _score(model, task, settings, kind))


def measured(
    model: ParticleModel, task: Task, settings: Settings, kind: str
) -> list[tuple[str, dict[str, Any]]]:
    """[(name, measures)] of the soup and, where the task has validation examples, of the particle
    that is best on these. The measures have "weights"."""
    particles = model.num_particles
    chosen = weights(model, task, settings, kind)
    rows = {f"soup ({kind})": torch.full((particles,), 1 / particles) if chosen is None else chosen}
    if task.validation is not None:
        identity = torch.eye(particles)
        own = _score(model, task, settings, "best particle")(identity)
        rows["best particle"] = identity[own.argmax()]
    found = []
    for name, w in rows.items():
        result, _, _ = soups.evaluate(
            model, w[None], lambda: evaluate(model, task, combine=settings.combine)
        )
        found.append((name, result | {"weights": w.tolist()}))
    return found


def described(weights: Tensor | None, particles: int) -> str:
    """A soup in words."""
    if particles == 1 and weights is None:
        return "the only particle"
    if weights is None:
        return f"the mean of {particles} particles"
    return (
        f"the sum of {particles} particles with weights {[round(w, 4) for w in weights.tolist()]}"
    )


def _score(model: ParticleModel, task: Task, settings: Settings, kind: str) -> soups.Score:
    if task.validation is None:
        raise ValueError(
            f"the {kind} soup is chosen on validation examples, and this run held out none: train "
            "with --validation N"
        )
    loader = DataLoader(task.validation, task.evaluation_batch, collate_fn=task.collate)
    return soups.accuracy(model, loader, settings.particle_chunk, forward=task.predict)
