"""The processes that share a particle model: some of the data each, some of the particles each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

AXES = ("data", "particle")
_Items = TypeVar("_Items", Sequence[Any], Tensor)


class Ranks:
    """This process's place among those along the data and those along the particles.

    Without groups it is alone, and every operation is the identity.
    """

    def __init__(
        self, data: dist.ProcessGroup | None = None, particle: dist.ProcessGroup | None = None
    ):
        self.data, self.particle = data, particle
        self.data_size = 1 if data is None else data.size()
        self.particle_size = 1 if particle is None else particle.size()
        self.particle_rank = 0 if particle is None else particle.rank()

    def __deepcopy__(self, memo: dict) -> Ranks:
        return self

    @staticmethod
    def of_mesh(mesh: DeviceMesh | None) -> Ranks:
        """Raises ValueError for a mesh with other axes than "data" and "particle"."""
        if mesh is None:
            return Ranks()
        names = mesh.mesh_dim_names or ()
        if not names or set(names) - set(AXES):
            raise ValueError(
                f"mesh needs axes named {AXES}, one of them or both (init_device_mesh(..., "
                f"mesh_dim_names=...)); got {names or 'no names'}"
            )
        groups = {name: mesh[name].get_group() for name in names}
        return Ranks(groups.get("data"), groups.get("particle"))

    def own(self, items: _Items) -> _Items:
        """This process's share of what has one entry, or row, a particle."""
        share, rest = divmod(len(items), self.particle_size)
        if rest or not share:
            raise ValueError(
                f"{len(items)} particles cannot be shared equally by {self.particle_size} processes"
            )
        return items[self.particle_rank * share : (self.particle_rank + 1) * share]

    def gather(self, t: Tensor) -> Tensor:
        """(K/P, ...) -> (K, ...), the particles of all processes in their order; no gradient."""
        if self.particle_size == 1:
            return t.detach()
        return _gather(t, self.particle).flatten(0, 1)

    def gather_all(self, tensors: list[Tensor]) -> list[Tensor]:
        """The same of many tensors in one communication a dtype."""
        if self.particle_size == 1:
            return [t.detach() for t in tensors]
        gathered = {}
        for dtype in {t.dtype: None for t in tensors}:
            group = [t for t in tensors if t.dtype == dtype]
            flat = self.gather(torch.cat([t.detach().flatten(1) for t in group], 1))
            parts = flat.split([t[0].numel() for t in group], 1)
            gathered |= {t: p.reshape(-1, *t.shape[1:]) for t, p in zip(group, parts)}
        return [gathered[t] for t in tensors]

    def mean_(self, tensors: Sequence[Tensor]) -> None:
        """Replace every tensor by its mean over the data, in one communication a dtype."""
        if self.data_size == 1:
            return
        for dtype in {t.dtype: None for t in tensors}:
            group = [t for t in tensors if t.dtype == dtype]
            flat = torch.cat([t.flatten() for t in group])
            dist.all_reduce(flat, group=self.data)
            flat /= self.data_size
            for t, part in zip(group, flat.split([t.numel() for t in group])):
                t.copy_(part.view(t.shape))

    def share_of_mean(self, count: Tensor) -> Tensor | float:
        """What a mean over `count` examples here counts in the mean of all processes' means, for
        that to be the mean over all their examples."""
        if self.data_size == 1:
            return 1.0
        total = count.double()
        dist.all_reduce(total, group=self.data)
        return count * (self.data_size / total.clamp_min(1))

    def all_true(self, flags: Tensor) -> Tensor:
        """flags (K/P,) -> (K,): true where they are on every process along the data."""
        flags = flags.to(torch.uint8)
        if self.data_size > 1:
            dist.all_reduce(flags, dist.ReduceOp.MIN, group=self.data)
        return self.gather(flags).bool()

    def write(self, function: Callable[[], object], device: torch.device) -> None:
        """function() in the first process; the others return when it has, or raise where it did."""
        error = None
        first = self.particle_rank == 0 and (self.data is None or self.data.rank() == 0)
        if first:
            try:
                function()
            except BaseException as raised:
                error = raised
        failed = torch.tensor([error is not None], dtype=torch.uint8, device=device)
        for group in (self.particle, self.data):
            if group is not None:
                dist.all_reduce(failed, dist.ReduceOp.MAX, group=group)
        if error is not None:
            raise error
        if bool(failed):
            raise RuntimeError("the first process could not write; its error says why")

    def require_equal(self, tensors: Sequence[Tensor], axis: str, message: str) -> None:
        """Raise RuntimeError, in all processes, where tensors differ along "data" or "particle"."""
        group = getattr(self, axis)
        if group is None or group.size() == 1:
            return
        # A sum that the order and the shape of the numbers change too.
        total = torch.zeros(1, dtype=torch.float64, device=tensors[0].device)
        for i, t in enumerate(tensors, 1):
            weights = torch.arange(i, i + t.numel(), dtype=torch.float64, device=t.device)
            total += t.detach().flatten().double() @ weights.sqrt()
        everybody = _gather(total, group)
        if not torch.allclose(everybody, everybody[:1], rtol=0, atol=0, equal_nan=True):
            raise RuntimeError(f"{message}: the processes of the {axis} axis differ")


def _gather(t: Tensor, group: dist.ProcessGroup) -> Tensor:
    """(...) -> (processes, ...)."""
    t = t.detach().contiguous()
    out = t.new_empty(group.size(), *t.shape)
    dist.all_gather_into_tensor(out.flatten(0, 1) if t.ndim else out, t, group=group)
    return out
