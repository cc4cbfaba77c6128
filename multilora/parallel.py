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
# The integer dtype of each size in bytes.
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# An odd integer that scatters others when it multiplies them: 2⁶⁴ over the golden ratio.
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
        self.particle_index = 0 if particle is None else particle.rank()

    def __deepcopy__(self, memo: dict) -> Processes:
        return self

    @staticmethod
    def of_mesh(mesh: DeviceMesh | None) -> Processes:
        """The processes of a mesh with the axes "data", "particle" or both; None: this one alone.

        Raises:
            ValueError: if the mesh has other axes.
        """
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
        """This process's share of what has one entry, or row, per particle.

        Raises:
            ValueError: if the processes cannot share the particles equally.
        """
        share, rest = divmod(len(items), self.particle_size)
        if rest or not share:
            raise ValueError(
                f"{len(items)} particles cannot be shared equally by {self.particle_size} processes"
            )
        return items[self.particle_index * share : (self.particle_index + 1) * share]

    def gather(self, t: Tensor) -> Tensor:
        """(K/P, ...) -> (K, ...), the particles of all P processes in their order; no gradient."""
        if self.particle is None or self.particle_size == 1:
            return t.detach()
        return _gather(t, self.particle).flatten(0, 1)

    def gather_all(self, tensors: list[Tensor]) -> list[Tensor]:
        """`gather` for many tensors, in one communication per dtype."""
        if self.particle_size == 1:
            return [t.detach() if t.requires_grad else t for t in tensors]
        gathered: dict[Tensor, Tensor] = {}
        for dtype in {t.dtype: None for t in tensors}:
            group = [t for t in tensors if t.dtype == dtype]
            flat = self.gather(torch.cat([t.detach().flatten(1) for t in group], 1))
            parts = flat.split([t[0].numel() for t in group], 1)
            gathered |= {t: p.reshape(-1, *t.shape[1:]) for t, p in zip(group, parts)}
        return [gathered[t] for t in tensors]

    def mean_(self, tensors: Sequence[Tensor], axis: str = "data") -> None:
        """Replace every tensor by its mean over the processes along an axis, in one communication
        per dtype."""
        if self._size(axis) == 1:
            return
        for dtype in {t.dtype: None for t in tensors}:
            group = [t for t in tensors if t.dtype == dtype]
            flat = torch.cat([t.flatten() for t in group])
            dist.all_reduce(flat, group=getattr(self, axis))
            flat /= self._size(axis)
            for t, part in zip(group, flat.split([t.numel() for t in group])):
                t.copy_(part.view(t.shape))

    def share_of_mean(self, count: Tensor) -> Tensor | float:
        """The weight of this process's mean over `count` examples.

        With it, the mean of the processes' means is the mean over all their examples.
        """
        if self.data_size == 1:
            return 1.0
        total = count.to(torch.float64, copy=True)
        dist.all_reduce(total, group=self.data)
        return count * (self.data_size / torch.where(total == 0, 1, total))

    def all_true(self, flags: Tensor) -> Tensor:
        """flags (K/P, ...) -> (K, ...), true where every process along the data has a true one."""
        if self.data_size == self.particle_size == 1:
            return flags
        flags = flags.to(torch.uint8)
        if self.data_size > 1:
            dist.all_reduce(flags, dist.ReduceOp.MIN, group=self.data)
        return self.gather(flags).bool()

    def write(self, function: Callable[[], object], device: torch.device) -> None:
        """Call function() in the first process; the others wait for it.

        Raises:
            RuntimeError: in the others, if it raised in the first, where its own error goes on.
        """
        error = None
        first = self.particle_index == 0 and (self.data is None or self.data.rank() == 0)
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
        """Check that tensors are equal along an axis, "data" or "particle".

        Only digests are exchanged, so the processes may have tensors of different shapes and
        numbers.

        Args:
            device: the device on which the processes communicate.
            message: the beginning of the error's message.
            more: an object whose repr must be equal too.

        Raises:
            RuntimeError: in all processes, if the tensors differ.
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
        """Check that settings are equal along an axis.

        Raises:
            RuntimeError: in all processes, if they differ; it names the settings that do.
        """
        if self._size(axis) == 1:
            return
        digest = _digest_of_text(repr(sorted(settings.items())))
        if not self._differ(torch.tensor([digest], device=device), axis):
            return
        # All processes come here, so they can exchange the settings themselves.
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
        """Whether (1,) differs along the axis, for this process or for any other."""
        everybody = _gather(digest, getattr(self, axis))
        differ = (everybody != everybody[:1]).any().to(torch.uint8)
        # Processes that agree would otherwise wait, in their next communication, for those that
        # raise.
        if self._size("data" if axis == "particle" else "particle") > 1:
            other = self.data if axis == "particle" else self.particle
            dist.all_reduce(differ, dist.ReduceOp.MAX, group=other)
        return bool(differ)


def _digest_of_text(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little", signed=True)


def _digest(t: Tensor) -> Tensor:
    """A checksum, int64 (1,), that depends on every bit of the numbers and on their order.

    It is the sum, modulo 2⁶⁴, of each number's bits times a weight that is scattered by its place.
    The sum is over integers, so it does not depend on the device or on the order of summation.
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
