"""Steps of K particles as K runs take them: clipping, and an optimizer for each particle."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from multilora.gradients import note_without, without_gradient
from multilora.particle_adamw import ParticleAdamW, groups_of_particles
from multilora.separate import SeparateParameter, separate_parameters, stacked_tensors

__all__ = [
    "EachParticle",
    "ParticleAdamW",
    "SeparateParameter",
    "clip_grad_norm_",
    "is_elementwise",
    "separate_parameters",
]

# They update each element from that element's gradients alone, so a stacked tensor steps as its
# particles' tensors would. Exactly these classes: a subclass may do otherwise.
_ELEMENTWISE = frozenset(
    getattr(torch.optim, name)
    for name in ("Adadelta Adagrad Adam AdamW Adamax ASGD NAdam RAdam RMSprop Rprop SGD".split())
)


def is_elementwise(optimizer: type) -> bool:
    """Whether an optimizer of this class is known to be right on stacked tensors (K, ...)."""
    return optimizer in _ELEMENTWISE


@torch.no_grad()
def clip_grad_norm_(
    model: Any,
    max_norm: float | Sequence[float],
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
) -> Tensor:
    """g_k ← g_k · min(1, max_norm / (‖g_k‖ + 1e-6)) for the gradient g_k of each particle k.

    This is torch.nn.utils.clip_grad_norm_ for K runs in one: the norm is over all tensors of a
    particle, and the spike of one particle leaves the steps of the others alone. A particle whose
    norm is infinite or NaN is scaled as torch's function would scale it. Over several processes,
    each clips the particles that it holds. A particle's gradient that is None stays so. On a GPU
    nothing waits for the device, unless error_if_nonfinite is set.

    Args:
        model: a ParticleModel, also inside DistributedDataParallel or torch.compile, a method, or
            an iterable of stacked tensors (K, ...). Tensors without a gradient take no part.
        max_norm: >= 0; infinity only measures. A list has a number for each particle.
        norm_type: > 0, infinity included.
        error_if_nonfinite: raise where a norm is not finite.

    Returns:
        The norms before clipping, (K,), on the device of the first tensor; zeros without gradients.

    Raises:
        ValueError: an argument is out of range, the tensors are not stacked, or the method draws
            its particles from a posterior (`Method.trains_particles`), whose gradients they are.
        TypeError: the parameters are separate ones.
        RuntimeError: a norm is not finite and error_if_nonfinite is set; nothing is clipped then.
    """
    several = isinstance(max_norm, Sequence)
    limits = [*map(float, max_norm)] if isinstance(max_norm, Sequence) else [float(max_norm)]
    norm_type = float(norm_type)
    if not all(limit >= 0 for limit in limits) or not norm_type > 0:
        raise ValueError(
            f"clipping needs max_norm >= 0 and norm_type > 0; got {max_norm} and {norm_type}"
        )
    if not getattr(model, "trains_particles", True):
        raise ValueError(
            f"the particles of {type(model).__name__} have no gradients to clip: use "
            "torch.nn.utils.clip_grad_norm_(method.parameters(), max_norm)"
        )
    params = stacked_tensors(model)
    if several and len(limits) != len(params[0]):
        raise ValueError(f"max_norm has {len(limits)} numbers for {len(params[0])} particles")
    grads, device = [p.grad for p in params if p.grad is not None], params[0].device
    if not grads:
        return torch.zeros(len(params[0]), dtype=params[0].dtype, device=device)
    sizes = {tuple(g.shape[:1]) for g in grads}
    if len(sizes) != 1 or () in sizes:
        raise ValueError(
            "clipping needs stacked tensors (K, ...) with one K; got gradients of shapes "
            f"{[tuple(g.shape) for g in grads[:4]]}"
        )
    norms = [torch.linalg.vector_norm(g.reshape(len(g), -1), norm_type, 1) for g in grads]
    norm = torch.linalg.vector_norm(torch.stack([n.to(device) for n in norms]), norm_type, 0)
    if error_if_nonfinite and not bool(norm.isfinite().all()):
        bad = (~norm.isfinite()).nonzero().flatten().tolist()
        raise RuntimeError(
            f"the gradient norms of the particles {bad} are {norm[bad].tolist()}, so they cannot "
            "be clipped; nothing was changed"
        )
    if min(limits) < math.inf:
        # A graph cannot hold a tensor that is made of the host's numbers.
        limit = norm.new_tensor(limits) if several else limits[0]
        scale = (limit / (norm + 1e-6)).clamp_max(1.0)
        if isinstance(limit, Tensor):
            scale = scale.masked_fill(limit == math.inf, 1.0)
        scales = [scale.to(g).view(-1, *[1] * (g.ndim - 1)) for g in grads]
        without = [without_gradient(g) for g in grads]
        torch._foreach_mul_(grads, scales)
        for grad, particles in zip(grads, without):
            note_without(grad, particles)
    return norm


class EachParticle(torch.optim.Optimizer):
    """K optimizers in one, each over the parameters of one particle: right for any optimizer.

    `param_groups` holds those of all K, particle by particle, so that schedulers and GradScaler see
    one optimizer; `optimizers` holds the K. `step` takes no closure, so L-BFGS cannot be used.

    Args:
        groups: a ParticleModel, separate parameters, or a list of parameter groups, which are dicts
            with separate parameters as "params" and their options.
        make: a function, groups of one particle -> its optimizer, such as
            lambda groups: timm.optim.Lamb(groups, lr=1e-3).

    Raises:
        TypeError: the parameters are not separate ones.
    """

    def __init__(self, groups: Any, make: Callable[[list[dict[str, Any]]], torch.optim.Optimizer]):
        by_particle = groups_of_particles(groups, "EachParticle")
        self.optimizers: list[torch.optim.Optimizer] = []
        for of_k in by_particle.values():
            self.optimizers.append(make(of_k))
        # Some schedules read the learning rate there.
        super().__init__(self._all_groups(), dict(self.optimizers[0].defaults))

    def _all_groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if len(self.param_groups) == len(self._all_groups()):
            raise TypeError("EachParticle takes all its parameters when it is made")
        super().add_param_group(param_group)

    # Optimizer.step may be given a closure.
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        if closure is not None:
            raise TypeError("EachParticle takes no closure: call method.backward before the step")
        for optimizer in self.optimizers:
            optimizer.step()

    def train(self) -> None:
        """Call `train` of the optimizers that have modes."""
        for optimizer in self.optimizers:
            getattr(optimizer, "train", bool)()

    def eval(self) -> None:
        """Call `eval` of the optimizers that have modes."""
        for optimizer in self.optimizers:
            getattr(optimizer, "eval", bool)()

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"optimizers": self.optimizers}

    def state_dict(self) -> dict[str, Any]:
        return {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from `state_dict()`. Raises ValueError unless it holds K optimizers' states."""
        states = state_dict.get("optimizers", [])
        if len(states) != len(self.optimizers):
            raise ValueError(
                f"the state is of {len(states)} particles' optimizers; this is of "
                f"{len(self.optimizers)}"
            )
        for optimizer, state in zip(self.optimizers, states):
            optimizer.load_state_dict(state)
        self.param_groups[:] = self._all_groups()
