"""Stochastic gradient Langevin dynamics: K chains, whose particles are samples of the posterior."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from multilora import checks
from multilora.losses import Loss
from multilora.methods.ensemble import Ensemble
from multilora.methods.noise import Noise
from multilora.methods.passes import Closure
from multilora.methods.tensors import accumulate, unflatten


class SGLD(Ensemble):
    """θ_i ← θ_i − η [∇ℓ(θ_i) + θ_i/(Nτ²)] + √(2ηT/N) ξ_i, ξ_i ~ N(0, I).

    With the mean loss ℓ of N training examples, θ_i tends to a draw of p(θ) ∝ exp(−(N/T) [ℓ(θ) +
    ‖θ‖²/(2Nτ²)]), up to an error of the order of η. The K chains are K samples at once.

    The noise is a part of the gradient, √(2T/(Nη)) ξ_i, so that the optimizer's step brings it to
    its size. This holds for torch.optim.SGD without momentum and weight decay, with the learning
    rate `lr`, and for no other optimizer; a GradScaler's scale is fine, clipping is not.
    `state_dict` holds the state of the noise's generator.

    Source: Welling & Teh 2011.

    Args:
        model, particle_chunk, nonfinite: see `Method`.
        num_data: N >= 1, the number of training examples.
        lr: η > 0, the optimizer's learning rate; or a callable, () -> η, for a learning rate that
            changes: `lambda: optimizer.param_groups[0]["lr"]`.
        temperature: T >= 0. 0 is SGD without noise.
        prior_std: τ > 0, the standard deviation of the Gaussian prior of every number; infinity is
            the flat prior.
        accumulation: M >= 1, how many calls of `backward`, each with scale 1/M, make a step. The
            noise of each is √M larger, before the scale.
        loss: ℓ, see `Ensemble`.
        seed: of the noise.

    Raises:
        ValueError: if η is not a number > 0, also when a callable gives it; and see `Method`.
        TypeError, RuntimeError: see `Method`.
    """

    needs_plain_sgd = True

    def __init__(
        self,
        model: Any,
        *,
        num_data: int,
        lr: float | Callable[[], float],
        temperature: float = 1.0,
        prior_std: float = math.inf,
        accumulation: int = 1,
        loss: str | Loss = "particle",
        seed: int = 0,
        particle_chunk: int | None = None,
        nonfinite: str = "raise",
    ):
        self.num_data = checks.integer("num_data", num_data, 1)
        self.lr = lr if callable(lr) else checks.number("lr", lr, 0, open_low=True)
        self.temperature = checks.number("temperature", temperature, 0)
        self.accumulation = checks.integer("accumulation", accumulation, 1)
        self.seed = checks.integer("seed", seed, 0, 2**63 - 1)
        if prior_std != math.inf:
            prior_std = checks.number("prior_std", prior_std, 0, open_low=True)
        super().__init__(
            model,
            prior_precision=1 / self.num_data / prior_std / prior_std,
            loss=loss,
            particle_chunk=particle_chunk,
            nonfinite=nonfinite,
        )
        self._noise = Noise(self.passes, "all", self.seed)

    def _backward(self, closure: Closure, scale: float | Tensor) -> dict[str, Tensor]:
        lr = float(self.lr()) if callable(self.lr) else self.lr
        lr = checks.number("lr", lr, 0, open_low=True)
        size = math.sqrt(2 * self.temperature * self.accumulation / self.num_data / lr)
        with self._noise.undone_on_error():
            stats = super()._backward(closure, scale)
            if size > 0:
                noise = unflatten(scale * size * self._noise.draw(), self.params)
                accumulate(self.params, self.passes.zero_skipped(noise))
        return stats

    @property
    def generator(self) -> torch.Generator:
        """That of the noise, which a CUDA graph has to know."""
        return self._noise.generator

    def state_dict(self) -> dict[str, Any]:
        """The step and the state of the noise's generator."""
        return super().state_dict() | self._noise.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._noise.load_state_dict(state)
