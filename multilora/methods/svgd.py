"""Stein variational gradient descent over adapters (Bella)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from multilora import checks, losses
from multilora.losses import Loss
from multilora.methods.base import (
    Method,
    accumulate,
    flatten,
    require_different_particles,
    unflatten,
)
from multilora.methods.passes import Closure
from multilora.ops import pairwise_frobenius, svgd_update
from multilora.ops.common import accumulator

# The smallest 2h²: at initialisation B = 0 and all distances are zero.
_FLOOR = 1e-12


class SVGD(Method):
    """θ_i ← θ_i − ε φ_i, φ_i = (1/K) Σ_j k_ij ∇_i ℓ_i + (γ/K) Σ_j ∇_i k_ij.

    k_ij = exp(−D_ij / 2h²) with D_ij = ‖ΔW_i − ΔW_j‖²_F of the adapted layer, or the squared
    distance of the weights for a head or any other stacked tensor.

    gamma: γ >= 0, the weight of the repulsion.
    scope: "layer", a kernel for every layer, or "global", one for the sum of all distances.
    bandwidth: "median", 2h² = median of the off-diagonal D / log(K + 1), without gradient; or a
        number, h, in [1e-6, 1e18].
    drive: "own", particle i moves by its own gradient (Bella's eq. 4); or "mix", the textbook
        (1/K) Σ_j k_ij ∇_j ℓ_j.
    repulse: "own", +∇_{θ_i} k_ij under descent (eq. 4 prints a minus, which would attract); or
        "stein", the textbook −∇_{θ_j} k_ji.
    loss: "particle", "label_smoothing", "soft_targets", "bce" or "gaussian_nll"
        (`multilora.losses`), or a callable (logits, targets) -> (K,).
    particle_chunk, nonfinite: see `Method`.

    Both parts are divided by K, as in the papers. With "own", particles far apart (k_ij ≈ 0 for
    i ≠ j) move by 1/K of their own gradient, so the driving part shrinks as K grows, between 1
    for equal particles and 1/K: under SGD, a learning rate tuned for an Ensemble or for a few
    particles has to grow with K, by as much as K times. AdamW and other optimizers that divide by
    the gradient's own size take steps of the same size for every K, but clipping and AdamW's eps
    see the smaller gradient.

    The textbook forms add and subtract factors of different particles. With independent A_i these
    live in different bases (any A → RA, B → BR⁻¹ leaves ΔW as it is), and the sum is no descent
    direction; use them where particles share their initial A, or for plain stacked tensors.

    Sources: Liu & Wang 2016; Bella (Doan et al. 2024), eq. 4 and appendix G.
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
        if bandwidth != "median":
            if isinstance(bandwidth, str) or bandwidth is None:
                raise ValueError(f'bandwidth must be "median" or a number > 0; got {bandwidth!r}')
            # 2h² is a float32: not below the floor of the median, and finite.
            bandwidth = checks.number("bandwidth", bandwidth, 1e-6, 1e18)
        settings = {
            "gamma": checks.number("gamma", gamma, 0),
            "scope": checks.choice("scope", scope, ("layer", "global")),
            "bandwidth": bandwidth,
            "drive": checks.choice("drive", drive, ("own", "mix")),
            "repulse": checks.choice("repulse", repulse, ("own", "stein")),
            "loss": losses.named(loss),
        }
        super().__init__(
            model, particle_chunk=particle_chunk, nonfinite=nonfinite, settings=settings
        )
        model = self.model
        if gamma != 0:
            require_different_particles(model, self.params, "the repulsion")
        adapters = model.adapters() if hasattr(model, "adapters") else []
        self.lora_A = [a.lora_A for a in adapters]
        self.lora_B = [a.lora_B for a in adapters]
        self.scaling = [a.scaling for a in adapters]
        # Everything else, by group: a head's tensors belong together.
        if hasattr(model, "heads"):
            self.dense = [list(head.values()) for _, head in model.heads()]
        else:
            self.dense = [[p] for p in self.params]

    def _backward(self, closure: Closure, scale: float | Tensor) -> dict[str, Tensor]:
        values, grads = self.passes.separate(closure, self.loss, scale)
        finite = self.finite_particles(values, grads, scale)
        mean = self.mean_loss(values, finite)
        directions, stats = self._directions(grads, finite, scale)
        accumulate(self.params, directions)
        return {"loss": mean, "nll": mean} | stats

    def _skipped(self) -> dict[str, Tensor]:
        stats = super()._skipped()
        pairs = () if self.passes.total == 1 else ("kernel", "distance")
        return stats | dict.fromkeys(pairs, stats["loss"])

    def _directions(
        self, grads: list[Tensor], finite: Tensor | None, scale: float | Tensor
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """φ of this process's particles, among all processes' particles with a finite step."""
        everyone = self._everyone(finite)
        grad = dict(zip(self.params, self._all_gradients(grads, finite)))
        lora_A = [everyone[t] for t in self.lora_A]
        lora_B = [everyone[t] for t in self.lora_B]
        layers = len(lora_A)
        distances = []
        # Relative to the first particle: equal ones are then exactly zero, and so is their force.
        dense = [flatten([everyone[t] for t in group]) for group in self.dense]
        dense = [x - x[:1] for x in dense]
        if layers:
            distances.append(pairwise_frobenius(lora_A, lora_B, self.scaling))
        distances += [_squared_distances(x)[None] for x in dense]
        D = torch.cat(distances)  # (layers + dense groups, K, K)
        particles = D.shape[-1]
        if self.scope == "global":
            D = D.sum(0, keepdim=True).expand_as(D)
        width = self._two_h_squared(D)  # (groups, 1, 1)
        k = torch.exp(-D / width)
        weight = k / particles
        # (groups, K, K), or (groups, K) where each particle moves by its own gradient only.
        mix = weight if self.drive == "mix" else weight.sum(-1)
        repulsion = scale * self.gamma / particles

        direction: dict[Tensor, Tensor] = {}
        # The force that the repulsion adds: Σ_j ∇_i k_ij, or −Σ_j ∇_j k_ji.
        force: dict[Tensor, Tensor] = {}
        if layers and self.repulse == "own":
            # ½ Σ_ij k_ij has ∂/∂D_ij = −k_ij / 4h² and the gradient Σ_j ∇_i k_ij.
            upstream = -k[:layers].double() / (2 * width[:layers]) * repulsion
            # Frozen factors have no gradient; their direction is dropped.
            grad_A = [grad[t] if t in grad else torch.zeros_like(everyone[t]) for t in self.lora_A]
            grad_B = [grad[t] if t in grad else torch.zeros_like(everyone[t]) for t in self.lora_B]
            update = svgd_update(
                grad_A, grad_B, mix[:layers], upstream, lora_A, lora_B, self.scaling
            )
            direction |= zip((*self.lora_A, *self.lora_B), (*update[0], *update[1]))
        elif layers:
            for layer, (A, B, s) in enumerate(zip(lora_A, lora_B, self.scaling)):
                pull = k[layer] * (2 * s * s / width[layer])
                forces = _stein_force(A, B, pull)
                force |= zip((self.lora_A[layer], self.lora_B[layer]), forces)
        for group, x, kernel, w in zip(self.dense, dense, k[layers:], width[layers:]):
            # For a kernel of the plain distance the two forms are the same vector.
            pull = (2 / w) * (kernel.to(x.dtype) @ x - kernel.sum(1, keepdim=True) * x)
            force |= zip(group, unflatten(pull.to(x.dtype), group))

        of_group = {p: layer for layer, p in enumerate(self.lora_A)}
        of_group |= {p: layer for layer, p in enumerate(self.lora_B)}
        of_group |= {p: layers + i for i, group in enumerate(self.dense) for p in group}
        for p in self.params:
            if p not in direction:
                driven = _mixed(mix[of_group[p]].to(p.dtype), grad[p])
                direction[p] = driven + force[p] * repulsion
        directions = [self._own(direction[p], finite) for p in self.params]

        if self.passes.total == 1:
            return directions, {}
        off = ~torch.eye(particles, dtype=torch.bool, device=k.device)
        # Zero where one particle is left, which has no pair.
        pairs = max(1, len(D) * particles * (particles - 1))
        return directions, {
            "kernel": torch.where(off, k, 0).sum() / pairs,
            "distance": torch.where(off, D, 0).sum() / pairs,
        }

    def _everyone(self, finite: Tensor | None) -> dict[Tensor, Tensor]:
        """Every tensor of the particles, with those of all processes that have a finite step."""
        tensors = [*self.lora_A, *self.lora_B, *(t for group in self.dense for t in group)]
        gathered = self.passes.processes.gather_all(tensors)
        if finite is not None:
            gathered = [t[finite] for t in gathered]
        return dict(zip(tensors, gathered))

    def _all_gradients(self, grads: list[Tensor], finite: Tensor | None) -> list[Tensor]:
        """The same of the gradients."""
        processes = self.passes.processes
        if processes.particle_size > 1:
            grads = processes.gather_all(grads)
        return grads if finite is None else [g[finite] for g in grads]

    def _own(self, direction: Tensor, finite: Tensor | None) -> Tensor:
        """This process's rows of what was computed for all; zero where a particle is skipped."""
        if finite is not None:
            every = direction.new_zeros(self.passes.total, *direction.shape[1:])
            direction = every.index_copy_(0, finite, direction)
        return self.passes.processes.own(direction)

    def _two_h_squared(self, D: Tensor) -> Tensor:
        """2h² of every kernel (groups, 1, 1)."""
        if self.bandwidth != "median":
            return D.new_full((D.shape[0], 1, 1), 2 * self.bandwidth**2)
        particles = D.shape[-1]
        if particles == 1:
            return D.new_ones(D.shape[0], 1, 1)
        i, j = torch.triu_indices(particles, particles, 1, device=D.device)
        pairs = D[:, i, j].sort(dim=-1).values
        # Not Tensor.median: of an even number of pairs that takes the lower one.
        middle = pairs[:, (pairs.shape[-1] - 1) // 2 : pairs.shape[-1] // 2 + 1]
        median = middle.mean(dim=-1)
        return (median / math.log(particles + 1)).clamp_min(_FLOOR)[:, None, None]


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
