"""Copies of a module for K particles: a head, or a whole model."""

import contextlib
import copy
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from multilora import forward_state
from multilora.forward_state import ForwardState
from multilora.gradients import note_without, without_gradient
from multilora.particle_layer import ParticleLayer, flat, is_same_for_all, own, row_ends, split


class StackedModule(ParticleLayer):
    """K copies of a module, a head or a whole model, with stacked parameters (K, ...).

    nn.Linear runs as one batched product and nn.Embedding as one look-up. Any other module runs
    under torch.func.vmap, or as it is for one particle. The particles share the buffers.

    Args:
        module: what the particles start from.
        num_particles: K.
        trained: which particles have a copy, (K,); the others run the module itself. None: all.
        widths: out_features of every particle, of an nn.Linear. The output has those of the widest;
            the rest of a narrower one is zero.
    """

    # 1 for a particle that has a copy, (K,); None where all have one.
    copied: Tensor | None

    def __init__(
        self,
        module: nn.Module,
        num_particles: int,
        trained: Sequence[bool] | None = None,
        widths: Sequence[int] | None = None,
    ):
        super().__init__()
        original, module = module, module if widths is None else widened(module, max(widths))
        # The structure without storage, to be run with other tensors. It is not registered as a
        # module, so state_dict leaves it out. Tied parameters stay one, which `to` would part.
        parameters = dict(module.named_parameters())
        empty: dict[int, Any] = {
            id(p): nn.Parameter(p.detach().to("meta")) for p in parameters.values()
        }
        self.__dict__["template"] = copy.deepcopy(module, empty).to("meta")
        stacks: dict[int, Any] = {}
        for i, (parameter, before) in enumerate(zip(parameters.values(), original.parameters())):
            dtype = torch.promote_types(parameter.dtype, torch.float32)
            stacked = parameter.detach().to(dtype).expand(num_particles, *parameter.shape)
            stacks[id(parameter)] = nn.Parameter(stacked.clone())
            # Kept beside the float32 masters for the frozen base, and for its dtype.
            self.register_buffer(f"original_{i}", before.detach(), persistent=False)
        self.module = copy.deepcopy(module, stacks)
        self.register_buffer("copied", None, persistent=False)
        self.set_each(trained, widths)

    def set_each(self, trained: Sequence[bool] | None, widths: Sequence[int] | None) -> None:
        """Say which particles have a copy, and of which width; the copies stay as they are."""
        trained = None if trained is None or all(trained) else trained
        self.trained = None if trained is None else tuple(trained)
        self.widths = None if widths is None else tuple(widths)
        first = next(self.module.parameters(), None)
        self.copied = None
        if trained is not None and first is not None:
            self.copied = torch.tensor(trained, dtype=torch.uint8, device=first.device)

    def is_trained(self, particle: int) -> bool:
        """Whether this particle has a copy."""
        return self.trained is None or self.trained[particle]

    def part(self, name: str, stacked: Tensor, particle: int) -> Tensor | None:
        if not self.is_trained(particle):
            return None
        one = stacked[particle]
        return one if self.widths is None else one[: self.widths[particle]]

    def repeat_each(self) -> None:
        count = self.num_particles
        widths = None if self.widths is None else self.widths[:1] * count
        self.set_each([self.is_trained(0)] * count, widths)

    @contextlib.contextmanager
    def narrowed(self, start: int, stop: int) -> Iterator[None]:
        before = self.trained, self.widths, self.copied
        cut = slice(start, stop)
        self.trained = None if self.trained is None else self.trained[cut]
        self.widths = None if self.widths is None else self.widths[cut]
        self.copied = None if self.copied is None else self.copied[cut]
        try:
            yield
        finally:
            self.trained, self.widths, self.copied = before

    def _parameters_of(self, state: ForwardState | None) -> dict[str, Tensor]:
        """The parameters (k, ...) of the particles that run."""
        found = {n: own(p, state) for n, p in self.module.named_parameters()}
        if self.copied is None:
            return found
        copied, originals = own(self.copied, state), self.originals_by_name()
        for name, p in found.items():
            has_copy = copied.view(-1, *[1] * (p.ndim - 1)) > 0
            found[name] = torch.where(has_copy, p, _padded(originals[name], p[0]).to(p))
        return found

    @property
    def num_particles(self) -> int:
        return next(self.module.parameters()).shape[0]

    def __getattr__(self, name: str) -> Any:
        """A model that reads the module gets the original's sizes and the particle's parameters."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or "module" not in self._modules:
                raise
            value = getattr(self.__dict__["template"], name)
        if not isinstance(value, Tensor):
            return value
        state = forward_state.current()
        stacked = getattr(self.module, name)
        if state is None or not isinstance(stacked, nn.Parameter):
            raise AttributeError(f"{name!r} of a module to save: every particle has its own")
        if state.frozen:
            return self.originals_by_name()[name]
        if state.particles > 1:
            raise NotImplementedError(
                f"the model reads {name!r} of a module to save instead of calling it, and each of "
                f'the {state.particles} particles that run has its own: use fold="loop"'
            )
        state.ran.add(self)
        return own(stacked, state)[0]

    def stacked(self) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
        for module in self.module.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    yield module, name, parameter

    def reset_particle(
        self, particle: int, generator: torch.Generator, within: str | None = None
    ) -> None:
        """Redraw this particle's matrices, keeping the standard deviation of each.

        within: the submodule whose matrices are redrawn, in place of all.
        """
        with torch.no_grad():
            for name, stacked in self.module.named_parameters():
                if stacked.ndim < 3 or not (within is None or name.startswith(f"{within}.")):
                    continue
                one = self.part(name, stacked, particle)
                if one is None:
                    continue
                std = one.std().item()
                if not std > 0:
                    std = 1 / math.sqrt(3 * one[0].numel())
                fresh = torch.empty(one.shape)
                one.copy_(nn.init.normal_(fresh, std=std, generator=generator))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        state = self.enter()
        self.template.train(self.training)
        if state is not None and state.frozen:
            return self._run(self.originals_by_name(), args, kwargs)
        parameters = self._parameters_of(state)
        if state is not None and state.counts is not None:
            return self._rows(args, kwargs, state, parameters)
        if len(args) == 1 and not kwargs and not is_same_for_all(args[0], state):
            if type(self.template) is nn.Linear:
                return self._linear(args[0], state, **parameters)
            if type(self.template) is nn.Embedding:
                return self._embedding(args[0], state, **parameters)
        floating = [t.dtype for t in _tensors_in((args, kwargs)) if t.is_floating_point()]
        dtype = floating[0] if floating else self.original_0.dtype
        parameters = {name: p.to(dtype) for name, p in parameters.items()}
        if len(next(iter(parameters.values()))) == 1:
            return self._run({name: p[0] for name, p in parameters.items()}, args, kwargs)
        return self._run_mapped(parameters, args, kwargs, state)

    def _rows(
        self,
        args: tuple,
        kwargs: dict[str, Any],
        state: ForwardState,
        parameters: dict[str, Tensor],
    ) -> Any:
        """The module where the particles have unequal numbers of rows: one after another."""
        leaves, structure = tree_flatten((args, kwargs))
        dtype = next((t.dtype for t in _tensors_in(leaves) if t.is_floating_point()), None)
        dtype = self.original_0.dtype if dtype is None else dtype
        assert state.rows is not None and state.counts is not None
        outputs = []
        for k in range(len(state.counts)):
            mine = []
            for leaf in leaves:
                if isinstance(leaf, Tensor) and leaf.ndim and not is_same_for_all(leaf, state):
                    self.require_rows(leaf, state, len(state.counts))
                    ends = [0, *row_ends(len(leaf), state, len(state.counts))]
                    leaf = leaf[ends[k] : ends[k + 1]]
                mine.append(leaf)
            one = {name: p[k].to(dtype) for name, p in parameters.items()}
            if type(self.template) is nn.Linear and len(mine) == 1:
                outputs.append(F.linear(mine[0], **one))  # a small one costs less than its call
            else:
                outputs.append(self._run(one, *tree_unflatten(mine, structure)))
        columns = zip(*(tree_flatten(output)[0] for output in outputs))
        joined = [torch.cat(c) if isinstance(c[0], Tensor) else c[0] for c in columns]
        return tree_unflatten(joined, tree_flatten(outputs[0])[1])

    def _run_mapped(
        self,
        parameters: dict[str, Tensor],
        args: tuple,
        kwargs: dict[str, Any],
        state: ForwardState | None,
    ) -> Any:
        """The module for each of several particles, under vmap."""
        particles = len(next(iter(parameters.values())))
        leaves, structure = tree_flatten((args, kwargs))
        tensors = [t for t in leaves if isinstance(t, Tensor) and t.ndim > 0]
        shared = len(tensors) > 0 and all(is_same_for_all(t, state) for t in tensors)
        unit = particles if state is None or state.rows is None else state.rows
        mapped = [isinstance(t, Tensor) and t.ndim > 0 and t.shape[0] % unit == 0 for t in leaves]
        rows = [t for t, is_mapped in zip(leaves, mapped) if is_mapped]
        for t in rows:
            self.require_rows(t, state, particles)
        if not rows and not shared:
            shapes = [tuple(t.shape) for t in leaves if isinstance(t, Tensor)]
            raise ValueError(f"a stacked module needs an input of particles × batch; got {shapes}")

        def one_particle(parameters: dict[str, Tensor], *rows: Tensor) -> Any:
            remaining = iter(rows)
            inputs = [next(remaining) if m else leaf for leaf, m in zip(leaves, mapped)]
            args, kwargs = tree_unflatten(inputs, structure)
            return self._run(parameters, args, kwargs)

        parts = [split(t, particles) for t in rows]
        outputs = torch.func.vmap(one_particle, randomness="different")(parameters, *parts)
        outputs = tree_map(lambda t: t.flatten(0, 1) if isinstance(t, Tensor) else t, outputs)
        if not shared:
            return outputs
        return tree_map(lambda t: t.repeat_interleave(unit // particles, 0), outputs)

    def _run(self, parameters: dict[str, Tensor], args: tuple, kwargs: dict[str, Any]) -> Any:
        """The module for one particle."""
        tensors = (parameters, dict(self.module.named_buffers()))
        return torch.func.functional_call(self.template, tensors, args, kwargs)

    def originals(self) -> dict[Tensor, Tensor]:
        """The tensor that each stacked parameter (K, ...) began as a copy of."""
        return {p: getattr(self, f"original_{i}") for i, p in enumerate(self.module.parameters())}

    def originals_by_name(self) -> dict[str, Tensor]:
        """The same, by the names of the module's parameters."""
        names = (name for name, _ in self.module.named_parameters())
        return {name: getattr(self, f"original_{i}") for i, name in enumerate(names)}

    @property
    def original_width(self) -> int:
        """out_features of the nn.Linear that was copied."""
        return len(self.originals_by_name()["weight"])

    def as_it_was(self) -> nn.Module:
        """The module before it was copied, over the same frozen tensors."""
        originals = self.originals_by_name()
        module: Any = copy.deepcopy(self.template)
        first: dict[int, nn.Parameter] = {}
        for name, p in list(module.named_parameters(remove_duplicate=False)):
            if id(p) not in first:
                first[id(p)] = nn.Parameter(originals[name], requires_grad=False)
            parent, _, own_name = name.rpartition(".")
            module.get_submodule(parent)._parameters[own_name] = first[id(p)]
        for name, t in self.module.named_buffers():
            parent, _, own_name = name.rpartition(".")
            module.get_submodule(parent)._buffers[own_name] = t
        if self.widths is not None:
            module.out_features = self.original_width
        return module.train(self.training)

    def widen(self, width: int) -> None:
        """Give an nn.Linear as many outputs, at least; those that come are zero."""
        if width <= self.template.out_features:
            return
        self.__dict__["template"] = widened(self.template, width)
        module: Any = self.module
        for name, p in list(module.named_parameters()):
            module._parameters[name] = grown(p, 1, width)
        module.out_features = width

    def _linear(
        self, x: Tensor, state: ForwardState | None, weight: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        self.require_rows(x, state, len(weight))
        rows = flat(x, len(weight))
        weight = weight.to(x.dtype)
        if bias is None:
            y = torch.bmm(rows, weight.mT)
        else:
            y = torch.baddbmm(bias.to(x.dtype).unsqueeze(1), rows, weight.mT)
        return y.view(*x.shape[:-1], y.shape[-1])

    def _embedding(self, ids: Tensor, state: ForwardState | None, weight: Tensor) -> Tensor:
        self.require_rows(ids, state, len(weight))
        rows = split(ids, len(weight))  # (k, B, *)
        weight = weight.to(self.original_0.dtype)  # (k, V, d)
        first = torch.arange(len(weight), device=ids.device) * weight.shape[1]
        first = first.view(-1, *[1] * (rows.ndim - 1))
        y = F.embedding(rows + first, weight.flatten(0, 1)).flatten(0, 1)
        if self.template.padding_idx is not None:
            # The padding row of each particle has no gradient.
            y = torch.where((ids == self.template.padding_idx).unsqueeze(-1), y.detach(), y)
        return y


def stacked_modules(base: nn.Module) -> Iterator[tuple[str, StackedModule]]:
    """The modules to save in module order, by their names in `base`."""
    for name, module in base.named_modules():
        if isinstance(module, StackedModule):
            yield name, module


def grown(p: nn.Parameter, axis: int, size: int) -> nn.Parameter:
    """A parameter with zeros behind the numbers of an axis; its gradient grows along."""

    def grow(t: Tensor) -> Tensor:
        shape = list(t.shape)
        shape[axis] = size - shape[axis]
        return torch.cat([t, t.new_zeros(shape)], axis)

    larger = nn.Parameter(grow(p.detach()), p.requires_grad)
    if p.grad is not None:
        without = without_gradient(p.grad)
        larger.grad = grow(p.grad)
        note_without(larger.grad, without)
    return larger


def widened(linear: Any, width: int) -> nn.Linear:
    """An nn.Linear with more outputs, which are zero."""
    wide = nn.Linear(
        linear.in_features,
        width,
        linear.bias is not None,
        device=linear.weight.device,
        dtype=linear.weight.dtype,
    )
    with torch.no_grad():
        wide.weight.copy_(_padded(linear.weight, wide.weight))
        if linear.bias is not None:
            wide.bias.copy_(_padded(linear.bias, wide.bias))
    return wide.train(linear.training)


def _padded(t: Tensor, like: Tensor) -> Tensor:
    """t with zeros behind its leading axis, or cut there, to the length of `like`."""
    if len(t) >= len(like):
        return t[: len(like)]
    return torch.cat([t, t.new_zeros(len(like) - len(t), *t.shape[1:])])


def _tensors_in(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor)]
