"""Steps of K particles as K runs take them: clipping, and parameters of one particle alone."""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

# Their update of an element depends on nothing but that element's own gradients, so that a stacked
# tensor steps as its particles' tensors would. Exactly these classes: a subclass may do otherwise.
_ELEMENTWISE = frozenset(
    getattr(torch.optim, name)
    for name in ("Adadelta Adagrad Adam AdamW Adamax ASGD NAdam RAdam RMSprop Rprop SGD".split())
)


def is_elementwise(optimizer: type) -> bool:
    """Whether an optimizer of this class is known to be right on stacked tensors (K, ...)."""
    return optimizer in _ELEMENTWISE


@torch.no_grad()
def clip_grad_norm_(
    model: Any, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False
) -> Tensor:
    """g_k ← g_k · min(1, max_norm / (‖g_k‖ + 1e-6)), the gradient of each particle k by itself.

    torch.nn.utils.clip_grad_norm_ for K runs in one: the norm is over all tensors of a particle,
    and the spike of one particle leaves the others' step alone. A particle whose norm is infinite
    or NaN gets what torch would make of it there.

    model: a ParticleModel, also inside DistributedDataParallel or torch.compile, a method, or an
        iterable of stacked tensors (K, ...); those without a gradient take no part. Over several
        processes, each clips the particles that it holds.
    max_norm >= 0; infinity only measures. norm_type > 0, infinity included.

    -> the norms before clipping, (K,), on the device of the first tensor; zeros without gradients.
    No value is read, so that a GPU is not waited for, but with error_if_nonfinite.

    Raises ValueError for arguments out of range or tensors that are not stacked, TypeError for
    separate parameters, and with error_if_nonfinite RuntimeError, with nothing clipped.
    """
    max_norm, norm_type = float(max_norm), float(norm_type)
    if not max_norm >= 0 or not norm_type > 0:
        raise ValueError(
            f"clipping needs max_norm >= 0 and norm_type > 0; got {max_norm} and {norm_type}"
        )
    params = _stacked(model)
    with_grad = [p for p in params if p.grad is not None]
    if not with_grad:
        return torch.zeros(len(params[0]), dtype=params[0].dtype, device=params[0].device)
    grads, device = [p.grad for p in with_grad], params[0].device
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
    if max_norm < math.inf:
        scale = (max_norm / (norm + 1e-6)).clamp_max(1.0)
        scales = [scale.to(g).view(-1, *[1] * (g.ndim - 1)) for g in grads]
        torch._foreach_mul_(grads, scales)
    return norm


def _stacked(model: Any) -> list[Tensor]:
    """The stacked tensors (K, ...) of what a user calls the model."""
    while isinstance(model, DistributedDataParallel) or hasattr(model, "_orig_mod"):
        model = model.module if isinstance(model, DistributedDataParallel) else model._orig_mod
    if hasattr(model, "particle_parameters"):
        tensors = model.particle_parameters()
    elif hasattr(model, "passes"):
        tensors = model.params
    elif isinstance(model, Iterable) and not isinstance(model, nn.Module):
        tensors = [model] if isinstance(model, Tensor) else list(model)
        # model.parameters() holds the frozen ones too.
        tensors = [t for t in tensors if t.requires_grad]
    else:
        raise TypeError(
            "model must be a ParticleModel, a method or stacked tensors; "
            f"got {type(model).__name__}"
        )
    if any(isinstance(t, SeparateParameter) for t in tensors):
        raise TypeError("separate parameters have no particle axis; clip the model itself")
    if not tensors or any(t.ndim == 0 for t in tensors):
        raise ValueError(
            "trainable stacked tensors (K, ...) are needed, and at least one of them; "
            f"got shapes {[tuple(t.shape) for t in tensors[:4]]}"
        )
    return tensors


# --- parameters of one particle alone ------------------------------------------------------------


def separate_parameters(model: Any) -> list[SeparateParameter]:
    """K leaves for every stacked tensor (K, ...): what an optimizer of K runs would be given.

    model: a ParticleModel or an iterable of stacked tensors. -> in their order, the K particles of
    a tensor side by side, so that `leaves[k::K]` are those of particle k (`leaf.particle` is k).
    An adapter of a convolution has the shape that PEFT gives it there.

    A leaf is the memory of its part of the stacked tensor, and its `.grad` is that part of the
    stacked gradient, at any time: method.backward, accumulation, clipping the model, GradScaler,
    zero_grad of the optimizer or of the model, with set_to_none or without, all meet there. So

        optimizer = torch.optim.Adafactor(model.particle_parameters(separate=True))

    steps each tensor by its own statistics, as K runs do, and parameter groups can give every
    particle a learning rate of its own. What an optimizer computes over *all* its parameters
    (the clipping inside timm's Lamb, D-adaptation, L-BFGS) needs one optimizer a particle:
    `EachParticle`.

    A leaf follows its tensor: after model.to(...) and load_state_dict(assign=True) it is part of
    what the model holds then, from the next look at its gradient on, which every step begins with.
    With the model it can be deep-copied, copy.deepcopy((model, optimizer)), and neither alone nor
    pickled: save optimizer.state_dict(). The gradient of a loss of the leaves themselves is added
    to that of the model's outputs.

    Raises RuntimeError, where it is used, if the model is gone or has other particles by then.
    """
    if not isinstance(model, nn.Module):
        return [leaf for t in _stacked(model) for leaf in _Stack(t).leaves()]
    wanted = {id(p) for p in _stacked(model)}
    leaves = []
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if id(parameter) in wanted:
                wanted.remove(id(parameter))
                leaves += _Stack(parameter, module, name).leaves()
    return leaves


class SeparateParameter(nn.Parameter):
    """One particle's part of a stacked tensor; see `separate_parameters`."""

    particle: int

    def __new__(cls, stack: _Stack, particle: int) -> SeparateParameter:
        part = stack.part(stack.tensor().detach(), particle)
        leaf = torch.Tensor._make_subclass(cls, part, True)
        leaf._stack, leaf.particle = stack, particle
        leaf.register_post_accumulate_grad_hook(_add_to_stacked)
        return leaf

    def __init__(self, stack: _Stack, particle: int):
        pass

    @property
    def stacked(self) -> Tensor:
        """The tensor (K, ...) that this is a part of."""
        return self._stack.tensor()

    @property
    def grad(self) -> Tensor | None:
        self._stack.follow(self)
        return self._stack.grad(self.particle)

    @grad.setter
    def grad(self, value: Tensor | None) -> None:
        self._stack.follow(self)
        if value is None:
            self._stack.clear_grad(self.particle)
        else:
            self._stack.set_grad(self.particle, value)

    @grad.deleter
    def grad(self) -> None:
        self.grad = None

    def __deepcopy__(self, memo: dict[int, Any]) -> SeparateParameter:
        if id(self) not in memo:
            memo[id(self)] = SeparateParameter(copy.deepcopy(self._stack, memo), self.particle)
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("separate parameters cannot be pickled; save optimizer.state_dict()")


def _add_to_stacked(leaf: SeparateParameter) -> None:
    """What autograd left on the leaf itself, where all its readers look."""
    own = torch.Tensor.grad.__get__(leaf)
    torch.Tensor.grad.__set__(leaf, None)
    there = leaf.grad
    if there is None:
        leaf.grad = own
    else:
        there += own


class _Stack:
    """A stacked tensor, found where its module keeps it, and the gradients of its particles.

    module, name: whose parameter of what name it is; without them it is a tensor by itself.
    """

    def __init__(self, tensor: Tensor, module: nn.Module | None = None, name: str = ""):
        self._tensor = tensor if module is None else None
        self._module, self._name = None if module is None else weakref.ref(module), name
        self.particles = len(tensor)
        self._shape = tensor.shape[1:]
        layer = getattr(module, "base_layer", None)
        if isinstance(layer, nn.Conv2d):
            # Stored flat; A is a convolution to r channels, B one of 1×1.
            kernel = layer.weight.shape[1:] if name == "lora_A" else (tensor.shape[2], 1, 1)
            self._shape = (tensor.shape[1], *kernel)
        # The particles whose gradient is None though the stacked one is not; and that one, with
        # its version, which changes with every change in place: then they have one again.
        self._cleared: set[int] = set()
        self._cleared_of: tuple[Tensor, int] | None = None

    def leaves(self) -> Iterator[SeparateParameter]:
        return (SeparateParameter(self, k) for k in range(self.particles))

    def tensor(self) -> Tensor:
        if self._module is None:
            return self._tensor
        module = self._module()
        if module is None:
            raise RuntimeError(
                "the model of these separate parameters is gone: keep it, and make them anew from "
                "the one that is trained"
            )
        tensor = module._parameters.get(self._name)
        if tensor is None or len(tensor) != self.particles:
            raise RuntimeError(
                f"these are parameters of {self.particles} particles, and the model's "
                f"{self._name!r} is {None if tensor is None else tuple(tensor.shape)} now; use "
                "them outside of model.particles(), and make them anew for another model"
            )
        return tensor

    def part(self, stacked: Tensor, particle: int) -> Tensor:
        return stacked[particle].view(self._shape)

    def follow(self, leaf: SeparateParameter) -> None:
        """Make the leaf's memory that of the tensor, which model.to and others exchange."""
        stacked = self.tensor().detach()
        offset = leaf.particle * stacked.stride(0) * stacked.element_size()
        where = (stacked.data_ptr() + offset, stacked.dtype, stacked.device)
        if where != (leaf.data_ptr(), leaf.dtype, leaf.device):
            leaf.data = self.part(stacked, leaf.particle)

    def grad(self, particle: int) -> Tensor | None:
        stacked = self.tensor().grad
        if stacked is None or particle in self._cleared_in(stacked):
            return None
        return self.part(stacked, particle)

    @torch.no_grad()
    def clear_grad(self, particle: int) -> None:
        stacked = self.tensor().grad
        if stacked is None:
            return
        cleared = self._cleared_in(stacked) | {particle}
        if len(cleared) == self.particles:
            self.tensor().grad, self._cleared_of = None, None
            return
        # The next backward adds to it.
        stacked[particle].zero_()
        self._cleared, self._cleared_of = cleared, (stacked, stacked._version)

    @torch.no_grad()
    def set_grad(self, particle: int, value: Tensor) -> None:
        tensor = self.tensor()
        if tensor.grad is None:
            tensor.grad = torch.zeros_like(tensor, memory_format=torch.contiguous_format)
            cleared = set(range(self.particles))
        else:
            cleared = self._cleared_in(tensor.grad)
        self.part(tensor.grad, particle).copy_(value)
        self._cleared, self._cleared_of = cleared - {particle}, (tensor.grad, tensor.grad._version)

    def _cleared_in(self, stacked: Tensor) -> set[int]:
        if self._cleared_of is not None:
            seen, version = self._cleared_of
            if seen is stacked and version == stacked._version:
                return self._cleared
            self._cleared_of = None
        return set()

    def __deepcopy__(self, memo: dict[int, Any]) -> _Stack:
        owner = self._tensor if self._module is None else self._module()
        if id(owner) not in memo:
            raise TypeError(
                "separate parameters are part of a model: copy it with them, and before them, "
                "copy.deepcopy((model, optimizer))"
            )
        if id(self) not in memo:
            twin = copy.copy(self)
            twin._cleared_of = None
            if self._module is None:
                twin._tensor = memo[id(owner)]
            else:
                twin._module = weakref.ref(memo[id(owner)])
            memo[id(self)] = twin
        return memo[id(self)]


class EachParticle(torch.optim.Optimizer):
    """K optimizers in one, of each particle's parameters alone: right for any optimizer.

    groups: a ParticleModel, separate parameters, or a list of parameter groups, which are dicts
        with separate parameters as "params" and their options.
    make: groups of one particle -> its optimizer, such as
        lambda groups: timm.optim.Lamb(groups, lr=1e-3).

    `param_groups` are those of all K, particle by particle, so that schedulers and GradScaler see
    one optimizer; `optimizers` are the K. step takes no closure: L-BFGS cannot be run so.
    """

    def __init__(self, groups: Any, make: Callable[[list[dict[str, Any]]], torch.optim.Optimizer]):
        if isinstance(groups, nn.Module):
            groups = separate_parameters(groups)
        groups = list(groups)
        if not groups or not isinstance(groups[0], dict):
            groups = [{"params": groups}]
        leaves = [leaf for group in groups for leaf in group["params"]]
        if not leaves or not all(isinstance(leaf, SeparateParameter) for leaf in leaves):
            kinds = sorted({type(leaf).__name__ for leaf in leaves})
            raise TypeError(f"EachParticle needs separate parameters, and some; got {kinds}")
        self.optimizers: list[torch.optim.Optimizer] = []
        for k in sorted({leaf.particle for leaf in leaves}):
            of_k = [[p for p in group["params"] if p.particle == k] for group in groups]
            self.optimizers.append(make([g | {"params": p} for g, p in zip(groups, of_k) if p]))
        super().__init__(self._all_groups(), {})

    def _all_groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if len(self.param_groups) == len(self._all_groups()):
            raise TypeError("EachParticle takes all its parameters when it is made")
        super().add_param_group(param_group)

    def step(self, closure: None = None) -> None:
        if closure is not None:
            raise TypeError("EachParticle takes no closure: call method.backward before the step")
        for optimizer in self.optimizers:
            optimizer.step()

    def train(self) -> None:
        """Of optimizers that have modes."""
        for optimizer in self.optimizers:
            getattr(optimizer, "train", bool)()

    def eval(self) -> None:
        for optimizer in self.optimizers:
            getattr(optimizer, "eval", bool)()

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"optimizers": self.optimizers}

    def state_dict(self) -> dict[str, Any]:
        return {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from `state_dict()`. Raises ValueError where it is not of K such optimizers."""
        states = state_dict.get("optimizers", [])
        if len(states) != len(self.optimizers):
            raise ValueError(
                f"the state is of {len(states)} particles' optimizers; this is of "
                f"{len(self.optimizers)}"
            )
        for optimizer, state in zip(self.optimizers, states):
            optimizer.load_state_dict(state)
        self.param_groups[:] = self._all_groups()
