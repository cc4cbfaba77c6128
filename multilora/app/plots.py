"""Pictures of a run: calibration, uncertainty, and how training went."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from multilora import checks
from multilora.calibration import BINS, Bins, equal_width
from multilora.log_probabilities import require_targets

#: What is averaged over fewer examples is drawn fainter.
_FEW = 20


def reliability_diagram(
    probabilities: Tensor,
    targets: Tensor,
    file: str | Path | BinaryIO,
    bins: int = BINS,
    method: str | None = None,
    combine: str = "prob",
) -> None:
    """Draw accuracy against confidence, of the predictive (thick) and of each particle (thin).

    The bins are those of the ECE, which the title gives with K. A bin of fewer than 20 examples is
    fainter the fewer it has. Below stands the number of examples of the predictive's bins, on a
    logarithmic scale.

    Args:
        probabilities: (K, N, C).
        targets: (N,); examples with the target −100 are left out.
        method: Its name, for the title.
        combine: How the particles' probabilities make the predictive, as for `metrics.evaluate`.

    Raises:
        ValueError: Other shapes, a target outside [0, C), no valid target, or rows that are not
            probabilities.
    """
    probabilities, targets = _checked(probabilities.detach().cpu(), targets.detach().cpu())
    checks.integer("bins", bins, 1)
    checks.choice("combine", combine, ("prob", "logit"))
    particles = len(probabilities)
    together = _binned(_mean(probabilities, combine), targets, bins)
    alone = [_binned(p, targets, bins) for p in probabilities] if particles > 1 else []

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(4.8, 6), sharex=True, height_ratios=(3, 1), layout="constrained"
    )
    top.plot([0, 1], [0, 1], color="grey", linestyle="--", linewidth=1, label="calibrated")
    for member in alone:
        _draw_faded(top, *member, "tab:orange", 0.8, 4)
    _draw_faded(top, *together, "tab:blue", 1.8, 28)
    words: dict[str, Any] = {"color": "grey", "fontsize": 8, "style": "italic", "zorder": 0}
    top.text(0.02, 0.99, "too unsure", va="top", **words)
    top.text(0.98, 0.01, "too sure", ha="right", **words)
    top.set(ylabel="accuracy of the bin", xlim=(0, 1), ylim=(-0.02, 1.02))
    who = "" if method is None else f"{method}, "
    top.set_title(f"{who}K = {particles}, ECE = {together.error():.3f}")
    if alone:
        top.plot([], [], color="tab:orange", linewidth=0.8, label="each particle")
    name = "mean of the particles" if alone else "the only particle"
    top.plot([], [], color="tab:blue", marker="o", markersize=5, label=name)
    _explain_faded(top, "tab:blue", *(drawn.examples for drawn in (together, *alone)))
    _draw_counts(bottom, together, bins)
    bottom.set(xlabel="confidence: the largest predicted probability", ylabel="examples")
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    figure.savefig(file, dpi=120, format="png")
    plt.close(figure)


#: The quantities of a history that are drawn: each panel's label, and its curves with theirs.
_CURVES = {
    "cross-entropy": {
        "loss": "of a particle, training batch",
        "validation_nll": "of the mean prediction, validation",
    },
    "objective": {"objective": ""},
    "divergence": {"divergence": ""},
    "mean distance ‖ΔW$_i$ − ΔW$_j$‖": {"particle_distance": ""},
}


def history_diagram(history: Sequence[Mapping[str, float]], file: str | Path | BinaryIO) -> None:
    """Draw the statistics of a training run over its steps, one below the other.

    Args:
        history: The statistics of some steps, in order, each with the key "step". What is drawn is
            the loss, the NLL of validation examples, the method's objective, the particles'
            divergence and their mean distance, where they are there.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    found = {
        label: drawn
        for label, curves in _CURVES.items()
        if (drawn := [name for name in curves if any(name in row for row in history)])
    }
    figure, axes = plt.subplots(
        max(1, len(found)),
        1,
        figsize=(5.5, 0.6 + 1.6 * max(1, len(found))),
        sharex=True,
        squeeze=False,
        layout="constrained",
    )
    for axis, (label, names) in zip(axes[:, 0], found.items()):
        for name, color in zip(names, ("tab:blue", "tab:orange")):
            rows = [row for row in history if name in row]
            steps, values = [row["step"] for row in rows], [row[name] for row in rows]
            called = _CURVES[label][name]
            axis.plot(steps, values, color=color, marker="o", markersize=3, label=called)
        if len(names) > 1:
            axis.legend(fontsize=7, frameon=False)
        axis.set_ylabel(label, fontsize=8)
        axis.grid(alpha=0.3)
    axes[-1, 0].set_xlabel("step")
    figure.savefig(file, dpi=120, format="png")
    plt.close(figure)


def entropy_histograms(
    entropies: Mapping[str, Tensor],
    file: str | Path | BinaryIO,
    bins: int = 30,
    title: str = "Predictive entropy",
) -> None:
    """Draw the distributions of the predictive entropy of several groups of examples.

    Each group has a row, with its number of examples and its mean. All rows have the same bins. The
    height is the share of the group's own examples, on a scale that fits the group, so a small
    group and one that is spread out can be read beside a large one.

    Args:
        entropies: Entropies (n,) in nats by the group's name, such as "right", "wrong" and "OOD",
            from `metrics.predictive(...).entropy`.

    Raises:
        ValueError: There is no group, all are empty, or an entropy is not finite or negative.
    """
    checks.integer("bins", bins, 1)
    groups = _checked_entropies(entropies)

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = len(groups)
    figure, axes = plt.subplots(
        rows, 1, figsize=(5.5, 1.2 + 1.1 * rows), sharex=True, squeeze=False, layout="constrained"
    )
    # Entropies of zero need bins of some width.
    highest = max(1e-6, *(group.max().item() for group in groups.values() if len(group)))
    edges = torch.linspace(0, highest, bins + 1, dtype=torch.float64)
    for i, (axis, (name, group)) in enumerate(zip(axes[:, 0], groups.items())):
        axis.set_xlim(0, highest)
        if len(group) == 0:
            axis.set_title(f"{name}: no example", loc="left", fontsize=10)
            axis.set_yticks([])
            continue
        share, mean = torch.histogram(group, edges).hist / len(group), group.mean().item()
        axis.stairs(share, edges, fill=True, color=f"C{i}", alpha=0.6)
        axis.axvline(mean, color="black", linestyle="--", linewidth=1.2)
        count = f"{len(group)} example{'s' * (len(group) > 1)}"
        axis.set_title(f"{name}: {count}, mean {mean:.3g}", loc="left", fontsize=10)
        axis.set_ylim(0)
        axis.yaxis.set_major_locator(plt.MaxNLocator(2))
        axis.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g} %")
    axes[-1, 0].xaxis.set_major_locator(plt.MaxNLocator(6))
    axes[-1, 0].set_xlabel("entropy of the prediction, H[p̄] (nats): sure ← → unsure")
    figure.supylabel("share of its group", fontsize=10)
    figure.suptitle(title)
    figure.legend(
        [plt.Line2D([], [], color="black", linestyle="--", linewidth=1.2)],
        ["mean of the group"],
        loc="outside lower center",
        frameon=False,
    )
    figure.savefig(file, dpi=120, format="png")
    plt.close(figure)


def confidence_curve(
    thresholds: Sequence[float],
    low: Sequence[float],
    high: Sequence[float],
    file: str | Path | BinaryIO,
    examples: tuple[Sequence[int], Sequence[int]] | None = None,
    title: str = "Human confidence on both sides of an entropy threshold",
) -> None:
    """Draw the raters' confidence where the model is sure and where it is not.

    A model whose entropy agrees with people has the curve of `low` above that of `high`.

    Source: Bella (Doan et al. 2024), its figure of human confidence.

    Args:
        thresholds: Entropies in nats, growing.
        low: The mean human confidence, 0 to 1, over examples of an entropy up to each threshold;
            NaN, which is not drawn, where there is none.
        high: The same over examples of an entropy above it.
        examples: The numbers of examples that `low` and `high` are means over. A mean over fewer
            than 20 is drawn fainter; all are drawn alike where it is None.

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

    figure, axis = plt.subplots(figsize=(5.5, 4), layout="constrained")
    below, above = map(torch.tensor, examples or ([_FEW] * len(low), [_FEW] * len(high)))
    for confidence, number, colour, name in (
        (low, below, "tab:blue", "the model is sure: entropy up to the threshold"),
        (high, above, "tab:orange", "the model is unsure: entropy above the threshold"),
    ):
        _draw_faded(axis, thresholds, confidence, number, colour, 1.8, 28)
        axis.plot([], [], color=colour, marker="o", markersize=5, label=name)
    _explain_faded(axis, "grey", below, above)
    axis.set(xlabel="entropy threshold (nats)", ylabel="mean human confidence")
    axis.set_title(title, fontsize=11)
    axis.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=1, frameon=False, fontsize=9)
    figure.savefig(file, dpi=120, format="png")
    plt.close(figure)


def _checked_entropies(entropies: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The groups in float64, after a check."""
    groups = {name: torch.as_tensor(e).detach().cpu().double() for name, e in entropies.items()}
    for name, group in groups.items():
        if group.ndim != 1 or not (group.isfinite() & (group >= 0)).all():
            raise ValueError(
                f"entropy_histograms needs finite entropies (n,) >= 0; got {tuple(group.shape)} "
                f"in {name!r}, from {group.min().item() if group.numel() else 'none'}"
            )
    if not any(map(len, groups.values())):
        raise ValueError(f"entropy_histograms needs an example; got the groups {[*groups]}")
    return groups


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


def _mean(p: Tensor, combine: str) -> Tensor:
    """p̄ (N, C) of probabilities p_k (K, N, C)."""
    if combine == "prob":
        return p.mean(0)
    # The logarithm of a probability that float32 has rounded to zero is finite.
    return p.clamp_min(torch.finfo(torch.float32).tiny).log().mean(0).softmax(-1)


def _binned(p: Tensor, targets: Tensor, bins: int) -> Bins:
    """The bins that the ECE of probabilities (N, C) is computed from."""
    confidence, predicted = p.max(-1)
    return equal_width(confidence, predicted == targets, bins)


def _draw_faded(
    axis: Any,
    x: Sequence[float] | Tensor,
    y: Sequence[float] | Tensor,
    examples: Tensor,
    colour: str,
    width: float,
    size: float,
) -> None:
    """Draw points (x, y) and lines between them, fainter where a mean is over few examples."""
    from matplotlib.collections import LineCollection
    from matplotlib.colors import to_rgba_array

    # A standard error shrinks with the square root as well.
    alpha = (examples / _FEW).clamp(0, 1).sqrt()
    points = list(
        zip(*(torch.as_tensor(values, dtype=torch.float64).tolist() for values in (x, y)))
    )
    ends = to_rgba_array(colour, torch.minimum(alpha[1:], alpha[:-1]).tolist())
    axis.add_collection(LineCollection(list(pairwise(points)), colors=ends, linewidths=width))
    colours = to_rgba_array(colour, alpha.tolist())
    axis.scatter(*zip(*points), size, colours, linewidths=0, zorder=3, clip_on=False)


def _draw_counts(axis: Any, drawn: Bins, bins: int) -> None:
    """Draw the number of examples of each bin, on a logarithmic scale."""
    # A mean may have been rounded beyond the upper edge of its bin.
    left = ((drawn.confidence * bins - 1e-9).ceil() - 1).clamp(0, bins - 1) / bins
    count = drawn.examples.tolist()
    axis.bar(left.tolist(), count, 1 / bins, align="edge", color="tab:blue", edgecolor="white")
    axis.set_yscale("log")
    # A bar of one example has a height, and the axis has two powers of ten at least.
    axis.set_ylim(0.5, max(10, 2 * max(count)))
    axis.yaxis.set_major_formatter("{x:g}")


def _explain_faded(axis: Any, colour: str, *examples: Tensor) -> None:
    """Give the legend an entry for faint points, where there are any."""
    if any(((numbers > 0) & (numbers < _FEW)).any() for numbers in examples):
        label = f"over fewer than {_FEW} examples"
        axis.plot([], [], "o", color=(colour, 0.3), markersize=5, label=label)
