"""Parameters of one particle alone, over the memory of the stacked ones."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from multilora.gradients import note_without, without_gradient
from multilora.particle_layer import ParticleLayer


def separate_parameters(model: Any) -> list[SeparateParameter]:
    """K leaves for every stacked tensor (K, ...), as the optimizers of K runs would get them.

    A leaf is the memory of its part of the stacked tensor, and its `.grad` is that part of the
    stacked gradient, at any time. method.backward, accumulation, clipping the model, GradScaler,
    and zero_grad of the optimizer or of the model, with set_to_none or without, all meet there. So

        optimizer = torch.optim.Adafactor(model.particle_parameters(separate=True))

    steps each tensor by its own statistics, as K runs do, and parameter groups can give each
    particle its own learning rate. An optimizer that computes something over *all* its parameters
    (the clipping inside timm's Lamb, D-adaptation, L-BFGS) is needed once for each particle:
    `optim.EachParticle`.

    Where particles have ranks or heads of their own, a leaf has its particle's true shape, and a
    particle that has no adapter on a layer has no leaf there.

    A leaf stays valid after model.to(...) and load_state_dict(assign=True). It can be deep-copied
    together with the model, copy.deepcopy((model, optimizer)), but not alone, and it cannot be
    pickled: save optimizer.state_dict(). The gradient of a loss of the leaves themselves is added
    to that of the model's outputs.

    Args:
        model: a ParticleModel or an iterable of stacked tensors.

    Returns:
        The leaves in the order of the tensors, the K particles of a tensor side by side;
        `leaf.particle` says whose it is. An adapter of a convolution has the shape that PEFT gives
        it there.

    Raises:
        RuntimeError: on use of a leaf, if the model is gone or has other particles by then.
    """
    if not isinstance(model, nn.Module):
        return [leaf for t in stacked_tensors(model) for leaf in _Stack(t).leaves()]
    wanted = {id(p) for p in stacked_tensors(model)}
    layers = [module for module in model.modules() if isinstance(module, ParticleLayer)]
    owners = {id(p): layer for layer in layers for _, _, p in layer.stacked()}
    leaves: list[SeparateParameter] = []
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) in wanted:
                wanted.remove(id(parameter))
                leaves += _Stack(parameter, module, name, owners.get(id(parameter))).leaves()
    return leaves


class SeparateParameter(nn.Parameter):
    """One particle's part of a stacked tensor; see `separate_parameters`."""

    particle: int
    _stack: _Stack

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


# The gradient that PyTorch itself keeps for a leaf.
_GRAD: Any = torch.Tensor.grad


def _add_to_stacked(leaf: SeparateParameter) -> None:
    """Move what autograd left on the leaf itself to where all its readers look."""
    own = _GRAD.__get__(leaf)
    _GRAD.__set__(leaf, None)
    there = leaf.grad
    if there is None:
        leaf.grad = own
    else:
        there += own


class _Stack:
    """A stacked tensor, found where its module keeps it, and the gradients of its particles.

    Args:
        tensor: the stacked tensor (K, ...).
        module, name: the module that holds it and its name there. Without them, the tensor itself
            is kept.
        layer: the particle layer that it belongs to, which knows what of it is a particle's.
    """

    def __init__(
        self,
        tensor: Tensor,
        module: nn.Module | None = None,
        name: str = "",
        layer: ParticleLayer | None = None,
    ):
        self._tensor = tensor if module is None else None
        self._module, self._name = None if module is None else weakref.ref(module), name
        self._layer = None if layer is None else weakref.ref(layer)
        self.particles = len(tensor)

    def leaves(self) -> Iterator[SeparateParameter]:
        stacked = self.tensor().detach()
        every = range(self.particles)
        return (SeparateParameter(self, k) for k in every if self._own(stacked, k) is not None)

    def tensor(self) -> Tensor:
        """The stacked tensor, where it is now."""
        if self._module is None:
            assert self._tensor is not None
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

    def _own(self, stacked: Tensor, particle: int) -> Tensor | None:
        layer = None if self._layer is None else self._layer()
        if layer is None:
            return stacked[particle]
        return layer.part(self._name, stacked, particle)

    def part(self, stacked: Tensor, particle: int) -> Tensor:
        own = self._own(stacked, particle)
        if own is None:
            raise RuntimeError(
                f"particle {particle} has no {self._name!r} here any more: make its parameters anew"
            )
        module = None if self._module is None else self._module()
        base = getattr(module, "base_layer", None)
        if isinstance(base, nn.Conv2d):
            # Stored flat; A is a convolution to r channels, B one of 1×1.
            if self._name == "lora_A":
                return own.view(len(own), *base.weight.shape[1:])
            return own[..., None, None]
        return own

    def follow(self, leaf: SeparateParameter) -> None:
        """Make the leaf's memory that of the tensor, which model.to and others exchange."""
        stacked = self.tensor().detach()
        offset = leaf.particle * stacked.stride(0) * stacked.element_size()
        where = (stacked.data_ptr() + offset, stacked.dtype, stacked.device)
        if where != (leaf.data_ptr(), leaf.dtype, leaf.device):
            leaf.data = self.part(stacked, leaf.particle)

    def grad(self, particle: int) -> Tensor | None:
        stacked = self.tensor().grad
        if stacked is None or particle in without_gradient(stacked):
            return None
        return self.part(stacked, particle)

    @torch.no_grad()
    def clear_grad(self, particle: int) -> None:
        stacked = self.tensor().grad
        if stacked is None:
            return
        cleared = without_gradient(stacked) | {particle}
        if all(k in cleared or self._own(stacked, k) is None for k in range(self.particles)):
            self.tensor().grad = None
            return
        # The next backward adds to it.
        stacked[particle].zero_()
        note_without(stacked, cleared)

    @torch.no_grad()
    def set_grad(self, particle: int, value: Tensor) -> None:
        tensor = self.tensor()
        if tensor.grad is None:
            tensor.grad = torch.zeros_like(tensor, memory_format=torch.contiguous_format)
            cleared = frozenset(range(self.particles))
        else:
            cleared = without_gradient(tensor.grad)
        self.part(tensor.grad, particle).copy_(value)
        note_without(tensor.grad, cleared - {particle})

    def __deepcopy__(self, memo: dict[int, Any]) -> _Stack:
        owner = self._tensor if self._module is None else self._module()
        if id(owner) not in memo:
            raise TypeError(
                "separate parameters are part of a model: copy it with them, and before them, "
                "copy.deepcopy((model, optimizer))"
            )
        if id(self) not in memo:
            twin = copy.copy(self)
            if self._module is None:
                twin._tensor = memo[id(owner)]
            else:
                twin._module = weakref.ref(memo[id(owner)])
                layer = None if self._layer is None else memo.get(id(self._layer()))
                twin._layer = None if layer is None else weakref.ref(layer)
            memo[id(self)] = twin
        return memo[id(self)]


def stacked_tensors(model: Any) -> list[Tensor]:
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
