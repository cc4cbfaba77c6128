"""Deep ensemble of adapters: K particles that do not interact."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from multilora.methods.base import (
    Closure,
    Loss,
    Method,
    accumulate,
    flat_gradients,
    particle_losses,
    unflatten,
)


class Ensemble(Method):
    """θ_i ← θ_i − ε ∇ℓ(θ_i): K independent runs in one.

    loss: "particle", the mean cross-entropy of each particle, or a callable
        (logits, targets) -> (K,).

    Source: Lakshminarayanan et al. 2017; Wang et al. 2023 for LoRA.
    """

    def __init__(self, model: Any, *, loss: Loss = "particle"):
        super().__init__(model)
        if not callable(loss) and loss != "particle":
            raise ValueError(f'loss must be "particle" or a callable; got {loss!r}')
        self.loss = loss

    def backward(self, closure: Closure, scale: float | Tensor = 1.0) -> dict[str, Tensor]:
        losses = particle_losses(closure, self.num_particles, self.loss)
        grads = flat_gradients(losses.sum() * scale, self.params)
        accumulate(self.params, unflatten(grads, self.params))
        self.step += 1
        mean = losses.detach().mean()
        return {"loss": mean, "nll": mean}
