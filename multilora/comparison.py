"""Two runs of a model, compared: their outputs, and what they left in its modules."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from multilora.fold import Axis
from multilora.particle_layer import ParticleLayer


def own_part(many: Tensor, one: Tensor, axis: Axis, n: int, k: int) -> tuple[Tensor, Tensor]:
    """The part of particle k among many, and the same alone."""
    if not isinstance(axis, int):
        return many, one
    return many.unflatten(axis, (n, -1)).select(axis, k), one


def distances(a: Tensor, b: Tensor, axis: Axis) -> tuple[float, float]:
    """The largest and the median distance between rows of a and b, relative to their size."""
    a, b = a.detach(), b.detach()
    if isinstance(axis, int):
        a, b = (t.movedim(axis, 0) for t in (a, b))
    else:
        a, b = a.unsqueeze(0), b.unsqueeze(0)
    if a.numel() == 0:
        return 0.0, 0.0
    a, b = (t.reshape(len(t), -1) for t in (a, b))
    if not a.is_floating_point():
        error = (a != b).any(1).double()
    else:
        a, b = a.double(), b.double()
        # Masks hold infinities and the largest finite numbers.
        equal = (a == b) | (a.isnan() & b.isnan())
        plain = a.isfinite() & b.isfinite() & (b.abs() < 1e30)
        error = torch.where(equal, 0, torch.where(plain, a - b, torch.inf)).square().mean(1)
        size = torch.where(plain, b, 0).square().mean(1)
        # The second term allows rows of zeros to round.
        error = (error / (size + 1e-6 * size.mean()).clamp_min(1e-60)).sqrt()
    return error.max().item(), error.median().item()


class Snapshot:
    """The buffers of all modules but ours, and the tensors and numbers among their attributes.

    Large tensors are left out, because packed weights are buffers too.
    """

    _LARGEST = 1 << 20

    def __init__(self, base: nn.Module):
        self.values: dict[tuple[nn.Module, str], tuple[dict[str, Any], Any, Any]] = {}
        for module in base.modules():
            if isinstance(module, ParticleLayer):
                continue
            for where in (module._buffers, vars(module)):
                for name, value in where.items():
                    if isinstance(value, Tensor) and value.numel() <= self._LARGEST:
                        self.values[module, name] = where, value, value.detach().clone()
                    elif type(value) in (int, float):
                        self.values[module, name] = where, value, value

    def restore(self) -> None:
        with torch.no_grad():
            for (_, name), (where, value, copy) in self.values.items():
                if isinstance(value, Tensor) and not _is_equal(value, copy):
                    value.copy_(copy)
                where[name] = value

    def difference(self, other: Snapshot, least: float) -> tuple[nn.Module, str] | None:
        """The place of a floating tensor or number that differs in `other`."""
        for key, (_, _, a) in self.values.items():
            b = other.values.get(key, (None, None, None))[2]
            if type(a) is float and type(b) is float:
                a, b = torch.tensor([a]), torch.tensor([b])
            if not (isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape):
                continue
            if a.is_floating_point() and distances(a, b, None)[0] > least:
                return key
        return None


def _is_equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(((a == b) | (a != a)).all())
