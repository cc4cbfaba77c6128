"""A Gaussian over the numbers of a particle, from which the particles are drawn."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from multilora.methods.noise import Noise
from multilora.methods.passes import Passes
from multilora.methods.tensors import flatten, unflatten
from multilora.ops.common import accumulator


class Gaussian:
    """q = N(μ, diag σ²), with σ = 0 for the tensors that have no noise.

    The tensors are float32 or better, and leaves that require gradients. Over processes, all have
    the same ones.

    Args:
        passes: those of the method; μ starts at the first particle of all.
        noisy: the indices of the parameters that have noise, `Noise.noisy`.
        sigma: σ at the start.
    """

    def __init__(self, passes: Passes, noisy: list[int], sigma: float):
        self.params, self.noisy = passes.params, noisy
        firsts = [passes.processes.gather(p)[0] for p in self.params]
        #: μ of every parameter, without the particle axis.
        self.mean = [t.to(accumulator(t.dtype), copy=True).requires_grad_() for t in firsts]
        #: log σ of the parameters that have noise.
        self.log_std = [
            torch.full_like(self.mean[i], math.log(sigma)).requires_grad_() for i in noisy
        ]

    @torch.no_grad()
    def draw(self, noise: Noise) -> list[Tensor]:
        """Particles ← μ + σ∘ε -> ε (K, ...) of the tensors that have noise."""
        drawn = unflatten(noise.draw(), self.params)
        epsilon = [drawn[i].to(self.mean[i].dtype) for i in self.noisy]
        draws = [m.expand(p.shape) for m, p in zip(self.mean, self.params)]
        for i, log_std, e in zip(self.noisy, self.log_std, epsilon):
            draws[i] = draws[i] + log_std.exp() * e
        torch._foreach_copy_(self.params, draws)
        # Autocast caches half-precision copies of the leaves; they are stale now.
        torch.clear_autocast_cache()
        return epsilon

    @torch.no_grad()
    def kl(self, prior_std: float) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """KL(q‖N(0, τ²I)) of the tensors that have noise, and its gradients in their μ and log σ.

        KL = ½ Σ (σ²/τ² + μ²/τ² − 1 − log(σ²/τ²)).
        """
        noisy = [self.params[i] for i in self.noisy]
        mean = flatten([self.mean[i][None] for i in self.noisy]) / prior_std
        log_ratio = 2 * (flatten([t[None] for t in self.log_std]) - math.log(prior_std))
        ratio = log_ratio.exp()  # σ²/τ²
        kl = (ratio + mean.square() - 1 - log_ratio).sum() / 2
        of_mean, of_log_std = (
            [t[0] for t in unflatten(flat, noisy)] for flat in (mean / prior_std, ratio - 1)
        )
        return kl, of_mean, of_log_std

    @torch.no_grad()
    def descend(
        self, means: list[Tensor], weight: float | Tensor, prior_std: float
    ) -> tuple[Tensor, list[Tensor]]:
        """KL(q‖N(0, τ²I)), and the gradients in every μ and then log σ.

        Args:
            means: mean_k g_k of every parameter, and then mean_k g_k∘ε_k of those that have noise.
            weight: of the KL divergence.
            prior_std: τ.
        """
        kl, of_mean, of_log_std = self.kl(prior_std)
        grads = means[: len(self.mean)]
        for i, pull in zip(self.noisy, of_mean):
            grads[i] = grads[i] + weight * pull
        rest = zip(self.log_std, means[len(self.mean) :], of_log_std)
        return kl, grads + [log_std.exp() * m + weight * pull for log_std, m, pull in rest]

    @torch.no_grad()
    def mean_std(self) -> Tensor:
        """The mean of σ over all numbers that have noise."""
        return flatten([t[None] for t in self.log_std]).exp().mean()

    def _named(self) -> dict[str, Tensor]:
        both = {"mean": self.mean, "log_std": self.log_std}
        return {f"{name}.{i}": t for name, tensors in both.items() for i, t in enumerate(tensors)}

    def state_dict(self) -> dict[str, Tensor]:
        return {name: t.detach().clone() for name, t in self._named().items()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Raises ValueError, before anything is changed, if a shape is another one."""
        for name, t in self._named().items():
            if state[name].shape != t.shape:
                raise ValueError(
                    f"{name} has shape {tuple(state[name].shape)} in the state, and "
                    f"{tuple(t.shape)} in this method"
                )
        for name, t in self._named().items():
            t.copy_(state[name])
