"""Pictures of a run: calibration, uncertainty, and how training went."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from multilora import checks
from multilora.calibration import BINS, equal_width
from multilora.log_probabilities import require_targets


def reliability_diagram(
    probabilities: Tensor, targets: Tensor, file: str | Path | BinaryIO, bins: int = BINS
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


def entropy_histograms(
    entropies: Mapping[str, Tensor], file: str | Path | BinaryIO, bins: int = 30
) -> None:
    """Draw the distributions of the predictive entropy of several groups of examples.

    Args:
        entropies: Entropies (n,) in nats by the group's name, such as "right", "wrong" and "OOD",
            from `metrics.predictive(...).entropy`. The legend counts each group's examples.

    Raises:
        ValueError: There is no group, all are empty, or an entropy is not finite or negative.
    """
    checks.integer("bins", bins, 1)
    groups = {name: torch.as_tensor(e).detach().cpu().double() for name, e in entropies.items()}
    for name, group in groups.items():
        if group.ndim != 1 or not (group.isfinite() & (group >= 0)).all():
            raise ValueError(
                f"entropy_histograms needs finite entropies (n,) >= 0; got {tuple(group.shape)} "
                f"in {name!r}, from {group.min().item() if group.numel() else 'none'}"
            )
    if not any(map(len, groups.values())):
        raise ValueError(f"entropy_histograms needs an example; got the groups {[*groups]}")

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(5.5, 3.6), layout="constrained")
    # Entropies of zero need bins of some width.
    highest = max(1e-6, *(group.max().item() for group in groups.values() if len(group)))
    edges = torch.linspace(0, highest, bins + 1, dtype=torch.float64).tolist()
    for i, (name, group) in enumerate(groups.items()):
        weights = torch.full_like(group, 1 / max(1, len(group))).tolist()
        style: dict[str, Any] = {"fc": (f"C{i}", 0.25), "ec": f"C{i}", "linewidth": 1.4}
        style |= {"histtype": "stepfilled", "label": f"{name} ({len(group)})"}
        axis.hist(group.tolist(), edges, weights=weights, **style)
    axis.set(xlabel="H[p̄] (nats)", ylabel="share of the group's examples", xlim=(0, highest))
    axis.set_title("Predictive entropy")
    figure.legend(loc="outside lower center", ncols=min(4, len(groups)), frameon=False)
    figure.savefig(file, dpi=120, format="png")
    plt.close(figure)


def confidence_curve(
    thresholds: Sequence[float],
    low: Sequence[float],
    high: Sequence[float],
    file: str | Path | BinaryIO,
) -> None:
    """Draw the raters' confidence where the model is sure and where it is not.

    A model whose entropy agrees with people has the curve of `low` above that of `high`.

    Source: Bella (Doan et al. 2024), its figure of human confidence.

    Args:
        thresholds: Entropies in nats, growing.
        low: The mean human confidence, 0 to 1, over examples of an entropy up to each threshold;
            NaN, which is not drawn, where there is none.
        high: The same over examples of an entropy above it.

    Raises:
        ValueError: The lengths differ, or there is no threshold.
    """
    if not len(thresholds) == len(low) == len(high) >= 1:
        raise ValueError(
            "confidence_curve needs as many confidences as thresholds, at least one; got "
            f"{len(thresholds)} thresholds, {len(low)} and {len(high)} confidences"
        )

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(5.5, 3.6), layout="constrained")
    axis.plot(thresholds, low, color="tab:blue", marker="o", label="entropy up to the threshold")
    axis.plot(thresholds, high, color="tab:orange", marker="s", label="entropy above it")
    axis.set(xlabel="entropy threshold (nats)", ylabel="mean human confidence")
    axis.set_title("Human confidence on both sides of an entropy threshold")
    axis.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
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


def _bins(p: Tensor, targets: Tensor, bins: int) -> list[list[float]]:
    """Confidence, accuracy and count of the bins that the ECE is computed from."""
    confidence, predicted = p.max(-1)
    return [t.tolist() for t in equal_width(confidence, predicted == targets, bins)]
