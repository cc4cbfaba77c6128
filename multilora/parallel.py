"""The processes that share a particle model: some of the data each, some of the particles each."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

AXES = ("data", "particle")
# The integers of so many bytes, and an odd one that scatters others: 2⁶⁴ over the golden ratio.
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_SCATTER = 0x9E3779B97F4A7C15 - 2**64
_Items = TypeVar("_Items", Sequence[Any], Tensor)


class Processes:
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

    def __deepcopy__(self, memo: dict) -> Processes:
        return self

    @staticmethod
    def of_mesh(mesh: DeviceMesh | None) -> Processes:
        """Raises ValueError for a mesh with other axes than "data" and "particle"."""
        if mesh is None:
            return Processes()
        names = getattr(mesh, "mesh_dim_names", None) or ()
        if not names or set(names) - set(AXES):
            raise ValueError(
                f"mesh needs axes named {AXES}, one of them or both (init_device_mesh(..., "
                f"mesh_dim_names=...)); got {names or 'no names'}"
            )
        groups = {name: mesh[name].get_group() for name in names}
        return Processes(groups.get("data"), groups.get("particle"))

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
        total = count.to(torch.float64, copy=True)
        dist.all_reduce(total, group=self.data)
        return count * (self.data_size / torch.where(total == 0, 1, total))

    def all_true(self, flags: Tensor) -> Tensor:
        """flags (K/P, ...) -> (K, ...): true where they are on every process along the data."""
        if self.data_size == self.particle_size == 1:
            return flags
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

    def require_equal(
        self,
        tensors: Sequence[Tensor],
        axis: str,
        device: torch.device,
        message: str,
        more: object = None,
    ) -> None:
        """Raise RuntimeError, in all processes, where tensors differ along "data" or "particle".

        Only digests are exchanged, so that tensors of different shapes and numbers may be
        compared. more: what has a repr and must be equal too; device: where the processes
        communicate.
        """
        if self._size(axis) == 1:
            return
        shapes = [(tuple(t.shape), str(t.dtype)) for t in tensors]
        total = torch.tensor([_digest_of_text(repr((shapes, more)))], device=device)
        for i, t in enumerate(tensors, 1):
            total += (2 * i + 1) * _digest(t).to(device)
        if self._differ(total, axis):
            raise RuntimeError(f"{message}: the processes of the {axis} axis differ")

    def require_same(self, settings: dict[str, str], axis: str, device: torch.device) -> None:
        """Raise RuntimeError, in all processes, where settings differ along an axis: which do."""
        if self._size(axis) == 1:
            return
        digest = _digest_of_text(repr(sorted(settings.items())))
        if not self._differ(torch.tensor([digest], device=device), axis):
            return
        # All processes are here: now there is time for the settings themselves.
        everybody: list[Any] = [None] * self._size(axis)
        dist.all_gather_object(everybody, settings, group=getattr(self, axis))
        names = dict.fromkeys(name for one in everybody for name in one)
        values = {name: [one.get(name, "none") for one in everybody] for name in names}
        differing = [
            f"{name} ({' / '.join(dict.fromkeys(each))})"
            for name, each in values.items()
            if len(set(each)) > 1
        ]
        raise RuntimeError(
            f"the processes of the {axis} axis need the same settings; they differ in "
            f"{', '.join(differing) or 'those of other processes'}"
        )

    def _size(self, axis: str) -> int:
        return self.data_size if axis == "data" else self.particle_size

    def _differ(self, digest: Tensor, axis: str) -> bool:
        """Whether (1,) differs among the processes of the axis, here or in any other place."""
        everybody = _gather(digest, getattr(self, axis))
        differ = (everybody != everybody[:1]).any().to(torch.uint8)
        # Those that agree must not wait, in their next communication, for those that raise.
        if self._size("data" if axis == "particle" else "particle") > 1:
            other = self.data if axis == "particle" else self.particle
            dist.all_reduce(differ, dist.ReduceOp.MAX, group=other)
        return bool(differ)


def _digest_of_text(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little", signed=True)


def _digest(t: Tensor) -> Tensor:
    """An int64 (1,) that the order of the numbers and every bit of them changes.

    The sum of the bits of each number times a weight that is scattered by its place, modulo 2⁶⁴:
    integers, so that it does not depend on the device or on the order of the sum.
    """
    t = torch.view_as_real(t) if t.is_complex() else t
    bits = t.detach().contiguous().flatten().view(_INTEGERS[t.element_size()]).long()
    weights = torch.arange(1, bits.numel() + 1, device=t.device) * _SCATTER
    weights = (weights ^ (weights >> 29)) * _SCATTER
    return (bits * (weights ^ (weights >> 32))).sum().reshape(1)


def _gather(t: Tensor, group: dist.ProcessGroup) -> Tensor:
    """(...) -> (processes, ...)."""
    t = t.detach().contiguous()
    out = t.new_empty(group.size(), *t.shape)
    dist.all_gather_into_tensor(out.flatten(0, 1) if t.ndim else out, t, group=group)
    return out
