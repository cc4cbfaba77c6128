"""Pictures of calibration."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor


def reliability_diagram(
    probabilities: Tensor, targets: Tensor, file: str | Path, bins: int = 15
) -> None:
    """Draw accuracy against confidence: the K particles (thin) and their mean (bars).

    probabilities (K, N, C), targets (N,).
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(4.5, 5.5), sharex=True, height_ratios=(3, 1), layout="constrained"
    )
    top.plot([0, 1], [0, 1], color="grey", linestyle="--", linewidth=1, label="calibrated")
    for k, member in enumerate(probabilities):
        confidence, accuracy, _ = _bins(member, targets, bins)
        label = "particles" if k == 0 else None
        top.plot(confidence, accuracy, color="tab:orange", linewidth=0.8, alpha=0.6, label=label)
    confidence, accuracy, count = _bins(probabilities.mean(0), targets, bins)
    top.plot(confidence, accuracy, color="tab:blue", marker="o", markersize=4, label="mean")
    top.set(ylabel="accuracy", xlim=(0, 1), ylim=(0, 1))
    top.legend(loc="upper left")
    bottom.bar(confidence, count, width=0.8 / bins, color="tab:blue")
    bottom.set(xlabel="confidence", ylabel="examples")
    figure.savefig(file, dpi=120)
    plt.close(figure)


def _bins(p: Tensor, targets: Tensor, bins: int) -> tuple[list, list, list]:
    """Mean confidence, accuracy and count of the bins that hold an example, for matplotlib."""
    confidence, predicted = p.double().max(-1)
    index = (confidence * bins).long().clamp_max(bins - 1)
    count = torch.bincount(index, minlength=bins)
    sums = torch.stack([confidence, (predicted == targets).double()])
    sums = torch.zeros(2, bins, dtype=torch.float64).index_add_(1, index, sums)
    used = count > 0
    means = sums[:, used] / count[used]
    return means[0].tolist(), means[1].tolist(), count[used].tolist()
