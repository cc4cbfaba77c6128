"""Kernels between particles, and the forces that they make, for every group of tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from multilora.methods.passes import Passes
from multilora.methods.tensors import flatten, unflatten
from multilora.ops import pairwise_frobenius, svgd_update
from multilora.ops.common import accumulator

# The smallest 2h².
_FLOOR = 1e-12


@dataclass(frozen=True, eq=False)
class Expert:
    """One expert's part of the factors (K, E, ...) of a bank."""

    factors: Tensor
    place: int

    def of(self, t: Tensor) -> Tensor:
        """Its part of a tensor of the same form."""
        return t[:, self.place]


#: What is compared and moved as one: a stacked tensor, or an expert's part of one.
Part: TypeAlias = "Tensor | Expert"


class Groups:
    """The tensors of a model by what is compared as one: an adapted layer, a head, a tensor.

    G counts the adapters and then the groups of dense tensors. `theta` and the other dictionaries
    hold the tensors (k, ...) of the particles that take part, by the stacked ones; for a bank of
    experts, by the experts.
    """

    def __init__(self, model: Any, params: list[Tensor]):
        adapters = model.adapters() if hasattr(model, "adapters") else []
        self.experts: dict[Tensor, list[Expert]] = {}
        parts = [[self._part(f, a.expert) for f in a.parameters] for a in adapters]
        self.lora_A: list[Part] = [A for A, _ in parts]
        self.lora_B: list[Part] = [B for _, B in parts]
        self.scaling = [a.scaling for a in adapters]
        # Where particles have ranks and scalings of their own; B is then taken with them.
        self.scales = [a.scales for a in adapters]
        # A head's weight and bias belong together.
        self.dense = [[p] for p in params]
        self.has_modules = hasattr(model, "heads")
        if self.has_modules:
            self.dense = [list(head.values()) for _, head in model.heads()]
        self.params = params

    def _part(self, factors: Tensor, expert: int | None) -> Part:
        if expert is None:
            return factors
        part = Expert(factors, expert)
        self.experts.setdefault(factors, []).append(part)
        return part

    def gather(self, passes: Passes) -> dict[Part, Tensor]:
        """theta, of all processes."""
        parts = [*self.lora_A, *self.lora_B, *(t for group in self.dense for t in group)]
        parts += [s for s in self.scales if s is not None]
        whole = [p.factors if isinstance(p, Expert) else p for p in parts]
        tensors = list(dict.fromkeys(whole))
        return self.apart(dict(zip(tensors, passes.gather(tensors))))

    def apart(self, values: Mapping[Tensor, Tensor]) -> dict[Part, Tensor]:
        """Values of stacked tensors; for a bank, of each expert."""
        found: dict[Part, Tensor] = {}
        for t, value in values.items():
            if t in self.experts:
                found |= {expert: expert.of(value) for expert in self.experts[t]}
            else:
                found[t] = value
        return found

    def together(self, values: Mapping[Part, Tensor]) -> dict[Tensor, Tensor]:
        """The values of the trained tensors, from those of their parts."""
        return {
            p: torch.stack([values[e] for e in self.experts[p]], 1)
            if p in self.experts
            else values[p]
            for p in self.params
        }

    def flat(self, theta: dict[Part, Tensor]) -> list[Tensor]:
        """The dense groups (k, P) relative to the first particle: equal ones are then exactly zero,
        and so is their force."""
        flat = (flatten([theta[t] for t in group]) for group in self.dense)
        return [x - x[:1] for x in flat]

    def distances(self, theta: dict[Part, Tensor], dense: list[Tensor]) -> Tensor:
        """D_ij (G, k, k), squared: of ΔW for an adapter, of the numbers for a dense group.

        dense: see `flat`.
        """
        distances = []
        if self.lora_A:
            lora_A, lora_B = [theta[t] for t in self.lora_A], self._scaled_B(theta)
            distances.append(pairwise_frobenius(lora_A, lora_B, self.scaling))
        return torch.cat([*distances, *(_squared_distances(x)[None] for x in dense)])

    def kernels(
        self,
        theta: dict[Part, Tensor],
        D: Tensor,
        scope: str,
        bandwidth: str | float,
        floor: float,
    ) -> tuple[Tensor, Tensor]:
        """k_ij (G, k, k) and 2h² (G, 1, 1); see `SVGD` for the options."""
        if isinstance(bandwidth, str):
            width = _median(D) / math.log(D.shape[-1] + 1)
            width = torch.maximum(width, self._floors(theta, D, floor))[:, None, None]
        else:
            width = D.new_full((len(D), 1, 1), 2 * bandwidth**2)
        exponent = -D / width
        if scope == "global":
            exponent = exponent.mean(0, keepdim=True).expand_as(D)
        return exponent.exp(), width

    def directions(
        self,
        theta: dict[Part, Tensor],
        dense: list[Tensor],
        grad: dict[Part, Tensor],
        kernels: tuple[Tensor, Tensor],
        mix: Tensor,
        weight: float | Tensor,
        repulse: str,
    ) -> dict[Part, Tensor]:
        """Σ_j mix_ij ∇_j ℓ_j + weight · Σ_j ∇k of every parameter.

        Args:
            dense: see `flat`.
            mix: (G, k, k), or (G, k) where each particle moves by its own gradient only.
            repulse: which gradient of k, "own" or "stein"; see `SVGD`.
        """
        k, width = kernels
        layers = len(self.lora_A)
        phi: dict[Part, Tensor] = {}
        force = self._dense_forces(dense, k[layers:], width[layers:])
        if layers and repulse == "own":
            # ½ Σ_ij k_ij has ∂/∂D_ij = −k_ij / 4h² and the gradient Σ_j ∇_i k_ij.
            upstream = -k[:layers].double() / (2 * width[:layers]) * weight
            phi = self._adapter_directions(theta, grad, mix[:layers], upstream)
        elif layers:
            force |= self._stein_forces(theta, k, width)
        for p, g in self.of_parameters().items():
            if p not in phi:
                phi[p] = _mixed(mix[g].to(grad[p].dtype), grad[p]) + force[p] * weight
        for A, B, own_scales in zip(self.lora_A, self.lora_B, self.scales):
            if own_scales is not None:
                # Another particle's gradient may reach into the padding of a smaller one.
                is_own = theta[own_scales] != 0
                phi |= {A: phi[A] * is_own.mT, B: phi[B] * is_own}
        return phi

    def of_parameters(self) -> dict[Part, int]:
        """The place in G of every parameter that is trained; for a bank, of each expert."""
        group_of: dict[Part, int] = {t: g for g, t in enumerate(self.lora_A)}
        group_of |= {t: g for g, t in enumerate(self.lora_B)}
        first = len(self.lora_A)
        group_of |= {t: first + g for g, group in enumerate(self.dense) for t in group}
        return {part: group_of[part] for part in self.apart({p: p for p in self.params})}

    def _floors(self, theta: dict[Part, Tensor], D: Tensor, floor: float) -> Tensor:
        """The smallest 2h² (G,): of an adapter, floor · s² mean_i ‖A_i‖²; of a module, floor ·
        mean_i ‖θ_i‖². Plain tensors have none, as their origin may mean nothing."""
        norms: list[Tensor] = []
        if self.lora_A:
            scaled = [
                theta[A] if s is None else theta[A] * theta[s].mT
                for A, s in zip(self.lora_A, self.scales)
            ]
            norms += torch._foreach_norm(scaled)
            norms = list(torch._foreach_mul(norms, self.scaling))
        if self.has_modules:
            norms += [
                torch.stack(torch._foreach_norm([theta[t] for t in group])).norm()
                for group in self.dense
            ]
        floors = D.new_full((len(D),), _FLOOR)
        if norms:
            floors[: len(norms)] += floor * torch.stack(norms).to(D).square() / D.shape[-1]
        return floors

    def _adapter_directions(
        self,
        theta: dict[Part, Tensor],
        grad: dict[Part, Tensor],
        mix: Tensor,
        upstream: Tensor,
    ) -> dict[Part, Tensor]:
        """Σ_j mix_ij ∇_j ℓ_j of the factors, and the gradient with `upstream` = ∂/∂D."""
        factors = (*self.lora_A, *self.lora_B)
        # Frozen factors have no gradient; their direction is dropped.
        grads = [grad[t] if t in grad else torch.zeros_like(theta[t]) for t in factors]
        n = len(self.lora_A)
        values_A, values_B = [theta[t] for t in self.lora_A], self._scaled_B(theta)
        own = [g for g, s in enumerate(self.scales) if s is not None]
        drives = {i: grads[i] for g in own for i in (g, n + g)}
        for i, drive in drives.items():
            # Mixed apart: the operator's gradient is that of B with its scales.
            grads[i] = torch.zeros_like(drive)
        phi_A, phi_B = svgd_update(
            grads[:n], grads[n:], mix, upstream, values_A, values_B, self.scaling
        )
        phi = dict(zip(factors, (*phi_A, *phi_B)))
        for g in own:
            A, B, own_scales = self.lora_A[g], self.lora_B[g], self.scales[g]
            assert own_scales is not None
            scales = theta[own_scales]
            mixing = mix[g].to(phi[A].dtype)
            phi[A] = phi[A] + _mixed(mixing, drives[g])
            phi[B] = phi[B] * scales + _mixed(mixing, drives[n + g])
        return phi

    def _scaled_B(self, theta: dict[Part, Tensor]) -> list[Tensor]:
        """B (k, d_out, r) of every adapter, with the scales in it where there are any."""
        pairs = zip(self.lora_B, self.scales)
        return [theta[B] if s is None else theta[B] * theta[s] for B, s in pairs]

    def _stein_forces(
        self, theta: dict[Part, Tensor], k: Tensor, width: Tensor
    ) -> dict[Part, Tensor]:
        """−Σ_j ∇_j k_ji of the factors."""
        force: dict[Part, Tensor] = {}
        scaled = self._scaled_B(theta)
        for layer, (A, B, s) in enumerate(zip(self.lora_A, self.lora_B, self.scaling)):
            pull = k[layer] * (2 * s * s / width[layer])
            own_scales = self.scales[layer]
            # The scaling of particle j, in whose coordinates the gradient is taken.
            pull_B = pull if own_scales is None else pull * theta[own_scales][:, 0, 0]
            force |= zip((A, B), _stein_force(theta[A], scaled[layer], pull, pull_B))
        return force

    def _dense_forces(self, dense: list[Tensor], k: Tensor, width: Tensor) -> dict[Part, Tensor]:
        """Σ_j ∇_i k_ij = −Σ_j ∇_j k_ji of the dense tensors: of a plain distance they are equal."""
        force: dict[Part, Tensor] = {}
        for group, x, kernel, w in zip(self.dense, dense, k, width):
            pull = (2 / w) * (kernel.to(x.dtype) @ x - kernel.sum(1, keepdim=True) * x)
            force |= zip(group, unflatten(pull.to(x.dtype), group))
        return force


def pair_means(k: Tensor, D: Tensor) -> dict[str, Tensor]:
    """The means of k_ij and D_ij over i ≠ j and all groups, for logging."""
    particles = D.shape[-1]
    off = ~torch.eye(particles, dtype=torch.bool, device=k.device)
    # Zero where one particle is left, which has no pair.
    pairs = max(1, len(D) * particles * (particles - 1))
    return {
        "kernel": torch.where(off, k, 0).sum() / pairs,
        "distance": torch.where(off, D, 0).sum() / pairs,
    }


def _median(D: Tensor) -> Tensor:
    """The median of D_ij over i ≠ j (groups,); one for a single particle, which has no pairs."""
    particles = D.shape[-1]
    if particles == 1:
        return D.new_ones(len(D))
    i, j = torch.triu_indices(particles, particles, 1, device=D.device)
    pairs = D[:, i, j].sort(dim=-1).values
    # Tensor.median would take the lower of the two in the middle of an even number.
    return pairs[:, (pairs.shape[-1] - 1) // 2 : pairs.shape[-1] // 2 + 1].mean(dim=-1)


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


def _stein_force(A: Tensor, B: Tensor, pull: Tensor, pull_B: Tensor) -> tuple[Tensor, Tensor]:
    """Σ_j pull_ij · (∇_{θ_j} ½‖B_jA_j − B_iA_i‖²) for A (K, r, d_in) and B (K, d_out, r).

    pull_B: in place of `pull` for the gradients in B.
    ∇_{B_j} = B_j (A_j A_jᵀ) − B_i (A_i A_jᵀ) and ∇_{A_j} = (B_jᵀB_j) A_j − (B_jᵀB_i) A_i.
    """
    pull, pull_B = pull.to(A.dtype), pull_B.to(A.dtype)
    gram_A = torch.einsum("ird,jsd->ijrs", A, A)  # A_i A_jᵀ
    gram_B = torch.einsum("idr,jds->ijrs", B, B)  # B_iᵀ B_j
    own_B = torch.einsum("jdr,jjrs->jds", B, gram_A)
    own_A = torch.einsum("jjrs,jsd->jrd", gram_B, A)
    force_B = torch.einsum("ij,jds->ids", pull_B, own_B)
    force_B = force_B - torch.einsum("idr,ij,ijrs->ids", B, pull_B, gram_A)
    force_A = torch.einsum("ij,jrd->ird", pull, own_A)
    force_A = force_A - torch.einsum("ij,jirs,isd->ird", pull, gram_B, A)
    return force_A, force_B
