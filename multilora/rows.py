"""Rows that each belong to one particle: their order in the base, and the way back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from multilora.fold import Axis, Inputs, map_tensors


class Rows:
    """Which particle each of N rows belongs to. Inside the base, rows of one particle are together.

    Args:
        particle: integers (N,).
        batch: N, the number of rows of the inputs.
        particles: K.

    Raises:
        ValueError, TypeError: `particle` does not fit.
    """

    def __init__(self, particle: Tensor | Sequence[int], batch: int, particles: int):
        index = _indices(particle)
        if len(index) != batch:
            raise ValueError(
                f"particle must name one for each of the {batch} rows of the inputs; got "
                f"{len(index)}"
            )
        if unknown := sorted({k for k in index if not 0 <= k < particles}):
            raise ValueError(f"there are {particles} particles; particle has {unknown[:8]}")
        self.order = sorted(range(batch), key=index.__getitem__)
        self.is_sorted = self.order == list(range(batch))
        every = [0] * particles
        for k in index:
            every[k] += 1
        #: The particles that have rows, and how many each has.
        self.present = [k for k in range(particles) if every[k]]
        self.counts = tuple(every[k] for k in self.present)

    @property
    def unequal_counts(self) -> tuple[int, ...] | None:
        """The counts; None where all are equal, for which the layers have a faster way."""
        return None if len(set(self.counts)) == 1 else self.counts

    def part(self, particles: int) -> Callable[[Tensor], Tensor] | None:
        """A function to the stacked tensors of the particles that have rows; None where all do."""
        first, last = self.present[0], self.present[-1]
        if len(self.present) == particles:
            return None
        if last - first + 1 == len(self.present):
            return lambda p: p[first : last + 1]
        return lambda p: p[self.present]

    def sorted(self, inputs: Inputs) -> tuple[tuple, dict]:
        """The arguments with the rows of each particle together."""
        if self.is_sorted:
            return inputs.args, inputs.kwargs
        return inputs.some_rows(torch.tensor(self.order))

    def back(self, output: Any, axes: Sequence[Axis]) -> Any:
        """The output with its rows in the order of the inputs; some may have m rows for each."""
        if self.is_sorted:
            return output
        remaining, rows = iter(axes), len(self.order)
        place = torch.tensor(sorted(range(rows), key=self.order.__getitem__))

        def one(t: Tensor) -> Tensor:
            axis = next(remaining)
            if not isinstance(axis, int) or t.shape[axis] % rows:
                return t
            if t.shape[axis] == rows:
                return t.index_select(axis, place.to(t.device))
            apart = t.unflatten(axis, (rows, -1))
            return apart.index_select(axis, place.to(t.device)).flatten(axis, axis + 1)

        return map_tensors(one, output)


def _indices(particle: Tensor | Sequence[int]) -> list[int]:
    if isinstance(particle, Tensor):
        if particle.ndim != 1 or particle.dtype.is_floating_point or particle.dtype == torch.bool:
            raise TypeError(
                f"particle must be integers (N,); got {particle.dtype} {tuple(particle.shape)}"
            )
        return [int(k) for k in particle.tolist()]
    if isinstance(particle, (str, bytes)) or not isinstance(particle, Sequence):
        raise TypeError(f"particle must be integers (N,); got {particle!r}")
    if any(type(k) is not int for k in particle):
        raise TypeError(f"particle must be integers (N,); got {list(particle)[:8]}")
    return list(particle)
