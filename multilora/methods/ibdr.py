"""Interactive Bayesian distributional robustness (IBDR)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from multilora import checks, losses
from multilora.losses import Loss
from multilora.methods.base import Method, described, is_captured, warn
from multilora.methods.parameters import require_different_particles
from multilora.methods.passes import Closure
from multilora.methods.tensors import accumulate, copies, flatten, unflatten
from multilora.ops import gram_volume, particle_loss
from multilora.ops.common import IGNORE_INDEX, accumulator

_warned_own_batches = False


class _Seen(NamedTuple):
    """The results of a pass, for the particles that take part.

    Class predictions (K, N, C) and their targets (N,) or (K, N), both None where the loss has no
    classes, and scalars to log.
    """

    predicted: Tensor | None
    targets: Tensor | None
    stats: dict[str, Tensor]


class IBDR(Method):
    """min over μ, σ and λ >= 0 of λρ + Σ_i max_{θ'_i} [ℓ(θ'_i) + α ℓ_div − λ ‖θ_i − θ'_i‖²]
    + β Σ_i [‖μ_i‖² + d (σ_i² − log σ_i²)],  θ_i = μ_i + σ_i ε_i.

    Every particle climbs and descends its own term of the sum, ℓ_i + α ℓ_div, so the joint
    divergence enters its gradient once (the gradient of the whole sum would hold it K times).

    One step draws θ, takes g_i = ∇_i [ℓ_i + α ℓ_div] at θ, climbs to θ', and gives μ the gradient
    that ℓ_i + α ℓ_div has at θ' (Danskin: the cost has no term in it). It takes two forwards and
    two backwards for all particles together. The parameters of the model are μ.

    If every particle has its own mini-batch (targets (K, N)), the predictions are of different
    examples and the divergence has no meaning: it contributes zero, and a warning says so once.
    Over accumulation steps each micro-batch has its own ascent. `backward` returns the loss, nll
    and divergence at θ', the new "lambda", and c̄ as "cost". `state_dict` holds the state of this
    process's particles.

    Source: Pham et al. 2025 (IBDR), Algorithm 1.

    Args:
        model, particle_chunk, nonfinite: see `Method`.
        alpha: α >= 0, weight of the divergence ℓ_div, see `kind`.
        ascent: "prox", θ' = θ + g/2λ, the maximiser of the linearised inner problem, ‖g_i‖ clipped
            at `clip` over all tensors of the particle; "step", θ + α₁ g (Algorithm 1 as printed);
            "sam", θ + ρ g/‖g‖.
        clip: the largest ‖g_i‖ of "prox", >= 0.
        step_size: α₁ >= 0 of "step".
        rho: ρ >= 0, the radius.
        lambda_init: λ₀, inside `lambda_bounds`.
        lambda_bounds: the bounds of λ.
        lambda_lr: α_λ >= 0; λ ← clamp(λ − α_λ (ρ − c̄)) once per call.
        cost: what c̄ is: "parameter", mean_i ‖θ'_i − θ_i‖²; or "output", the mean squared distance
            of the predicted probabilities at valid targets.
        sigma: σ >= 0, the standard deviation of the noise; 1e-3 … 1e-2 is a sensible range where
            both factors are noisy (0.1 perturbs ΔW as much as the weights themselves).
        noise: "A" adds the noise to lora_A only, "all" to every tensor.
        learn_sigma: one σ_i per particle becomes trainable: give `method.parameters()` to the
            optimizer. Its gradient is ⟨∇ℓ(θ'_i), ε_i⟩ + 2βd (σ_i − 1/σ_i), d noisy numbers.
        beta: β >= 0, weight of the KL term, about 1/N_data; it adds 2βμ_i to the gradient.
        divergence: "joint", over all θ'; or "cross", θ'_i against the others' unperturbed
            predictions, which takes K times the logits' memory.
        loss: ℓ. "particle", the cross-entropy of each particle; "ensemble", that of the mean
            logits, times K so that a step does not shrink with K; "label_smoothing",
            "soft_targets", "bce" or "gaussian_nll" (`multilora.losses`); or a callable
            (logits, targets) -> (K,).
        divergence_of: a callable (logits (K, ..., C), targets) -> (class logits (K, N, C), class
            targets (N,) int64, −100 left out), whose divergence is taken: for losses without
            classes, and to look at some predictions only. By default it is that of the loss; where
            targets are probabilities, the most likely class is the excluded one. With alpha=0 and
            cost="parameter" none is needed.
        kind: "logdet", ℓ_div = −log det(I + G/eps) of the predictions' Gram matrix G; or "det",
            −det G.
        eps: ε of `kind`, in [1e-12, 1e6].
        seed: of the noise.

    Raises:
        ValueError: if α > 0, σ = 0 and all particles are equal, which then stay so; if the loss
            has no classes and no `divergence_of` is given; and see `Method`.
        TypeError, RuntimeError: see `Method`.
    """

    interacts = True

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
        lambda_bounds: tuple[float, float] = (0.5, 5.0),
        lambda_lr: float = 1e-2,
        cost: str = "parameter",
        sigma: float = 0.0,
        noise: str = "all",
        learn_sigma: bool = False,
        beta: float = 0.0,
        divergence: str = "joint",
        loss: str | Loss = "particle",
        divergence_of: Callable[[Tensor, Any], tuple[Tensor, Tensor]] | None = None,
        kind: str = "logdet",
        eps: float = 1e-4,
        seed: int = 0,
        particle_chunk: int | None = None,
        nonfinite: str = "raise",
    ):
        self.lambda_bounds = _checked_bounds(lambda_bounds)
        name = "lambda_init (inside lambda_bounds)"
        self.lambda_init = checks.number(name, lambda_init, *self.lambda_bounds)
        self.learn_sigma = checks.flag("learn_sigma", learn_sigma)
        name = "sigma (with learn_sigma)" if learn_sigma else "sigma"
        self.sigma_init = checks.number(name, sigma, 0, open_low=learn_sigma)
        if divergence_of is not None and not callable(divergence_of):
            raise ValueError(f"divergence_of must be a callable or None; got {divergence_of!r}")
        self.alpha = checks.number("alpha", alpha, 0)
        self.ascent = checks.choice("ascent", ascent, ("prox", "step", "sam"))
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
        self.seed = checks.integer("seed", seed, 0, 2**63 - 1)
        super().__init__(model, particle_chunk=particle_chunk, nonfinite=nonfinite)
        if isinstance(self.loss, (losses.BCE, losses.GaussianNLL)):
            self._require_classes(None)
        if alpha != 0 and sigma == 0:
            require_different_particles(self.model, self.params, "the divergence")
        self._make_state()

    def _make_state(self) -> None:
        """λ, σ, the generator of ε and which tensors are noisy."""
        # The loss of each particle; "ensemble" adds one of all together.
        self._each = losses.NAMES["particle"] if isinstance(self.loss, str) else self.loss
        device = self.params[0].device
        self.lambda_ = torch.tensor(self.lambda_init, dtype=torch.float64, device=device)
        self.sigma = torch.full((self.num_particles,), self.sigma_init, device=device)
        self.sigma.requires_grad_(self.learn_sigma)
        self.generator = torch.Generator(device).manual_seed(self.seed)
        noisy = set(self.params if self.sigma_init > 0 else [])
        if noisy and self.noise == "A":
            if not hasattr(self.model, "adapters"):
                raise ValueError('noise="A" needs a ParticleModel, whose tensors have names')
            noisy &= {adapter.lora_A for adapter in self.model.adapters()}
            if not noisy:
                raise ValueError('noise="A" needs a lora_A that is trained, and all are frozen')
        # Indices into `params`, not tensors: a copy of this method has different tensors.
        self.noisy = [i for i, p in enumerate(self.params) if p in noisy]
        self.noisy_size = sum(p[0].numel() for p in noisy)

    def _backward(self, closure: Closure, scale: float | Tensor) -> dict[str, Tensor]:
        with self._moving() as mu:
            epsilon = self._draw_noise()
            if epsilon is not None:
                sigma = self.sigma.detach()[:, None].to(epsilon.dtype)
                self._move(sigma * epsilon)  # θ = μ + σε
            # Scaled before differentiating, for half precision, and unscaled after. A scale of
            # zero, of a micro-batch that counts nothing, must not divide.
            climbing = scale if isinstance(scale, Tensor) or scale > 0 else 1.0
            grads, at_theta = self._gradients(closure, climbing, None)
            climb = self._climb(flatten(grads).div_(climbing))
            del grads
            self._move(climb)  # θ'
            moved = climb.square().sum(1)  # ‖θ'_i − θ_i‖²
            del climb
            grads, seen = self._gradients(closure, scale, at_theta)

        if self.sigma.requires_grad and epsilon is not None:
            pull = self.sigma.detach() - 1 / self.sigma.detach()
            pull = (2 * self.beta * self.noisy_size) * pull
            grad = (flatten(grads) * epsilon).sum(1) + scale * pull
            accumulate([self.sigma], self.passes.zero_skipped([grad]))
        if self.beta != 0:
            grads = [g + (scale * 2 * self.beta) * m for g, m in zip(grads, mu)]
            grads = self.passes.zero_skipped(grads)
        accumulate(self.params, grads)
        cost = self._update_lambda(moved, at_theta, seen)
        return self.passes.log(seen.stats) | {"lambda": self.lambda_.clone(), "cost": cost}

    def _gradients(
        self, closure: Closure, scale: float | Tensor, at_theta: _Seen | None
    ) -> tuple[list[Tensor], _Seen]:
        """scale · ∇_i [ℓ_i + α ℓ_div] where the particles are now: at θ, or then at θ'."""

        def objective(logits: Tensor, targets: Any) -> tuple[Tensor, Tensor, _Seen]:
            return self._objective(logits, targets, at_theta)

        return self._together(closure, self._each, objective, scale, again=at_theta is not None)

    def _objective(
        self, logits: Tensor, targets: Any, at_theta: _Seen | None
    ) -> tuple[Tensor, Tensor, _Seen]:
        """Σ_i ℓ_i + α ℓ_div of the particles that take part, their ℓ_i, and what is kept."""
        classes = self._classes(logits, targets)
        nll, divergence, volumes = self._terms(logits, targets, classes, at_theta)
        each, particles = nll.detach(), len(nll)
        if self.loss == "ensemble":
            mean = self.passes.take(logits).mean(0, keepdim=True)
            nll = self.passes.losses(self._each, mean, targets, 1) * particles
        mean_nll = nll.detach().sum() / particles
        mean_divergence = divergence.detach() / volumes
        stats = {
            "loss": mean_nll + self.alpha * mean_divergence,
            "nll": mean_nll,
            "divergence": mean_divergence,
        }
        total = nll.sum() + self.alpha * divergence
        predicted, of = (None, None) if classes is None else (classes[0].detach(), classes[1])
        return total, each, _Seen(predicted, of, stats)

    def _terms(
        self,
        logits: Tensor,
        targets: Any,
        classes: tuple[Tensor, Tensor] | None,
        at_theta: _Seen | None,
    ) -> tuple[Tensor, Tensor, int]:
        """ℓ_i of the particles that take part (K,), ℓ_div, and how many volumes it is a sum of."""
        divergence, volumes = logits.new_zeros((), dtype=accumulator(logits.dtype)), 1
        nll = None
        if classes is not None and classes[1].ndim == 2:
            if self.loss == "ensemble":
                raise ValueError('loss="ensemble" needs targets (N,) shared by all particles')
            _warn_own_batches(*classes)
        elif classes is not None:
            predicted, of = classes
            share = self.passes.share_of_mean((of != IGNORE_INDEX).sum())
            if self._is_cross_entropy(targets):
                nll, divergence = particle_loss(predicted, of, self.eps, self.kind)
                nll = nll * share
            if self.divergence == "cross" and at_theta is not None:
                divergence = self._cross_divergence(predicted, of, at_theta)
                volumes = len(predicted)
            elif nll is None:
                volume = gram_volume(predicted, of, self.eps, self.kind)
                divergence = _mean_over_valid(volume, of)
            divergence = divergence * share
        if nll is None:
            nll = self.passes.losses(self._each, logits, targets, self.passes.total)
            nll = self.passes.take(nll)
        return nll, divergence, volumes

    def _is_cross_entropy(self, targets: Any) -> bool:
        """Whether ℓ_i is the plain one that `particle_loss` computes beside the divergence."""
        return (
            type(self._each) is losses.CrossEntropy
            and self._each.label_smoothing == 0
            and self._each.weight is None
            and self.divergence_of is None
            and not targets.is_floating_point()
        )

    def _cross_divergence(self, predicted: Tensor, targets: Tensor, at_theta: _Seen) -> Tensor:
        """Σ_i ℓ_div(θ'_i, θ_{−i}): problem i has particle i at θ' and the others at θ."""
        assert at_theta.predicted is not None
        particles = len(predicted)
        own = torch.eye(particles, dtype=torch.bool, device=predicted.device)[:, :, None, None]
        # (particle, problem, N, C)
        mixed = torch.where(own, predicted.unsqueeze(1), at_theta.predicted.unsqueeze(1))
        everyone = targets.repeat(particles)
        volume = gram_volume(mixed.flatten(1, 2), everyone, self.eps, self.kind)
        return _mean_over_valid(volume, targets)

    def _classes(self, logits: Tensor, targets: Any) -> tuple[Tensor, Tensor] | None:
        """Class predictions (K, N, C) of the particles that take part, and their targets.

        Targets are (N,) or, each particle's own, (K, N). None: the loss has no classes.
        """
        if self.divergence_of is None:
            classes = losses.class_predictions(self._each, logits, targets)
            if classes is None:
                self._require_classes(targets)
                return None
            predicted, of = classes
        else:
            predicted, of = self.divergence_of(logits, targets)
            fits = predicted.ndim == 3 and of.shape in (predicted.shape[1:2], predicted.shape[:2])
            if not fits or len(predicted) != len(logits):
                raise ValueError(
                    "divergence_of must return class logits (K, N, C) and class targets (N,) with "
                    f"K = {len(logits)}; got {tuple(predicted.shape)} and {tuple(of.shape)}"
                )
        return self.passes.take(predicted), self.passes.take(of) if of.ndim == 2 else of

    def _require_classes(self, targets: Any) -> None:
        """Raise ValueError if classes are needed: the loss's targets do not say which they are."""
        if self.divergence_of is not None or (self.alpha == 0 and self.cost == "parameter"):
            return
        got = f" of {targets.dtype} {tuple(targets.shape)}" if isinstance(targets, Tensor) else ""
        raise ValueError(
            'IBDR\'s divergence, and cost="output", are of class predictions, and the targets'
            f"{got} of the loss {described(self.loss)} are neither classes nor probabilities: "
            "give divergence_of=, a callable (logits, targets) -> (class logits (K, N, C), class "
            'targets (N,)); or alpha=0 and cost="parameter"'
        )

    def _draw_noise(self) -> Tensor | None:
        """ε (K, P), zero where a tensor has no noise; None where σ = 0."""
        if not self.noisy:
            return None
        noise = [
            self.passes.normal(p, self.generator) if i in self.noisy else torch.zeros_like(p)
            for i, p in enumerate(self.params)
        ]
        return flatten(noise).detach()

    def _climb(self, g: Tensor) -> Tensor:
        """θ' − θ (K, P) from the gradient g of every particle's objective."""
        norm = torch.linalg.vector_norm(g, dim=1, keepdim=True)
        tiny = torch.finfo(g.dtype).tiny
        if self.ascent == "step":
            return self.step_size * g
        if self.ascent == "sam":
            return g * (self.rho / norm.clamp_min(tiny))
        return g * ((self.clip / norm.clamp_min(tiny)).clamp_max(1) / (2 * self.lambda_)).to(g)

    @contextlib.contextmanager
    def _moving(self) -> Iterator[list[Tensor]]:
        """Give μ, and put the parameters back there afterwards.

        After an error, the generator of ε is back where it was too.
        """
        if self.lambda_.device != self.params[0].device:
            raise RuntimeError(
                f"IBDR was made for parameters on {self.lambda_.device}, and they are on "
                f"{self.params[0].device} now; make it after moving the model"
            )
        # A CUDA graph keeps the generator's state itself, and it cannot be read during the capture.
        draws = bool(self.noisy) and not is_captured(self.params[0])
        drawn_from = self.generator.get_state() if draws else None
        mu = copies(self.params)
        # The optimizer may have stepped inside the same autocast.
        torch.clear_autocast_cache()
        try:
            yield mu
        except BaseException:
            if drawn_from is not None:
                self.generator.set_state(drawn_from)
            raise
        finally:
            with torch.no_grad():
                torch._foreach_copy_(self.params, mu)
            torch.clear_autocast_cache()

    @torch.no_grad()
    def _move(self, by: Tensor) -> None:
        torch._foreach_add_(self.params, unflatten(by, self.params))
        # Autocast caches half-precision copies of the leaves; they are stale now.
        torch.clear_autocast_cache()

    def _update_lambda(self, moved: Tensor, at_theta: _Seen, at_theta_prime: _Seen) -> Tensor:
        """λ ← clamp(λ − α_λ (ρ − c̄)); moved: ‖θ'_i − θ_i‖² of this process's particles. -> c̄"""
        if self.cost == "parameter":
            cost = self.passes.particle_mean(moved)
        else:
            cost = self._output_distance(at_theta, at_theta_prime)
        lambda_ = self.lambda_ - self.lambda_lr * (self.rho - cost)
        lambda_ = lambda_.clamp(*self.lambda_bounds)
        # An overflowing step (GradScaler skips it) must not poison λ.
        self.lambda_.copy_(torch.where(torch.isfinite(cost), lambda_, self.lambda_))
        return cost

    def _output_distance(self, at_theta: _Seen, at_theta_prime: _Seen) -> Tensor:
        """‖p(θ'_i) − p(θ_i)‖², a mean over valid targets and particles."""
        before, after, targets = at_theta.predicted, at_theta_prime.predicted, at_theta.targets
        assert before is not None and after is not None and targets is not None
        dtype = accumulator(before.dtype)
        change = after.to(dtype).softmax(-1) - before.to(dtype).softmax(-1)
        valid = targets.ne(IGNORE_INDEX)
        distance = (change.square().sum(-1) * valid).sum(-1) / valid.sum(-1).clamp_min(1)
        share = self.passes.share_of_mean(valid.sum(-1))
        return self.passes.data_mean(distance * share).mean()

    def parameters(self) -> list[Tensor]:
        """σ where it is trained."""
        return [self.sigma] if self.sigma.requires_grad else []

    def state_dict(self) -> dict[str, Any]:
        """The step, λ, σ of this process's particles and the state of the noise's generator."""
        return super().state_dict() | {
            "lambda": self.lambda_.clone(),
            "sigma": self.sigma.detach().clone(),
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        with torch.no_grad():
            self.lambda_.copy_(state["lambda"])
            self.sigma.copy_(state["sigma"])
        self.generator.set_state(state["generator"].cpu())

    def _skipped(self) -> dict[str, Tensor]:
        stats = super()._skipped()
        nothing = stats["loss"]
        return stats | {"divergence": nothing, "lambda": self.lambda_.clone(), "cost": nothing}


def _checked_bounds(bounds: tuple[float, float]) -> tuple[float, float]:
    if not isinstance(bounds, (tuple, list)) or len(bounds) != 2:
        raise ValueError(f"lambda_bounds must be two numbers; got {bounds!r}")
    low = checks.number("lambda_bounds[0]", bounds[0], 0, open_low=True)
    return low, checks.number("lambda_bounds[1]", bounds[1], low)


def _mean_over_valid(volume: Tensor, targets: Tensor) -> Tensor:
    return volume.sum() / (targets != IGNORE_INDEX).sum().clamp_min(1)


def _warn_own_batches(logits: Tensor, targets: Tensor) -> None:
    global _warned_own_batches
    if not _warned_own_batches:
        _warned_own_batches = True
        warn(
            "IBDR: every particle has its own mini-batch, so their predictions cannot be compared "
            f"and the divergence contributes zero (logits {tuple(logits.shape)}, "
            f"targets {tuple(targets.shape)})"
        )
