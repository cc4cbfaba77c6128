"""Interactive Bayesian distributional robustness (IBDR)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from multilora import checks, losses
from multilora.losses import Loss
from multilora.methods.ascent import ASCENTS, climb, move, moving
from multilora.methods.base import warn
from multilora.methods.divergence import ClassesOf, Objective, Seen, output_distance
from multilora.methods.noise import WithSpread
from multilora.methods.parameters import require_different_particles
from multilora.methods.passes import Closure
from multilora.methods.tensors import accumulate, flatten


class IBDR(WithSpread):
    """min over μ, σ and λ >= 0 of λρ + Σ_i max_{θ'_i} [ℓ(θ'_i) + α ℓ_div − λ c(θ_i, θ'_i)]
    + β Σ_i [‖μ_i‖²/τ² + d (σ_i²/τ² − log σ_i²)],  θ_i = μ_i + σ_i ε_i.

    Every particle climbs and descends its own term of the sum, ℓ_i + α ℓ_div, so the joint
    divergence enters its gradient once (the gradient of the whole sum would hold it K times). The
    paper minimises (1/K) Σ_i ℓ_i + α ℓ_div, so that our α is K times its α; β is the same.

    One step draws θ, takes g_i = ∇_i [ℓ_i + α ℓ_div] at θ, climbs to θ', and gives μ the gradient
    that ℓ_i + α ℓ_div has at θ' (Danskin: the cost has no term in it). It takes two forwards and
    two backwards for all particles together. The parameters of the model are μ.

    If every particle has its own mini-batch (targets (K, N)), the predictions are of different
    examples and the divergence has no meaning: it contributes zero, and a warning says so once.
    Over accumulation steps each micro-batch has its own ascent. `backward` returns the loss, nll
    and divergence at θ', and, where they decide the ascent ("prox"), the new "lambda", and c̄ as
    "cost"; and the mean σ where it is trained. `state_dict` holds the state of this process's
    particles.

    Source: Pham et al. 2025 (IBDR), Algorithm 1.

    Args:
        model, particle_chunk, nonfinite: see `Method`.
        alpha: α >= 0, weight of the divergence ℓ_div, see `kind`; K times the paper's.
        ascent: "prox", θ' = θ + g/2λ, the maximiser of the linearised inner problem for the squared
            distance, ‖g_i‖ clipped at `clip` over all tensors of the particle; "step", θ + α₁ g
            (Algorithm 1 as printed); "sam", θ + ρ g/‖g‖. λ has a part in "prox" only.
        clip: the largest ‖g_i‖ of "prox", >= 0.
        step_size: α₁ >= 0 of "step".
        rho: ρ >= 0, the radius, in the unit of `cost`; of "sam", in that of the parameters.
        lambda_init: λ₀, inside `lambda_bounds`.
        lambda_bounds: the bounds of λ.
        lambda_lr: α_λ >= 0; λ ← clamp(λ − α_λ (ρ − c̄)) once per call, so that its unit is one over
            that of `cost`.
        cost: what c̄ is, a mean over particles: "output", the mean over valid targets of the
            distance ‖p(θ'_i) − p(θ_i)‖₂ of the predicted probabilities, in [0, √2]; "parameter",
            ‖θ'_i − θ_i‖².
        sigma: σ >= 0, the standard deviation of the noise; 1e-3 … 1e-2 is a sensible range where
            both factors are noisy (0.1 perturbs ΔW as much as the weights themselves).
        noise: "A" adds the noise to lora_A only, "all" to every tensor.
        learn_sigma: one log σ_i per particle becomes trainable, `method.parameters()`: give it to
            the optimizer in a group without weight decay, perhaps with its own learning rate. Its
            gradient is σ_i ⟨∇ℓ(θ'_i), ε_i⟩ + 2βd (σ_i²/τ² − 1), d noisy numbers.
        beta: β >= 0, weight of the KL term, 1/(2N) for N training examples; it adds 2βμ_i/τ² to
            the gradient.
        prior_std: τ > 0, the standard deviation of the Gaussian prior of every number.
        divergence: "joint", over all θ'; or "cross", θ'_i against the others' unperturbed
            predictions, which takes K times the logits' memory.
        loss: ℓ. "particle", the cross-entropy of each particle; "ensemble", that of the mean
            logits, times K so that a step does not shrink with K; "label_smoothing",
            "soft_targets", "bce" or "gaussian_nll" (`multilora.losses`); or a callable
            (logits, targets) -> (K,).
        divergence_of: a callable (logits (K, ..., C), targets) -> (class logits (K, N, C), class
            targets (N,) int64, −100 left out), whose divergence is taken, and whose distance is the
            cost "output": for losses without classes, and to look at some predictions only. By
            default it is that of the loss; where targets are probabilities, the most likely class
            is the excluded one. With alpha=0 and cost="parameter" none is needed.
        kind: "logdet", ℓ_div = −log det(I + G/eps) of the predictions' Gram matrix G; or "det",
            −det G, for K < C only.
        eps: ε of `kind`, in [1e-12, 1e6].
        seed: of the noise.

    Raises:
        ValueError: if α > 0, σ = 0 and all particles are equal, which then stay so; if the loss
            has no classes and no `divergence_of` is given; if `kind` is "det" and K >= C; and see
            `Method`.
        TypeError, RuntimeError: see `Method`.
    """

    interacts = True

    takes_own_configurations = True

    def __init__(
        self,
        model: Any,
        *,
        alpha: float = 0.02,
        ascent: str = "prox",
        clip: float = 0.15,
        step_size: float = 0.05,
        rho: float = 0.03,
        lambda_init: float = 3.0,
        lambda_bounds: tuple[float, float] = (0.05, 5.0),
        lambda_lr: float = 2.0,
        cost: str = "output",
        sigma: float = 0.0,
        noise: str = "all",
        learn_sigma: bool = False,
        beta: float = 0.0,
        prior_std: float = 1.0,
        divergence: str = "joint",
        loss: str | Loss = "particle",
        divergence_of: ClassesOf | None = None,
        kind: str = "logdet",
        eps: float = 1e-4,
        seed: int = 0,
        particle_chunk: int | None = None,
        nonfinite: str = "raise",
    ):
        self.lambda_bounds = _checked_bounds(lambda_bounds)
        name = "lambda_init (inside lambda_bounds)"
        self.lambda_init = checks.number(name, lambda_init, *self.lambda_bounds)
        self._check_spread(sigma, learn_sigma, prior_std, seed)
        if divergence_of is not None and not callable(divergence_of):
            raise ValueError(f"divergence_of must be a callable or None; got {divergence_of!r}")
        self.alpha = checks.number("alpha", alpha, 0)
        self.ascent = checks.choice("ascent", ascent, ASCENTS)
        self.clip = checks.number("clip", clip, 0)
        self.step_size = checks.number("step_size", step_size, 0)
        self.rho = checks.number("rho", rho, 0)
        self.lambda_lr = checks.number("lambda_lr", lambda_lr, 0)
        self.cost = checks.choice("cost", cost, ("parameter", "output"))
        self.noise = checks.choice("noise", noise, ("all", "A"))
        self.beta = checks.number("beta", beta, 0)
        self.divergence = checks.choice("divergence", divergence, ("joint", "cross"))
        self.loss = losses.named(loss, "ensemble")
        self.divergence_of = divergence_of
        self.kind = checks.choice("kind", kind, ("logdet", "det"))
        # `gram_volume` has narrower bounds for logits of less than float64.
        self.eps = checks.number("eps", eps, 1e-12, 1e6)
        super().__init__(model, particle_chunk=particle_chunk, nonfinite=nonfinite)
        self._objective = Objective(
            self.passes,
            self.loss,
            self.divergence == "cross",
            self.kind,
            self.eps,
            self.divergence_of,
            keeps_predictions=self.ascent == "prox" and self.cost == "output",
        )
        self._objective.check_loss(self.alpha)
        if alpha != 0 and sigma == 0:
            require_different_particles(self.model, self.params, "the divergence")
        self._warn_loose_bound()
        device = self.params[0].device
        self.lambda_ = torch.tensor(self.lambda_init, dtype=torch.float64, device=device)
        self._make_spread(self.noise)

    def _warn_loose_bound(self) -> None:
        farthest = (self.clip / (2 * self.lambda_bounds[0])) ** 2
        if self.ascent == "prox" and self.cost == "parameter" and farthest < self.rho:
            warn(
                f"IBDR: the bound can never bind: no particle climbs farther than c = clip²/4λ² = "
                f"{farthest:.3g}, at the smallest λ, and rho = {self.rho:g}, so that λ only falls; "
                'raise clip, lower rho or lambda_bounds[0], or take cost="output"'
            )

    def _backward(self, closure: Closure, scale: float | Tensor) -> dict[str, Tensor]:
        with self._spread.undone_on_error(), moving(self.params):
            epsilon = self._spread.move()  # θ = μ + σε
            # Scaled before differentiating, for half precision, and unscaled after. A scale of
            # zero, of a micro-batch that counts nothing, must not divide.
            climbing = scale if isinstance(scale, Tensor) or scale > 0 else 1.0
            grads, at_theta = self._gradients(closure, climbing, None)
            by = climb(
                flatten(grads).div_(climbing),
                self.ascent,
                rho=self.rho,
                step_size=self.step_size,
                clip=self.clip,
                lambda_=self.lambda_,
            )
            del grads
            move(self.params, by)  # θ'
            moved = by.square().sum(1)  # ‖θ'_i − θ_i‖²
            del by
            grads, seen = self._gradients(closure, scale, at_theta)

        self._spread.pull(grads, epsilon, scale, 2 * self.beta, self.prior_std)
        grads = self._with_prior(grads, 2 * self.beta / self.prior_std**2, scale)
        accumulate(self.params, grads)
        stats = self.passes.log(seen.stats)
        if self.ascent == "prox":
            stats |= self._update_lambda(moved, at_theta, seen)
        return self._with_sigma(stats)

    def _gradients(
        self, closure: Closure, scale: float | Tensor, at_theta: Seen | None
    ) -> tuple[list[Tensor], Seen]:
        """scale · ∇_i [ℓ_i + α ℓ_div] where the particles are now: at θ, or then at θ'."""

        def objective(logits: Tensor, targets: Any) -> tuple[Tensor, Tensor, Seen]:
            return self._objective(logits, targets, self.alpha, at_theta)

        return self._together(
            closure, self._objective.each, objective, scale, again=at_theta is not None
        )

    def _update_lambda(self, moved: Tensor, at_theta: Seen, seen: Seen) -> dict[str, Tensor]:
        """λ ← clamp(λ − α_λ (ρ − c̄)); moved: ‖θ'_i − θ_i‖² of this process's particles."""
        if self.cost == "parameter":
            cost = self.passes.particle_mean(moved)
        else:
            cost = output_distance(at_theta, seen, self.passes).mean()
        lambda_ = self.lambda_ - self.lambda_lr * (self.rho - cost)
        lambda_ = lambda_.clamp(*self.lambda_bounds)
        # An overflowing step (GradScaler skips it) must not poison λ.
        self.lambda_.copy_(torch.where(torch.isfinite(cost), lambda_, self.lambda_))
        return {"lambda": self.lambda_.clone(), "cost": cost}

    def state_dict(self) -> dict[str, Any]:
        """The step, λ, log σ of this process's particles and the state of the noise's generator."""
        return super().state_dict() | {"lambda": self.lambda_.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        with torch.no_grad():
            self.lambda_.copy_(state["lambda"])

    def _skipped(self) -> dict[str, Tensor]:
        stats = super()._skipped()
        nothing = stats["loss"]
        if self.alpha != 0:
            stats["divergence"] = nothing
        if self.ascent == "prox":
            stats |= {"lambda": self.lambda_.clone(), "cost": nothing}
        return stats


def _checked_bounds(bounds: tuple[float, float]) -> tuple[float, float]:
    if not isinstance(bounds, (tuple, list)) or len(bounds) != 2:
        raise ValueError(f"lambda_bounds must be two numbers; got {bounds!r}")
    low = checks.number("lambda_bounds[0]", bounds[0], 0, open_low=True)
    return low, checks.number("lambda_bounds[1]", bounds[1], low)
