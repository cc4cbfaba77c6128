"""Pictures of a run: calibration, and how training went."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from multilora import checks
from multilora.metrics import require_targets


def reliability_diagram(
    probabilities: Tensor, targets: Tensor, file: str | Path | BinaryIO, bins: int = 15
) -> None:
    """Draw accuracy against confidence: the K particles (thin) and their mean (bars).

    Args:
        probabilities: (K, N, C).
        targets: (N,); examples with the target −100 are left out.

    Raises:
        ValueError: Other shapes, a target outside [0, C), no valid target, or rows that are not
            probabilities.
    """
    probabilities, targets = _checked(probabilities.detach().cpu(), targets.detach().cpu())
    checks.integer("bins", bins, 1)

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


#: The quantities of a history that are drawn, each with its axis label.
_CURVES = {
    "loss": "loss",
    "nll": "mean NLL of a particle",
    "divergence": "divergence",
    "particle_distance": "mean distance ‖ΔW$_i$ − ΔW$_j$‖",
}


def history_diagram(history: Sequence[Mapping[str, float]], file: str | Path | BinaryIO) -> None:
    """Draw the statistics of a training run over its steps, one below the other.

    Args:
        history: The statistics of some steps, in order, each with the key "step". What is drawn is
            the loss, the particles' NLL, their divergence and their mean distance, where they are
            there.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    found = {name: label for name, label in _CURVES.items() if any(name in row for row in history)}
    figure, axes = plt.subplots(
        max(1, len(found)),
        1,
        figsize=(5.5, 0.6 + 1.6 * max(1, len(found))),
        sharex=True,
        squeeze=False,
        layout="constrained",
    )
    for axis, (name, label) in zip(axes[:, 0], found.items()):
        rows = [row for row in history if name in row]
        steps, values = [row["step"] for row in rows], [row[name] for row in rows]
        axis.plot(steps, values, color="tab:blue", marker="o", markersize=3)
        axis.set_ylabel(label, fontsize=8)
        axis.grid(alpha=0.3)
    axes[-1, 0].set_xlabel("step")
    figure.savefig(file, dpi=120, format="png")
    plt.close(figure)


def _checked(p: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities and targets of the examples with a valid target, after a check."""
    shapes = f"probabilities {tuple(p.shape)}, targets {tuple(targets.shape)}"
    if p.ndim != 3 or not len(p) or targets.shape != p.shape[1:2] or targets.dtype != torch.int64:
        raise ValueError(
            "reliability_diagram needs probabilities (K, N, C) and int64 targets (N,); "
            f"got {shapes}, {targets.dtype}"
        )
    valid = require_targets("reliability_diagram", targets, p.shape[-1], shapes)
    p, targets = p[:, valid].double(), targets[valid]
    # NaN fails both comparisons. Half precision sums to one only within its rounding.
    good = (p >= 0).all(-1) & ((p.sum(-1) - 1).abs() < 2e-2)
    if not good.all():
        raise ValueError(
            f"{int((~good).any(0).sum())} of {len(targets)} rows are not probabilities, which are "
            f">= 0 and sum to one: take the softmax of logits; got {shapes}"
        )
    return p, targets


def _bins(p: Tensor, targets: Tensor, bins: int) -> tuple[list, list, list]:
    """Mean confidence, accuracy and count of the bins that hold an example, for matplotlib."""
    confidence, predicted = p.max(-1)
    index = (confidence * bins).long().clamp_max(bins - 1)
    count = torch.bincount(index, minlength=bins)
    sums = torch.stack([confidence, (predicted == targets).double()])
    sums = torch.zeros(2, bins, dtype=torch.float64).index_add_(1, index, sums)
    used = count > 0
    means = sums[:, used] / count[used]
    return means[0].tolist(), means[1].tolist(), count[used].tolist()
