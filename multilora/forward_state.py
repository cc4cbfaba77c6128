"""The state of a forward of the base model, as the layers inside it need to know it.

It belongs to the thread that runs the forward, so that several threads may call one model. A
backward that runs a checkpointed part of the model again sees the state of the forward that its
outputs come from.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn


class ForwardState:
    """The state of one forward of the base, or of one call of another of its methods.

    Args:
        owner: the ParticleModel that runs it; None in the isolation check.
        particles: k, how many particles run in it.
        rows: k·B, of which the leading axis at every particle layer is a multiple. None where one
            particle, or none, runs on whatever it is given.
        counts: how many of the rows each of the k particles has, in their order; None where all
            have B.
        which: the places of these k particles in stacked tensors (K, ...), where rows belong to
            particles of their own.
        shared_batch: B where the inputs have B rows, to be repeated at the cut of a shared trunk;
            else None.
        part: a stacked parameter (K, ...) -> the tensor (k, ...) that runs in its place.
        frozen: whether the base runs without any particle.
        trunk: the TrunkOutput that this forward fills, or starts from.
    """

    def __init__(
        self,
        owner: nn.Module | None,
        particles: int,
        rows: int | None = None,
        shared_batch: int | None = None,
        part: Callable[[Tensor], Tensor] | None = None,
        frozen: bool = False,
        trunk: Any = None,
        counts: tuple[int, ...] | None = None,
        which: Sequence[int] = (),
    ):
        self.owner, self.particles, self.rows = owner, particles, rows
        self.shared_batch, self.part = shared_batch, part
        self.frozen, self.trunk, self.counts, self.which = frozen, trunk, counts, which
        #: Where the particles' rows end among n, for n and a device: see `ends_on`.
        self.ends: dict[tuple[int, torch.device], Tensor] = {}
        #: What layers keep for the rest of this forward, by keys of their own.
        self.kept: dict[Any, Any] = {}
        #: The particle layers that have run so far.
        self.ran: set[nn.Module] = set()

    @property
    def is_special(self) -> bool:
        """Whether anything but all particles on equal parts of the rows runs."""
        return self.frozen or self.part is not None or self.counts is not None

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Inside, this is the current state."""
        token = _current.set(self)
        _count(self.is_special)
        try:
            yield
        finally:
            _count(-self.is_special)
            _current.reset(token)

    def mark(self, t: Tensor) -> Tensor:
        """Make this state current again in the backward that passes through the output t."""
        if t.requires_grad and torch.is_grad_enabled():
            t.register_hook(functools.partial(_enter_backward, self))
        return t


# How many special states are current, in all threads.
special = 0
_counting = threading.Lock()


def _count(more: int) -> None:
    global special
    if more:
        with _counting:
            special += more


def require_plain() -> None:
    """For layers inside torch.compile, which do not see the state: raise where it is special.

    Compiled code is guarded on the number of special states, so it comes here again when that
    changes.

    Raises:
        NotImplementedError: it is this thread's.
    """
    if special:
        # An error that torch.compile sees makes it run what is around the layer without it. It
        # does not look behind a break.
        torch._dynamo.graph_break()
        _refuse_special()


def _refuse_special() -> None:
    state = _current.get()
    if state is not None and state.is_special:
        raise NotImplementedError(
            "base_only, model.particle(k) and rows for particles of their own do not run in "
            "torch.compile"
        )


_current: ContextVar[ForwardState | None] = ContextVar("multilora_forward", default=None)
# The number of the backward that runs, and the state of the forward whose outputs it has reached.
# Nodes of a later forward run before those of an earlier one, so everything up to the next marked
# output belongs to this one. A plain global, because a GPU's backward runs on autograd's own
# thread.
_of_backward: tuple[int, Callable[[], ForwardState | None]] = (-1, lambda: None)


def current() -> ForwardState | None:
    """The state of the forward that runs; in a backward that runs a part of a forward again, the
    state of that forward."""
    state = _current.get()
    if state is None and in_backward() and _of_backward[0] == torch._C._current_graph_task_id():
        return _of_backward[1]()
    return state


def in_backward() -> bool:
    """Whether this thread runs a backward."""
    return torch._C._current_graph_task_id() != -1


def _enter_backward(state: ForwardState, grad: Tensor) -> None:
    global _of_backward
    _of_backward = (torch._C._current_graph_task_id(), weakref.ref(state))
