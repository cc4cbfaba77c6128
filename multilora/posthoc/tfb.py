"""Training-free Bayesianisation (TFB): the largest noise that a trained adapter bears."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from multilora import checks
from multilora.layers import LoraLayer
from multilora.model import MOST_PARTICLES, ParticleModel


@torch.no_grad()
def bayesianize(
    model: ParticleModel,
    score: Callable[[ParticleModel], float],
    tolerance: float,
    num_particles: int = 10,
    steps: int = 12,
    *,
    largest: float | None = None,
    seed: int = 0,
) -> float:
    """Turn a trained model of one particle into K draws of a posterior, without training (TFB).

    Every adapter s B A, with s B = U diag(d) Vᵀ and positive d, becomes B' = U diag(d) / s and
    A' = Vᵀ A, which leaves ΔW as it is. Particle k then has row i of A' plus (σ/d_i) ε_ki, where
    ε ~ N(0, I). So every column of ΔW has noise of covariance σ² U Uᵀ, which lies in the space of
    the columns of B and does not depend on how ΔW is factored. A row with d_i = 0 gets no noise,
    and neither do modules to save. One σ serves all layers: the largest whose score is at most
    `tolerance` below that of the trained model, found by bisection with the same ε for all σ.

    The model is changed in place, from one particle to `num_particles`: it then predicts and saves
    as any other model of K particles. It has new parameters, so an optimizer of it is void.

    Source: Shi et al., Training-Free Bayesianization for Low-Rank Adapters of Large Language
    Models, NeurIPS 2025.

    Args:
        model: a model of one particle, which has been trained.
        score: score(model) -> a number that is higher for a better model, on an anchor set that is
            not the test set: accuracy, or minus the NLL of the mean prediction. It is called once
            with the trained model, then `steps` times with `num_particles` particles. With
            processes along the data, it has to be the same in all of them.
        tolerance: >= 0, how much the score may lose, in its own unit.
        num_particles: K >= 1, the number of draws.
        steps: number of bisections; σ is known to largest/2^steps.
        largest: the upper end of the search. By default, the σ at which the noise on ΔW has twice
            the Frobenius norm of ΔW, over all layers together.
        seed: of ε.

    Returns:
        σ, in units of the entries of ΔW. It is 0 if no σ that was tried keeps the score; a warning
        says if none lost it.

    Raises:
        ValueError: the model has more than one particle or no trained adapter, an argument is out
            of range, or the score of the trained model is not finite. The model is unchanged then,
            and also where `score` raises.
    """
    checks.number("tolerance", tolerance, 0)
    checks.integer("num_particles", num_particles, 1, MOST_PARTICLES)
    checks.integer("steps", steps, 1, 1000)
    if len(model.seeds) != 1:
        raise ValueError(f"bayesianize needs a model of one particle; got {len(model.seeds)}")
    layers = [layer for _, layer in model.lora_layers()]
    if any(layer.groups for layer in layers):
        raise NotImplementedError(
            "bayesianize does not support the experts of target_parameters, whose layers have many "
            "matrices; adapt modules alone"
        )
    generator = torch.Generator().manual_seed(checks.integer("seed", seed, 0, 2**63 - 1))
    factors = [_Factors.of(layer, num_particles, generator) for layer in layers]
    if largest is None:
        largest = _twice_the_norm(factors)
    checks.number("largest", largest, 0, open_low=True)
    trained = checks.number("the score of the trained model", float(score(model)))
    low, high = 0.0, largest
    with model.mixtures(torch.ones(num_particles, 1)):
        for _ in range(steps):
            sigma = (low + high) / 2
            for layer, of_layer in zip(layers, factors):
                layer.lora_A.data, layer.lora_B.data = of_layer.draws(sigma)
            if trained - float(score(model)) <= tolerance:
                low = sigma
            else:
                high = sigma
    if high == largest:
        warnings.warn(
            f"no score was more than {tolerance:g} below that of the trained model: σ = {low:g} is "
            "the end of the search (largest), and the anchor set says nothing about it",
            stacklevel=3,  # this function is inside torch.no_grad's
        )
    model.repeat(num_particles)
    for layer, of_layer in zip(layers, factors):
        for parameter, drawn in zip((layer.lora_A, layer.lora_B), of_layer.draws(low)):
            parameter.copy_(drawn)
    return low


class _Factors(NamedTuple):
    """One adapter in the basis of its singular vectors, and its noise."""

    A: Tensor  # (r, d_in), A'
    B: Tensor  # (d_out, r), B'
    noise: Tensor  # (K, r, d_in), ε/d
    squared_norm: float  # ‖ΔW‖²
    noise_size: int  # the noise on ΔW has the expected squared norm σ² · noise_size

    @staticmethod
    def of(layer: LoraLayer, particles: int, generator: torch.Generator) -> _Factors:
        A, B = layer.lora_A[0].double(), layer.lora_B[0].double() * layer.scaling
        U, d, Vh = torch.linalg.svd(B, full_matrices=False)
        # Where the rank exceeds d_out, the rows that U lacks are zero.
        lacking = len(A) - len(d)
        A, B = Vh @ A, U * d / layer.scaling if layer.scaling else torch.zeros_like(U)
        squared_norm = (d[:, None] * A).square().sum().item()
        A = torch.nn.functional.pad(A, (0, 0, 0, lacking))
        B = torch.nn.functional.pad(B, (0, lacking))
        d = torch.nn.functional.pad(d, (0, lacking))
        zero = d <= d.max() * max(layer.lora_B.shape) * torch.finfo(layer.lora_B.dtype).eps
        epsilon = torch.randn(particles, *A.shape, generator=generator).to(A)
        noise = torch.where(zero[:, None], 0, epsilon / torch.where(zero, 1, d)[:, None])
        A, B, noise = (t.to(layer.lora_A.dtype) for t in (A, B, noise))
        return _Factors(A, B, noise, squared_norm, int((~zero).sum()) * A.shape[1])

    def draws(self, sigma: float) -> tuple[Tensor, Tensor]:
        """A (K, r, d_in) and B (K, d_out, r) of the particles."""
        return self.A + sigma * self.noise, self.B.expand(len(self.noise), -1, -1).contiguous()


def _twice_the_norm(factors: Sequence[_Factors]) -> float:
    norm = sum(f.squared_norm for f in factors)
    size = sum(f.noise_size for f in factors)
    if not norm > 0:
        raise ValueError(
            f"bayesianize needs a trained model; ΔW of its {len(factors)} adapters is zero"
        )
    return 2 * math.sqrt(norm / size)
