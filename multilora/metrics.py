"""How good, how calibrated and how diverse the K particles' predictions are."""

from __future__ import annotations

import math
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from multilora.ops.common import IGNORE_INDEX, accumulator
from multilora.prediction import predict, predict_loader

__all__ = [
    "evaluate",
    "log_mean",
    "predict",
    "predict_loader",
    "require_targets",
    "sequence_entropy",
    "token_entropy",
]


@torch.no_grad()
def evaluate(
    logits: Tensor,
    targets: Tensor,
    combine: str = "prob",
    ood_logits: Tensor | None = None,
) -> dict[str, Any]:
    """The predictive measures of K particles over a whole data set.

    Args:
        logits: (K, N, C), with −∞ for a class that is masked. Log-probabilities do as well, as
            `predict(..., log=True)` and `predict_loader` return them.
        targets: int64 (N,); −100 is left out.
        combine: the predictive p̄ is the mean of the probabilities ("prob"), or the softmax of the
            mean logits ("logit").
        ood_logits: (K, M, C), the same particles on inputs from another distribution.

    Returns:
        A dict of floats, with entropies in nats:

        - accuracy, nll (−log p̄_y), brier (summed over classes), ece (15 equal-width bins over the
          whole set, 0 to 1), entropy H[p̄];
        - mutual_information H[p̄] − mean_k H[p_k] = mean_k KL(p_k‖p̄), and diversity
          mean_k KL(p̄‖p_k) (Bella's), both of the mean probabilities whatever `combine` is;
        - member_accuracy and member_nll, lists of K;
        - auroc_misclassification: how well H[p̄] ranks errors above hits, NaN where all or none is
          right;
        - with ood_logits: ood_entropy, ood_mutual_information, and auroc_ood and auroc_ood_mi, the
          quality of H[p̄] and of the mutual information as scores of the other distribution;
        - combine and num_examples.

    Raises:
        ValueError: shapes do not fit, a target is outside [0, C) or has no probability, no target
            is valid, or a row of logits holds NaN or +∞, or nothing but −∞.
    """
    from torchmetrics.functional.classification import (
        multiclass_accuracy,
        multiclass_calibration_error,
    )

    _check(logits, targets, combine, ood_logits)
    valid = targets != IGNORE_INDEX
    predictive, targets = _predictive(logits[:, valid], combine), targets[valid]
    members, log_p, entropy = predictive.members, predictive.log_p, predictive.entropy
    particles, examples, classes = members.shape
    p = log_p.exp()
    nll = -log_p.gather(-1, targets[:, None]).squeeze(-1)
    wrong = p.argmax(-1) != targets
    one_hot = nn.functional.one_hot(targets, classes)
    member_nll = -members.gather(-1, targets.expand(particles, -1)[..., None]).squeeze(-1)
    result = {
        "accuracy": multiclass_accuracy(p, targets, classes, average="micro").item(),
        "nll": nll.mean().item(),
        "ece": multiclass_calibration_error(p.float(), targets, classes, n_bins=15).item(),
        "brier": (p - one_hot).square().sum(-1).mean().item(),
        "entropy": entropy.mean().item(),
        "mutual_information": predictive.mutual_information.mean().item(),
        "diversity": _kl(predictive.mean, members).mean().item(),
        "member_accuracy": (members.argmax(-1) == targets).double().mean(-1).tolist(),
        "member_nll": member_nll.mean(-1).tolist(),
        "auroc_misclassification": math.nan,
        "combine": combine,
        "num_examples": examples,
    }
    if wrong.any() and not wrong.all():
        result["auroc_misclassification"] = _auroc(entropy, wrong)
    if ood_logits is not None:
        result |= _ood_measures(predictive, _predictive(ood_logits, combine))
    return result


def token_entropy(log_p: Tensor) -> tuple[Tensor, Tensor]:
    """H[p̄] and the mutual information H[p̄] − mean_k H[p_k] (...), in nats.

    Args:
        log_p: logits or log-probabilities (K, ..., V).
    """
    predictive = _predictive(log_p, "prob")
    return predictive.entropy, predictive.mutual_information


@torch.no_grad()
def sequence_entropy(log_p: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The means over a sequence's tokens of H[p̄_t] and of the mutual information (Bella, eq. 7).

    Args:
        log_p: logits or log-probabilities (K, B, T, V) of the token at each position.
        mask: bool, or 0 and 1, (B, T): which positions are tokens of the sequence. What log_p holds
            elsewhere does not matter.

    Returns:
        Entropy (B,) and mutual information (B,), in nats.

    Raises:
        ValueError: the shapes do not fit, or a sequence has no token.
    """
    shapes = f"log_p {tuple(log_p.shape)}, mask {tuple(mask.shape)}"
    if log_p.ndim != 4 or mask.shape != log_p.shape[1:3]:
        raise ValueError(f"sequence_entropy needs log_p (K, B, T, V), mask (B, T); got {shapes}")
    mask = mask.bool()
    lengths = mask.sum(-1)
    if not lengths.all():
        empty = int((lengths == 0).sum())
        raise ValueError(
            f"{empty} of {len(mask)} sequences have no token in the mask; got {shapes}"
        )
    entropy, information = (
        torch.where(mask, measure, 0).sum(-1) / lengths for measure in token_entropy(log_p)
    )
    return entropy, information


class _Predictive(NamedTuple):
    """The predictive distributions of N examples, in log space."""

    members: Tensor  # (K, N, C), log p_k
    mean: Tensor  # (N, C), the log of the mean probabilities
    log_p: Tensor  # (N, C), log p̄ as `combine` says
    entropy: Tensor  # (N,), H[p̄]
    mutual_information: Tensor  # (N,)


def _predictive(logits: Tensor, combine: str) -> _Predictive:
    logits = _at_least_float32(logits)
    members = logits.log_softmax(-1)
    mean = log_mean(members)
    log_p = mean if combine == "prob" else logits.mean(0).log_softmax(-1)
    # As mean_k KL(p_k‖p̄) it is never negative, unlike the difference of two rounded entropies.
    return _Predictive(members, mean, log_p, _entropy(log_p), _kl(members, mean))


def _ood_measures(own: _Predictive, ood: _Predictive) -> dict[str, float]:
    """How the predictive looks on another distribution, and how well it tells the two apart."""
    is_ood = torch.cat([torch.zeros_like(own.entropy), torch.ones_like(ood.entropy)]).bool()
    information = torch.cat([own.mutual_information, ood.mutual_information])
    return {
        "ood_entropy": ood.entropy.mean().item(),
        "ood_mutual_information": ood.mutual_information.mean().item(),
        "auroc_ood": _auroc(torch.cat([own.entropy, ood.entropy]), is_ood),
        "auroc_ood_mi": _auroc(information, is_ood),
    }


def _auroc(score: Tensor, positive: Tensor) -> float:
    from torchmetrics.functional.classification import binary_auroc

    # Torchmetrics would take scores outside [0, 1] for logits and squash them. Ranks keep ties, and
    # make no others.
    _, rank = torch.unique(score, return_inverse=True)
    return binary_auroc(rank / max(rank.max().item(), 1), positive.long()).item()


def _at_least_float32(t: Tensor) -> Tensor:
    return t.to(accumulator(t.dtype))


def log_mean(members: Tensor) -> Tensor:
    """log mean_k p_k (...) from log p_k (K, ...), computed in log space."""
    # Rounding can lift a certain prediction above probability one.
    return (torch.logsumexp(members, 0) - math.log(members.shape[0])).clamp_max(0)


def _entropy(log_p: Tensor) -> Tensor:
    return torch.special.entr(log_p.exp()).sum(-1)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """mean over particles of KL(p‖q) (N,), one of the two (K, N, C) and the other (N, C)."""
    p = log_p.exp()
    # 0 · (−∞ − …) is 0 here.
    terms = torch.where(p > 0, p * (log_p - log_q), 0)
    return terms.sum(-1).mean(0).clamp_min(0)


def _check(logits: Tensor, targets: Tensor, combine: str, ood_logits: Tensor | None) -> None:
    shapes = f"logits {tuple(logits.shape)}, targets {tuple(targets.shape)}"
    if logits.ndim != 3 or targets.shape != logits.shape[1:2]:
        raise ValueError(f"evaluate needs logits (K, N, C) and targets (N,); got {shapes}")
    if combine not in ("prob", "logit"):
        raise ValueError(f'combine must be "prob" or "logit"; got {combine!r}')
    if ood_logits is not None and (
        ood_logits.ndim != 3 or ood_logits.shape[::2] != logits.shape[::2] or not ood_logits.numel()
    ):
        raise ValueError(
            f"evaluate needs ood_logits (K, M, C) of the same particles and classes, M >= 1; "
            f"got {tuple(ood_logits.shape)} beside {shapes}"
        )
    if targets.dtype != torch.int64:
        raise ValueError(f"evaluate needs int64 targets; got {targets.dtype}, {shapes}")
    valid = require_targets("evaluate", targets, logits.shape[-1], shapes)
    rows = logits[:, valid]
    _require_rows("logits", rows)
    if ood_logits is not None:
        _require_rows("ood_logits", ood_logits)
    chosen = rows.gather(-1, targets[valid].expand(len(rows), -1)[..., None])
    impossible = int((chosen == -math.inf).any(0).sum())
    if impossible:
        raise ValueError(
            f"{impossible} of {rows.shape[1]} targets have the logit -inf, no probability at all: "
            "instead of the logarithm of probabilities that were rounded to zero, take "
            f"predict(..., log=True); got {shapes}"
        )
    if bool((rows >= 0).all() & ((rows.sum(-1) - 1).abs() < 1e-3).all()):
        warnings.warn(
            "the logits look like probabilities, which evaluate would take the softmax of: give it "
            f"predict(..., log=True); got {shapes}",
            stacklevel=4,
        )


def require_targets(name: str, targets: Tensor, classes: int, shapes: str) -> Tensor:
    """The mask of valid targets (N,); ValueError if none is, or one is not in [0, classes)."""
    valid = targets != IGNORE_INDEX
    if not valid.any():
        raise ValueError(f"{name} needs at least one valid target; got {shapes}")
    if not ((targets >= 0) & (targets < classes))[valid].all():
        raise ValueError(f"{name} needs targets in [0, {classes}) or {IGNORE_INDEX}; got {shapes}")
    return valid


def _require_rows(name: str, logits: Tensor) -> None:
    broken = logits.isnan().any(-1) | (logits == math.inf).any(-1) | (logits == -math.inf).all(-1)
    rows = int(broken.any(0).sum())
    if rows:
        raise ValueError(
            f"{rows} of {logits.shape[1]} rows of {name} hold NaN or +inf, or nothing but -inf, in "
            "one particle at least: leave them out (target -100), or find out why"
        )
