"""How a method runs its particles: all at once or a few at a time, here or in many processes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from multilora.ops.common import IGNORE_INDEX, accumulator
from multilora.parallel import Ranks
from multilora.randomness import RandomState

Closure = Callable[[], tuple[Tensor, Tensor]]
Loss = str | Callable[[Tensor, Tensor], Tensor]


class Passes:
    """Forwards and backwards over this process's particles, `particle_chunk` at a time.

    Gradients come back as tensors (K, ...), the means over the data of all processes.
    """

    def __init__(self, model: Any, particle_chunk: int | None):
        self.model, self._wrapper = _unwrap(model)
        self.params = stacked_parameters(self.model)
        self.num_particles = self.params[0].shape[0]
        self.devices = list({p.device: None for p in self.params})
        if hasattr(self.model, "devices"):
            self.devices = self.model.devices()
        self.ranks = getattr(self.model, "ranks", None) or Ranks()
        if self._wrapper is not None and self.ranks.data is None:
            self.ranks = Ranks(self._wrapper.process_group, self.ranks.particle)
        self._check_wrapper()
        self.total = self.num_particles * self.ranks.particle_size
        self.chunk = chunk = self.num_particles if particle_chunk is None else particle_chunk
        if type(chunk) is not int or chunk < 1:
            raise ValueError(f"particle_chunk must be an integer >= 1; got {particle_chunk!r}")
        if chunk < self.num_particles and not hasattr(self.model, "particles"):
            raise ValueError("particle_chunk needs a ParticleModel, which can run some particles")
        starts = range(0, self.num_particles, chunk)
        self._parts = [slice(i, min(i + chunk, self.num_particles)) for i in starts]
        self._graph: Tensor | None = None
        self._states: list[Any] = []
        self._batch_checked = False
        self.ranks.require_equal(
            self.params, "data", "the particles must start equal in all processes that hold them"
        )

    def _check_wrapper(self) -> None:
        """DistributedDataParallel makes its processes equal: they must not hold other particles."""
        if self._wrapper is None or self.ranks.particle_size == 1:
            return
        copies = dist.get_process_group_ranks(self._wrapper.process_group)
        others = dist.get_process_group_ranks(self.ranks.particle)
        if len(set(copies) & set(others)) > 1:
            raise ValueError(
                f"DistributedDataParallel over the processes {copies} has given them all the "
                f"particles of one, and {others} hold different ones: use it without, as the "
                "method averages by itself"
            )

    @contextlib.contextmanager
    def running(self, repeats: bool) -> Iterator[None]:
        """One step of the method; repeats: whether it calls the closure more than once."""
        with contextlib.ExitStack() as stack:
            if self._wrapper is not None:
                # Gradients are averaged here; the wrapper waits for hooks that do not run.
                stack.enter_context(self._wrapper.no_sync())
            try:
                yield
            finally:
                self._graph, self._states = None, []

    def separate(
        self, closure: Closure, loss: Loss, scale: float | Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        """The loss of every particle (K,) and the gradients of scale · their sum.

        loss: "particle", the cross-entropy, or a callable (logits, targets) -> one a particle.
        """
        losses, grads = [], self._buffers()
        for part in self._parts:
            with self._only(part) as params:
                values = self._losses(closure, loss, part)
                grads = _filled(grads, part, gradients(values.sum() * scale, params))
            losses.append(values.detach())
        return self.mean(torch.cat(losses)), self._mean_all(grads)

    def predict(self, closure: Closure) -> tuple[Tensor, Tensor]:
        """-> the logits (K, N, C) of all processes' particles, a leaf of its own, and targets (N,)
        or (K, N). What `pull_back` needs is kept: the graph, or for chunks the random state."""
        if len(self._parts) == 1:
            logits, targets = self._call(closure, self._parts[0])
            self._graph = logits
        else:
            self._states, parts = [], []
            for part in self._parts:
                self._states.append(RandomState(self.devices))
                with torch.no_grad(), self._only(part):
                    logits, targets = self._call(closure, part)
                parts.append((logits, targets))
            logits = torch.cat([logits for logits, _ in parts])
            if targets.ndim == 2:
                targets = torch.cat([targets for _, targets in parts])
        if targets.ndim == 2:
            targets = self.ranks.gather(targets)
        return self.ranks.gather(logits).detach().requires_grad_(), targets

    def pull_back(self, closure: Closure, grad: Tensor) -> list[Tensor]:
        """The gradients in the parameters, from the gradient (K, N, C) in `predict`'s logits."""
        own = self.ranks.own(grad)
        if self._graph is not None:
            logits, self._graph = self._graph, None
            return self._mean_all(gradients(logits, self.params, own))
        grads = self._buffers()
        for part, state in zip(self._parts, self._states):
            state.restore()
            with self._only(part) as params:
                logits, _ = self._call(closure, part)
                if logits.shape != own[part].shape:
                    raise ValueError(
                        "the closure must return the same batch at each of its calls; got logits "
                        f"{tuple(logits.shape)} after {tuple(own[part].shape)}"
                    )
                grads = _filled(grads, part, gradients(logits, params, own[part]))
        return self._mean_all(grads)

    def weight(self, targets: Tensor) -> Tensor | float:
        """Brings means over this process's valid targets to those over all processes' data: their
        mean over the processes, times this, is the mean over everything."""
        return self.ranks.share_of_mean((targets != IGNORE_INDEX).sum(-1))

    def mean(self, values: Tensor) -> Tensor:
        """The mean of `values` over the data of all processes."""
        self.ranks.mean_([values])
        return values

    def log(self, stats: dict[str, Tensor]) -> dict[str, Tensor]:
        """Scalars as they are over the data of all processes."""
        if self.ranks.data_size == 1:
            return stats
        values = torch.stack([value.double() for value in stats.values()])
        self.ranks.mean_([values])
        return {name: v.to(value.dtype) for (name, value), v in zip(stats.items(), values)}

    @contextlib.contextmanager
    def _only(self, part: slice) -> Iterator[list[Tensor]]:
        """Run some particles alone -> their parameters."""
        if len(self._parts) == 1:
            yield self.params
            return
        with self.model.particles(part.start, part.stop):
            yield self.model.particle_parameters()

    def _call(self, closure: Closure, part: slice) -> tuple[Tensor, Tensor]:
        """closure() with its shapes checked and flattened: logits (k, N, C), targets (N,) or (k, N)
        of the k particles that run."""
        logits, targets = closure()
        particles = part.stop - part.start
        shapes = f"logits {tuple(logits.shape)}, targets {tuple(targets.shape)}"
        if logits.ndim < 3 or logits.shape[0] != particles:
            raise ValueError(
                f"the closure must return logits (K, ..., C) with K = {particles}; got {shapes}"
            )
        if len(self._parts) > 1:
            targets = self._own_targets(logits, targets, part)
        if targets.shape == logits.shape[1:-1]:
            targets = targets.reshape(-1)
        elif targets.shape == logits.shape[:-1]:
            targets = targets.flatten(1)
        else:
            raise ValueError(
                "the closure must return targets shaped as the logits without their class axis, "
                f"with the particle axis or without it; got {shapes}"
            )
        if not self._batch_checked and targets.ndim == 1:
            self._batch_checked = True
            self.ranks.require_equal(
                [targets], "particle", "processes that share the data need the same batch"
            )
        return logits.flatten(1, -2), targets

    def _own_targets(self, logits: Tensor, targets: Tensor, part: slice) -> Tensor:
        """The targets of the particles that run, where each has its own."""
        if targets.shape == (self.num_particles, *logits.shape[1:-1]):
            return targets[part]
        return targets

    def _losses(self, closure: Closure, loss: Loss, part: slice) -> Tensor:
        if not callable(loss):
            logits, targets = self._call(closure, part)
            return task_loss(logits, targets) * self.weight(targets)
        logits, targets = closure()
        if len(self._parts) > 1 and isinstance(targets, Tensor):
            targets = self._own_targets(logits, targets, part)
        values = loss(logits, targets)
        if values.shape != (part.stop - part.start,):
            raise ValueError(
                f"loss(logits, targets) must return one value a particle, "
                f"({part.stop - part.start},); got {tuple(values.shape)}"
            )
        return values

    def _buffers(self) -> list[Tensor] | None:
        """Room for the gradients of all chunks, made before the first runs: memory that stays would
        otherwise lie between activations that go."""
        if len(self._parts) == 1:
            return None
        return [torch.empty_like(p, requires_grad=False) for p in self.params]

    def _mean_all(self, grads: list[Tensor]) -> list[Tensor]:
        self.ranks.mean_(grads)
        return grads


def _unwrap(model: Any) -> tuple[Any, DistributedDataParallel | None]:
    """The model inside torch.compile and DistributedDataParallel, and the latter."""
    wrapper = None
    while True:
        if isinstance(model, DistributedDataParallel):
            model, wrapper = model.module, model
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod
        else:
            return model, wrapper


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
    if any(hasattr(p, "placements") for p in params):
        raise TypeError(
            "a method needs whole tensors, and some are DTensors, sharded by FSDP2 or a tensor "
            "parallel plan: leave the trainable ones out, fully_shard(module, "
            "ignored_params=set(model.particle_parameters()))"
        )
    sizes = {tuple(p.shape[:1]) for p in params}
    if len(sizes) != 1 or () in sizes:
        raise ValueError(
            "a method needs stacked tensors (K, ...) with one K and at least one of them; "
            f"got shapes {[tuple(p.shape) for p in params[:4]]}"
        )
    return params


def task_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of every particle (K,): logits (K, N, C), targets (N,) or (K, N)."""
    logits = logits.to(accumulator(logits.dtype))
    targets = targets.expand(logits.shape[:2])
    nll = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    count = (targets != IGNORE_INDEX).sum(-1).clamp_min(1)
    return nll.view(targets.shape).sum(-1) / count


def gradients(
    output: Tensor, params: list[Tensor], grad_output: Tensor | None = None
) -> list[Tensor]:
    """The gradient of a scalar, or of ⟨output, grad_output⟩, in every parameter; zeros where it
    does not depend on it."""
    grads = torch.autograd.grad(output, params, grad_output, allow_unused=True)
    if any(g is None for g in grads) and _has_node(output, "CheckpointFunctionBackward"):
        raise RuntimeError(
            "reentrant activation checkpointing hides parameters from torch.autograd.grad, and "
            "their gradients would be zero; checkpoint with use_reentrant=False"
        )
    return [torch.zeros_like(p) if g is None else g.contiguous() for p, g in zip(params, grads)]


def _filled(buffers: list[Tensor] | None, part: slice, grads: list[Tensor]) -> list[Tensor]:
    """The gradients of all chunks, with those of one."""
    if buffers is None:
        return grads
    torch._foreach_copy_([buffer[part] for buffer in buffers], grads)
    return buffers


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
