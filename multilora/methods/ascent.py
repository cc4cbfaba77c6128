"""The climb of the methods that descend from a worse place nearby, and the way there and back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from multilora.methods.tensors import copies, unflatten

#: The kinds of `climb`.
ASCENTS = ("prox", "step", "sam")


def climb(
    g: Tensor,
    kind: str,
    *,
    rho: float = 0.0,
    step_size: float = 0.0,
    clip: float = 0.0,
    lambda_: float | Tensor = 1.0,
) -> Tensor:
    """θ' − θ (K, P) from the gradient g (K, P) of every particle's objective.

    "prox" is g/2λ with ‖g_i‖ clipped at `clip`, the maximiser of ⟨g, δ⟩ − λ‖δ‖²; "step" is
    step_size · g; "sam" is ρ g_i/‖g_i‖, which is zero where the gradient is.
    """
    if kind == "step":
        return step_size * g
    norm = torch.linalg.vector_norm(g, dim=1, keepdim=True).clamp_min(torch.finfo(g.dtype).tiny)
    if kind == "sam":
        return g * (rho / norm)
    return g * ((clip / norm).clamp_max(1) / (2 * lambda_)).to(g)


@torch.no_grad()
def move(params: list[Tensor], by: Tensor) -> None:
    """params += by, (K, P)."""
    torch._foreach_add_(params, unflatten(by, params))
    # Autocast caches half-precision copies of the leaves; they are stale now.
    torch.clear_autocast_cache()


@contextlib.contextmanager
def moving(params: list[Tensor]) -> Iterator[None]:
    """Inside, the parameters may move; afterwards they are where they were, bit for bit."""
    before = copies(params)
    # The optimizer may have stepped inside the same autocast.
    torch.clear_autocast_cache()
    try:
        yield
    finally:
        with torch.no_grad():
            torch._foreach_copy_(params, before)
        torch.clear_autocast_cache()
