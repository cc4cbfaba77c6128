"""The call of the base model that is under way, as the layers inside it need to know it.

It belongs to the thread that makes it, so that several threads may call one model. A backward that
runs a checkpointed part of the model again has the call whose outputs it comes from.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn


class Call:
    """One call of the base by `owner`, a ParticleModel.

    particles: how many particles run in it, k.
    rows: k·B, of which the leading axis at every particle layer is a multiple; None where one
        particle, or none, runs on whatever it is given.
    batch: B where the inputs have B rows, to be repeated at the cut of a shared trunk; else None.
    part: a stacked parameter (K, ...) -> the tensor (k, ...) that runs in its place.
    frozen: the base runs without any particle.
    trunk: what a shared trunk keeps in this call, or takes from an earlier one.
    """

    def __init__(
        self,
        owner: nn.Module,
        particles: int,
        rows: int | None = None,
        batch: int | None = None,
        part: Callable[[Tensor], Tensor] | None = None,
        frozen: bool = False,
        trunk: Any = None,
    ):
        self.owner, self.particles, self.rows, self.batch = owner, particles, rows, batch
        self.part, self.frozen, self.trunk = part, frozen, trunk
        #: The particle layers that have run so far.
        self.ran: set[nn.Module] = set()

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        token = _current.set(self)
        try:
            yield
        finally:
            _current.reset(token)

    def mark(self, t: Tensor) -> Tensor:
        """Let the backward that passes through this output know its call."""
        if t.requires_grad and torch.is_grad_enabled():
            t.register_hook(functools.partial(_enter_backward, self))
        return t


_current: ContextVar[Call | None] = ContextVar("multilora_call", default=None)
# Of the backward that runs, by its number. Nodes of a later call run before those of an earlier
# one, so that everything up to the next mark belongs to this one. A plain global: a GPU's backward
# runs on a thread of autograd's own.
_of_backward: tuple[int, Callable[[], Call | None]] = (-1, lambda: None)


def current() -> Call | None:
    """The call under way; inside a backward, where a checkpoint runs a part of a forward again, the
    call that it was part of."""
    call = _current.get()
    if call is None and in_backward() and _of_backward[0] == torch._C._current_graph_task_id():
        return _of_backward[1]()
    return call


def in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _enter_backward(call: Call, grad: Tensor) -> None:
    global _of_backward
    _of_backward = (torch._C._current_graph_task_id(), weakref.ref(call))
