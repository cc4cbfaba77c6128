"""How different K particles are: in what they predict, and in their weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from multilora import checks
from multilora.log_probabilities import kl
from multilora.ops.common import accumulator


@torch.no_grad()
def vendi(similarity: Tensor, q: float = 1.0) -> float:
    """The Vendi score of order q, the effective number of different particles, from 1 to K.

    With λ the eigenvalues of S/K, which sum to one, it is exp(−Σ λ log λ) for q = 1, the rank of S
    for q = 0, 1 / max λ for q = ∞, and (Σ λ^q)^(1/(1−q)) otherwise. It falls as q grows: large q
    looks at the largest groups of similar particles, small q at all. Eigenvalues within rounding of
    zero (K times the dtype's epsilon, relative to the largest) are zero.

    Source: Friedman and Dieng, "The Vendi score", 2022, and Pasarkar and Dieng, 2023, for q ≠ 1.

    Args:
        similarity: S (K, K), symmetric and positive semidefinite with a unit diagonal, such as
            `similarity(log_p)` or `model.cosines()`.
        q: the order, >= 0, or math.inf.

    Raises:
        ValueError: S has another shape or is not such a matrix, or q is negative.
    """
    if similarity.ndim != 2 or len(similarity) != similarity.shape[-1] or not len(similarity):
        raise ValueError(f"vendi needs similarities (K, K); got {tuple(similarity.shape)}")
    if q != math.inf:
        checks.number("q", q, 0)
    matrix = similarity.double()
    unit = bool(((matrix.diagonal() - 1).abs() < 1e-3).all())
    symmetric = bool(((matrix - matrix.mT).abs() < 1e-3).all())
    spectrum = torch.linalg.eigvalsh(matrix) if unit and symmetric else matrix.new_full((1,), -1)
    if not spectrum[0] > -1e-3 * len(matrix):
        raise ValueError(
            "vendi needs a symmetric positive semidefinite matrix with ones on its diagonal; got "
            f"{similarity.tolist() if len(similarity) < 9 else tuple(similarity.shape)}"
        )
    noise = len(matrix) * torch.finfo(accumulator(similarity.dtype)).eps * spectrum[-1]
    share = spectrum[spectrum > noise]
    share /= share.sum()
    if q == math.inf:
        return 1 / share.max().item()
    if q == 1:
        return torch.special.entr(share).sum().exp().item()
    return share.pow(q).sum().pow(1 / (1 - q)).item()


@torch.no_grad()
def similarity(log_p: Tensor) -> Tensor:
    """S_ij = mean_n Σ_c √(p_inc p_jnc) (K, K): how much two particles' predictions overlap.

    It is the mean Bhattacharyya coefficient: 1 for equal predictions, 0 for predictions without a
    common class, and positive semidefinite, so that `vendi` takes it.

    Args:
        log_p: log-probabilities (K, N, C), as `predict(..., log=True)` returns them.

    Returns:
        float32 (float64 for float64 log_p); sums are taken in float64.

    Raises:
        ValueError: log_p has another shape, or its rows are not log-probabilities.
    """
    shape = tuple(log_p.shape)
    if log_p.ndim != 3 or not log_p.numel():
        raise ValueError(f"similarity needs log-probabilities (K, N, C); got {shape}")
    particles, examples, _ = shape
    total = torch.zeros(particles, particles, dtype=torch.float64, device=log_p.device)
    # The float64 copies are those of a part of the examples.
    for part in log_p.split(4096, 1):
        p = part.double().exp()
        if not ((p.sum(-1) - 1).abs() < 2e-2).all():
            raise ValueError(
                f"similarity needs log-probabilities, the log_softmax of logits; got {shape} with "
                "rows whose probabilities do not sum to one"
            )
        root = p.sqrt().flatten(1)
        total += root @ root.mT
    return (total / examples).to(accumulator(log_p.dtype))


def cosines(gram: Tensor) -> Tensor:
    """T_ij / √(T_ii T_jj) (..., K, K) of a Gram matrix (..., K, K).

    A zero vector has the cosine 1 with itself and with another zero vector, which it equals, and 0
    with all others; so the result stays positive semidefinite with a unit diagonal.
    """
    norms = gram.diagonal(dim1=-2, dim2=-1).double().sqrt()
    products = norms[..., :, None] * norms[..., None, :]
    zero = norms == 0
    both = zero[..., :, None] & zero[..., None, :]
    return torch.where(products > 0, gram / products, both.double()).to(gram.dtype)


def disagreement(members: Tensor) -> float:
    """The share of examples that two particles classify differently, the mean over pairs.

    NaN for one particle.

    Args:
        members: log p_k (K, N, C).
    """
    particles, examples, classes = members.shape
    votes = torch.zeros(examples, classes, dtype=torch.float64, device=members.device)
    choices = members.argmax(-1).mT
    votes.scatter_add_(1, choices, torch.ones_like(choices, dtype=torch.float64))
    # Among the K² ordered pairs, Σ_c votes² agree, and K of them are a particle with itself. One
    # particle has no pair, and 0/0 is NaN.
    agreeing = (votes.square().sum(-1) - particles) / (particles * (particles - 1))
    return 1 - agreeing.mean().item()


def ambiguity(members: Tensor, mean: Tensor) -> float:
    """mean_k Σ_c (p_kc − p̄_c)²: the mean of the particles' Brier scores is p̄'s plus this.

    Args:
        members: log p_k (K, N, C).
        mean: log mean_k p_k (N, C).
    """
    return (members.exp() - mean.exp()).square().sum(-1).mean().item()


def kl_pairwise(members: Tensor) -> Tensor:
    """mean_n KL(p_i‖p_j) (K, K) in nats, row i and column j, of log p_k (K, N, C)."""
    return torch.stack([kl(own, members).mean(-1) for own in members]).clamp_min(0)
