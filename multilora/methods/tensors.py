"""Arithmetic on stacked tensors (K, ...): gradients, flat views, copies, accumulation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# How many tensors `zero_if_finite` puts together at a time.
_TOGETHER = 64


def flatten(tensors: list[Tensor]) -> Tensor:
    """Stacked tensors (K, ...) -> (K, P)."""
    return torch.cat([t.reshape(t.shape[0], -1) for t in tensors], 1)


def unflatten(flat: Tensor, like: list[Tensor]) -> list[Tensor]:
    """(k, P) -> tensors (k, ...), where `like` are (K, ...): k may be another number than K."""
    parts = flat.split([t[0].numel() for t in like], 1)
    return [part.reshape(-1, *t.shape[1:]) for part, t in zip(parts, like)]


@torch.no_grad()
def copies(tensors: list[Tensor]) -> list[Tensor]:
    """Detached, contiguous copies."""
    out = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in tensors]
    torch._foreach_copy_(out, tensors)
    return out


@torch.no_grad()
def accumulate(params: list[Tensor], grads: list[Tensor]) -> None:
    """p.grad += g, as loss.backward() does it."""
    added = [(p.grad, g) for p, g in zip(params, grads) if p.grad is not None]
    fresh = [(p, g) for p, g in zip(params, grads) if p.grad is None]
    if added:
        torch._foreach_add_([grad for grad, _ in added], [g for _, g in added])
    if fresh:
        new = [torch.empty_like(p, memory_format=torch.contiguous_format) for p, _ in fresh]
        torch._foreach_copy_(new, [g for _, g in fresh])
        for (p, _), grad in zip(fresh, new):
            p.grad = grad


def sums(some: Sequence[Tensor | None], others: Sequence[Tensor | None]) -> list[Tensor | None]:
    """a + b for each pair; the other one where one is None."""
    both = [i for i, (a, b) in enumerate(zip(some, others)) if a is not None and b is not None]
    found = [b if a is None else a for a, b in zip(some, others)]
    pairs: Any = [(some[i], others[i]) for i in both]
    if pairs:
        for i, total in zip(both, torch._foreach_add(*map(list, zip(*pairs)))):
            found[i] = total
    return found


def zero_if_finite(tensors: list[Tensor]) -> Tensor:
    """(K,): 0 for a particle whose numbers are all finite, else NaN; stacked tensors (K, ...).

    Some tensors go at a time: one operation for each of them would be most of a small step's, and
    copies of all of them would take the memory of the gradients once more.
    """
    parts = [tensors[i : i + _TOGETHER] for i in range(0, len(tensors), _TOGETHER)]
    return torch.stack([flatten(part).mul_(0).sum(1) for part in parts]).sum(0)


def gradients(
    output: Tensor | Sequence[Tensor],
    params: list[Tensor],
    grad_output: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """∂output/∂p, or ∂Σ⟨output, grad_output⟩/∂p, for every parameter p; contiguous.

    Args:
        output: a scalar, or tensors of any shapes with a `grad_output` of each.

    Returns:
        One tensor per parameter, zeros where the output does not depend on it.

    Raises:
        RuntimeError: if the output depends on no parameter, or if reentrant activation
            checkpointing hides some.
    """
    grads = used_gradients(output, params, grad_output)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(params, grads)]


def used_gradients(
    output: Tensor | Sequence[Tensor],
    params: list[Tensor],
    grad_output: Sequence[Tensor] | None = None,
) -> list[Tensor | None]:
    """`gradients`, with None for the parameters that the output does not depend on."""
    outputs = [output] if isinstance(output, Tensor) else output
    along = [None] * len(outputs) if grad_output is None else grad_output
    depending = [(o, g) for o, g in zip(outputs, along) if o.requires_grad]
    grads: tuple[Tensor | None, ...] = (None,) * len(params)
    if depending:
        of, by = zip(*depending)
        grads = torch.autograd.grad(of, params, by, allow_unused=True)
    if any(g is None for g in grads) and _has_node(outputs, "CheckpointFunctionBackward"):
        raise RuntimeError(
            "reentrant activation checkpointing hides parameters from torch.autograd.grad, and "
            "their gradients would be zero; checkpoint with use_reentrant=False"
        )
    if all(g is None for g in grads):
        raise RuntimeError(
            "the loss does not depend on any of the method's parameters, so nothing "
            "would be trained: it must run the model that the method was made for, not a copy of "
            "it, with gradients enabled and without detaching the logits"
        )
    return [None if g is None else g.contiguous() for g in grads]


def _has_node(outputs: Sequence[Tensor], name: str) -> bool:
    """Whether the graph of some output holds a node of that name."""
    found, stack = set(), [output.grad_fn for output in outputs]
    while stack:
        node = stack.pop()
        if node is not None and node not in found:
            if node.name() == name:
                return True
            found.add(node)
            stack += [following for following, _ in node.next_functions]
    return False
