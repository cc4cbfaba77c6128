"""Calibration: bins of confidences and their errors, and a temperature that repairs them."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from multilora.log_probabilities import combined, labelled, negative
from multilora.ranking import tie_means

#: The number of bins of every calibration error.
BINS = 15
#: No temperature is fitted on fewer examples.
FEWEST = 50
#: The standard deviation of the prior on log T.
_PRIOR_STD = 0.5


class Bins(NamedTuple):
    """The bins that hold an example, from low to high confidence: float64 (b,) each."""

    confidence: Tensor  # mean
    accuracy: Tensor  # share of right ones
    examples: Tensor  # their number

    def gaps(self) -> Tensor:
        """|confidence − accuracy| of every bin."""
        return (self.confidence - self.accuracy).abs()

    def error(self) -> float:
        """Σ_b n_b/N |confidence_b − accuracy_b|: the expected calibration error."""
        return ((self.examples / self.examples.sum()) @ self.gaps()).item()


def equal_width(confidence: Tensor, right: Tensor, bins: int = BINS) -> Bins:
    """Bins (b/bins, (b + 1)/bins] of confidences (N,) in [0, 1]; a confidence of 0 is in the first.

    The last bin holds the confidence 1, so there are `bins` of them and no more.
    """
    index = ((confidence.double() * bins).ceil().long() - 1).clamp(0, bins - 1)
    return _binned(index, confidence, right, bins)


def equal_mass(confidence: Tensor, right: Tensor, bins: int = BINS) -> Bins:
    """Bins of N/bins examples each, rounded down or up, in the order of the confidences (N,).

    Equal confidences share their accuracy, so the result does not depend on the examples' order.
    """
    order, examples = confidence.argsort(), len(confidence)
    index = torch.arange(examples, device=confidence.device) * bins // examples
    return _binned(index, confidence[order], tie_means(confidence, right)[order], bins)


def _binned(index: Tensor, confidence: Tensor, right: Tensor, bins: int) -> Bins:
    rows = torch.stack([confidence.double(), right.double(), torch.ones_like(index).double()])
    sums = torch.zeros(3, bins, dtype=torch.float64, device=rows.device).index_add_(1, index, rows)
    confidences, accuracies, examples = sums[:, sums[2] > 0]
    return Bins(confidences / examples, accuracies / examples, examples)


def classwise_error(p: Tensor, targets: Tensor) -> float:
    """The mean over classes c of the calibration error of p_c as the probability of y = c.

    Source: Kull et al., "Beyond temperature scaling", 2019.

    Args:
        p: probabilities (N, C).
        targets: (N,).
    """
    errors = [equal_width(p[:, c], targets == c).error() for c in range(p.shape[-1])]
    return sum(errors) / len(errors)


@torch.no_grad()
def fit_temperature(log_p: Tensor, targets: Tensor, combine: str = "prob") -> float:
    """The temperature T of softmax(log p̄ / T), for `evaluate(..., temperature=T)`.

    T minimises mean NLL + (log T)² / (2 · 0.5² · N) over log T in [−2, 2]: the second term is a
    prior N(0, 0.5²) on log T, without which a fit on few examples can be worse than T = 1. Golden
    section in float64 finds log T to 1e-6. Fit on examples that nothing else is measured on; where
    there are none, `calibrated_nll` fits and measures on the same set.

    Source: Guo et al., "On calibration of modern neural networks", 2017; the prior is ours.

    Args:
        log_p: (K, N, C), log-probabilities or logits, as `evaluate` takes them.
        targets: int64 (N,); −100 is left out.
        combine: as in `evaluate`.

    Raises:
        ValueError: as in `evaluate`, or fewer than 50 examples have a valid target.
    """
    rows, targets = labelled("fit_temperature", log_p, targets)
    _require_many("fit_temperature", len(targets), FEWEST)
    return _fitted(combined(rows, combine).log_p.double(), targets)


@torch.no_grad()
def calibrated_nll(log_p: Tensor, targets: Tensor, combine: str = "prob") -> float:
    """The NLL of p̄ with a temperature, cross-fitted on the set that it is measured on.

    The temperature of the examples with an even index is fitted on those with an odd one, and the
    other way round (indices count the valid examples), so no example is measured with a temperature
    that its target has influenced. It compares methods whose confidences differ.

    Source: Ashukha et al., "Pitfalls of in-domain uncertainty estimation and ensembling", 2020.

    Args and Raises are those of `fit_temperature`, with 100 examples at least.
    """
    rows, targets = labelled("calibrated_nll", log_p, targets)
    _require_many("calibrated_nll", len(targets), 2 * FEWEST)
    log_p = combined(rows, combine).log_p.double()
    nll = torch.empty_like(log_p[:, 0])
    for i in (0, 1):
        fitted, measured = slice(i, None, 2), slice(1 - i, None, 2)
        temperature = _fitted(log_p[fitted], targets[fitted])
        scaled = (log_p[measured] / temperature).log_softmax(-1)
        nll[measured] = negative(scaled, targets[measured])
    return nll.mean().item()


def _require_many(name: str, examples: int, fewest: int) -> None:
    if examples < fewest:
        raise ValueError(
            f"{name} needs at least {fewest} examples with a valid target, since on fewer the "
            f"temperature fits their noise; got {examples}"
        )


def _fitted(log_p: Tensor, targets: Tensor) -> float:
    """T for float64 log p̄ (N, C) and targets (N,)."""

    def objective(log_t: float) -> float:
        nll = negative((log_p / math.exp(log_t)).log_softmax(-1), targets).mean().item()
        return nll + log_t**2 / (2 * _PRIOR_STD**2 * len(targets))

    golden = (math.sqrt(5) - 1) / 2
    low, high = -2.0, 2.0
    left, right = high - golden * (high - low), low + golden * (high - low)
    at_left, at_right = objective(left), objective(right)
    while high - low > 1e-6:
        if at_left < at_right:
            high, right, at_right = right, left, at_left
            left = high - golden * (high - low)
            at_left = objective(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + golden * (high - low)
            at_right = objective(right)
    return math.exp((low + high) / 2)
