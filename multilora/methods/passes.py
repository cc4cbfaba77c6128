"""How a method runs its particles: all at once or a few at a time, here or in many processes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from multilora import checks
from multilora.losses import NAMES, Loss, RowLoss, own_targets
from multilora.methods.parameters import check_wrapper, stacked_parameters, unwrap
from multilora.parallel import Processes
from multilora.randomness import RandomState

Closure = Callable[[], tuple[Tensor, Any]]

# How far a chunk's logits may be from those of its first run, relative to their norm: far above
# what other kernels round differently with a graph, far below what other random numbers change.
_REPLAYED = {torch.float64: 1e-9, torch.float32: 5e-3}
_REPLAYED_HALF = 5e-2


class Passes:
    """Forwards and backwards over this process's particles, `particle_chunk` at a time.

    Gradients come back as tensors (K, ...), the means over the data of all processes.
    """

    def __init__(self, model: Any, particle_chunk: int | None):
        self.model, self._wrapper = unwrap(model)
        self.params = stacked_parameters(self.model)
        self.num_particles = self.params[0].shape[0]
        self.processes = getattr(self.model, "processes", None) or Processes()
        if self._wrapper is not None and self.processes.data is None:
            self.processes = Processes(self._wrapper.process_group, self.processes.particle)
        check_wrapper(self._wrapper, self.processes)
        self.total = self.num_particles * self.processes.particle_size
        self.chunk = chunk = self.num_particles if particle_chunk is None else particle_chunk
        checks.integer("particle_chunk", chunk, 1)
        if chunk < self.num_particles and not hasattr(self.model, "particles"):
            raise ValueError("particle_chunk needs a ParticleModel, which can run some particles")
        starts = range(0, self.num_particles, chunk)
        self._parts = [slice(i, min(i + chunk, self.num_particles)) for i in starts]
        self._forget()

    def _forget(self) -> None:
        """Nothing is kept from one step to the next."""
        self._loss: Loss | None = None
        self._graph: Tensor | None = None
        self._predicted: Tensor | None = None
        self._states: list[RandomState] = []
        self._compare, self._inputs = False, []

    def require_agreement(self, settings: dict[str, str]) -> None:
        """Raise RuntimeError, in all processes, where they were made for different runs."""
        device = self.params[0].device
        settings = settings | {
            "number of particles": str(self.total),
            "particle_chunk": str(self.chunk),
            "tensors": str([(tuple(p.shape), p.dtype) for p in self.params]),
        }
        seeds = {"seeds of the particles": str(getattr(self.model, "seeds", None))}
        self.processes.require_same(settings, "data", device)
        self.processes.require_same(settings | seeds, "particle", device)
        self.processes.require_equal(
            self.params,
            "data",
            device,
            "the particles must start equal in all processes that hold them",
        )

    @contextlib.contextmanager
    def running(self, interacts: bool, compare: bool = False) -> Iterator[None]:
        """One step of the method.

        compare: whether to see to it that processes along the particles have one batch: equal
        targets and, where the particles' predictions interact, equal inputs of the model.
        """
        self._compare = compare and self.processes.particle_size > 1
        with contextlib.ExitStack() as stack:
            stack.callback(self._forget)
            if self._wrapper is not None:
                # Gradients are averaged here; the wrapper waits for hooks that do not run.
                stack.enter_context(self._wrapper.no_sync())
            if self._compare and interacts:
                hook = self.model.register_forward_pre_hook(self._note_inputs, with_kwargs=True)
                stack.callback(hook.remove)
            yield

    def _note_inputs(self, _module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        # A compiled model's inputs are not looked at.
        if self._compare and not kwargs.get("per_particle") and not torch.compiler.is_compiling():
            self._inputs.append((args, kwargs))

    def separate(
        self, closure: Closure, loss: Loss, scale: float | Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        """The loss of every particle (K,) and the gradients of scale · their sum."""
        losses, grads = [], self._buffers()
        for part in self._parts:
            with self._only(part) as params:
                logits, targets, _ = self._call(closure, loss, part)
                values = self.means(loss, logits, targets, part.stop - part.start)
                grads = _filled(grads, part, gradients(values.sum() * scale, params))
            losses.append(values.detach())
        return self.mean(torch.cat(losses)), self._mean_all(grads)

    def predict(self, closure: Closure, loss: Loss = NAMES["particle"]) -> tuple[Tensor, Any]:
        """-> the logits (K, ..., C) of all processes' particles, a leaf of its own, and targets.

        What `pull_back` needs is kept: the graph, or for chunks the random state."""
        self._loss, self._states, parts = loss, [], []
        if len(self._parts) == 1:
            parts.append(self._call(closure, loss, self._parts[0]))
            self._graph = parts[0][0]
        else:
            for part in self._parts:
                self._states.append(RandomState({p.device for p in self._all_parameters()}))
                with torch.no_grad(), self._only(part):
                    parts.append(self._call(closure, loss, part))
        for part, (logits, _, _) in zip(self._parts, parts):
            if not _fits(logits, part):
                raise ValueError(_no_logits(logits, part))
        logits, targets, own = parts[-1]
        if len(parts) > 1:
            logits = torch.cat([logits for logits, _, _ in parts])
            targets = torch.cat([targets for _, targets, _ in parts]) if own else targets
        targets = self.processes.gather(targets) if own else targets
        self._predicted = self.processes.gather(logits).detach().requires_grad_()
        return self._predicted, targets

    def pull_back(self, closure: Closure, grad: Tensor) -> list[Tensor]:
        """The gradients in the parameters, from the gradient (K, ..., C) in `predict`'s logits."""
        own = self.processes.own(grad)
        if self._graph is not None:
            logits, self._graph = self._graph, None
            return self._mean_all(gradients(logits, self.params, own))
        grads, before = self._buffers(), self.processes.own(self._predicted.detach())
        for part, state in zip(self._parts, self._states):
            state.restore()
            with self._only(part) as params:
                logits, _, _ = self._call(closure, self._loss, part)
                if logits.shape != own[part].shape:
                    raise ValueError(
                        "the closure must return the same batch at each of its calls; got logits "
                        f"{tuple(logits.shape)} after {tuple(own[part].shape)}"
                    )
                self._require_replay(logits.detach(), before[part])
                grads = _filled(grads, part, gradients(logits, params, own[part]))
        return self._mean_all(grads)

    def _require_replay(self, logits: Tensor, before: Tensor) -> None:
        half = {p.dtype for p in self._all_parameters()} & {torch.float16, torch.bfloat16}
        if half or torch.is_autocast_enabled(logits.device.type):
            tolerance = _REPLAYED_HALF
        else:
            tolerance = _REPLAYED.get(logits.dtype, _REPLAYED_HALF)
        wide = torch.promote_types(logits.dtype, torch.float32)
        off = torch.linalg.vector_norm((logits - before).to(wide))
        # False for logits that are not finite, whose particle `nonfinite` is about.
        if off > tolerance * torch.linalg.vector_norm(before.to(wide)):
            raise RuntimeError(
                "a chunk of particles ran a second time, for its gradient, and had other logits "
                "than before: the closure must use one batch, and a module must not change with "
                "every call or draw random numbers from a generator of its own, which "
                "cannot be replayed (those of PyTorch, NumPy and Python are); use particle_chunk="
                "None, or a method whose particles run once (Ensemble, SVGD)"
            )

    def means(self, loss: Loss, logits: Tensor, targets: Any, particles: int) -> Tensor:
        """loss(logits, targets) (K,), such that the mean over the processes along the data is the
        mean over all their data, where the loss has a `count` of what it is a mean over."""
        values = loss(logits, targets)
        if not isinstance(values, Tensor) or values.shape != (particles,):
            raise ValueError(
                f"loss(logits, targets) must return one value a particle, ({particles},); "
                f"got {_shown(values)}"
            )
        count = getattr(loss, "count", None)
        if self.processes.data_size == 1 or not callable(count):
            return values
        return values * self.processes.share_of_mean(count(logits, targets)).to(values.dtype)

    def mean(self, values: Tensor) -> Tensor:
        """The mean of `values` over the data of all processes."""
        self.processes.mean_([values])
        return values

    def log(self, stats: dict[str, Tensor]) -> dict[str, Tensor]:
        """Scalars as they are over the data of all processes."""
        if self.processes.data_size == 1:
            return stats
        values = torch.stack([value.double() for value in stats.values()])
        self.processes.mean_([values])
        return {name: v.to(value.dtype) for (name, value), v in zip(stats.items(), values)}

    @contextlib.contextmanager
    def _only(self, part: slice) -> Iterator[list[Tensor]]:
        """Run some particles alone -> their parameters."""
        if len(self._parts) == 1:
            yield self.params
            return
        with self.model.particles(part.start, part.stop):
            yield self.model.particle_parameters()

    def _call(self, closure: Closure, loss: Loss, part: slice) -> tuple[Tensor, Any, bool]:
        """closure() -> logits and targets of the k particles that run, and whether the targets are
        (k, ...), a mini-batch for each."""
        logits, targets = closure()
        rows = isinstance(loss, RowLoss)
        if rows and not (_fits(logits, part) and isinstance(targets, Tensor)):
            raise ValueError(f"{_no_logits(logits, part)}, targets {_shown(targets)}")
        own = False
        if rows or len(self._parts) > 1 or self.processes.particle_size > 1:
            own = own_targets(loss, logits, targets, self.num_particles)
        if own and len(targets) == self.num_particles:
            targets = targets[part]
        if self._compare:
            # Each process has other mini-batches then.
            batch = [] if own else tree_leaves((self._inputs, targets))
            self._compare, self._inputs = False, []
            self.processes.require_equal(
                [t for t in batch if isinstance(t, Tensor)],
                "particle",
                self.params[0].device,
                "processes that share the data need the same batch",
                (own, getattr(logits, "shape", ())[1:]),
            )
        return logits, targets, own

    def _all_parameters(self) -> Any:
        return self.model.parameters() if hasattr(self.model, "parameters") else self.params

    def _buffers(self) -> list[Tensor] | None:
        """Room for the gradients of all chunks, made before the first runs: memory that stays would
        otherwise lie between activations that go."""
        if len(self._parts) == 1:
            return None
        return [torch.empty_like(p, requires_grad=False) for p in self.params]

    def _mean_all(self, grads: list[Tensor]) -> list[Tensor]:
        self.processes.mean_(grads)
        return grads


def _fits(logits: Any, part: slice) -> bool:
    return isinstance(logits, Tensor) and logits.shape[:1] == (part.stop - part.start,)


def _no_logits(logits: Any, part: slice) -> str:
    k = part.stop - part.start
    return f"the closure must return logits (K, ..., C) with K = {k}; got logits {_shown(logits)}"


def _shown(value: Any) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__


def gradients(
    output: Tensor, params: list[Tensor], grad_output: Tensor | None = None
) -> list[Tensor]:
    """The gradient of a scalar, or of ⟨output, grad_output⟩, in every parameter; zeros where it
    does not depend on it. Raises RuntimeError where it depends on none."""
    grads = [None] * len(params)
    if output.requires_grad:
        grads = torch.autograd.grad(output, params, grad_output, allow_unused=True)
    if any(g is None for g in grads) and _has_node(output, "CheckpointFunctionBackward"):
        raise RuntimeError(
            "reentrant activation checkpointing hides parameters from torch.autograd.grad, and "
            "their gradients would be zero; checkpoint with use_reentrant=False"
        )
    if all(g is None for g in grads):
        raise RuntimeError(
            "the closure's loss does not depend on any of the method's parameters, so nothing "
            "would be trained: it must run the model that the method was made for, not a copy of "
            "it, with gradients enabled and without detaching the logits"
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
