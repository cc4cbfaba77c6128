"""Interactive Bayesian distributional robustness (IBDR)."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from multilora import checks, losses
from multilora.losses import Loss
from multilora.methods.base import (
    Method,
    accumulate,
    copies,
    described,
    flatten,
    is_captured,
    require_different_particles,
    unflatten,
)
from multilora.methods.passes import Closure
from multilora.ops import gram_volume, particle_loss
from multilora.ops.common import IGNORE_INDEX, accumulator

_warned_own_batches = False


class _Pass(NamedTuple):
    """One forward and backward: class predictions (K, N, C) of all processes' particles and their
    targets (None: of no classes), gradients of this one's (before the climb flat, one (K, P)), the
    indices of the finite ones (None: all), what to log."""

    logits: Tensor | None
    targets: Tensor | None
    grads: list[Tensor]
    finite: Tensor | None
    stats: dict[str, Tensor]


class IBDR(Method):
    """min over μ, σ and λ >= 0 of λρ + Σ_i max_{θ'_i} [ℓ(θ'_i) + α ℓ_div − λ ‖θ_i − θ'_i‖²]
    + β Σ_i [‖μ_i‖² + d (σ_i² − log σ_i²)],  θ_i = μ_i + σ_i ε_i.

    Every particle climbs and descends its own term of the sum, ℓ_i + α ℓ_div, so the joint
    divergence enters its gradient once (the gradient of the whole sum would hold it K times).

    One step: draw θ, take g_i = ∇_i [ℓ_i + α ℓ_div] at θ, climb to θ', and give μ the gradient
    that ℓ_i + α ℓ_div has at θ' (Danskin: the cost has no term in it). Two forwards and two
    backwards for all particles together. The parameters of the model are μ.

    alpha: α, weight of the divergence −log det(I + G/eps) (`kind` "logdet") or −det G ("det").
    ascent: "prox", θ' = θ + g/2λ, the maximiser of the linearised inner problem, ‖g_i‖ clipped at
        `clip` over all tensors of the particle; "step", θ + α₁ g (Algorithm 1 as printed); "sam",
        θ + ρ g/‖g‖.
    step_size: α₁ of "step".
    rho: ρ, the radius. lambda_init, lambda_bounds, lambda_lr: λ₀, its bounds and α_λ;
        λ ← clamp(λ − α_λ (ρ − c̄)) once a call, c̄ = mean_i ‖θ'_i − θ_i‖², or with
        cost="output" the mean squared distance of the predicted probabilities at valid targets.
    sigma: σ, the standard deviation of the noise; 1e-3 … 1e-2 is a sensible range where both
        factors are noisy (0.1 perturbs ΔW as much as the weights themselves).
        noise="A" adds it to lora_A only, noise="all" to every tensor.
    learn_sigma: one σ_i a particle becomes trainable: give `method.parameters()` to the
        optimizer. Its gradient is ⟨∇ℓ(θ'_i), ε_i⟩ + 2βd (σ_i − 1/σ_i), d noisy numbers.
    beta: β, weight of the KL term, about 1/N_data; it adds 2βμ_i to the gradient.
    divergence: "joint", over all θ'; or "cross", θ'_i against the others' unperturbed
        predictions, which takes K times the logits' memory.
    loss: "particle", each one's cross-entropy; "ensemble", that of the mean logits, times K so
        that a step does not shrink with K; "label_smoothing", "soft_targets", "bce" or
        "gaussian_nll" (`multilora.losses`); or a callable (logits, targets) -> (K,).
    divergence_of: a callable (logits (K, ..., C), targets) -> (class logits (K, N, C), class
        targets (N,) int64, −100 left out), whose divergence it is: for losses of no classes, and
        to look at some predictions only. By default those of the loss; of targets that are
        probabilities, the most likely class is the excluded one. With alpha = 0 and
        cost="parameter" none is needed.

    Ranges: alpha, clip, step_size, rho, lambda_lr, sigma and beta are >= 0.
    particle_chunk, nonfinite: see `Method`. `state_dict` is that of this process's particles.

    Where every particle has its own mini-batch (targets (K, N)) the predictions are of different
    examples and the divergence has no meaning: it contributes zero, and a warning says so once.
    Over accumulation steps each micro-batch has its own ascent.

    Source: Pham et al. 2025 (IBDR), Algorithm 1.
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
        if not isinstance(lambda_bounds, (tuple, list)) or len(lambda_bounds) != 2:
            raise ValueError(f"lambda_bounds must be two numbers; got {lambda_bounds!r}")
        low = checks.number("lambda_bounds[0]", lambda_bounds[0], 0, open_low=True)
        high = checks.number("lambda_bounds[1]", lambda_bounds[1], low)
        checks.number("lambda_init (inside lambda_bounds)", lambda_init, low, high)
        checks.flag("learn_sigma", learn_sigma)
        name = "sigma (with learn_sigma)" if learn_sigma else "sigma"
        sigma = checks.number(name, sigma, 0, open_low=learn_sigma)
        if divergence_of is not None and not callable(divergence_of):
            raise ValueError(f"divergence_of must be a callable or None; got {divergence_of!r}")
        settings = {
            "alpha": checks.number("alpha", alpha, 0),
            "ascent": checks.choice("ascent", ascent, ("prox", "step", "sam")),
            "clip": checks.number("clip", clip, 0),
            "step_size": checks.number("step_size", step_size, 0),
            "rho": checks.number("rho", rho, 0),
            "lambda_init": float(lambda_init),
            "lambda_bounds": (low, high),
            "lambda_lr": checks.number("lambda_lr", lambda_lr, 0),
            "cost": checks.choice("cost", cost, ("parameter", "output")),
            "sigma": sigma,
            "noise": checks.choice("noise", noise, ("all", "A")),
            "learn_sigma": learn_sigma,
            "beta": checks.number("beta", beta, 0),
            "divergence": checks.choice("divergence", divergence, ("joint", "cross")),
            "loss": losses.named(loss, "ensemble"),
            "divergence_of": divergence_of,
            "kind": checks.choice("kind", kind, ("logdet", "det")),
            # `gram_volume` has narrower bounds for logits of less than float64.
            "eps": checks.number("eps", eps, 1e-12, 1e6),
            "seed": checks.integer("seed", seed, 0, 2**63 - 1),
        }
        super().__init__(
            model, particle_chunk=particle_chunk, nonfinite=nonfinite, settings=settings
        )
        model = self.model
        # The loss of each particle; "ensemble" is another one of all together.
        self._each = losses.NAMES["particle"] if self.loss == "ensemble" else self.loss
        self._plain = (
            type(self._each) is losses.CrossEntropy
            and self._each.label_smoothing == 0
            and self._each.weight is None
            and divergence_of is None
        )
        if isinstance(self.loss, (losses.BCE, losses.GaussianNLL)):
            self._require_classes(None)
        if alpha != 0 and sigma == 0:
            require_different_particles(model, self.params, "the divergence")

        device = self.params[0].device
        self.lambda_ = torch.tensor(lambda_init, dtype=torch.float64, device=device)
        self.sigma = torch.full((self.num_particles,), float(sigma), device=device)
        self.sigma.requires_grad_(learn_sigma)
        self.generator = torch.Generator(device).manual_seed(self.seed)
        noisy = set(self.params if sigma > 0 else [])
        if sigma > 0 and noise == "A":
            if not hasattr(model, "adapters"):
                raise ValueError('noise="A" needs a ParticleModel, whose tensors have names')
            noisy &= {adapter.lora_A for adapter in model.adapters()}
            if not noisy:
                raise ValueError('noise="A" needs a lora_A that is trained, and all are frozen')
        # By their places in `params`: a copy of this method has other tensors.
        self.noisy = [i for i, p in enumerate(self.params) if p in noisy]
        self.noisy_size = sum(p[0].numel() for p in noisy)

    def _backward(self, closure: Closure, scale: float | Tensor) -> dict[str, Tensor]:
        if self.lambda_.device != self.params[0].device:
            raise RuntimeError(
                f"IBDR was made for parameters on {self.lambda_.device}, and they are on "
                f"{self.params[0].device} now; make it after moving the model"
            )
        # A graph's own record says where its replays draw from, and is not to be read here.
        draws = bool(self.noisy) and not is_captured(self.params[0])
        drawn_from = self.generator.get_state() if draws else None
        mu = copies(self.params)
        # The optimizer may have stepped inside the same autocast.
        torch.clear_autocast_cache()
        try:
            noise = self._draw_noise()
            first, moved, second = self._climb_and_descend(closure, scale, noise, None)
            while second.finite is not first.finite:
                # A particle that broke on its climb was in the others' climb too.
                self._put_back(mu)
                first, moved, second = self._climb_and_descend(closure, scale, noise, second.finite)
        except BaseException:
            if draws:
                self.generator.set_state(drawn_from)
            raise
        finally:
            self._put_back(mu)

        grads, finite = second.grads, second.finite
        if self.sigma.requires_grad:
            pull = self.sigma.detach() - 1 / self.sigma.detach()
            pull = (2 * self.beta * self.noisy_size) * pull
            grad = (flatten(grads) * noise).sum(1) + scale * pull
            accumulate([self.sigma], self.without_others([grad], finite))
        if self.beta != 0:
            grads = [g + (scale * 2 * self.beta) * m for g, m in zip(grads, mu)]
            grads = self.without_others(grads, finite)
        accumulate(self.params, grads)
        cost = self._update_lambda(moved, first.logits, second)
        stats = self.passes.log(second.stats)
        return stats | {"lambda": self.lambda_.clone(), "cost": cost}

    def _climb_and_descend(
        self,
        closure: Closure,
        scale: float | Tensor,
        noise: Tensor | None,
        finite: Tensor | None,
    ) -> tuple[_Pass, Tensor, _Pass]:
        """From μ: the pass at θ, ‖θ'_i − θ_i‖² of this process's particles and the pass at θ'."""
        if noise is not None:
            self._move(self.sigma.detach()[:, None].to(noise.dtype) * noise)
        # Scaled before differentiating, for half precision; unscaled after. A scale of zero, of a
        # micro-batch that counts nothing, must not divide.
        climbing = scale if isinstance(scale, Tensor) or scale > 0 else 1.0
        first = self._pass(closure, climbing, None, finite)
        climb = self._climb(first.grads[0] / climbing)
        self._move(climb)
        moved = climb.square().sum(1)
        first = first._replace(grads=[])
        del climb
        return first, moved, self._pass(closure, scale, first, first.finite)

    @torch.no_grad()
    def _put_back(self, mu: list[Tensor]) -> None:
        torch._foreach_copy_(self.params, mu)
        torch.clear_autocast_cache()

    def _pass(
        self,
        closure: Closure,
        scale: float | Tensor,
        before: _Pass | None,
        finite: Tensor | None,
    ) -> _Pass:
        """The gradients of Σ_i ℓ_i + α ℓ_div where the particles are now, of those `finite`."""
        while True:
            logits, targets = self.passes.predict(closure, self._each)
            classes = self._classes(logits, targets)
            total, each, stats = self._objective(logits, targets, classes, before, finite)
            (grad,) = torch.autograd.grad(total * scale, logits)
            grads = self.passes.pull_back(closure, grad)
            grads = [flatten(grads)] if before is None else grads
            self.particle_nll = self.passes.mean(self.passes.processes.own(each))
            still = finite
            if before is None or not isinstance(scale, Tensor):
                still = self.finite_particles(self.particle_nll, grads, scale, finite)
            if still is finite:
                grads = self.without_others(grads, finite)
                predicted, of = (None, None) if classes is None else classes
                predicted = None if predicted is None else predicted.detach()
                return _Pass(predicted, of, grads, finite, stats)
            # Once more without them: their predictions are in everybody's divergence.
            finite = still

    def parameters(self) -> list[Tensor]:
        return [self.sigma] if self.sigma.requires_grad else []

    def state_dict(self) -> dict[str, Any]:
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
        stats |= {"divergence": stats["loss"], "lambda": self.lambda_.clone()}
        return stats | {"cost": stats["loss"]}

    def _classes(self, logits: Tensor, targets: Any) -> tuple[Tensor, Tensor] | None:
        """Class predictions (K, N, C) and targets (N,) or, each particle's own, (K, N)."""
        if self.divergence_of is None:
            classes = losses.class_predictions(self._each, logits, targets)
            if classes is None:
                self._require_classes(targets)
            return classes
        predicted, of = self.divergence_of(logits, targets)
        fits = predicted.ndim == 3 and of.shape in (predicted.shape[1:2], predicted.shape[:2])
        if not fits or len(predicted) != len(logits):
            raise ValueError(
                "divergence_of must return class logits (K, N, C) and class targets (N,) with "
                f"K = {len(logits)}; got {tuple(predicted.shape)} and {tuple(of.shape)}"
            )
        return predicted, of

    def _require_classes(self, targets: Any) -> None:
        """Raise where the loss's targets do not say of which classes the divergence is."""
        if self.divergence_of is not None or (self.alpha == 0 and self.cost == "parameter"):
            return
        got = f" of {targets.dtype} {tuple(targets.shape)}" if isinstance(targets, Tensor) else ""
        raise ValueError(
            'IBDR\'s divergence, and cost="output", are of class predictions, and the targets'
            f"{got} of the loss {described(self.loss)} are neither classes nor probabilities: "
            "give divergence_of=, a callable (logits, targets) -> (class logits (K, N, C), class "
            'targets (N,)); or alpha=0 and cost="parameter"'
        )

    def _objective(
        self,
        logits: Tensor,
        targets: Any,
        classes: tuple[Tensor, Tensor] | None,
        before: _Pass | None,
        finite: Tensor | None,
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Σ_i ℓ_i + α ℓ_div over the particles `finite`, every particle's ℓ_i (K,) and what to log.

        before: the pass at the unperturbed particles, for "cross".
        """
        passes, everybody = self.passes, slice(None) if finite is None else finite
        divergence, fused = logits.new_zeros((), dtype=accumulator(logits.dtype)), None
        particles = passes.total if finite is None else len(finite)
        volumes = 1  # that `divergence` is a sum of
        if classes is not None and classes[1].ndim == 2:
            if self.loss == "ensemble":
                raise ValueError('loss="ensemble" needs targets (N,) shared by all particles')
            _warn_own_batches(*classes)
        elif classes is not None:
            predicted, of = classes[0][everybody], classes[1]
            weight = passes.processes.share_of_mean((of != IGNORE_INDEX).sum())
            if self._plain and not targets.is_floating_point():
                fused, divergence = particle_loss(predicted, of, self.eps, self.kind)
            if self.divergence == "cross" and before is not None:
                divergence = self._cross_divergence(predicted, of, before.logits[everybody])
                volumes = particles
            elif fused is None:
                volume = gram_volume(predicted, of, self.eps, self.kind)
                divergence = volume.sum() / (of != IGNORE_INDEX).sum().clamp_min(1)
            divergence = divergence * weight
        if fused is not None:
            nll = fused * weight
        else:
            nll = passes.means(self._each, logits, targets, passes.total)[everybody]
        each = nll.detach()
        if finite is not None:
            each = each.new_full((passes.total,), torch.nan).index_copy_(0, finite, each)
        if self.loss == "ensemble":
            mean = logits[everybody].mean(0, keepdim=True)
            nll = passes.means(self._each, mean, targets, 1) * particles
        total = nll.sum() + self.alpha * divergence
        mean_nll = nll.detach().sum() / particles
        mean_divergence = divergence.detach() / volumes
        return (
            total,
            each,
            {
                "loss": mean_nll + self.alpha * mean_divergence,
                "nll": mean_nll,
                "divergence": mean_divergence,
            },
        )

    def _cross_divergence(self, logits: Tensor, targets: Tensor, before: Tensor) -> Tensor:
        """Σ_i ℓ_div(θ'_i, θ_{−i}): problem i has particle i perturbed and the others not."""
        particles = len(logits)
        own = torch.eye(particles, dtype=torch.bool, device=logits.device)[:, :, None, None]
        # (particle, problem, N, C)
        mixed = torch.where(own, logits.unsqueeze(1), before.unsqueeze(1)).flatten(1, 2)
        volume = gram_volume(mixed, targets.repeat(particles), self.eps, self.kind)
        return volume.sum() / (targets != IGNORE_INDEX).sum().clamp_min(1)

    def _draw_noise(self) -> Tensor | None:
        """ε (K, P), zero where a tensor has no noise; None where σ = 0."""
        if not self.noisy:
            return None
        total, processes = self.passes.total, self.passes.processes
        return flatten(
            [
                # Those of all processes' particles are drawn: the particles that one process has.
                processes.own(p.new_empty(total, *p.shape[1:]).normal_(generator=self.generator))
                if i in self.noisy
                else torch.zeros_like(p)
                for i, p in enumerate(self.params)
            ]
        ).detach()

    def _climb(self, g: Tensor) -> Tensor:
        """θ' − θ (K, P) from the gradient of every particle's objective."""
        norm = torch.linalg.vector_norm(g, dim=1, keepdim=True)
        tiny = torch.finfo(g.dtype).tiny
        if self.ascent == "step":
            return self.step_size * g
        if self.ascent == "sam":
            return g * (self.rho / norm.clamp_min(tiny))
        return g * ((self.clip / norm.clamp_min(tiny)).clamp_max(1) / (2 * self.lambda_)).to(g)

    @torch.no_grad()
    def _move(self, by: Tensor) -> None:
        torch._foreach_add_(self.params, unflatten(by, self.params))
        # Autocast keeps half-precision copies of leaves, which are other ones now.
        torch.clear_autocast_cache()

    def _update_lambda(self, moved: Tensor, before: Tensor, second: _Pass) -> Tensor:
        """moved: ‖θ'_i − θ_i‖² of this process's particles. -> c̄"""
        if self.cost == "parameter":
            distance = self.passes.processes.gather(moved)
        else:
            dtype = accumulator(before.dtype)
            change = second.logits.to(dtype).softmax(-1) - before.to(dtype).softmax(-1)
            valid = second.targets != IGNORE_INDEX
            distance = (change.square().sum(-1) * valid).sum(-1) / valid.sum(-1).clamp_min(1)
            distance = self.passes.mean(
                distance * self.passes.processes.share_of_mean(valid.sum(-1))
            )
        distance = (distance if second.finite is None else distance[second.finite]).mean()
        moved = self.lambda_ - self.lambda_lr * (self.rho - distance)
        moved = moved.clamp(*self.lambda_bounds)
        # An overflowing step (GradScaler skips it) must not poison λ.
        self.lambda_.copy_(torch.where(torch.isfinite(distance), moved, self.lambda_))
        return distance


def _warn_own_batches(logits: Tensor, targets: Tensor) -> None:
    global _warned_own_batches
    if not _warned_own_batches:
        _warned_own_batches = True
        warnings.warn(
            "IBDR: every particle has its own mini-batch, so their predictions cannot be compared "
            f"and the divergence contributes zero (logits {tuple(logits.shape)}, "
            f"targets {tuple(targets.shape)})",
            stacklevel=4,
        )
