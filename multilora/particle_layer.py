"""What all layers share that hold K particles, and how they read the rows of a batch.

Inside a particle model the particles ride on the batch axis, particle first: a layer sees
(K·B, ...) and reads it as (K, B, ...), or (N, ...) where the particles have other numbers of rows.
"""

import contextlib
import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from multilora import forward_state
from multilora.forward_state import ForwardState


class ParticleLayer(nn.Module):
    """A layer that holds tensors of K particles."""

    @property
    def num_particles(self) -> int:
        """K; inside `ParticleModel.particles`, the number of those particles."""
        raise NotImplementedError

    def stacked(self) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
        """(module, name in it, tensor) for everything with a particle axis."""
        for name, parameter in self._parameters.items():
            if parameter is not None:
                yield self, name, parameter

    def part(self, name: str, stacked: Tensor, particle: int) -> Tensor | None:
        """One particle's numbers in a tensor (K, ...) of `stacked()`, without padding.

        None where the particle has no adapter on this layer, or does not train this module.
        """
        return stacked[particle]

    def repeat_each(self) -> None:
        """Take what the layer knows of particle 0 for as many particles as its tensors now have."""

    @contextlib.contextmanager
    def narrowed(self, start: int, stop: int) -> Iterator[None]:
        """Inside, what the layer knows of each particle is of start … stop − 1 alone."""
        yield

    def enter(self) -> ForwardState | None:
        """Record that this layer runs, and return the state of the forward that it runs in.

        Returns:
            The state; None under torch.compile, in a backward, and for one particle alone.

        Raises:
            RuntimeError: several particles run outside of a forward, where each row would go to one
                of them.
        """
        if torch.compiler.is_compiling():
            forward_state.require_plain()
            return None
        state = forward_state.current()
        if state is not None:
            state.ran.add(self)
        elif self.num_particles > 1 and not forward_state.in_backward():
            raise RuntimeError(
                "a layer of several particles runs outside of model(...), where every row would go "
                "to one of them: use model.call(name, ...) for another method of the base, "
                "model.particle(k) for one particle, or `with model.base_only():` for none"
            )
        return state

    def require_rows(self, x: Tensor, state: ForwardState | None, particles: int) -> None:
        """Raise ValueError where the leading axis of x cannot be particles × batch.

        A length can fit by accident; the isolation check finds that.
        """
        unit = particles if state is None or state.rows is None else state.rows
        if state is not None and particles != state.particles:
            raise RuntimeError("another thread chose other particles in the middle of a forward")
        if x.shape[0] % max(unit, 1):
            raise ValueError(
                f"a particle layer needs an input whose leading axis is particles × batch, "
                f"a multiple of {unit} (K = {particles}); got {tuple(x.shape)}. Where layers put "
                'another axis first, use fold="loop".'
            )


def row_ends(n: int, state: ForwardState | None, particles: int) -> list[int]:
    """Where each particle's part of n leading rows ends (k,): equal parts, or those of the state.

    The n rows are m for each row of the batch, m >= 1, such as the windows of an image.
    """
    if state is None or state.counts is None:
        return [n // particles * (k + 1) for k in range(particles)]
    each = n // max(state.rows or 0, 1)
    return [end * each for end in itertools.accumulate(state.counts)]


def ends_on(n: int, state: ForwardState, device: torch.device) -> Tensor:
    """The same as int32 on a device, where it is copied once in a forward."""
    if (n, device) not in state.ends:
        ends = row_ends(n, state, state.particles)
        state.ends[n, device] = torch.tensor(ends, dtype=torch.int32, device=device)
    return state.ends[n, device]


def is_same_for_all(x: Tensor, state: ForwardState | None) -> bool:
    """Whether x is (1, ...), such as relative positions: one row for all particles' examples."""
    return state is not None and state.rows is not None and x.shape[0] == 1 != state.rows


class _ForEveryExample(Tensor):
    """Rows for all particles' examples, which a layer made from one row that all share.

    A model that knows of the one row repeats it for its batch, as DeBERTa does with relative
    positions. The rows are repeated already, so `repeat` leaves this axis alone. Reshaping and
    swapping axes keep the leading axis, and with it this type; any other result is a plain tensor.
    """

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            rows, name = args[0] if args else None, getattr(function, "__name__", "")
            if name == "repeat" and isinstance(rows, cls):
                counts = args[1] if len(args) == 2 and not isinstance(args[1], int) else args[1:]
                state = forward_state.current()
                if state is not None and counts[0] == state.rows:
                    return rows.as_subclass(Tensor).repeat(1, *counts[1:])
            result = function(*args, **(kwargs or {}))
            if name in _KEEP_ROWS and isinstance(result, Tensor):
                return result.as_subclass(cls)
            return _plain(result)


def as_every_example(rows: Tensor) -> Tensor:
    """Rows that were made for every example from one; see `_ForEveryExample`."""
    return rows.as_subclass(_ForEveryExample)


_KEEP_ROWS = {"view", "reshape", "permute", "transpose", "contiguous", "to"}


def _plain(result: Any) -> Any:
    return result.as_subclass(Tensor) if isinstance(result, _ForEveryExample) else result


def own(parameter: Tensor, state: ForwardState | None) -> Tensor:
    """The tensor (k, ...) of the particles that run."""
    return parameter if state is None or state.part is None else state.part(parameter)


def split(x: Tensor, particles: int) -> Tensor:
    """(k·B, ...) -> (k, B, ...)."""
    return x.view(particles, x.shape[0] // particles, *x.shape[1:])


def flat(x: Tensor, particles: int) -> Tensor:
    """(k·B, *, d) -> (k, T, d), with T the product of B and *, in one view to spare autograd."""
    length, *axes, d = x.shape
    return x.reshape(particles, length // particles * math.prod(axes), d)
