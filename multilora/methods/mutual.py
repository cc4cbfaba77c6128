"""Mutual learning of particles whose weights and features are kept apart."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
from torch import Tensor

from multilora import checks, losses
from multilora.losses import Loss
from multilora.methods.ascent import moving
from multilora.methods.base import Method, is_captured, warn
from multilora.methods.features import Features, checked_names
from multilora.methods.noise import Spread
from multilora.methods.pairs import DISTANCES, Weights, disagreement, distillation
from multilora.methods.parameters import require_different_particles
from multilora.methods.passes import Closure
from multilora.methods.tensors import accumulate
from multilora.ops.common import IGNORE_INDEX


class MutualLearning(Method):
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
        alpha, beta: α, β >= 0.
        temperature: T > 0.
        start: the call of `backward` from which W and F act, or a fraction of `total_steps`.
        total_steps: how many calls of `backward` there will be.
        distance: "root", W_ij = √(D_ij + d (σ_i − σ_j)² + 1e-12)/√d with D_ij the squared distance
            of the updates ΔW and of all other trained tensors, d numbers in all; "squared",
            without root and d, W₂² of the paper, which has no bound; or "relative", in [0, 2].
        sigma: σ >= 0. Particles are draws θ_i = μ_i + σ_i ε_i, as in IBDR, and the parameters μ.
        learn_sigma: log σ_i is trained, `method.parameters()`, by all terms.
        kl_weight: >= 0, weight of KL(N(μ_i, σ_i²)‖N(0, τ²)), 1/N for N training examples.
        prior_std: τ > 0.
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
        self.features = checked_names(features)
        self.alpha = checks.number("alpha", alpha, 0)
        self.beta = checks.number("beta", beta, 0)
        if self.beta > 0 and self.features is None:
            raise ValueError(f"features=None needs beta=0; got beta={beta!r}")
        self.temperature = checks.number("temperature", temperature, 0, open_low=True)
        self.start = _first_step(start, total_steps)
        self.distance = checks.choice("distance", distance, DISTANCES)
        if self.distance == "squared" and self.alpha > 0:
            warn('MutualLearning: distance="squared" has no bound, and alpha pulls it up for ever')
        self.learn_sigma = checks.flag("learn_sigma", learn_sigma)
        name = "sigma (with learn_sigma)" if learn_sigma else "sigma"
        self.sigma_init = checks.number(name, sigma, 0, open_low=learn_sigma)
        self.kl_weight = checks.number("kl_weight", kl_weight, 0)
        self.prior_std = checks.number("prior_std", prior_std, 0, open_low=True)
        self.loss = losses.named(loss)
        if isinstance(self.loss, (losses.BCE, losses.GaussianNLL)):
            raise ValueError(f"MutualLearning needs a loss with classes; got {loss!r}")
        self.seed = checks.integer("seed", seed, 0, 2**63 - 1)
        super().__init__(model, particle_chunk=particle_chunk, nonfinite=nonfinite)
        if self.sigma_init == 0:
            require_different_particles(self.model, self.params, "mutual learning")
        self._features = Features(self.model, self.features) if self.features and beta else None
        self._weights = Weights(self.model, self.params)
        self._spread = Spread(self.passes, "all", self.seed, self.sigma_init, self.learn_sigma)

    def _acts(self, weight: float) -> bool:
        """Whether a diversity term of that weight acts in this step."""
        return weight > 0 and self.step >= self.start and self.passes.total > 1

    def _backward(self, closure: Closure, scale: float | Tensor) -> dict[str, Tensor]:
        features = self._features if self._acts(self.beta) else None
        with (
            self._spread.undone_on_error(),
            moving(self.params) if self.sigma_init > 0 else contextlib.nullcontext(),
            features.watched() if features is not None else contextlib.nullcontext(),
        ):
            epsilon = self._spread.move()
            grads, stats = self._together(
                closure, self.loss, self._objective, scale, taps=features or tuple
            )
        self._spread.pull(grads, epsilon, scale, self.kl_weight, self.prior_std)
        if self.kl_weight > 0:
            decay = scale * self.kl_weight / self.prior_std**2
            grads = [g + decay * p.detach() for g, p in zip(grads, self.params)]
        accumulate(self.params, self.passes.zero_skipped(grads))
        stats = self.passes.log(stats)
        if self._acts(self.alpha):
            distance = self._push_apart(scale)
            stats["loss"] = stats["loss"] - self.alpha * distance
            stats["weight_distance"] = distance
        return stats | self._logged_sigma()

    def _objective(
        self, logits: Tensor, targets: Any, *features: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """The sum of the own terms without W, each pair counted once; the ℓ_i; what to log."""
        nll = self.passes.take(self.passes.losses(self.loss, logits, targets, self.passes.total))
        mutual = self._mutual(logits, targets)
        own, each, particles = nll + mutual, nll.detach(), len(nll)
        stats = {"loss": own.mean(), "nll": each.mean(), "mutual": mutual.mean()}
        total = own.sum()
        if features:
            z = self.passes.take(features[0])
            if z.shape[1] < 3:
                raise ValueError(
                    "MutualLearning compares each example with two others at least when beta > 0: "
                    f"it needs batches of 3 or more; got features {tuple(z.shape)}"
                )
            share = self.passes.share_of_mean(z.new_full((), z.shape[1]))
            distance = disagreement(z) * share
            # Σ_{i<j} F_ij/(K − 1): particle i has its own term's gradient of it.
            total = total - self.beta * particles / 2 * distance
            stats["loss"] = stats["loss"] - self.beta * distance
            stats["feature_distance"] = distance
        return total, each, {name: value.detach() for name, value in stats.items()}

    def _mutual(self, logits: Tensor, targets: Any) -> Tensor:
        """T²/(K−1) Σ_{j≠i} KL(p_j‖p_i) (k,), a mean over valid targets, with constant p_j."""
        classes = losses.class_predictions(self.loss, logits, targets)
        if classes is None or classes[1].ndim == 2:
            shown = tuple(targets.shape) if isinstance(targets, Tensor) else type(targets).__name__
            raise ValueError(
                "MutualLearning compares the class predictions of all particles for one batch: it "
                f"needs class targets (N,) that they share; got logits {tuple(logits.shape)}, "
                f"targets {shown}"
            )
        share = self.passes.share_of_mean((classes[1] != IGNORE_INDEX).sum())
        return distillation(self.passes.take(classes[0]), classes[1], self.temperature) * share

    def _push_apart(self, scale: float | Tensor) -> Tensor:
        """Add the gradient of −scale · α/(K−1) Σ_{i<j} W_ij; returns the mean of W."""
        tensors = [*self._weights.tensors]
        values = self.passes.gather(tensors)
        if self.sigma_init > 0:
            tensors.append(self._spread.log_sigma)
            values.append(self.passes.take(self.passes.processes.gather(tensors[-1])))
        theta = dict(zip(tensors, (t.detach().requires_grad_() for t in values)))
        log_sigma = theta.pop(self._spread.log_sigma, None)
        sigma = None if log_sigma is None else log_sigma.exp()
        distance = self._weights.mean([*theta.values()], sigma, self.distance)
        pull = distance * (-self.alpha * len(values[0]) / 2) * scale
        leaves = [theta[p] for p in self.params]
        if self.learn_sigma:
            leaves.append(log_sigma)
        grads = torch.autograd.grad(pull, leaves)
        accumulate([*self.params, *self.parameters()], [self.passes.put(g) for g in grads])
        return distance.detach()

    def _require_capturable(self) -> None:
        super()._require_capturable()
        later = (self.alpha > 0 or self.beta > 0) and self.step < self.start
        if later and is_captured(self.params[0]):
            raise RuntimeError(
                "a CUDA graph repeats one step of MutualLearning, and its terms change at the call "
                f"{self.start}; this is call {self.step}: capture from there on, or take start=0"
            )

    def _skipped(self) -> dict[str, Tensor]:
        stats = super()._skipped()
        acting = {"weight_distance": self.alpha, "feature_distance": self.beta}
        names = ["mutual", *(name for name, weight in acting.items() if self._acts(weight))]
        return stats | dict.fromkeys(names, stats["loss"]) | self._logged_sigma()

    def _logged_sigma(self) -> dict[str, Tensor]:
        return {"sigma": self.passes.particle_mean(self._spread.sigma)} if self.learn_sigma else {}

    def parameters(self) -> list[Tensor]:
        """log σ where it is trained."""
        return self._spread.parameters()

    def state_dict(self) -> dict[str, Any]:
        """The step, log σ of this process's particles and the state of the noise's generator."""
        return super().state_dict() | self._spread.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._spread.load_state_dict(state)


def _first_step(start: int | float, total_steps: int | None) -> int:
    """The call from which the diversity terms act."""
    if total_steps is not None:
        checks.integer("total_steps", total_steps, 1)
    if not isinstance(start, float):
        return checks.integer("start", start, 0)
    fraction = checks.number("start (a fraction of total_steps)", start, 0, 1)
    if total_steps is None:
        raise ValueError(
            f"start={start:.3g} is a fraction of total_steps, which is not given: give it, or the "
            "number of a call"
        )
    return math.ceil(fraction * total_steps)
