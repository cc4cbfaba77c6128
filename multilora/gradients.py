"""Gradients of single particles inside stacked ones (K, ...): who has one, adding, clearing."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor


def without_gradient(stacked: Tensor) -> frozenset[int]:
    """The particles whose gradient is None, though their part of the stacked one is there.

    The stacked gradient itself knows them, for all who read it, until something else writes to it:
    then all particles have a gradient again.
    """
    who, version, particles = getattr(stacked, "_multilora_without", (0, 0, frozenset()))
    return particles if (who, version) == (id(stacked), stacked._version) else frozenset()


def note_without(stacked: Tensor, particles: frozenset[int]) -> None:
    """Say which particles have no gradient, until something else writes to the stacked one."""
    setattr(stacked, "_multilora_without", (id(stacked), stacked._version, particles))  # noqa: B010


def ranges(particles: Collection[int]) -> list[slice]:
    """Particles as slices of those that lie side by side, in ascending order."""
    found: list[slice] = []
    for k in sorted(particles):
        if found and found[-1].stop == k:
            found[-1] = slice(found[-1].start, k + 1)
        else:
            found.append(slice(k, k + 1))
    return found


@torch.no_grad()
def add_gradients(
    params: Sequence[Tensor], grads: Sequence[Tensor], particles: Collection[int]
) -> None:
    """p.grad += g for these particles alone; the gradients of all others stay, None included.

    params and grads are stacked tensors (K, ...).
    """
    parts, missing = ranges(particles), frozenset(range(len(params[0]))) - set(particles)
    into, added, after = [], [], []
    for p, g in zip(params, grads):
        without = missing if p.grad is None else without_gradient(p.grad) & missing
        if p.grad is None and not missing:
            p.grad = torch.empty_like(p, memory_format=torch.contiguous_format).copy_(g)
            continue
        if p.grad is None:
            p.grad = torch.zeros_like(p, memory_format=torch.contiguous_format)
        into += [p.grad[part] for part in parts]
        added += [g[part] for part in parts]
        after.append((p.grad, without))
    if into:
        torch._foreach_add_(into, added)
    for grad, without in after:
        note_without(grad, without)


@torch.no_grad()
def clear_gradients(params: Sequence[Tensor], particles: Collection[int]) -> None:
    """Make the gradients of these particles None; the gradients of all others stay.

    params are stacked tensors (K, ...).
    """
    parts, cleared, zeroed = ranges(particles), [], []
    for p in params:
        if p.grad is None:
            continue
        without = without_gradient(p.grad) | set(particles)
        if len(without) == len(p):
            p.grad = None
        else:
            zeroed += [p.grad[part] for part in parts]
            cleared.append((p.grad, without))
    if zeroed:
        torch._foreach_zero_(zeroed)
    for grad, without in cleared:
        note_without(grad, without)
