"""How well a score ranks examples: detection of the positive ones, and selective prediction."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def detection(name: str, score: Tensor, positive: Tensor) -> dict[str, float]:
    """AUROC, FPR95 and AUPR of a score (N,) for finding the examples `positive` (N,).

    Returns:
        auroc_NAME, fpr95_NAME (the share of negatives above the highest threshold that finds 95 %
        of the positives) and aupr_NAME (average precision). All are NaN where every example is
        positive, or none.
    """
    from torchmetrics.functional.classification import (
        binary_auroc,
        binary_average_precision,
        binary_specificity_at_sensitivity,
    )

    keys = [f"{measure}_{name}" for measure in ("auroc", "fpr95", "aupr")]
    if positive.all() or not positive.any():
        return dict.fromkeys(keys, math.nan)
    # Torchmetrics would take scores outside [0, 1] for logits and squash them. Ranks keep ties, and
    # make no others.
    _, rank = torch.unique(score, return_inverse=True)
    both = rank / max(rank.max().item(), 1), positive.long()
    specificity, _ = binary_specificity_at_sensitivity(*both, min_sensitivity=0.95)
    values = binary_auroc(*both), 1 - specificity.double(), binary_average_precision(*both)
    return {key: value.item() for key, value in zip(keys, values)}


def aurc(confidence: Tensor, wrong: Tensor) -> float:
    """The area under the risk–coverage curve: mean_n (errors among the n most confident) / n.

    Examples of equal confidence count as if in random order.

    Source: Geifman, Uziel and El-Yaniv, "Bias-reduced uncertainty estimation for deep neural
    classifiers", 2019.

    Args:
        confidence: (N,).
        wrong: bool (N,), whether the prediction is wrong.
    """
    errors = tie_means(confidence, wrong)[confidence.argsort(descending=True)].cumsum(0)
    return (errors / torch.arange(1, len(errors) + 1, device=errors.device)).mean().item()


def spearman(a: Tensor, b: Tensor) -> float:
    """The rank correlation of a (N,) and b (N,), in [−1, 1]; NaN where one is constant.

    Equal values have the mean of their ranks.
    """
    if len(a) < 2:
        return math.nan
    ranks = [tie_means(values, values.argsort().argsort()) for values in (a, b)]
    return torch.corrcoef(torch.stack(ranks))[0, 1].item()


def tie_means(score: Tensor, values: Tensor) -> Tensor:
    """float64 (N,): each value replaced by the mean over the examples of exactly its score.

    Sums in the order of the scores then do not depend on the order of equal ones.
    """
    _, group, count = torch.unique(score, return_inverse=True, return_counts=True)
    sums = torch.zeros(len(count), dtype=torch.float64, device=score.device)
    return (sums.index_add_(0, group, values.double()) / count)[group]
