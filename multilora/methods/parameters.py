"""The tensors that a method trains, and whether they still are those that run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from multilora.parallel import Processes


def unwrap(model: Any) -> tuple[Any, DistributedDataParallel | None]:
    """The model inside torch.compile and DistributedDataParallel, and the latter."""
    wrapper = None
    while True:
        if isinstance(model, DistributedDataParallel):
            model, wrapper = model.module, model
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod
        else:
            return model, wrapper


def check_wrapper(wrapper: DistributedDataParallel | None, processes: Processes) -> None:
    """DistributedDataParallel makes its processes equal: they must not hold other particles."""
    if wrapper is None or processes.particle_size == 1:
        return
    copies = dist.get_process_group_ranks(wrapper.process_group)
    others = dist.get_process_group_ranks(processes.particle)
    if len(set(copies) & set(others)) > 1:
        raise ValueError(
            f"DistributedDataParallel over the processes {copies} has given them all the "
            f"particles of one, and {others} hold different ones: use it without, as the "
            "method averages by itself"
        )


def stacked_parameters(model: Any) -> list[Tensor]:
    """The trainable tensors (K, ...) of a ParticleModel or of an iterable of tensors."""
    if not hasattr(model, "particle_parameters") and not isinstance(model, Iterable):
        raise TypeError(
            "a method needs a ParticleModel or an iterable of stacked tensors; "
            f"got {type(model).__name__}"
        )
    params = _trainable(model)
    if any(hasattr(p, "placements") for p in params):
        raise TypeError(
            "a method needs whole tensors, and some are DTensors, sharded by FSDP2 or a tensor "
            "parallel plan: leave the trainable ones out, fully_shard(module, "
            "ignored_params=set(model.particle_parameters()))"
        )
    sizes = {tuple(p.shape[:1]) for p in params}
    if len(sizes) != 1 or () in sizes:
        raise ValueError(
            "a method needs stacked tensors (K, ...) with one K and at least one of them; "
            f"got shapes {[tuple(p.shape) for p in params[:4]]}"
        )
    frozen = [tuple(p.shape) for p in params if not p.requires_grad]
    if frozen:
        raise ValueError(
            f"a method needs tensors that require gradients; {len(frozen)} of {len(params)} do "
            f"not, of shapes {frozen[:4]}"
        )
    return params


def require_current(model: Any, params: list[Tensor]) -> None:
    """Raise RuntimeError where the model's trainable tensors are no longer `params`."""
    # An iterator was empty after it had been read once.
    now = params if isinstance(model, Iterator) else _trainable(model)
    same = len(now) == len(params) and all(a is b for a, b in zip(now, params))
    if not same or not all(p.requires_grad for p in params):
        raise RuntimeError(
            "the model's trainable tensors are not those that the method was made with, so what "
            "runs would not be trained (load_state_dict(assign=True), requires_grad_, replaced "
            "modules, a call inside model.particles(...)): make the method and the optimizer after "
            "the last such change"
        )


def _trainable(model: Any) -> list[Tensor]:
    return list(model.particle_parameters() if hasattr(model, "particle_parameters") else model)
