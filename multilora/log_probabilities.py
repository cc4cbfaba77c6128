"""What K particles predict together, in log space, and the checks of what a measure is given."""

from __future__ import annotations

import math
import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from multilora import checks
from multilora.ops.common import IGNORE_INDEX, accumulator


class Predictive(NamedTuple):
    """The predictive distributions of N examples."""

    members: Tensor  # (K, N, C), log p_k
    mean: Tensor  # (N, C), the log of the mean probabilities
    log_p: Tensor  # (N, C), log p̄ as `combine` and `temperature` say
    entropy: Tensor  # (N,), H[p̄] in nats
    mutual_information: Tensor  # (N,), in nats, of the mean probabilities


@torch.no_grad()
def predictive(logits: Tensor, combine: str = "prob", temperature: float = 1.0) -> Predictive:
    """The predictive distribution of every example, with its entropy and mutual information.

    Args:
        logits: (K, N, C), logits or log-probabilities, with −∞ for a class that is masked.
        combine: as in `evaluate`.
        temperature: as in `evaluate`.

    Returns:
        A named tuple: `members` log p_k (K, N, C), `mean` log mean_k p_k (N, C), `log_p` log p̄
        (N, C), `entropy` H[p̄] (N,) and `mutual_information` (N,), both in nats. All are float32, or
        float64 for float64 logits.

    Raises:
        ValueError: the logits have another shape, or a row holds NaN or +∞, or nothing but −∞.
    """
    if logits.ndim != 3 or not logits.numel():
        raise ValueError(f"predictive needs logits (K, N, C); got {tuple(logits.shape)}")
    require_rows("logits", logits)
    return combined(logits, combine, temperature)


def combined(logits: Tensor, combine: str, temperature: float = 1.0) -> Predictive:
    """`predictive` for rows that have been checked."""
    checks.choice("combine", combine, ("prob", "logit"))
    checks.number("temperature", temperature, 0, open_low=True)
    logits = logits.to(accumulator(logits.dtype))
    members = logits.log_softmax(-1)
    mean = log_mean(members)
    log_p = mean if combine == "prob" else logits.mean(0).log_softmax(-1)
    if temperature != 1:
        log_p = (log_p / temperature).log_softmax(-1)
    # As mean_k KL(p_k‖p̄) it is never negative, unlike the difference of two rounded entropies.
    return Predictive(members, mean, log_p, entropy(log_p), mean_kl(members, mean))


def log_mean(members: Tensor) -> Tensor:
    """log mean_k p_k (...) from log p_k (K, ...), computed in log space."""
    # Rounding can lift a certain prediction above probability one.
    return (torch.logsumexp(members, 0) - math.log(members.shape[0])).clamp_max(0)


def entropy(log_p: Tensor) -> Tensor:
    """H[p] (...) in nats, from log p (..., C)."""
    return torch.special.entr(log_p.exp()).sum(-1)


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p‖q) (...) in nats, from log p and log q (..., C)."""
    p = log_p.exp()
    # 0 · (−∞ − …) is 0 here.
    return torch.where(p > 0, p * (log_p - log_q), 0).sum(-1)


def mean_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """The mean over particles of KL(p‖q) (N,), one of the two (K, N, C) and the other (N, C)."""
    return kl(log_p, log_q).mean(0).clamp_min(0)


def negative(log_p: Tensor, targets: Tensor) -> Tensor:
    """−log p_y (..., N) from log p (..., N, C) and y (N,)."""
    index = targets.expand(log_p.shape[:-1])[..., None]
    return -log_p.gather(-1, index).squeeze(-1)


def labelled(name: str, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (K, N', C) and targets (N',) of the valid examples, for the function `name`.

    Raises:
        ValueError: as `evaluate` says.
    """
    shapes = f"logits {tuple(logits.shape)}, targets {tuple(targets.shape)}"
    if logits.ndim != 3 or not len(logits) or targets.shape != logits.shape[1:2]:
        raise ValueError(f"{name} needs logits (K, N, C) and targets (N,); got {shapes}")
    if targets.dtype != torch.int64:
        raise ValueError(f"{name} needs int64 targets; got {targets.dtype}, {shapes}")
    valid = require_targets(name, targets, logits.shape[-1], shapes)
    rows, targets = logits[:, valid], targets[valid]
    require_rows("logits", rows)
    impossible = int((negative(rows, targets) == math.inf).any(0).sum())
    if impossible:
        raise ValueError(
            f"{impossible} of {rows.shape[1]} targets have the logit -inf, no probability at all: "
            "instead of the logarithm of probabilities that were rounded to zero, take "
            f"predict(..., log=True); got {shapes}"
        )
    if bool((rows >= 0).all() & ((rows.sum(-1) - 1).abs() < 1e-3).all()):
        warnings.warn(
            f"the logits look like probabilities, which {name} would take the softmax of: give it "
            f"predict(..., log=True); got {shapes}",
            stacklevel=4,
        )
    return rows, targets


def require_targets(name: str, targets: Tensor, classes: int, shapes: str) -> Tensor:
    """The mask of valid targets (N,); ValueError if none is, or one is not in [0, classes)."""
    valid = targets != IGNORE_INDEX
    if not valid.any():
        raise ValueError(f"{name} needs at least one valid target; got {shapes}")
    if not ((targets >= 0) & (targets < classes))[valid].all():
        raise ValueError(f"{name} needs targets in [0, {classes}) or {IGNORE_INDEX}; got {shapes}")
    return valid


def require_rows(name: str, logits: Tensor) -> None:
    """Raise ValueError where a row of logits (K, N, C) is no distribution."""
    broken = logits.isnan().any(-1) | (logits == math.inf).any(-1) | (logits == -math.inf).all(-1)
    rows = int(broken.any(0).sum())
    if rows:
        raise ValueError(
            f"{rows} of {logits.shape[1]} rows of {name} hold NaN or +inf, or nothing but -inf, in "
            "one particle at least: leave them out (target -100), or find out why"
        )
