"""Variational inference with one Gaussian, whose draws are the particles: BBB, BLoB and SA-BNN."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from multilora import checks, losses
from multilora.losses import Loss
from multilora.methods.ascent import climb, move, moving
from multilora.methods.base import Method
from multilora.methods.gaussian import Gaussian
from multilora.methods.noise import Noise
from multilora.methods.passes import Closure
from multilora.methods.tensors import accumulate, flatten


class Variational(Method):
    """min over μ and σ of E_q[ℓ(θ)] + β KL(q‖N(0, τ²I)), q = N(μ, diag σ²), β = kl_weight/N.

    Particle k is a draw θ_k = μ + σ∘ε_k. Each call of `backward` draws all K and leaves them in the
    model; with g_k = ∇ℓ(θ_k) the gradients are

        ∂/∂μ = mean_k g_k + β μ/τ²,   ∂/∂ log σ = σ∘[mean_k g_k∘ε_k + β (σ/τ² − 1/σ)],

    and KL = ½ Σ (σ²/τ² + μ²/τ² − 1 − log(σ²/τ²)) is over the tensors with noise only; the others
    are the same in all particles. `mean` and `log_std` are `method.parameters()`, float32 or
    better, with the shapes of one particle; the particles themselves get no gradient. μ starts at
    particle 0 of the model, and all particles are overwritten with draws at once.

    If the closure gives each particle its own part of the batch, model(x, per_particle=True) with
    targets (K, B/K), K draws cost one forward of B rows, which see K different draws.

    `backward` returns ℓ as "nll", KL as "kl", ℓ + β KL as "loss", and the mean σ as "sigma".

    Sources: Blundell et al. 2015 (BBB); Wang et al. 2024 (BLoB); Nguyen et al. 2023 (SA-BNN).

    Args:
        model, particle_chunk, nonfinite: see `Method`.
        num_data: N >= 1, the number of training examples.
        sigma: σ > 0 at the start.
        prior_std: τ > 0, the standard deviation of the Gaussian prior of every number.
        noise: "A" has noise on lora_A only (BLoB), "all" on every tensor.
        kl_weight: >= 0, what multiplies the ELBO's weight 1/N.
        rho: ρ >= 0; each draw climbs ρ g_k/‖g_k‖ before its gradient is taken: twice the cost.
        loss: ℓ, see `Ensemble`.
        seed: of the noise.

    Raises:
        ValueError: if `noise` is "A" and the model has no lora_A that is trained; and see `Method`.
        TypeError, RuntimeError: see `Method`.
    """

    trains_particles = False

    def __init__(
        self,
        model: Any,
        *,
        num_data: int,
        sigma: float = 3e-3,
        prior_std: float = 1.0,
        noise: str = "all",
        kl_weight: float = 1.0,
        rho: float = 0.0,
        loss: str | Loss = "particle",
        seed: int = 0,
        particle_chunk: int | None = None,
        nonfinite: str = "raise",
    ):
        self.num_data = checks.integer("num_data", num_data, 1)
        self.sigma_init = checks.number("sigma", sigma, 0, open_low=True)
        self.prior_std = checks.number("prior_std", prior_std, 0, open_low=True)
        self.noise = checks.choice("noise", noise, ("all", "A"))
        self.kl_weight = checks.number("kl_weight", kl_weight, 0)
        self.rho = checks.number("rho", rho, 0)
        self.loss = losses.named(loss)
        self.seed = checks.integer("seed", seed, 0, 2**63 - 1)
        super().__init__(model, particle_chunk=particle_chunk, nonfinite=nonfinite)
        self._noise = Noise(self.passes, self.noise, self.seed)
        # Another sequence, in the 32 bits of a seed that a CPU's generator takes.
        self._sampling = Noise(self.passes, self.noise, self.seed ^ 0x5EED5EED)
        self._posterior = Gaussian(self.passes, self._noise.noisy, self.sigma_init)
        self.mean, self.log_std = self._posterior.mean, self._posterior.log_std
        self.sample()

    def sample(self) -> None:
        """Put K new draws into the particles, from a generator that `backward` does not use."""
        with self._sampling.undone_on_error():
            self._posterior.draw(self._sampling)

    def _backward(self, closure: Closure, scale: float | Tensor) -> dict[str, Tensor]:
        with self._noise.undone_on_error():
            epsilon = self._posterior.draw(self._noise)
            nll, grads = self._separate(closure, self.loss, scale)
            if self.rho > 0:
                with moving(self.params):
                    move(self.params, climb(flatten(grads), "sam", rho=self.rho))
                    nll, grads = self._separate(closure, self.loss, scale, again=True)
            pulls = [grads[i] * e for i, e in zip(self._noise.noisy, epsilon)]
            means = self.passes.particle_means([*grads, *pulls])  # of g_k, then of g_k∘ε_k
        beta = self.kl_weight / self.num_data
        kl, grads = self._posterior.descend(means, scale * beta, self.prior_std)
        accumulate(self.parameters(), grads)
        return {"loss": nll + beta * kl, "nll": nll, **self._of_posterior(kl)}

    def _of_posterior(self, kl: Tensor) -> dict[str, Tensor]:
        return {"kl": kl, "sigma": self._posterior.mean_std()}

    def _skipped(self) -> dict[str, Tensor]:
        return super()._skipped() | self._of_posterior(self._posterior.kl(self.prior_std)[0])

    @property
    def generator(self) -> torch.Generator:
        """That of the noise, which a CUDA graph has to know."""
        return self._noise.generator

    def parameters(self) -> list[Tensor]:
        """μ of every tensor, and then log σ of those that have noise."""
        return [*self.mean, *self.log_std]

    def state_dict(self) -> dict[str, Any]:
        """The step, μ, log σ and the states of both generators."""
        sampling = {"sampling_generator": self._sampling.generator.get_state()}
        noise = self._noise.state_dict() | sampling
        return super().state_dict() | noise | self._posterior.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`. The particles stay what they are until the next draw."""
        super().load_state_dict(state)
        self._posterior.load_state_dict(state)
        self._noise.load_state_dict(state)
        self._sampling.load_state_dict({"generator": state["sampling_generator"]})


#: `Variational` with noise on lora_A only: Bayesian low-rank adaptation by backpropagation.
BLoB = partial(Variational, noise="A", prior_std=0.2, sigma=2e-3)
