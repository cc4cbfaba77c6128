"""Stein variational gradient descent over adapters (Bella)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from multilora import checks, losses
from multilora.losses import Loss
from multilora.methods.base import Method
from multilora.methods.parameters import require_different_particles
from multilora.methods.passes import Closure
from multilora.methods.tensors import accumulate, flatten, unflatten
from multilora.ops import pairwise_frobenius, svgd_update
from multilora.ops.common import accumulator

# The smallest 2h²: at initialisation B = 0 and all distances are zero.
_FLOOR = 1e-12


class SVGD(Method):
    """θ_i ← θ_i − ε φ_i, φ_i = (1/K) Σ_j k_ij ∇_i ℓ_i + (γ/K) Σ_j ∇_i k_ij.

    k_ij = exp(−D_ij / 2h²) with D_ij = ‖ΔW_i − ΔW_j‖²_F of the adapted layer, or the squared
    distance of the weights for a head or any other stacked tensor.

    Both parts are divided by K, as in the papers. With drive="own", particles far apart (k_ij ≈ 0
    for i ≠ j) move by 1/K of their gradient, so the driving part shrinks as K grows, between 1
    for equal particles and 1/K: under SGD, a learning rate tuned for an Ensemble or for a few
    particles has to grow with K, by as much as K times. AdamW and other optimizers that divide by
    the gradient's own size take steps of the same size for every K, but clipping and AdamW's eps
    see the smaller gradient.

    The textbook forms add and subtract factors of different particles. With independent A_i these
    live in different bases (any A → RA, B → BR⁻¹ leaves ΔW as it is), and the sum is not a descent
    direction; use them where particles share their initial A, or for plain stacked tensors.

    Sources: Liu & Wang 2016; Bella (Doan et al. 2024), eq. 4 and appendix G.

    Args:
        model, particle_chunk, nonfinite: see `Method`.
        gamma: γ >= 0, the weight of the repulsion.
        scope: "layer", a kernel for every layer, or "global", one for the sum of all distances.
        bandwidth: "median", 2h² = median of the off-diagonal D / log(K + 1), without gradient; or
            a number, h, in [1e-6, 1e18].
        drive: "own", particle i moves by its own gradient (Bella's eq. 4); or "mix", the textbook
            (1/K) Σ_j k_ij ∇_j ℓ_j.
        repulse: "own", +∇_{θ_i} k_ij under descent (eq. 4 prints a minus, which would attract); or
            "stein", the textbook −∇_{θ_j} k_ji.
        loss: ℓ. "particle", "label_smoothing", "soft_targets", "bce" or "gaussian_nll"
            (`multilora.losses`), or a callable (logits, targets) -> (K,).

    Raises:
        ValueError: if γ > 0 and all particles are equal, which then stay so; and see `Method`.
        TypeError, RuntimeError: see `Method`.
    """

    def __init__(
        self,
        model: Any,
        *,
        gamma: float = 0.01,
        scope: str = "layer",
        bandwidth: str | float = "median",
        drive: str = "own",
        repulse: str = "own",
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
        super().__init__(model, particle_chunk=particle_chunk, nonfinite=nonfinite)
        if gamma != 0:
            require_different_particles(self.model, self.params, "the repulsion")
        adapters = self.model.adapters() if hasattr(self.model, "adapters") else []
        self.lora_A = [a.lora_A for a in adapters]
        self.lora_B = [a.lora_B for a in adapters]
        self.scaling = [a.scaling for a in adapters]
        # The tensors outside of adapters, by group: a head's weight and bias belong together.
        self.dense = [[p] for p in self.params]
        if hasattr(self.model, "heads"):
            self.dense = [list(head.values()) for _, head in self.model.heads()]

    def _backward(self, closure: Closure, scale: float | Tensor) -> dict[str, Tensor]:
        loss, grads = self._separate(closure, self.loss, scale)
        tensors = [*self.lora_A, *self.lora_B, *(t for group in self.dense for t in group)]
        theta = dict(zip(tensors, self.passes.gather(tensors)))
        grad = dict(zip(self.params, self.passes.gather(grads)))
        # Relative to the first particle: equal ones are then exactly zero, and so is their force.
        dense = [flatten([theta[t] for t in group]) for group in self.dense]
        dense = [x - x[:1] for x in dense]

        D = self._distances(theta, dense)  # (adapters + dense groups, K, K)
        width = self._two_h_squared(D)  # (adapters + dense groups, 1, 1)
        k = torch.exp(-D / width)
        phi = self._directions(theta, grad, dense, k, width, scale)
        accumulate(self.params, [self.passes.put(phi[p]) for p in self.params])
        return {"loss": loss, "nll": loss} | self._pair_means(k, D)

    def _skipped(self) -> dict[str, Tensor]:
        stats = super()._skipped()
        pairs = () if self.passes.total == 1 else ("kernel", "distance")
        return stats | dict.fromkeys(pairs, stats["loss"])

    def _distances(self, theta: dict[Tensor, Tensor], dense: list[Tensor]) -> Tensor:
        """D_ij of every kernel: of the adapters, then of the dense groups."""
        distances = []
        if self.lora_A:
            lora_A, lora_B = ([theta[t] for t in factor] for factor in (self.lora_A, self.lora_B))
            distances.append(pairwise_frobenius(lora_A, lora_B, self.scaling))
        D = torch.cat([*distances, *(_squared_distances(x)[None] for x in dense)])
        return D.sum(0, keepdim=True).expand_as(D) if self.scope == "global" else D

    def _two_h_squared(self, D: Tensor) -> Tensor:
        """2h² of every kernel (groups, 1, 1)."""
        if not isinstance(self.bandwidth, str):
            return D.new_full((D.shape[0], 1, 1), 2 * self.bandwidth**2)
        particles = D.shape[-1]
        if particles == 1:
            return D.new_ones(D.shape[0], 1, 1)
        i, j = torch.triu_indices(particles, particles, 1, device=D.device)
        pairs = D[:, i, j].sort(dim=-1).values
        # Tensor.median would take the lower of the two in the middle of an even number.
        middle = pairs[:, (pairs.shape[-1] - 1) // 2 : pairs.shape[-1] // 2 + 1]
        median = middle.mean(dim=-1)
        return (median / math.log(particles + 1)).clamp_min(_FLOOR)[:, None, None]

    def _directions(
        self,
        theta: dict[Tensor, Tensor],
        grad: dict[Tensor, Tensor],
        dense: list[Tensor],
        k: Tensor,
        width: Tensor,
        scale: float | Tensor,
    ) -> dict[Tensor, Tensor]:
        """scale · φ of every parameter, for the particles that take part."""
        layers, particles = len(self.lora_A), k.shape[-1]
        # (groups, K, K), or (groups, K) where each particle moves by its own gradient only.
        mix = k / particles if self.drive == "mix" else (k / particles).sum(-1)
        repulsion = scale * self.gamma / particles
        phi: dict[Tensor, Tensor] = {}
        force = self._dense_forces(dense, k[layers:], width[layers:])
        if layers and self.repulse == "own":
            # ½ Σ_ij k_ij has ∂/∂D_ij = −k_ij / 4h² and the gradient Σ_j ∇_i k_ij.
            upstream = -k[:layers].double() / (2 * width[:layers]) * repulsion
            phi = self._adapter_directions(theta, grad, mix[:layers], upstream)
        elif layers:
            force |= self._stein_forces(theta, k, width)

        group_of = {p: layer for layer, p in enumerate(self.lora_A)}
        group_of |= {p: layer for layer, p in enumerate(self.lora_B)}
        group_of |= {p: layers + i for i, group in enumerate(self.dense) for p in group}
        for p in self.params:
            if p not in phi:
                driving = _mixed(mix[group_of[p]].to(p.dtype), grad[p])
                phi[p] = driving + force[p] * repulsion
        return phi

    def _adapter_directions(
        self,
        theta: dict[Tensor, Tensor],
        grad: dict[Tensor, Tensor],
        mix: Tensor,
        upstream: Tensor,
    ) -> dict[Tensor, Tensor]:
        """φ of the factors with repulse="own", from ∂(γ/K · ½ Σ_ij k_ij)/∂D."""
        factors = (*self.lora_A, *self.lora_B)
        # Frozen factors have no gradient; their direction is dropped.
        grads = [grad[t] if t in grad else torch.zeros_like(theta[t]) for t in factors]
        values = [theta[t] for t in factors]
        n = len(self.lora_A)
        phi_A, phi_B = svgd_update(
            grads[:n], grads[n:], mix, upstream, values[:n], values[n:], self.scaling
        )
        return dict(zip(factors, (*phi_A, *phi_B)))

    def _stein_forces(
        self, theta: dict[Tensor, Tensor], k: Tensor, width: Tensor
    ) -> dict[Tensor, Tensor]:
        """−Σ_j ∇_j k_ji of the factors."""
        force: dict[Tensor, Tensor] = {}
        for layer, (A, B, s) in enumerate(zip(self.lora_A, self.lora_B, self.scaling)):
            pull = k[layer] * (2 * s * s / width[layer])
            force |= zip((A, B), _stein_force(theta[A], theta[B], pull))
        return force

    def _dense_forces(self, dense: list[Tensor], k: Tensor, width: Tensor) -> dict[Tensor, Tensor]:
        """Σ_j ∇_i k_ij = −Σ_j ∇_j k_ji of the dense tensors: of a plain distance they are equal."""
        force: dict[Tensor, Tensor] = {}
        for group, x, kernel, w in zip(self.dense, dense, k, width):
            pull = (2 / w) * (kernel.to(x.dtype) @ x - kernel.sum(1, keepdim=True) * x)
            force |= zip(group, unflatten(pull.to(x.dtype), group))
        return force

    def _pair_means(self, k: Tensor, D: Tensor) -> dict[str, Tensor]:
        """The means of k_ij and D_ij over i ≠ j and all kernels, for logging."""
        if self.passes.total == 1:
            return {}
        particles = D.shape[-1]
        off = ~torch.eye(particles, dtype=torch.bool, device=k.device)
        # Zero where one particle is left, which has no pair.
        pairs = max(1, len(D) * particles * (particles - 1))
        return {
            "kernel": torch.where(off, k, 0).sum() / pairs,
            "distance": torch.where(off, D, 0).sum() / pairs,
        }


def _checked_bandwidth(bandwidth: str | float) -> str | float:
    if bandwidth == "median":
        return bandwidth
    if isinstance(bandwidth, str) or bandwidth is None:
        raise ValueError(f'bandwidth must be "median" or a number > 0; got {bandwidth!r}')
    # 2h² is a float32: not below the floor of the median, and finite.
    return checks.number("bandwidth", bandwidth, 1e-6, 1e18)


def _mixed(mix: Tensor, grad: Tensor) -> Tensor:
    """Σ_j mix_ij grad_j for grad (K, ...); mix (K,) is a diagonal."""
    if mix.ndim == 1:
        return grad * mix.view(-1, *[1] * (grad.ndim - 1))
    return (mix @ grad.flatten(1)).view(grad.shape)


def _squared_distances(x: Tensor) -> Tensor:
    """‖x_i − x_j‖² (K, K) of the rows of x (K, P), in float64 as pairwise_frobenius does it."""
    x64 = x.double()
    gram = x64 @ x64.T
    norms = gram.diagonal()
    D = (norms[:, None] + norms[None] - 2 * gram).clamp_min(0)
    D.fill_diagonal_(0)
    return D.to(accumulator(x.dtype))


def _stein_force(A: Tensor, B: Tensor, pull: Tensor) -> tuple[Tensor, Tensor]:
    """Σ_j pull_ij · (∇_{θ_j} ½‖B_jA_j − B_iA_i‖²) for A (K, r, d_in) and B (K, d_out, r).

    ∇_{B_j} = B_j (A_j A_jᵀ) − B_i (A_i A_jᵀ) and ∇_{A_j} = (B_jᵀB_j) A_j − (B_jᵀB_i) A_i.
    """
    pull = pull.to(A.dtype)
    gram_A = torch.einsum("ird,jsd->ijrs", A, A)  # A_i A_jᵀ
    gram_B = torch.einsum("idr,jds->ijrs", B, B)  # B_iᵀ B_j
    own_B = torch.einsum("jdr,jjrs->jds", B, gram_A)
    own_A = torch.einsum("jjrs,jsd->jrd", gram_B, A)
    force_B = torch.einsum("ij,jds->ids", pull, own_B)
    force_B = force_B - torch.einsum("idr,ij,ijrs->ids", B, pull, gram_A)
    force_A = torch.einsum("ij,jrd->ird", pull, own_A)
    force_A = force_A - torch.einsum("ij,jirs,isd->ird", pull, gram_B, A)
    return force_A, force_B
