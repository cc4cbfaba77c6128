"""How good, how calibrated and how diverse the K particles' predictions are."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from multilora.ops.common import IGNORE_INDEX, accumulator


@torch.no_grad()
def predict(model: nn.Module, x: Any, particle_chunk: int | None = None) -> Tensor:
    """Every particle's class probabilities (K, B, C), in eval mode and without gradients.

    x: the model's input, or a mapping of its keyword arguments. An output with `.logits`
    (transformers) is unwrapped. Every module is left in the mode it was in. Probabilities are
    float32 or better; those of all processes where the particles are spread over some.

    particle_chunk: run that many particles at a time, with their memory.
    """

    def run() -> Tensor:
        output = model(**x) if isinstance(x, Mapping) else model(x)
        return _at_least_float32(getattr(output, "logits", output)).softmax(-1)

    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        p = run() if particle_chunk is None else model.in_chunks(particle_chunk, run)
    finally:
        for module in training:
            module.training = True
    return model.ranks.gather(p) if hasattr(model, "ranks") else p


@torch.no_grad()
def evaluate(
    logits: Tensor,
    targets: Tensor,
    combine: str = "prob",
    ood_logits: Tensor | None = None,
) -> dict[str, Any]:
    """The predictive measures of K particles over a whole data set.

    logits (K, N, C) (log-probabilities do as well), targets (N,) int64, −100 left out;
    ood_logits (K, M, C): the same particles on inputs from another distribution.

    combine: the predictive p̄ is the mean of the probabilities ("prob"), or the softmax of the
    mean logits ("logit"). -> a dict of floats, entropies in nats:

    accuracy, nll (−log p̄_y), brier (summed over classes), ece (15 equal-width bins over the
    whole set, 0 to 1), entropy H[p̄];
    mutual_information H[p̄] − mean_k H[p_k] = mean_k KL(p_k‖p̄) and diversity mean_k KL(p̄‖p_k)
    (Bella's), both of the mean probabilities whatever `combine` is;
    member_accuracy, member_nll: lists of K;
    auroc_misclassification: how well H[p̄] ranks errors above hits (NaN where all or none is right);
    with ood_logits, ood_entropy, ood_mutual_information, and auroc_ood and auroc_ood_mi: how
    well H[p̄] and the mutual information rank the other distribution above this one;
    combine, num_examples.

    Raises ValueError for shapes that do not fit, a target outside [0, C) or no valid target.
    """
    from torchmetrics.functional.classification import (
        binary_auroc,
        multiclass_accuracy,
        multiclass_calibration_error,
    )

    _check(logits, targets, combine, ood_logits)
    valid = targets != IGNORE_INDEX
    logits, targets = _at_least_float32(logits[:, valid]), targets[valid]
    particles, examples, classes = logits.shape
    members = logits.log_softmax(-1)  # (K, N, C)
    mean = log_mean(members)  # (N, C), log of the mean probabilities
    log_p = mean if combine == "prob" else logits.mean(0).log_softmax(-1)
    p = log_p.exp()
    nll = -log_p.gather(-1, targets[:, None]).squeeze(-1)
    wrong = p.argmax(-1) != targets
    entropy = _entropy(log_p)
    one_hot = nn.functional.one_hot(targets, classes)
    member_nll = -members.gather(-1, targets.expand(particles, -1)[..., None]).squeeze(-1)
    result = {
        "accuracy": multiclass_accuracy(p, targets, classes, average="micro").item(),
        "nll": nll.mean().item(),
        "ece": multiclass_calibration_error(p.float(), targets, classes, n_bins=15).item(),
        "brier": (p - one_hot).square().sum(-1).mean().item(),
        "entropy": entropy.mean().item(),
        "mutual_information": _mutual_information(members, mean).mean().item(),
        "diversity": _kl(mean, members).mean().item(),
        "member_accuracy": (members.argmax(-1) == targets).double().mean(-1).tolist(),
        "member_nll": member_nll.mean(-1).tolist(),
        "auroc_misclassification": math.nan,
        "combine": combine,
        "num_examples": examples,
    }
    if wrong.any() and not wrong.all():
        result["auroc_misclassification"] = _auroc(binary_auroc, entropy, wrong)
    if ood_logits is not None:
        ood_logits = _at_least_float32(ood_logits)
        ood_members = ood_logits.log_softmax(-1)
        ood_mean = log_mean(ood_members)
        ood_log_p = ood_mean if combine == "prob" else ood_logits.mean(0).log_softmax(-1)
        ood_entropy = _entropy(ood_log_p)
        ood_mi = _mutual_information(ood_members, ood_mean)
        mi = _mutual_information(members, mean)
        is_ood = torch.cat([torch.zeros_like(entropy), torch.ones_like(ood_entropy)]).bool()
        result["ood_entropy"] = ood_entropy.mean().item()
        result["ood_mutual_information"] = ood_mi.mean().item()
        result["auroc_ood"] = _auroc(binary_auroc, torch.cat([entropy, ood_entropy]), is_ood)
        result["auroc_ood_mi"] = _auroc(binary_auroc, torch.cat([mi, ood_mi]), is_ood)
    return result


def _auroc(binary_auroc, score: Tensor, positive: Tensor) -> float:
    # Ranks, because torchmetrics takes scores outside [0, 1] for logits and squashes them: ties
    # must stay ties and nothing else may become one.
    _, rank = torch.unique(score, return_inverse=True)
    return binary_auroc(rank / max(rank.max().item(), 1), positive.long()).item()


def _at_least_float32(t: Tensor) -> Tensor:
    return t.to(accumulator(t.dtype))


def log_mean(members: Tensor) -> Tensor:
    """log mean_k p_k (...) from log p_k (K, ...), without leaving log space."""
    # Rounding can lift a certain prediction above probability one.
    return (torch.logsumexp(members, 0) - math.log(members.shape[0])).clamp_max(0)


def _entropy(log_p: Tensor) -> Tensor:
    return torch.special.entr(log_p.exp()).sum(-1)


def _mutual_information(members: Tensor, mean: Tensor) -> Tensor:
    """mean_k KL(p_k‖p̄) (N,): never negative, unlike the difference of two rounded entropies."""
    return _kl(members, mean)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """mean over particles of KL(p‖q) (N,), one of the two (K, N, C) and the other (N, C)."""
    p = log_p.exp()
    # 0 · (−∞ − …) is 0 here.
    terms = torch.where(p > 0, p * (log_p - log_q), 0)
    return terms.sum(-1).mean(0).clamp_min(0)


def _check(logits, targets, combine, ood_logits) -> None:
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
    valid = targets != IGNORE_INDEX
    if not valid.any():
        raise ValueError(f"evaluate needs at least one valid target; got {shapes}")
    if not ((targets >= 0) & (targets < logits.shape[-1]))[valid].all():
        raise ValueError(
            f"evaluate needs targets in [0, {logits.shape[-1]}) or {IGNORE_INDEX}; got {shapes}"
        )
