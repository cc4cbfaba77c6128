"""Whether the model is unsure where people disagree."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from multilora.integrations.vqa import THRESHOLDS, confidence_curve
from multilora.log_probabilities import combined
from multilora.ops.common import IGNORE_INDEX
from multilora.ranking import spearman


def agreement(
    log_p: Tensor, targets: Tensor, confidence: Tensor, combine: str = "prob"
) -> dict[str, Any]:
    """The raters' confidence on both sides of entropy thresholds, and the rank correlation.

    Source: Bella (Doan et al. 2024), figure 6.

    Args:
        log_p: (K, N, C).
        targets: (N,); examples with the target −100 are left out.
        confidence: (N,) in [0, 1], the raters' agreement on each example.
        combine: As for `metrics.evaluate`.

    Returns:
        Lists, one number for each of the "thresholds" in nats: "low" and "high" are the mean
        confidences over examples of an entropy H[p̄] up to it, and above it, NaN where there is
        none, and "examples_low" and "examples_high" the numbers of these examples. "spearman" is
        the correlation of H[p̄] with 1 − confidence, NaN where one of them is constant.

    Raises:
        ValueError: There is not one confidence in [0, 1] for each example.
    """
    # NaN fails both comparisons.
    outside = ~((confidence >= 0) & (confidence <= 1))
    if confidence.shape != targets.shape or outside.any():
        raise ValueError(
            f"human_confidence must be in [0, 1], one for each of the {len(targets)} examples; got "
            f"{tuple(confidence.shape)}, {int(outside.sum())} of them outside"
        )
    valid = targets != IGNORE_INDEX
    entropy = combined(log_p[:, valid], combine).entropy
    confidence = confidence[valid].to(entropy.device)
    low, high = confidence_curve(entropy, confidence)
    below = [int((entropy <= t).sum()) for t in THRESHOLDS]
    return {
        "thresholds": list(THRESHOLDS),
        "low": low.tolist(),
        "high": high.tolist(),
        "examples_low": below,
        "examples_high": [len(entropy) - n for n in below],
        "spearman": spearman(entropy, 1 - confidence),
    }
