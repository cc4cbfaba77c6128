"""The pictures of a run, drawn from what was measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from multilora import atomic
from multilora.app import plots
from multilora.app.folders import ENTROPIES, HISTORY_PICTURE, HUMAN_CONFIDENCE, RELIABILITY
from multilora.log_probabilities import combined
from multilora.ops.common import IGNORE_INDEX


class Entropies:
    """Collects the predictive entropies of the sets that `evaluation.evaluate` measures.

    Args:
        combine: As for `metrics.evaluate`.
    """

    def __init__(self, combine: str):
        self.combine = combine
        self._found: dict[str, list[Tensor]] = {n: [] for n in ("right", "wrong", "shifted", "OOD")}

    def groups(self) -> dict[str, Tensor]:
        """The entropies (n,) in nats of "right" and "wrong" predictions on the test set, and of the
        inputs of all "shifted" and of all "OOD" sets, where there are such sets."""
        return {name: torch.cat(parts) for name, parts in self._found.items() if parts}

    def add(self, kind: str, log_p: Tensor, targets: Tensor) -> None:
        """Add the predictions (K, N, C) on a set, whose kind is "test", "shifted" or "ood"."""
        if kind == "ood":  # its targets say nothing
            self._found["OOD"].append(combined(log_p, self.combine).entropy)
            return
        valid = targets != IGNORE_INDEX
        together = combined(log_p[:, valid], self.combine)
        if kind == "shifted":
            self._found["shifted"].append(together.entropy)
            return
        right = together.log_p.argmax(-1) == targets[valid]
        self._found["right"].append(together.entropy[right])
        self._found["wrong"].append(together.entropy[~right])


def write_pictures(
    out: Path,
    measures: Mapping[str, Any],
    predictions: Tensor,
    targets: Tensor,
    entropies: Mapping[str, Tensor],
    history: Sequence[Mapping[str, float]],
) -> None:
    """Write the pictures of a run into its folder; `folders.PICTURES` lists them.

    Args:
        measures: What metrics.json holds; "human_confidence" is drawn where it is there.
        predictions: p_k (K, N, C) on the test set.
        targets: (N,), with −100 for examples that are left out.
        entropies: Those of `Entropies.groups`.
        history: The statistics of the training's steps.
    """
    method, combine = measures["method"], measures["combine"]
    who = f"{method}, K = {len(predictions)}"
    atomic.write_file(
        out / RELIABILITY,
        lambda stream: plots.reliability_diagram(
            predictions, targets, stream, method=method, combine=combine
        ),
    )
    atomic.write_file(
        out / ENTROPIES,
        lambda stream: plots.entropy_histograms(
            entropies, stream, title=f"Predictive entropy of {who}"
        ),
    )
    if "human_confidence" in measures:
        curve = measures["human_confidence"]
        rho = "undefined" if math.isnan(curve["spearman"]) else f"{curve['spearman']:.2f}"
        atomic.write_file(
            out / HUMAN_CONFIDENCE,
            lambda stream: plots.confidence_curve(
                curve["thresholds"],
                curve["low"],
                curve["high"],
                stream,
                (curve["examples_low"], curve["examples_high"]),
                f"Human confidence by the entropy of {who}\n"
                f"Spearman correlation of entropy and disagreement: {rho}",
            ),
        )
    atomic.write_file(out / HISTORY_PICTURE, lambda stream: plots.history_diagram(history, stream))
