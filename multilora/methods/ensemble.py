"""Deep ensemble of adapters: K particles that do not interact."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from multilora.methods.base import Method, accumulate
from multilora.methods.passes import Closure, Loss


class Ensemble(Method):
    """θ_i ← θ_i − ε ∇ℓ(θ_i): K independent runs in one.

    loss: "particle", the mean cross-entropy of each particle, or a callable
        (logits, targets) -> (K,).
    particle_chunk, nonfinite: see `Method`.

    Source: Lakshminarayanan et al. 2017; Wang et al. 2023 for LoRA.
    """

    def __init__(
        self,
        model: Any,
        *,
        loss: Loss = "particle",
        particle_chunk: int | None = None,
        nonfinite: str = "raise",
    ):
        super().__init__(model, particle_chunk=particle_chunk, nonfinite=nonfinite)
        if not callable(loss) and loss != "particle":
            raise ValueError(f'loss must be "particle" or a callable; got {loss!r}')
        self.loss = loss

    def _backward(self, closure: Closure, scale: float | Tensor) -> dict[str, Tensor]:
        losses, grads = self.passes.separate(closure, self.loss, scale)
        finite = self.finite_particles(losses, grads, scale)
        accumulate(self.params, self.without_others(grads, finite))
        mean = self.mean_loss(losses, finite)
        return {"loss": mean, "nll": mean}
