"""Deep ensemble of adapters: K particles that do not interact."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from multilora import checks, losses
from multilora.losses import Loss
from multilora.methods.base import Method
from multilora.methods.passes import Closure
from multilora.methods.tensors import accumulate


class Ensemble(Method):
    """θ_i ← θ_i − ε [∇ℓ(θ_i) + c θ_i]: K independent runs in one.

    Source: Lakshminarayanan et al. 2017; Wang et al. 2023 for LoRA.

    Args:
        model, particle_chunk, nonfinite: see `Method`.
        prior_precision: c >= 0, for the maximum a posteriori under a Gaussian prior: 1/(Nτ²) for N
            training examples and the prior N(0, τ²) of every number. The default has no prior. It
            is a term of the objective, which an adaptive optimizer divides by the gradient's size,
            as it does not with weight decay.
        loss: ℓ. "particle", the mean cross-entropy of each particle; "label_smoothing",
            "soft_targets", "bce" or "gaussian_nll" (`multilora.losses`); or a callable
            (logits, targets) -> (K,).

    Raises:
        TypeError, ValueError, RuntimeError: see `Method`.
    """

    takes_own_configurations = True

    def __init__(
        self,
        model: Any,
        *,
        prior_precision: float = 0.0,
        loss: str | Loss = "particle",
        particle_chunk: int | None = None,
        nonfinite: str = "raise",
    ):
        self.prior_precision = checks.number("prior_precision", prior_precision, 0)
        self.loss = losses.named(loss)
        super().__init__(model, particle_chunk=particle_chunk, nonfinite=nonfinite)

    def _backward(self, closure: Closure, scale: float | Tensor) -> dict[str, Tensor]:
        loss, grads = self._separate(closure, self.loss, scale)
        accumulate(self.params, self._with_prior(grads, self.prior_precision, scale))
        return {"loss": loss, "nll": loss}
