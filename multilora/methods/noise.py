"""The noise of methods whose particles are draws θ = μ + σε."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from multilora import checks
from multilora.methods.ascent import move
from multilora.methods.base import Method, is_captured
from multilora.methods.passes import Passes
from multilora.methods.tensors import accumulate, flatten


class Noise:
    """ε ~ N(0, 1) for the trainable tensors of all particles, or for lora_A only.

    Args:
        passes: those of the method, which know the tensors and the processes.
        which: "all" or "A".
        seed: of the generator.

    Raises:
        ValueError: "A" without adapters whose lora_A is trained.
    """

    def __init__(self, passes: Passes, which: str, seed: int):
        checks.choice("noise", which, ("all", "A"))
        checks.integer("seed", seed, 0, 2**63 - 1)
        self.passes, params = passes, passes.params
        self.device = params[0].device
        self.generator = torch.Generator(self.device).manual_seed(seed)
        noisy = set(params)
        if which == "A":
            if not hasattr(passes.model, "adapters"):
                raise ValueError('noise="A" needs a ParticleModel, whose tensors have names')
            if not passes.model.adapters():
                raise ValueError('noise="A" needs adapters, and full copies have none')
            noisy &= {adapter.parameters[0] for adapter in passes.model.adapters()}
            if not noisy:
                raise ValueError('noise="A" needs a lora_A that is trained, and all are frozen')
        # Indices into the parameters, not tensors: a copy of the method has different tensors.
        self.noisy = [i for i, p in enumerate(params) if p in noisy]
        #: d, how many numbers of a particle are noisy.
        self.size = sum(p[0].numel() for p in noisy)

    def draw(self) -> Tensor:
        """ε (K, P) of this process's particles, zero where a tensor has no noise."""
        return flatten(
            [
                self.passes.normal(p, self.generator) if i in self.noisy else torch.zeros_like(p)
                for i, p in enumerate(self.passes.params)
            ]
        ).detach()

    @contextlib.contextmanager
    def undone_on_error(self) -> Iterator[None]:
        """After an error inside, the generator is back where it was."""
        if self.device != self.passes.params[0].device:
            raise RuntimeError(
                f"the method was made for parameters on {self.device}, and they are on "
                f"{self.passes.params[0].device} now; make it after moving the model"
            )
        # A CUDA graph keeps the generator's state itself, and it cannot be read during the capture.
        state = None if is_captured(self.passes.params[0]) else self.generator.get_state()
        try:
            yield
        except BaseException:
            if state is not None:
                self.generator.set_state(state)
            raise

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.generator.set_state(state["generator"].cpu())


class Spread(Noise):
    """θ_i = μ_i + σ_i ε_i with one σ_i per particle, fixed or trained as log σ_i.

    Args:
        passes, which, seed: see `Noise`.
        sigma: σ >= 0 of all particles at the start; > 0 where it is trained.
        learn: whether log σ_i is trained.
    """

    def __init__(self, passes: Passes, which: str, seed: int, sigma: float, learn: bool):
        super().__init__(passes, which, seed)
        self.is_zero = sigma == 0
        log_sigma = -math.inf if sigma == 0 else math.log(sigma)
        self.log_sigma = torch.full((passes.num_particles,), log_sigma, device=self.device)
        self.log_sigma.requires_grad_(learn)

    @property
    def sigma(self) -> Tensor:
        """σ_i (K,) of this process's particles."""
        return self.log_sigma.detach().exp()

    def move(self) -> Tensor | None:
        """Move the parameters from μ to θ; returns ε (K, P), or None where σ is zero."""
        if self.is_zero:
            return None
        epsilon = self.draw()
        move(self.passes.params, self.sigma[:, None].to(epsilon.dtype) * epsilon)
        return epsilon

    def pull(
        self,
        grads: list[Tensor],
        epsilon: Tensor | None,
        scale: float | Tensor,
        weight: float,
        prior_std: float,
    ) -> None:
        """Add the gradient of log σ_i, σ_i ⟨grads, ε_i⟩ + scale · weight · d (σ_i²/τ² − 1).

        Args:
            grads: scale · those of the objective at θ.
            epsilon: ε of θ.
            scale: of the objective.
            weight: of the KL divergence to the prior N(0, τ²).
            prior_std: τ.
        """
        if epsilon is None or not self.log_sigma.requires_grad:
            return
        sigma = self.sigma
        kl = weight * self.size * ((sigma / prior_std).square() - 1)
        grad = sigma * (flatten(grads) * epsilon).sum(1) + scale * kl
        accumulate([self.log_sigma], self.passes.zero_skipped([grad]))

    def parameters(self) -> list[Tensor]:
        """log σ where it is trained."""
        return [self.log_sigma] if self.log_sigma.requires_grad else []

    def state_dict(self) -> dict[str, Any]:
        return {"log_sigma": self.log_sigma.detach().clone()} | super().state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        with torch.no_grad():
            self.log_sigma.copy_(state["log_sigma"])


class WithSpread(Method):
    """A method whose particles are draws θ_i = μ_i + σ_i ε_i; the model's parameters are μ."""

    _spread: Spread

    def _check_spread(self, sigma: float, learn_sigma: bool, prior_std: float, seed: int) -> None:
        """Set these settings, before the constructor of `Method`."""
        self.learn_sigma = checks.flag("learn_sigma", learn_sigma)
        name = "sigma (with learn_sigma)" if learn_sigma else "sigma"
        self.sigma_init = checks.number(name, sigma, 0, open_low=learn_sigma)
        self.prior_std = checks.number("prior_std", prior_std, 0, open_low=True)
        self.seed = checks.integer("seed", seed, 0, 2**63 - 1)

    def _make_spread(self, noise: str = "all") -> None:
        self._spread = Spread(self.passes, noise, self.seed, self.sigma_init, self.learn_sigma)

    @property
    def sigma(self) -> Tensor:
        """σ_i (K,) of this process's particles."""
        return self._spread.sigma

    @property
    def generator(self) -> torch.Generator:
        """That of the noise, which a CUDA graph has to know."""
        return self._spread.generator

    def _with_sigma(self, stats: dict[str, Tensor]) -> dict[str, Tensor]:
        """stats, with the mean σ where it is trained."""
        return (
            stats | {"sigma": self.passes.particle_mean(self.sigma)} if self.learn_sigma else stats
        )

    def _skipped(self) -> dict[str, Tensor]:
        return self._with_sigma(super()._skipped())

    def parameters(self) -> list[Tensor]:
        """log σ where it is trained."""
        return self._spread.parameters()

    def state_dict(self) -> dict[str, Any]:
        """The step, log σ of this process's particles and the state of the noise's generator."""
        return super().state_dict() | self._spread.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._spread.load_state_dict(state)
