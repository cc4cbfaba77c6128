"""The measures of a run's predictions on the test set and on all further sets."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from multilora import checks, metrics
from multilora.app.raters import agreement
from multilora.app.settings import Settings
from multilora.app.tasks.task import Task
from multilora.calibration import FEWEST
from multilora.model import ParticleModel
from multilora.ops.common import IGNORE_INDEX
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
        "calibrated_nll" is `metrics.calibrated_nll`, where there are 100 examples for it. With
        validation examples there is what `validate` returns, and "calibrated" has the measures of
        the test set at its temperature.
        "human_confidence" is `raters.agreement` on the test set, where the task has raters.
    """

    # A set may be both shifted and out of distribution.
    known: dict[Dataset, tuple[Tensor, Tensor]] = {}

    def predicted(data: Dataset, kind: str) -> tuple[Tensor, Tensor]:
        if data not in known:
            known[data] = predictions(model, task, data, batch_size, particle_chunk)
        if on_predictions is not None:
            on_predictions(kind, *known[data])
        return known[data]

    log_p, targets = predicted(task.test, "test")

    def told_apart(other: Tensor) -> dict[str, float]:
        """How the predictions `other` differ from those on the test set: the ..._ood measures."""
        every = metrics.evaluate(log_p, targets, combine, ood_logits=other)
        return {name: value for name, value in every.items() if "ood" in name.split("_")}

    result = metrics.evaluate(log_p, targets, combine)
    if int((targets != IGNORE_INDEX).sum()) >= 2 * FEWEST:
        result["calibrated_nll"] = metrics.calibrated_nll(log_p, targets, combine)
    if task.validation is not None:
        on_validation = validate(model, task, batch_size, particle_chunk, combine)
        result |= on_validation
        if "temperature" in on_validation:
            temperature = on_validation["temperature"]
            scaled = metrics.evaluate(log_p, targets, combine, temperature=temperature)
            result["calibrated"] = {m: scaled[m] for m in _OF_CALIBRATION}
    if task.human_confidence is not None:
        result["human_confidence"] = agreement(log_p, targets, task.human_confidence, combine)
    ood = {name: told_apart(predicted(data, "ood")[0]) for name, data in task.ood.items()}
    if ood:
        result |= _means(ood.values()) | {"ood": {n: _plain(each) for n, each in ood.items()}}
    shifted = {}
    for name, data in task.shifted.items():
        other, labels = predicted(data, "shifted")
        own = metrics.evaluate(other, labels, combine)
        shifted[name] = {m: own[m] for m in _ON_SHIFTED} | _plain(told_apart(other))
    if shifted:
        means = _means([{m: each[m] for m in _ON_SHIFTED} for each in shifted.values()])
        accuracies = {f"{name}_accuracy": each["accuracy"] for name, each in shifted.items()}
        result |= {"shifted": shifted, "corrupted": means | accuracies}
    return result, log_p.exp(), targets


def validate(
    model: ParticleModel,
    task: Task,
    batch_size: int | None = None,
    particle_chunk: int | None = None,
    combine: str = "prob",
) -> dict[str, Any]:
    """Measures on the task's validation examples, and the temperature that these ask for.

    Returns:
        "validation" with some of `metrics.evaluate`, and "temperature", `metrics.fit_temperature`,
        where there are enough examples for one.
    """
    assert task.validation is not None
    log_p, targets = predictions(model, task, task.validation, batch_size, particle_chunk)
    own = metrics.evaluate(log_p, targets, combine)
    result: dict[str, Any] = {"validation": {m: own[m] for m in _OF_VALIDATION}}
    if own["num_examples"] >= FEWEST:
        result["temperature"] = metrics.fit_temperature(log_p, targets, combine)
    return result


def predictions(
    model: ParticleModel,
    task: Task,
    data: Dataset,
    batch_size: int | None = None,
    particle_chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """log p_k (K, N, C) on a data set, and its targets (N,); see `evaluate`.

    Raises:
        FloatingPointError: A prediction is not a number, since the particles have diverged.
    """
    size = task.evaluation_batch if batch_size is None else batch_size
    checks.integer("batch_size", size, 1)
    chunk = model.num_particles if particle_chunk is None else particle_chunk
    # A loader draws a number when it starts: from a generator that nothing else uses.
    loader = DataLoader(data, size, collate_fn=task.collate, generator=torch.Generator())
    log_p, targets = metrics.predict_loader(model, loader, chunk, forward=task.predict)
    if log_p.isnan().any():
        raise FloatingPointError("the particles have diverged: they predict NaN")
    return log_p, targets


_OF_VALIDATION = ("accuracy", "nll", "brier", "ece", "num_examples")
#: The measures that a temperature changes.
_OF_CALIBRATION = ("nll", "brier", "entropy", "ece", "mce", "ece_adaptive")
#: The measures of a set that has labels.
_ON_SHIFTED = ("accuracy", "nll", "ece", "brier", "mutual_information")


def _means(sets: Iterable[dict[str, float]]) -> dict[str, float]:
    """The mean of each measure over data sets."""
    rows = list(sets)
    return {name: statistics.fmean(row[name] for row in rows) for name in rows[0]}


def _plain(measures: dict[str, float]) -> dict[str, float]:
    """auroc_ood_mi -> auroc_mi: the measures of a set that is named already."""
    return {"_".join(w for w in n.split("_") if w != "ood"): v for n, v in measures.items()}
