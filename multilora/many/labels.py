"""Over what the loss of a step is a mean, as transformers' Trainer has it for a model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from multilora.labels import counts_items
from multilora.model import ParticleModel
from multilora.ops.common import IGNORE_INDEX
from multilora.randomness import RandomState


class StepMeans:
    """Whether a step's loss is the mean over the labels of all its micro-batches.

    Trainer counts them for models that take `num_items_in_batch`. Some of these ignore the number:
    their losses are means, and Trainer adds those of the micro-batches up.
    """

    def __init__(self, model: ParticleModel):
        self.model = model
        self.counts = hasattr(model.base, "config") and counts_items(model.base)
        self._shifts: bool | None = None
        self._sums_means: bool | None = None

    def items(self, micro: list[Any]) -> float | None:
        """The number of labels in the micro-batches; None where the model does not count them."""
        if not self.counts or not all(isinstance(b, Mapping) and "labels" in b for b in micro):
            return None
        if any(self.sums_means(batch) for batch in micro):
            return None
        return float(sum(self._number(batch) for batch in micro)) or None

    def sums_means(self, batch: Any) -> bool:
        """Whether the model ignores the number that it is given; False while no batch has told."""
        if not self.counts or not isinstance(batch, Mapping) or "labels" not in batch:
            return False
        if self._sums_means is not None:
            return self._sums_means
        items = self._number(batch)
        if not items:
            return False
        device = next(self.model.base.parameters()).device
        inputs = {n: v.to(device) if hasattr(v, "to") else v for n, v in batch.items()}
        before, found = RandomState(self.model.devices()), []
        with torch.no_grad(), self.model.base_only():
            for times in (1, 2):
                output = self.model.base(**inputs, num_items_in_batch=times * items)
                found.append(float(output["loss"]))
                before.restore()
        if not all(map(math.isfinite, found)) or not any(found):
            return False  # a loss that no number divides
        self._sums_means = found[0] == found[1]
        return self._sums_means

    def _number(self, batch: Mapping[str, Any]) -> int:
        return int((self._counted(batch) != IGNORE_INDEX).sum())

    def _counted(self, batch: Mapping[str, Any]) -> Any:
        """The labels that the model counts."""
        if self._shifts is None:
            from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

            kind = LOSS_MAPPING.get(getattr(self.model.base, "loss_type", None))
            self._shifts = kind is ForCausalLMLoss
        if "shift_labels" in batch:
            return batch["shift_labels"]
        return batch["labels"][..., 1:] if self._shifts else batch["labels"]
