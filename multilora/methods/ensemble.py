"""Deep ensemble of adapters: K particles that do not interact."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from multilora import losses
from multilora.losses import Loss
from multilora.methods.base import Method
from multilora.methods.passes import Closure
from multilora.methods.tensors import accumulate


class Ensemble(Method):
    """θ_i ← θ_i − ε ∇ℓ(θ_i): K independent runs in one.

    Source: Lakshminarayanan et al. 2017; Wang et al. 2023 for LoRA.

    Args:
        model, particle_chunk, nonfinite: see `Method`.
        loss: ℓ. "particle", the mean cross-entropy of each particle; "label_smoothing",
            "soft_targets", "bce" or "gaussian_nll" (`multilora.losses`); or a callable
            (logits, targets) -> (K,).

    Raises:
        TypeError, ValueError, RuntimeError: see `Method`.
    """

    def __init__(
        self,
        model: Any,
        *,
        loss: str | Loss = "particle",
        particle_chunk: int | None = None,
        nonfinite: str = "raise",
    ):
        self.loss = losses.named(loss)
        super().__init__(model, particle_chunk=particle_chunk, nonfinite=nonfinite)

    def _backward(self, closure: Closure, scale: float | Tensor) -> dict[str, Tensor]:
        loss, grads = self._separate(closure, self.loss, scale)
        accumulate(self.params, grads)
        return {"loss": loss, "nll": loss}
