"""Stein variational gradient descent over adapters (Bella)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from multilora import checks, losses
from multilora.losses import Loss
from multilora.methods.base import Method
from multilora.methods.parameters import require_different_particles
from multilora.methods.passes import Closure
from multilora.methods.repulsion import Groups, pair_means
from multilora.methods.tensors import accumulate


class SVGD(Method):
    """θ_i ← θ_i − ε φ_i, φ_i = (1/K) Σ_j k_ij ∇_i ℓ_i + (γ/K) Σ_j ∇_i k_ij.

    k_ij = exp(−D_ij / 2h²) with D_ij = ‖ΔW_i − ΔW_j‖²_F of the adapted layer, or the squared
    distance of the weights for a head or any other stacked tensor.

    γ is the weight of the repulsion relative to the drive. The papers print Σ_j [k ∇ℓ − (γ/K) ∇k],
    where it is γ/K: ours is theirs divided by K. For a posterior at temperature T and a mean loss
    over N examples, γ = T/N.

    With drive="own" this is the Wasserstein gradient descent of repulsive ensembles (D'Angelo &
    Fortuin 2021), times Σ_j k_ij / K for each particle: φ_i = (Σ_j k_ij / K) [∇_i ℓ_i + γ Σ_j ∇_i
    k_ij / Σ_j k_ij]. That factor is 1 for equal particles and 1/K for particles far apart, so that
    the drive shrinks as K grows: under SGD, and under clipping, a learning rate tuned for an
    Ensemble has to grow with K, by as much as K times. AdamW divides by the gradient's own size.
    normalise="density" takes the bracket alone, whose drive is the Ensemble's.

    The textbook forms add and subtract factors of different particles. With independent A_i these
    live in different bases (any A → RA, B → BR⁻¹ leaves ΔW as it is), and the sum is not a descent
    direction; use them where particles share their initial A, or for plain stacked tensors.

    Sources: Liu & Wang 2016; Bella (Doan et al. 2024), eqs. 2 and 4 and appendix G; D'Angelo &
    Fortuin 2021, eq. 10.

    Args:
        model, particle_chunk, nonfinite: see `Method`.
        gamma: γ >= 0, the weight of the repulsion.
        scope: "layer", a kernel for every group, which is an adapted layer, a head or another
            tensor; or "global", the geometric mean of these L kernels in the place of each. It
            compares every group in units of its own median, and its gradient has the weight γL, so
            that γ means the same in both.
        bandwidth: "median", 2h² = median of the off-diagonal D / log(K + 1), without gradient; or
            a number, h, in [1e-6, 1e18].
        floor: the smallest 2h² under "median", in units of s² mean_i ‖A_i‖² for an adapter and of
            mean_i ‖θ_i‖² for a head or another module. Distances are zero at B = 0 and between
            copies, and without a floor the repulsion would be many times the drive in the first
            steps. Plain tensors have none.
        drive: "own", particle i moves by its own gradient (Bella's eq. 4); or "mix", the textbook
            (1/K) Σ_j k_ij ∇_j ℓ_j.
        repulse: "own", +∇_{θ_i} k_ij under descent (eq. 4 prints a minus, which would attract); or
            "stein", the textbook −∇_{θ_j} k_ji.
        normalise: "particles", as above; or "density", φ_i K / Σ_j k_ij.
        prior_precision: c >= 0, of the prior N(0, 1/(cN)) of every number; c θ_i is added to the
            gradient of ℓ_i.
        loss: ℓ. "particle", "label_smoothing", "soft_targets", "bce" or "gaussian_nll"
            (`multilora.losses`), or a callable (logits, targets) -> (K,).

    Raises:
        ValueError: if γ > 0 and all particles are equal, which then stay so; and see `Method`.
        TypeError, RuntimeError: see `Method`.
    """

    takes_own_configurations = True

    def __init__(
        self,
        model: Any,
        *,
        gamma: float = 0.01,
        scope: str = "layer",
        bandwidth: str | float = "median",
        drive: str = "own",
        repulse: str = "own",
        normalise: str = "particles",
        floor: float = 1e-3,
        prior_precision: float = 0.0,
        loss: str | Loss = "particle",
        particle_chunk: int | None = None,
        nonfinite: str = "raise",
    ):
        self.gamma = checks.number("gamma", gamma, 0)
        self.scope = checks.choice("scope", scope, ("layer", "global"))
        self.bandwidth = _checked_bandwidth(bandwidth)
        self.drive = checks.choice("drive", drive, ("own", "mix"))
        self.repulse = checks.choice("repulse", repulse, ("own", "stein"))
        self.loss = losses.named(loss)
        self.normalise = checks.choice("normalise", normalise, ("particles", "density"))
        self.floor = checks.number("floor", floor, 0)
        self.prior_precision = checks.number("prior_precision", prior_precision, 0)
        super().__init__(model, particle_chunk=particle_chunk, nonfinite=nonfinite)
        if any(m.trained or m.widths for _, m in getattr(self.model, "stacked_modules", tuple)()):
            raise NotImplementedError("SVGD compares heads, so all particles need the same ones")
        if gamma != 0:
            require_different_particles(self.model, self.params, "the repulsion")
        self.groups = Groups(self.model, self.params)

    def _backward(self, closure: Closure, scale: float | Tensor) -> dict[str, Tensor]:
        loss, grads = self._separate(closure, self.loss, scale)
        grads = self._with_prior(grads, self.prior_precision, scale)
        theta, grad = self.groups.gather(self.passes), self.passes.gather(grads)
        dense = self.groups.flat(theta)
        D = self.groups.distances(theta, dense)  # (groups, K, K)
        k, width = self.groups.kernels(theta, D, self.scope, self.bandwidth, self.floor)
        particles, density = k.shape[-1], k.sum(-1)
        mix = k / particles if self.drive == "mix" else density / particles
        phi = self.groups.directions(
            theta,
            dense,
            self.groups.apart(dict(zip(self.params, grad))),
            (k, width),
            mix,
            scale * self.gamma / particles,
            self.repulse,
        )
        if self.normalise == "density":
            for p, g in self.groups.of_parameters().items():
                factor = (particles / density[g]).to(phi[p].dtype)
                phi[p] = phi[p] * factor.view(-1, *[1] * (phi[p].ndim - 1))
        moved = self.groups.together(phi)
        accumulate(self.params, [self.passes.put(moved[p]) for p in self.params])
        means = pair_means(k, D) if self.passes.total > 1 else {}
        return {"loss": loss, "nll": loss} | means

    def _skipped(self) -> dict[str, Tensor]:
        stats = super()._skipped()
        pairs = () if self.passes.total == 1 else ("kernel", "distance")
        return stats | dict.fromkeys(pairs, stats["loss"])


def _checked_bandwidth(bandwidth: str | float) -> str | float:
    if bandwidth == "median":
        return bandwidth
    if isinstance(bandwidth, str) or bandwidth is None:
        raise ValueError(f'bandwidth must be "median" or a number > 0; got {bandwidth!r}')
    # 2h² is a float32: not below the floor of the median, and finite.
    return checks.number("bandwidth", bandwidth, 1e-6, 1e18)
