"""Deep ensemble of adapters: K particles that do not interact."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from multilora import losses
from multilora.losses import Loss
from multilora.methods.base import Method, accumulate
from multilora.methods.passes import Closure


class Ensemble(Method):
    """θ_i ← θ_i − ε ∇ℓ(θ_i): K independent runs in one.

    loss: "particle", the mean cross-entropy of each particle; "label_smoothing", "soft_targets",
        "bce" or "gaussian_nll" (`multilora.losses`); or a callable (logits, targets) -> (K,).
    particle_chunk, nonfinite: see `Method`.

    Source: Lakshminarayanan et al. 2017; Wang et al. 2023 for LoRA.
    """

    def __init__(
        self,
        model: Any,
        *,
        loss: str | Loss = "particle",
        particle_chunk: int | None = None,
        nonfinite: str = "raise",
    ):
        settings = {"loss": losses.named(loss)}
        super().__init__(
            model, particle_chunk=particle_chunk, nonfinite=nonfinite, settings=settings
        )

    def _backward(self, closure: Closure, scale: float | Tensor) -> dict[str, Tensor]:
        values, grads = self.passes.separate(closure, self.loss, scale)
        finite = self.finite_particles(values, grads, scale)
        accumulate(self.params, self.without_others(grads, finite))
        mean = self.mean_loss(values, finite)
        return {"loss": mean, "nll": mean}
