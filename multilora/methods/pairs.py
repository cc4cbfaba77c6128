"""How far particles are apart, two by two: in their predictions, their features, their weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from multilora import checks
from multilora.methods.base import warn
from multilora.ops import lora_gram, pairwise_frobenius
from multilora.ops.common import IGNORE_INDEX, accumulator

#: W_ij of two particles, see `Weights`.
DISTANCES = ("root", "squared", "relative")
# δ, in squared distances: the gradient of a root is finite where two particles are equal.
_DELTA = 1e-12
# Added to every similarity of two examples, so that its logarithm is finite.
_SIMILAR = 1e-7


def checked_distance(distance: str, alpha: float) -> str:
    """One of DISTANCES. Warns where it has no bound, and is pulled up for ever."""
    if checks.choice("distance", distance, DISTANCES) == "squared" and alpha > 0:
        warn('MutualLearning: distance="squared" has no bound, and alpha pulls it up for ever')
    return distance


def distillation(logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """T²/(K−1) Σ_{j≠i} KL(p_j‖p_i) of every particle i (K,), p = softmax(z/T), with constant p_j.

    Args:
        logits: z (K, N, C).
        targets: (N,); rows with the target −100 are left out of the mean over the rows.
        temperature: T.

    Returns:
        float32 or better; zeros for one particle.
    """
    log_p = (logits.to(accumulator(logits.dtype)) / temperature).log_softmax(-1)
    p, valid = log_p.detach().exp(), targets != IGNORE_INDEX
    negentropy = (p * log_p.detach()).sum(-1)
    cross = ((p.sum(0) - p) * log_p).sum(-1)
    kl = ((negentropy.sum(0) - negentropy - cross) * valid).sum(-1) / valid.sum().clamp_min(1)
    return kl * (temperature**2 / max(1, len(logits) - 1))


def disagreement(z: Tensor) -> Tensor:
    """The mean over pairs of particles of the symmetrised KL of their conditionals, z (K, B, D).

    F_ij = ½ [KL(P^i‖P^j) + KL(P^j‖P^i)], a mean over the examples b, of
    P^i_{c|b} ∝ ½ (cos(z^i_b, z^i_c) + 1) + 1e-7 over the other examples c ≠ b. With the means P̄
    and log P over the particles, Σ_{i<j} F_ij = (K/2B) Σ_i ⟨P^i − P̄, log P^i − mean log P⟩.

    Returns:
        A float64 scalar: the cosines are near 1, and the differences between particles small.
    """
    particles, examples = z.shape[:2]
    z = F.normalize(z.double(), dim=-1)
    other = ~torch.eye(examples, dtype=torch.bool, device=z.device)
    similarity = torch.where(other, ((z @ z.mT + 1) / 2).clamp_min(0) + _SIMILAR, 0)
    p = similarity / similarity.sum(-1, keepdim=True)
    log_p = torch.where(other, p, 1).log()
    apart = (p - p.mean(0)) * (log_p - log_p.mean(0))
    return apart.sum() / (examples * max(1, particles - 1))


class Weights:
    """W_ij of the updates ΔW of the adapted layers and of all other trainable tensors.

    With D_ij = Σ_layers ‖ΔW_i − ΔW_j‖² + Σ_others ‖θ_i − θ_j‖² + d (σ_i − σ_j)², which is W₂² of
    the Gaussians N(θ_i, σ_i²): "root" is √(D_ij + δ)/√d, "squared" D_ij, and "relative"
    D_ij/(T_i + T_j) with T_i the squared norm of the same, in [0, 2] for equal σ.

    Args:
        model, params: those of a method.
    """

    def __init__(self, model: Any, params: list[Tensor]):
        adapters = model.adapters() if hasattr(model, "adapters") else []
        # The experts of a bank are taken apart where the distances are computed.
        adapters = [adapter for adapter in adapters if not adapter.expert]
        self.lora_A = [adapter.parameters[0] for adapter in adapters]
        self.lora_B = [adapter.parameters[1] for adapter in adapters]
        self.scaling = [adapter.scaling for adapter in adapters]
        factors = {*self.lora_A, *self.lora_B}
        self.others = [p for p in params if p not in factors]
        #: What W_ij depends on; frozen factors too.
        self.tensors = [*self.lora_A, *self.lora_B, *self.others]
        #: d, how many numbers of a particle are trained.
        self.size = sum(p[0].numel() for p in params)

    def mean(self, theta: list[Tensor], sigma: Tensor | None, distance: str) -> Tensor:
        """The mean of W_ij over pairs i ≠ j, zero for one particle.

        Args:
            theta: (k, ...) in the order of `tensors`.
            sigma: σ_i (k,), or None where all are zero.
            distance: one of DISTANCES.
        """
        layers, particles = len(self.scaling), len(theta[0])
        dtype = accumulator(theta[0].dtype)
        theta = [t.to(dtype) for t in theta]
        # A dense tensor is an update of rank one, of θ as a row with a factor of one.
        rows = [t.flatten(1).unsqueeze(1) for t in theta[2 * layers :]]
        lora_A = [m for t in theta[:layers] for m in _matrices(t)] + rows
        lora_B = [m for t in theta[layers : 2 * layers] for m in _matrices(t)]
        lora_B += [t.new_ones(particles, 1, 1) for t in rows]
        scaling = [s for s, t in zip(self.scaling, theta) for _ in _matrices(t)]
        scaling += [1.0] * len(rows)
        D = pairwise_frobenius(lora_A, lora_B, scaling).sum(0)
        if sigma is not None:
            D = D + self.size * (sigma[:, None] - sigma).to(dtype).square()
        if distance == "root":
            W = (D + _DELTA).sqrt() / self.size**0.5
        elif distance == "squared":
            W = D
        else:
            T = lora_gram(lora_A, lora_B, scaling).sum(0).diagonal()
            if sigma is not None:
                T = T + self.size * sigma.to(dtype).square()
            W = D / (T[:, None] + T + _DELTA)
        apart = ~torch.eye(particles, dtype=torch.bool, device=W.device)
        return torch.where(apart, W, 0).sum() / max(1, particles * (particles - 1))


def _matrices(factors: Tensor) -> Sequence[Tensor]:
    """The factors (K, ·, ·) themselves, or those of each expert of a bank (K, E, ·, ·)."""
    return [factors] if factors.ndim == 3 else factors.unbind(1)
