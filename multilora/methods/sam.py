"""Sharpness-aware minimisation of K particles that do not interact."""

from __future__ import annotations

from typing import Any

from multilora.losses import Loss
from multilora.methods.ibdr import IBDR


class SAM(IBDR):
    """θ_i ← θ_i − ε ∇ℓ(θ_i + ρ g_i/‖g_i‖), g_i = ∇ℓ(θ_i): each particle descends from the worst
    place within ρ of it.

    It is `IBDR` without its divergence, its noise and λ: two forwards and two backwards a step.
    ‖g_i‖ is over all tensors of particle i. Over accumulation steps each micro-batch has its own
    ascent. `backward` returns the loss at the place that was climbed to.

    Source: Foret et al. 2021.

    Args:
        model, particle_chunk, nonfinite: see `Method`.
        rho: ρ >= 0, the radius, in the unit of the parameters.
        loss: ℓ, see `IBDR`.

    Raises:
        TypeError, ValueError, RuntimeError: see `Method`.
    """

    def __init__(
        self,
        model: Any,
        *,
        rho: float = 0.05,
        loss: str | Loss = "particle",
        particle_chunk: int | None = None,
        nonfinite: str = "raise",
    ):
        super().__init__(
            model,
            alpha=0.0,
            ascent="sam",
            rho=rho,
            loss=loss,
            particle_chunk=particle_chunk,
            nonfinite=nonfinite,
        )
