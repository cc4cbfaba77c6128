"""The measures of a run's predictions on the test set and on all further sets."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from multilora import checks, metrics
from multilora.app.raters import agreement
from multilora.app.settings import Settings
from multilora.app.tasks.task import Task
from multilora.model import ParticleModel
from multilora.prediction import mc_dropout


def predictive(model: ParticleModel, settings: Settings) -> contextlib.AbstractContextManager[None]:
    """Inside, the model's particles are those that the run's measures are of."""
    if settings.entry.posthoc == "mc_dropout":
        return mc_dropout(model, settings.particles, seed=settings.seed)
    return contextlib.nullcontext()


def evaluate(
    model: ParticleModel,
    task: Task,
    batch_size: int | None = None,
    particle_chunk: int | None = None,
    combine: str = "prob",
    on_predictions: Callable[[str, Tensor, Tensor], None] | None = None,
) -> tuple[dict[str, Any], Tensor, Tensor]:
    """Measures on the test set, and on the shifted and out-of-distribution sets of the task.

    Args:
        batch_size: Examples per forward; the task's own number where it is None.
        particle_chunk: Particles per forward; all where it is None.
        combine: As for `metrics.evaluate`.
        on_predictions: on_predictions(kind, log_p, targets) is called once for each set, with the
            predictions log p_k (K, N, C); its kind is "test", "shifted" or "ood".

    Returns:
        The measures, and the predictions p_k (K, N, C) on the test set with their targets (N,).
        Measures of the test set are at the top. "shifted" has the measures of each shifted set by
        name, and how well the entropy ("auroc") and the mutual information ("auroc_mi") tell it
        from the test set; "corrupted" has their means over the sets. "ood" has each set's entropy,
        mutual information and AUROCs, whose means are auroc_ood, auroc_ood_mi, ... at the top.
        "human_confidence" is `raters.agreement` on the test set, where the task has raters.
    """
    size = task.evaluation_batch if batch_size is None else batch_size
    checks.integer("batch_size", size, 1)
    chunk = model.num_particles if particle_chunk is None else particle_chunk

    def predictions(data: Dataset, kind: str) -> tuple[Tensor, Tensor]:
        loader = DataLoader(data, size, collate_fn=task.collate)
        found = metrics.predict_loader(model, loader, chunk, forward=task.predict)
        if on_predictions is not None:
            on_predictions(kind, *found)
        return found

    log_p, targets = predictions(task.test, "test")

    def told_apart(other: Tensor) -> dict[str, float]:
        """How the predictions `other` differ from those on the test set: the ..._ood measures."""
        every = metrics.evaluate(log_p, targets, combine, ood_logits=other)
        return {name: value for name, value in every.items() if "ood" in name.split("_")}

    result = metrics.evaluate(log_p, targets, combine)
    if task.human_confidence is not None:
        result["human_confidence"] = agreement(log_p, targets, task.human_confidence, combine)
    ood = {name: told_apart(predictions(data, "ood")[0]) for name, data in task.ood.items()}
    if ood:
        result |= _means(ood.values()) | {"ood": {n: _plain(each) for n, each in ood.items()}}
    shifted = {}
    for name, data in task.shifted.items():
        other, labels = predictions(data, "shifted")
        own = metrics.evaluate(other, labels, combine)
        shifted[name] = {m: own[m] for m in _ON_SHIFTED} | _plain(told_apart(other))
    if shifted:
        means = _means([{m: each[m] for m in _ON_SHIFTED} for each in shifted.values()])
        accuracies = {f"{name}_accuracy": each["accuracy"] for name, each in shifted.items()}
        result |= {"shifted": shifted, "corrupted": means | accuracies}
    return result, log_p.exp(), targets


#: The measures of a set that has labels.
_ON_SHIFTED = ("accuracy", "nll", "ece", "brier", "mutual_information")


def _means(sets: Iterable[dict[str, float]]) -> dict[str, float]:
    """The mean of each measure over data sets."""
    rows = list(sets)
    return {name: statistics.fmean(row[name] for row in rows) for name in rows[0]}


def _plain(measures: dict[str, float]) -> dict[str, float]:
    """auroc_ood_mi -> auroc_mi: the measures of a set that is named already."""
    return {"_".join(w for w in n.split("_") if w != "ood"): v for n, v in measures.items()}
