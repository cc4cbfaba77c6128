"""How a method runs its particles: all at once or a few at a time, in one process or in many."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from multilora import checks
from multilora.losses import NAMES, Loss, RowLoss, own_targets
from multilora.methods.parameters import check_wrapper, stacked_parameters, unwrap
from multilora.methods.tensors import gradients, zero_if_finite
from multilora.ops.common import accumulator
from multilora.parallel import Processes
from multilora.randomness import RandomState

Closure = Callable[[], tuple[Tensor, Any]]
#: () -> tensors (k, ...) of the particles that ran in the last call of the closure, such as
#: features that a hook of the model saw.
Taps = Callable[[], Sequence[Tensor]]

# How far a chunk's logits may be from those of its first run, relative to their norm: far above
# the rounding of kernels that run with a graph, far below the effect of other random numbers.
_REPLAYED = {torch.float64: 1e-9, torch.float32: 5e-3}
_REPLAYED_HALF = 5e-2


class Passes:
    """Forwards and backwards over this process's particles, `particle_chunk` at a time.

    K counts this process's particles, `total` those of all processes. Gradients come back as
    tensors (K, ...), the means over the data of all processes.

    `participants` are the particles that take part in the step: indices (k,) among the `total`, or
    None where all do. `take` selects them, `put` brings their results back to this process.
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
        """Keep nothing from one step to the next."""
        self.participants: Tensor | None = None
        self._loss: Loss = NAMES["particle"]
        self._graph: list[Tensor] = []
        self._predicted: list[Tensor] = []
        self._states: list[RandomState] = []
        self._compare = False
        self._inputs: list[tuple[tuple, dict[str, Any]]] = []

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
        """Run one step of the method.

        Args:
            interacts: whether the particles' predictions interact.
            compare: whether to check that processes along the particles have the same batch: equal
                targets and, where predictions interact, equal inputs of the model.
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
        # The inputs of a compiled model cannot be read here.
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
                values = self.losses(loss, logits, targets, part.stop - part.start)
                grads = _filled(grads, part, gradients(values.sum() * scale, params))
            losses.append(values.detach())
        return self.data_mean(torch.cat(losses)), self._data_means(grads)

    def predict(
        self, closure: Closure, loss: Loss = NAMES["particle"], taps: Taps = tuple
    ) -> tuple[list[Tensor], Any]:
        """The logits of the particles of all processes (total, ..., C) and then their taps
        (total, ...), as leaves; and the targets.

        This keeps what `pull_back` needs: the graph, or for chunks the random states."""
        self._loss, self._states, parts = loss, [], []
        if len(self._parts) == 1:
            parts.append(self._call_with_taps(closure, taps, self._parts[0]))
            self._graph = parts[0][0]
        else:
            for part in self._parts:
                self._states.append(RandomState({p.device for p in self._all_parameters()}))
                with torch.no_grad(), self._only(part):
                    parts.append(self._call_with_taps(closure, taps, part))
        outputs, targets, own = parts[-1]
        if len(parts) > 1:
            outputs = [torch.cat(each) for each in zip(*(outputs for outputs, _, _ in parts))]
            targets = torch.cat([targets for _, targets, _ in parts]) if own else targets
        targets = self.processes.gather(targets) if own else targets
        self._predicted = [self.processes.gather(t).detach().requires_grad_() for t in outputs]
        return self._predicted, targets

    def pull_back(
        self, closure: Closure, grads: Sequence[Tensor], taps: Taps = tuple
    ) -> list[Tensor]:
        """The gradients in the parameters, from those in `predict`'s leaves (total, ...)."""
        own = [self.processes.own(grad) for grad in grads]
        if self._graph:
            outputs, self._graph = self._graph, []
            return self._data_means(gradients(outputs, self.params, own))
        assert self._predicted, "pull_back follows predict"
        buffers = self._buffers()
        before = [self.processes.own(t.detach()) for t in self._predicted]
        for part, state in zip(self._parts, self._states):
            state.restore()
            with self._only(part) as params:
                outputs, _, _ = self._call_with_taps(closure, taps, part)
                for output, first in zip(outputs, before):
                    if output.shape != first[part].shape:
                        raise ValueError(
                            "the closure must return the same batch at each of its calls; got "
                            f"logits {tuple(output.shape)} after {tuple(first[part].shape)}"
                        )
                    self._require_replay(output.detach(), first[part])
                along = [grad[part] for grad in own]
                buffers = _filled(buffers, part, gradients(outputs, params, along))
        return self._data_means(buffers)

    def _call_with_taps(
        self, closure: Closure, taps: Taps, part: slice
    ) -> tuple[list[Tensor], Any, bool]:
        """As `_call`, with the taps after the logits."""
        logits, targets, own = self._call(closure, self._loss, part)
        if not _fits(logits, part):
            raise ValueError(_no_logits(logits, part))
        return [logits, *taps()], targets, own

    def _require_replay(self, logits: Tensor, before: Tensor) -> None:
        half = {p.dtype for p in self._all_parameters()} & {torch.float16, torch.bfloat16}
        if half or torch.is_autocast_enabled(logits.device.type):
            tolerance = _REPLAYED_HALF
        else:
            tolerance = _REPLAYED.get(logits.dtype, _REPLAYED_HALF)
        wide = torch.promote_types(logits.dtype, torch.float32)
        off = torch.linalg.vector_norm((logits - before).to(wide))
        # False where logits are not finite: `nonfinite` decides about such a particle.
        if off > tolerance * torch.linalg.vector_norm(before.to(wide)):
            raise RuntimeError(
                "a chunk of particles ran a second time, for its gradient, and had other logits "
                "than before: the closure must use one batch, and a module must not change with "
                "every call or draw random numbers from its own generator, which "
                "cannot be replayed (those of PyTorch, NumPy and Python are); use particle_chunk="
                "None, or a method whose particles run once (Ensemble, SVGD)"
            )

    def broken(self, losses: Tensor, grads: list[Tensor], interacts: bool) -> list[int]:
        """The participants whose losses (K,) or gradients (K, ...) are not finite; waits once.

        grads may be empty: only the losses are then looked at.
        """
        seen = [losses, zero_if_finite(grads)] if grads else [losses]
        # The one wait for the device: what follows is lists.
        finite = self.processes.all_true(torch.stack(seen, 1).isfinite()).tolist()
        particles = range(self.total) if self.participants is None else self.participants.tolist()
        # The divergence carries one particle's broken predictions into the gradients of all: then
        # only the losses tell which particle it is.
        by_loss = [k for k in particles if not finite[k][0]]
        if interacts and by_loss:
            return by_loss
        return [k for k in particles if not all(finite[k])]

    def leave_out(self, broken: list[int]) -> bool:
        """Take these particles out of the step. False where no other takes part."""
        before = range(self.total) if self.participants is None else self.participants.tolist()
        others = sorted(set(before) - set(broken))
        if others:
            self.participants = torch.tensor(others, device=self.params[0].device)
        return bool(others)

    def take(self, t: Tensor) -> Tensor:
        """(total, ...) -> (k, ...): the rows of the particles that take part."""
        return t if self.participants is None else t[self.participants]

    def gather(self, tensors: list[Tensor]) -> list[Tensor]:
        """(K, ...) of every process -> (k, ...): the particles that take part; no gradient."""
        return [self.take(t) for t in self.processes.gather_all(tensors)]

    def put(self, t: Tensor, fill: float = 0.0) -> Tensor:
        """(k, ...) -> (K, ...): this process's rows; `fill` for a particle that takes no part."""
        if self.participants is not None:
            everybody = t.new_full((self.total, *t.shape[1:]), fill)
            t = everybody.index_copy_(0, self.participants, t)
        return self.processes.own(t)

    def zero_skipped(self, tensors: list[Tensor]) -> list[Tensor]:
        """(K, ...) of this process, with zeros for the particles that take no part."""
        if self.participants is None:
            return tensors
        skipped = torch.ones(self.total, dtype=torch.bool, device=self.participants.device)
        skipped = self.processes.own(skipped.index_fill(0, self.participants, False))
        return [t.masked_fill(skipped.view(-1, *[1] * (t.ndim - 1)), 0) for t in tensors]

    def particle_mean(self, values: Tensor) -> Tensor:
        """The mean of values (K,) of every process over all particles that take part."""
        return self.take(self.processes.gather(values)).mean()

    def particle_means(self, tensors: list[Tensor]) -> list[Tensor]:
        """(K, ...) of every process -> (...): the means over all particles that take part.

        The others must be zero. Unlike `gather`, it never has the tensors of all processes.
        """
        part = 1.0 if self.participants is None else self.total / len(self.participants)
        means = [t.mean(0, dtype=accumulator(t.dtype)) * part for t in tensors]
        self.processes.mean_(means, "particle")
        return means

    def losses(self, loss: Loss, logits: Tensor, targets: Any, particles: int) -> Tensor:
        """loss(logits, targets) (particles,), weighted by this process's share of the data.

        The mean over the processes along the data is then the mean over all their data, where the
        loss has a `count` of what it is a mean over.
        """
        values = loss(logits, targets)
        if not isinstance(values, Tensor) or values.shape != (particles,):
            raise ValueError(
                f"loss(logits, targets) must return one value per particle, ({particles},); "
                f"got {_shown(values)}"
            )
        count = getattr(loss, "count", None)
        if self.processes.data_size == 1 or not callable(count):
            return values
        share = self.share_of_mean(count(logits, targets))
        return values * torch.as_tensor(share, dtype=values.dtype)

    def share_of_mean(self, count: Tensor) -> Tensor | float:
        """The weight of a mean over `count` examples: see `Processes.share_of_mean`."""
        return self.processes.share_of_mean(count)

    def data_mean(self, values: Tensor) -> Tensor:
        """The mean of `values` over the data of all processes, in their place."""
        self.processes.mean_([values])
        return values

    def log(self, stats: dict[str, Tensor]) -> dict[str, Tensor]:
        """The means of scalars over the data of all processes."""
        if self.processes.data_size == 1:
            return stats
        values = torch.stack([value.double() for value in stats.values()])
        self.processes.mean_([values])
        return {name: v.to(value.dtype) for (name, value), v in zip(stats.items(), values)}

    def normal(self, like: Tensor, generator: torch.Generator) -> Tensor:
        """Standard normal numbers of the shape of `like` (K, ...), one of this process's tensors.

        The noise of all particles is drawn on every process, so that the result does not depend on
        how they are spread.
        """
        noise = like.new_empty(self.total, *like.shape[1:]).normal_(generator=generator)
        return self.processes.own(noise)

    def _data_means(self, grads: list[Tensor]) -> list[Tensor]:
        self.processes.mean_(grads)
        return grads

    @contextlib.contextmanager
    def _only(self, part: slice) -> Iterator[list[Tensor]]:
        """Run some particles alone; gives their parameters."""
        if len(self._parts) == 1:
            yield self.params
            return
        with self.model.particles(part.start, part.stop):
            yield self.model.particle_parameters()

    def _call(self, closure: Closure, loss: Loss, part: slice) -> tuple[Tensor, Any, bool]:
        """closure() -> logits and targets of the particles that run, and whether the targets have
        a particle axis, a mini-batch for each particle."""
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
            self._require_one_batch(logits, targets, own)
        return logits, targets, own

    def _require_one_batch(self, logits: Tensor, targets: Any, own: bool) -> None:
        """Compare the batch among the processes along the particles, once a step."""
        # Where each particle has its own mini-batch, the processes' batches differ.
        batch = [] if own else tree_leaves((self._inputs, targets))
        self._compare, self._inputs = False, []
        self.processes.require_equal(
            [t for t in batch if isinstance(t, Tensor)],
            "particle",
            self.params[0].device,
            "processes that share the data need the same batch",
            (own, getattr(logits, "shape", ())[1:]),
        )

    def _all_parameters(self) -> Sequence[Tensor]:
        return list(self.model.parameters()) if hasattr(self.model, "parameters") else self.params

    def _buffers(self) -> list[Tensor]:
        """Room for the gradients of all chunks; none is needed for a single chunk.

        They are allocated first, so that long-lived gradients do not fragment the activations'
        memory.
        """
        if len(self._parts) == 1:
            return []
        return [torch.empty_like(p, requires_grad=False) for p in self.params]


def _fits(logits: Any, part: slice) -> bool:
    return isinstance(logits, Tensor) and logits.shape[:1] == (part.stop - part.start,)


def _no_logits(logits: Any, part: slice) -> str:
    k = part.stop - part.start
    return f"the closure must return logits (K, ..., C) with K = {k}; got logits {_shown(logits)}"


def _shown(value: Any) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__


def _filled(buffers: list[Tensor], part: slice, grads: list[Tensor]) -> list[Tensor]:
    """The gradients of all chunks after those of one; without buffers the one is all."""
    if not buffers:
        return grads
    torch._foreach_copy_([buffer[part] for buffer in buffers], grads)
    return buffers
