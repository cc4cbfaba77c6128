"""The tensors that a method trains, and checks that they can be trained, together and still."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from multilora.parallel import Processes


def unwrap(model: Any) -> tuple[Any, DistributedDataParallel | None]:
    """The model inside torch.compile and DistributedDataParallel, and the latter wrapper."""
    wrapper = None
    while True:
        if isinstance(model, DistributedDataParallel):
            model, wrapper = model.module, model
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod
        else:
            return model, wrapper


def check_wrapper(wrapper: DistributedDataParallel | None, processes: Processes) -> None:
    """Raise ValueError if processes that hold different particles were made equal.

    DistributedDataParallel broadcasts the parameters of one process to all of its group.
    """
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
    """The trainable tensors (K, ...) of a ParticleModel or of an iterable of tensors.

    Raises:
        TypeError: if the model is neither, or a tensor is a DTensor.
        ValueError: if the tensors have no common K, or some require no gradient.
    """
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
    """Raise RuntimeError if the model's trainable tensors are no longer `params`."""
    # An iterator was exhausted when the method read it.
    now = params if isinstance(model, Iterator) else _trainable(model)
    same = len(now) == len(params) and all(a is b for a, b in zip(now, params))
    if not same or not all(p.requires_grad for p in params):
        raise RuntimeError(
            "the model's trainable tensors are not those that the method was made with, so what "
            "runs would not be trained (load_state_dict(assign=True), requires_grad_, replaced "
            "modules, a call inside model.particles(...) or mixtures(...)): make the method and "
            "the optimizer after the last such change"
        )


def require_different_particles(model: Any, params: list[Tensor], why: str) -> None:
    """Raise ValueError if all particles are equal: `why` then has an exactly zero gradient."""
    tensors = list(params)
    for adapter in model.adapters() if hasattr(model, "adapters") else ():
        # Frozen factors tell particles apart too; the experts of a bank have the same.
        tensors += adapter.parameters if not adapter.expert else ()
    same = torch.stack([(t == t[:1]).all() for t in tensors]).all()
    processes = getattr(model, "processes", None) or Processes()
    if processes.particle_size > 1:
        # Compare a checksum of each process's first particle.
        sums = [t[:1].detach().double().abs().sqrt().sum() for t in tensors]
        first = processes.gather(torch.stack(sums).sum().reshape(1))
        same = processes.all_true(same.expand(len(params[0]))).all() & (first == first[0]).all()
    particles = len(params[0]) * processes.particle_size
    if particles > 1 and bool(same):
        raise ValueError(
            f"all {particles} particles are identical, so {why} has zero gradient and "
            "they stay identical; start them from different seeds"
        )


def _trainable(model: Any) -> list[Tensor]:
    return list(model.particle_parameters() if hasattr(model, "particle_parameters") else model)
