"""How good, how calibrated and how diverse the K particles' predictions are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from multilora.calibration import (
    calibrated_nll,
    classwise_error,
    equal_mass,
    equal_width,
    fit_temperature,
)
from multilora.diversity import ambiguity, disagreement, kl_pairwise, similarity, vendi
from multilora.log_probabilities import (
    Predictive,
    combined,
    labelled,
    log_mean,
    mean_kl,
    negative,
    predictive,
    require_rows,
)
from multilora.prediction import predict, predict_loader
from multilora.ranking import aurc, detection

__all__ = [
    "calibrated_nll",
    "evaluate",
    "fit_temperature",
    "log_mean",
    "predict",
    "predict_loader",
    "predictive",
    "sequence_entropy",
    "similarity",
    "token_entropy",
    "vendi",
]


@torch.no_grad()
def evaluate(
    logits: Tensor,
    targets: Tensor,
    combine: str = "prob",
    ood_logits: Tensor | None = None,
    *,
    temperature: float = 1.0,
    full: bool = False,
) -> dict[str, Any]:
    """The predictive measures of K particles over a whole data set; docs/measures.md defines each.

    Args:
        logits: (K, N, C), with −∞ for a class that is masked. Log-probabilities do as well, as
            `predict(..., log=True)` and `predict_loader` return them.
        targets: int64 (N,); −100 is left out.
        combine: the predictive p̄ is the mean of the probabilities ("prob"), or the softmax of the
            mean logits ("logit").
        ood_logits: (K, M, C), the same particles on inputs from another distribution.
        temperature: T > 0; p̄ becomes softmax(log p̄ / T). `fit_temperature` finds one. Measures of
            the particles and of their diversity do not change.
        full: add the measures that cost C or K² passes over the data.

    Returns:
        A dict of floats, with entropies and divergences in nats:

        - of p̄: accuracy, nll (−log p̄_y), brier (summed over classes), entropy H[p̄];
        - calibration of p̄: ece (15 equal-width bins over the whole set, 0 to 1), mce (the largest
          gap of a bin) and ece_adaptive (15 bins of equal mass);
        - uncertainty against errors: entropy_correct, entropy_incorrect, mi_correct and
          mi_incorrect, means over the right and the wrong predictions, NaN where there is none;
          auroc_misclassification, fpr95_misclassification and aupr_misclassification, how well
          H[p̄] finds the errors, NaN where all or none is right; aurc, the area under the
          risk–coverage curve by confidence max p̄;
        - diversity, of the mean probabilities whatever `combine` is: mutual_information
          H[p̄] − mean_k H[p_k] = mean_k KL(p_k‖p̄), diversity mean_k KL(p̄‖p_k) (Bella's),
          jensen_gap mean_k NLL_k − NLL(p̄) >= 0, ambiguity mean_k ‖p_k − p̄‖², disagreement (the
          share of examples that two particles classify differently, NaN for K = 1) and
          vendi_prediction (the effective number of different predictions, 1 to K);
        - member_accuracy and member_nll, lists of K;
        - with ood_logits: ood_entropy and ood_mutual_information; auroc_ood, fpr95_ood and
          aupr_ood, how well H[p̄] finds the other distribution, and the same three with _mi at the
          end by mutual information;
        - with full: ece_classwise, and kl_pairwise, K lists of K, mean KL(p_i‖p_j);
        - combine and num_examples.

    Raises:
        ValueError: shapes do not fit, a target is outside [0, C) or has no probability, no target
            is valid, a row of logits holds NaN or +∞, or nothing but −∞, or temperature <= 0.
    """
    _check_ood(logits, targets, ood_logits)
    rows, targets = labelled("evaluate", logits, targets)
    own = combined(rows, combine, temperature)
    result = _quality(own, targets) | _diversity(own, targets)
    if ood_logits is not None:
        require_rows("ood_logits", ood_logits)
        result |= _ood_measures(own, combined(ood_logits, combine, temperature))
    if full:
        result["ece_classwise"] = classwise_error(own.log_p.exp(), targets)
        result["kl_pairwise"] = kl_pairwise(own.members).tolist()
    return result | {"combine": combine, "num_examples": len(targets)}


def token_entropy(log_p: Tensor) -> tuple[Tensor, Tensor]:
    """H[p̄] and the mutual information H[p̄] − mean_k H[p_k] (...), in nats.

    Args:
        log_p: logits or log-probabilities (K, ..., V).
    """
    of_tokens = combined(log_p, "prob")
    return of_tokens.entropy, of_tokens.mutual_information


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


def _quality(own: Predictive, targets: Tensor) -> dict[str, float]:
    """How good and how calibrated p̄ is, and whether its uncertainty shows its errors."""
    p = own.log_p.exp()
    confidence, predicted = p.max(-1)
    right = predicted == targets
    bins = equal_width(confidence, right)
    one_hot = nn.functional.one_hot(targets, p.shape[-1])
    return {
        "accuracy": right.double().mean().item(),
        "nll": negative(own.log_p, targets).mean().item(),
        "brier": (p - one_hot).square().sum(-1).mean().item(),
        "entropy": own.entropy.mean().item(),
        "ece": bins.error(),
        "mce": bins.gaps().max().item(),
        "ece_adaptive": equal_mass(confidence, right).error(),
        # The mean of nothing is NaN.
        "entropy_correct": own.entropy[right].mean().item(),
        "entropy_incorrect": own.entropy[~right].mean().item(),
        "mi_correct": own.mutual_information[right].mean().item(),
        "mi_incorrect": own.mutual_information[~right].mean().item(),
        **detection("misclassification", own.entropy, ~right),
        "aurc": aurc(confidence, ~right),
    }


def _diversity(own: Predictive, targets: Tensor) -> dict[str, Any]:
    """How good the particles are by themselves, and how different."""
    member_nll = negative(own.members, targets)
    # Jensen's inequality holds for every example; rounding does not know it.
    gap = (member_nll.mean(0) - negative(own.mean, targets)).clamp_min(0)
    return {
        "mutual_information": own.mutual_information.mean().item(),
        "diversity": mean_kl(own.mean, own.members).mean().item(),
        "jensen_gap": gap.mean().item(),
        "ambiguity": ambiguity(own.members, own.mean),
        "disagreement": disagreement(own.members),
        "vendi_prediction": vendi(similarity(own.members)),
        "member_accuracy": (own.members.argmax(-1) == targets).double().mean(-1).tolist(),
        "member_nll": member_nll.mean(-1).tolist(),
    }


def _ood_measures(own: Predictive, ood: Predictive) -> dict[str, float]:
    """How the predictive looks on another distribution, and how well it tells the two apart."""
    is_ood = torch.cat([torch.zeros_like(own.entropy), torch.ones_like(ood.entropy)]).bool()
    information = torch.cat([own.mutual_information, ood.mutual_information])
    return {
        "ood_entropy": ood.entropy.mean().item(),
        "ood_mutual_information": ood.mutual_information.mean().item(),
        **detection("ood", torch.cat([own.entropy, ood.entropy]), is_ood),
        **detection("ood_mi", information, is_ood),
    }


def _check_ood(logits: Tensor, targets: Tensor, ood_logits: Tensor | None) -> None:
    if ood_logits is not None and (
        ood_logits.ndim != 3 or ood_logits.shape[::2] != logits.shape[::2] or not ood_logits.numel()
    ):
        raise ValueError(
            "evaluate needs ood_logits (K, M, C) of the same particles and classes, M >= 1; got "
            f"{tuple(ood_logits.shape)} beside logits {tuple(logits.shape)}, targets "
            f"{tuple(targets.shape)}"
        )
