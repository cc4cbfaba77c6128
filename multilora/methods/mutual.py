"""Mutual learning of particles whose weights and features are kept apart."""

from __future__ import annotations

import contextlib
from functools import partial
from typing import Any

from torch import Tensor

from multilora import checks
from multilora.losses import Loss
from multilora.methods.ascent import moving
from multilora.methods.base import is_captured
from multilora.methods.features import Features, checked_names
from multilora.methods.noise import WithSpread
from multilora.methods.pairs import Weights, checked_distance
from multilora.methods.parameters import require_different_particles
from multilora.methods.passes import Closure
from multilora.methods.peers import Terms, class_loss, first_step, push_apart
from multilora.methods.tensors import accumulate


class MutualLearning(WithSpread):
    """Particle i descends its own term, in which the others j are constants:
    ℓ_i + 1/(K−1) Σ_{j≠i} [T² KL(p_j‖p_i) − α W_ij − β F_ij],  p = softmax(z/T).

    W_ij is the distance of two particles' weights (`methods.pairs.Weights`), and F_ij, of their
    features (`methods.pairs.disagreement`), the symmetrised KL of how similar each of them finds
    the examples of the batch. They act from `start` on: the second of the paper's two stages.
    Weights α and β that suit whole networks do next to nothing for adapters: search up to 1e3.

    `backward` returns the mean own term as "loss", "nll" and T² KL as "mutual", and once they act
    the means of W and F as "weight_distance" and "feature_distance". Processes along the data
    compare the examples of their own parts of the batch in F. One particle is an Ensemble of one.

    Source: Pham et al. 2024, Model and Feature Diversity for Bayesian Neural Networks in Mutual
    Learning; with α = β = 0 Zhang et al. 2018, Deep Mutual Learning.

    Args:
        model, particle_chunk, nonfinite: see `Method`.
        features: the shallow and the deep module whose features F compares, by their names in the
            base; "auto", the middle and the last of its blocks; None with beta=0.
        alpha, beta, temperature: α, β >= 0, T > 0.
        start: the call of `backward` from which W and F act, or a fraction of `total_steps`.
        total_steps: how many calls of `backward` there will be.
        distance: "root", W_ij = √(D_ij + d (σ_i − σ_j)² + 1e-12)/√d with D_ij the squared distance
            of the updates ΔW and of all other trained tensors, d numbers in all; "squared",
            without root and d, W₂² of the paper, which has no bound; or "relative", in [0, 2].
        sigma: σ >= 0. Particles are draws θ_i = μ_i + σ_i ε_i, as in IBDR, and the parameters μ.
        learn_sigma: log σ_i is trained, `method.parameters()`, by all terms.
        kl_weight: >= 0, weight of KL(N(μ_i, σ_i²)‖N(0, τ²)), 1/N for N examples; prior_std: τ > 0.
        loss: ℓ, with classes: "particle", "label_smoothing" or "soft_targets"
            (`multilora.losses`), or a callable (logits, targets) -> (K,).
        seed: of the noise.

    Raises:
        ValueError: if all particles are equal and σ = 0; if targets are not shared by the
            particles, or the loss has no classes; if features cannot be read (see `Features`) or
            the batch has fewer than 3 examples when they are compared; and see `Method`.
        TypeError, RuntimeError: see `Method`.
    """

    interacts = True

    def __init__(
        self,
        model: Any,
        *,
        features: str | tuple[str, str] | None = "auto",
        alpha: float = 1.0,
        beta: float = 2.0,
        temperature: float = 3.0,
        start: int | float = 2 / 3,
        total_steps: int | None = None,
        distance: str = "root",
        sigma: float = 0.0,
        learn_sigma: bool = False,
        kl_weight: float = 0.0,
        prior_std: float = 1.0,
        loss: str | Loss = "particle",
        seed: int = 0,
        particle_chunk: int | None = None,
        nonfinite: str = "raise",
    ):
        self.alpha = checks.number("alpha", alpha, 0)
        self.beta = checks.number("beta", beta, 0)
        self.features = checked_names(features, self.beta)
        self.temperature = checks.number("temperature", temperature, 0, open_low=True)
        self.start = first_step(start, total_steps) if self.alpha > 0 or self.beta > 0 else 0
        self.distance = checked_distance(distance, self.alpha)
        self._check_spread(sigma, learn_sigma, prior_std, seed)
        self.kl_weight = checks.number("kl_weight", kl_weight, 0)
        self.loss = class_loss(loss)
        super().__init__(model, particle_chunk=particle_chunk, nonfinite=nonfinite)
        if self.sigma_init == 0:
            require_different_particles(self.model, self.params, "mutual learning")
        self._terms = Terms(self.passes, self.loss, self.temperature)
        names = self.features if self.beta > 0 and self.passes.total > 1 else None
        self._features = Features(self.model, names) if names else None
        self._weights = Weights(self.model, self.params)
        self._make_spread()

    def _acts(self, weight: float) -> bool:
        """Whether a diversity term of that weight acts in this step."""
        return weight > 0 and self.step >= self.start and self.passes.total > 1

    def _backward(self, closure: Closure, scale: float | Tensor) -> dict[str, Tensor]:
        features, nothing = self._features, contextlib.nullcontext()
        taps = features if features is not None and self._acts(self.beta) else tuple
        with (
            self._spread.undone_on_error(),
            moving(self.params) if self.sigma_init > 0 else nothing,
            features.watched() if features is not None else nothing,  # in the first stage too
        ):
            epsilon = self._spread.move()  # θ = μ + σε
            terms = partial(self._terms, self.beta)
            grads, stats = self._together(closure, self.loss, terms, scale, taps=taps)
        self._spread.pull(grads, epsilon, scale, self.kl_weight, self.prior_std)
        accumulate(self.params, self._with_prior(grads, self.kl_weight / self.prior_std**2, scale))
        stats = self.passes.log(stats)
        if self._acts(self.alpha):
            grads, distance = push_apart(
                self.passes, self._weights, self._spread, self.distance, scale * self.alpha
            )
            accumulate([*self.params, *self.parameters()], grads)
            stats |= {"loss": stats["loss"] - self.alpha * distance, "weight_distance": distance}
        return self._with_sigma(stats)

    def _require_capturable(self) -> None:
        super()._require_capturable()
        later = (self.alpha > 0 or self.beta > 0) and self.step < self.start
        if later and is_captured(self.params[0]):
            message = "a CUDA graph repeats one step, and MutualLearning changes at call"
            raise RuntimeError(f"{message} {self.start}: capture from there on, or take start=0")

    def _skipped(self) -> dict[str, Tensor]:
        acting = {"weight_distance": self.alpha, "feature_distance": self.beta}
        stats, names = super()._skipped(), [n for n, weight in acting.items() if self._acts(weight)]
        return stats | dict.fromkeys(["mutual", *names], stats["loss"])
