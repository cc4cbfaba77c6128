"""What all methods share: the closure's protocol, the task loss, gradients as one matrix."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from multilora.ops.common import IGNORE_INDEX, accumulator

Closure = Callable[[], tuple[Tensor, Tensor]]
Loss = str | Callable[[Tensor, Tensor], Tensor]


class Method:
    """A training method over K particles; its `backward(closure)` replaces `loss.backward()`.

    model: a ParticleModel, or any iterable of stacked tensors (K, ...) that require gradients.

    The user's loop keeps optimizer, scheduler, clipping and precision. The objective is the sum
    over particles of each one's own mean loss, so that K particles step as K separate runs would.
    """

    def __init__(self, model: Any):
        self.params = stacked_parameters(model)
        self.num_particles = self.params[0].shape[0]
        self.step = 0

    def backward(self, closure: Closure, scale: float | Tensor = 1.0) -> dict[str, Tensor]:
        """Add scale · (the method's direction) to every parameter's `.grad`.

        closure() -> (logits (K, ..., C), targets); it may be called twice, with other parameter
        values. Targets of shape (...) are shared by the particles; targets (K, ...) give every
        particle its own mini-batch. −100 is ignored; losses are means over valid targets.

        scale: 1/M for M accumulation steps; with a GradScaler, scaler.scale(torch.ones(())) on
        the parameters' device.

        -> detached scalars for logging, on the parameters' device. The parameters are left as they
        were, also when the closure raises.
        """
        raise NotImplementedError

    def parameters(self) -> list[Tensor]:
        """The method's own trainable tensors, to be given to the optimizer too; mostly none."""
        return []

    def state_dict(self) -> dict[str, Any]:
        """What resuming needs."""
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`. Raises ValueError where the keys are not this method's."""
        expected = self.state_dict().keys()
        if state.keys() != expected:
            raise ValueError(
                f"{type(self).__name__} state needs the keys {sorted(expected)}; "
                f"got {sorted(state)}"
            )
        self.step = int(state["step"])


def stacked_parameters(model: Any) -> list[Tensor]:
    """The trainable tensors (K, ...) of a ParticleModel or of an iterable of tensors."""
    if hasattr(model, "particle_parameters"):
        params = list(model.particle_parameters())
    elif isinstance(model, Iterable):
        params = list(model)
    else:
        raise TypeError(
            "a method needs a ParticleModel or an iterable of stacked tensors; "
            f"got {type(model).__name__}"
        )
    sizes = {tuple(p.shape[:1]) for p in params}
    if len(sizes) != 1 or () in sizes:
        raise ValueError(
            "a method needs stacked tensors (K, ...) with one K and at least one of them; "
            f"got shapes {[tuple(p.shape) for p in params[:4]]}"
        )
    return params


def require_different_particles(model: Any, params: list[Tensor], why: str) -> None:
    """Raise where all particles are equal: their interaction then has an exactly zero gradient."""
    tensors = list(params)
    for adapter in model.adapters() if hasattr(model, "adapters") else ():
        # Frozen factors tell particles apart too.
        tensors += [adapter.lora_A, adapter.lora_B]
    if params[0].shape[0] > 1 and all(bool((t == t[:1]).all()) for t in tensors):
        raise ValueError(
            f"all {params[0].shape[0]} particles are identical, so {why} has zero gradient and "
            "they stay identical; start them from different seeds"
        )


def call(closure: Closure, num_particles: int) -> tuple[Tensor, Tensor]:
    """closure() with its shapes checked and flattened: logits (K, N, C), targets (N,) or (K, N)."""
    logits, targets = closure()
    shapes = f"logits {tuple(logits.shape)}, targets {tuple(targets.shape)}"
    if logits.ndim < 3 or logits.shape[0] != num_particles:
        raise ValueError(
            f"the closure must return logits (K, ..., C) with K = {num_particles}; got {shapes}"
        )
    if targets.shape == logits.shape[1:-1]:
        targets = targets.reshape(-1)
    elif targets.shape == logits.shape[:-1]:
        targets = targets.flatten(1)
    else:
        raise ValueError(
            "the closure must return targets shaped as the logits without their class axis, with "
            f"the particle axis or without it; got {shapes}"
        )
    return logits.flatten(1, -2), targets


def task_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of every particle (K,): logits (K, N, C), targets (N,) or (K, N)."""
    logits = logits.to(accumulator(logits.dtype))
    targets = targets.expand(logits.shape[:2])
    nll = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    count = (targets != IGNORE_INDEX).sum(-1).clamp_min(1)
    return nll.view(targets.shape).sum(-1) / count


def particle_losses(closure: Closure, num_particles: int, loss: Loss) -> Tensor:
    """The closure's loss of every particle (K,): cross-entropy, or what a callable says."""
    if not callable(loss):
        return task_loss(*call(closure, num_particles))
    values = loss(*closure())
    if values.shape != (num_particles,):
        raise ValueError(
            f"loss(logits, targets) must return one value a particle, ({num_particles},); "
            f"got {tuple(values.shape)}"
        )
    return values


def gradients(total: Tensor, params: list[Tensor]) -> list[Tensor]:
    """The gradient of a scalar in every parameter, zeros where it does not depend on it."""
    grads = torch.autograd.grad(total, params, allow_unused=True)
    if any(g is None for g in grads) and _has_node(total, "CheckpointFunctionBackward"):
        raise RuntimeError(
            "reentrant activation checkpointing hides parameters from torch.autograd.grad, and "
            "their gradients would be zero; checkpoint with use_reentrant=False"
        )
    return [torch.zeros_like(p) if g is None else g for p, g in zip(params, grads)]


def flat_gradients(total: Tensor, params: list[Tensor]) -> Tensor:
    """The same as one matrix (K, P), a row a particle."""
    return flatten(gradients(total, params))


def _has_node(output: Tensor, name: str) -> bool:
    """Whether the graph of `output` holds a node of that name."""
    found, stack = set(), [output.grad_fn]
    while stack:
        node = stack.pop()
        if node is not None and node not in found:
            if node.name() == name:
                return True
            found.add(node)
            stack += [following for following, _ in node.next_functions]
    return False


def flatten(tensors: list[Tensor]) -> Tensor:
    """Stacked tensors (K, ...) -> (K, P)."""
    return torch.cat([t.reshape(t.shape[0], -1) for t in tensors], 1)


def unflatten(flat: Tensor, params: list[Tensor]) -> list[Tensor]:
    """(K, P) -> tensors shaped as `params`."""
    parts = flat.split([p[0].numel() for p in params], 1)
    return [part.reshape(p.shape) for part, p in zip(parts, params)]


@torch.no_grad()
def accumulate(params: list[Tensor], grads: list[Tensor]) -> None:
    """p.grad += g, as loss.backward() does it."""
    for p, g in zip(params, grads):
        if p.grad is None:
            p.grad = g.to(p.dtype, copy=True, memory_format=torch.contiguous_format)
        else:
            p.grad += g
