"""Particles on the batch axis: find that axis in the inputs, fold particles in, and out again."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

#: Inputs that define the batch, wherever they stand; the first of these that is given does.
_FIRST = (
    "input_ids inputs_embeds pixel_values input_values input_features decoder_input_ids "
    "decoder_inputs_embeds"
).split()
#: Inputs with a row for every example. One of them with another length is an error.
_ROWS = {
    *_FIRST,
    *(
        "attention_mask token_type_ids labels decoder_attention_mask bool_masked_pos "
        "global_attention_mask start_positions end_positions mm_token_type_ids pixel_values_videos"
    ).split(),
}
#: Inputs that have a row for every example where their length says so.
_ROWS_IF_LONG = {"position_ids"}
#: Inputs that are the same for all examples, whatever their length.
_SHARED = {"cache_position", "logits_to_keep", "num_logits_to_keep", "edge_index", "edge_attr"}
#: Inputs that an earlier call returned: their rows are particles × batch already.
_CACHES = {"past_key_values", "cache_params", "encoder_outputs", "mems", "state"}
_NO_ROWS = _SHARED | _CACHES

#: The axis of the batch in arguments or outputs by name; None where all rows share a tensor.
Axes = Mapping[str, int | None]
#: The axis of the particles in an output tensor. None: the tensor is the same for all particles;
#: "same": its rows are the same for all particles, for which it is repeated.
Axis = int | Literal["same"] | None


class PerParticle(list):
    """An output that is not a tensor, with one entry for each particle; a caller may pass it on."""


class Leaf(NamedTuple):
    """A tensor among the inputs.

    Attributes:
        axis: the axis of the batch in the shape that the base sees; None where all rows share it.
        own: whether it has a particle axis in front.
        guessed: whether only its length says that it has rows.
    """

    name: str
    tensor: Tensor
    axis: int | None
    own: bool
    guessed: bool


class Inputs:
    """The arguments of one call, with the batch axis of each tensor in them; `batch` is B.

    Args:
        names: the names of the arguments.
        args, kwargs: the arguments.
        axes: the batch axes that the user has given, by name.
        particles: K for inputs (K, B, ...), with a mini-batch for each particle; else None.
        strict: whether a batch axis that is ambiguous raises. For one particle it does not matter.

    Raises:
        ValueError: no argument has a batch axis, or one is ambiguous; the message names it.
    """

    def __init__(
        self,
        names: Names,
        args: tuple,
        kwargs: dict[str, Any],
        axes: Axes,
        particles: int | None,
        strict: bool = True,
    ):
        self.strict = strict
        self.args, self.kwargs, self.names = args, kwargs, names
        self.particles = particles
        arguments = names.of(args, kwargs)
        lead = 0 if particles is None else 1
        first = _first(arguments, names.order, axes, lead)
        axis = axes.get(first[0]) or 0
        if first[1].ndim <= axis + lead or (lead and first[1].shape[0] != particles):
            wanted = f"(K, B, ...) with K = {particles}" if lead else f"with a batch axis {axis}"
            raise ValueError(
                f"{'per_particle=True' if lead else 'the model'} needs inputs {wanted}; got "
                f"{tuple(first[1].shape)}, {first[0]}"
            )
        self.batch = first[1].shape[axis + lead]
        self.leaves = [
            self._leaf(name, tensor, axes, first[0])
            for name, value in arguments
            for tensor in tensors(value)
        ]

    def _leaf(self, name: str, tensor: Tensor, axes: Axes, first: str) -> Leaf:
        shape, batch, lead = (
            tensor.shape,
            self.batch,
            () if self.particles is None else (self.particles,),
        )
        known = name == first or name in axes or name in _ROWS
        axis = axes.get(name, None if name in _NO_ROWS else 0)
        if axis is None or not shape or (name not in axes and shape[0] == 1 != batch and not lead):
            return Leaf(name, tensor, None, False, False)
        if tensor.layout is not torch.strided and self.strict:
            raise ValueError(
                f"{name} {tuple(shape)} is {tensor.layout}, which has no rows for every particle: "
                f'say with batch_axes={{{name!r}: None}} that all share it, or use fold="loop"'
            )
        moved = shape[len(lead) + axis : len(lead) + axis + 1]
        if shape[: len(lead)] == lead and moved == (batch,):
            guessed = not known and name not in _ROWS_IF_LONG
            return Leaf(name, tensor, axis, bool(lead), guessed)
        # Beside a mini-batch for each particle, another input may still be the same for all.
        same = not lead or shape[0] != batch or batch == 1
        if not self.strict or (same and (not known or (lead and shape[0] == 1))):
            return Leaf(name, tensor, None, False, False)
        raise ValueError(
            f"the batch axis of {name} {tuple(shape)} is not clear: {first} has a batch of {batch}"
            + (f" for each of {self.particles} particles" if lead else "")
            + f". Say what it is with batch_axes={{{name!r}: axis}} (None: the same for all rows), "
            'or use fold="loop", which needs no batch axis'
        )

    @property
    def guessed(self) -> list[str]:
        """The arguments that were taken for a batch only because of their length."""
        return [leaf.name for leaf in self.leaves if leaf.guessed]

    def form(self, of_one: bool = True) -> tuple:
        """A key for how the base may treat these inputs, apart from numbers and lengths.

        Args:
            of_one: whether a batch of one example has another key.
        """
        rest = tuple(
            (name, value)
            for name, value in self.names.of(self.args, self.kwargs)
            if value is None or isinstance(value, (bool, str))
        )
        leaves = tuple((x.name, x.tensor.ndim, x.tensor.dtype, x.axis, x.own) for x in self.leaves)
        return leaves, rest, of_one and self.batch == 1, self.particles is not None

    def of_particle(self, particle: int, rows: Tensor | None = None) -> tuple[tuple, dict]:
        """The arguments for one particle alone, or for some of its rows."""

        def alone(leaf: Leaf) -> Tensor:
            t = leaf.tensor[particle] if leaf.own else leaf.tensor
            if rows is None or leaf.axis is None:
                return t
            return t.index_select(leaf.axis, rows.to(t.device))

        return self._map(alone)

    def some_rows(self, rows: Tensor) -> tuple[tuple, dict]:
        """The arguments with these rows of the batch, in this order."""

        def select(leaf: Leaf) -> Tensor:
            if leaf.axis is None:
                return leaf.tensor
            return leaf.tensor.index_select(leaf.axis, rows.to(leaf.tensor.device))

        return self._map(select)

    def folded(self, which: Sequence[int], rows: Tensor | None = None) -> tuple[tuple, dict]:
        """The arguments for some particles in one batch, particle first."""

        def fold(leaf: Leaf) -> Tensor:
            if leaf.axis is None:
                return leaf.tensor
            if not leaf.own:
                t = leaf.tensor.expand(len(which), *leaf.tensor.shape)
            elif isinstance(which, range):
                t = leaf.tensor[which.start : which.stop]
            else:
                t = leaf.tensor[list(which)]
            t = t if rows is None else t.index_select(leaf.axis + 1, rows.to(t.device))
            return t.movedim(0, leaf.axis).flatten(leaf.axis, leaf.axis + 1)

        return self._map(fold)

    def shifted(self) -> Inputs:
        """These inputs for particles with rows of their own: those of particle k start at row k."""
        inputs = copy.copy(self)
        inputs.__class__ = _Shifted
        return inputs

    def _map(self, function: Callable[[Leaf], Tensor]) -> tuple[tuple, dict]:
        leaves = iter(self.leaves)
        return map_tensors(lambda _: function(next(leaves)), (self.args, self.kwargs))

    def is_uniform(self) -> bool:
        """Whether all examples are equal, or all zero, so that mixing them would not show."""
        rows = [x.tensor.movedim(x.axis + x.own, 0) for x in self.leaves if x.axis is not None]
        return all(
            bool((t == t[:1]).all()) and (self.batch > 1 or (t.is_floating_point() and not t.any()))
            for t in rows
        )

    @property
    def has_cache(self) -> bool:
        """Whether an argument comes from an earlier call, and a call may change it."""
        arguments = self.names.of(self.args, self.kwargs)
        return any(name in _CACHES and value is not None for name, value in arguments)


class _Shifted(Inputs):
    """See `Inputs.shifted`."""

    def of_particle(self, particle: int, rows: Tensor | None = None) -> tuple[tuple, dict]:
        return self.folded([particle], rows)

    def folded(self, which: Sequence[int], rows: Tensor | None = None) -> tuple[tuple, dict]:
        rows = torch.arange(self.batch) if rows is None else rows
        return self.some_rows(torch.cat([(rows + k) % self.batch for k in which]))


class Names:
    """The names of a function's arguments."""

    def __init__(self, function: Callable[..., Any]):
        parameters = inspect.signature(function).parameters.values()
        positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        self.positional = [p.name for p in parameters if p.kind in positional]
        self.order = [p.name for p in parameters]
        self.takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)

    def of(self, args: tuple, kwargs: dict[str, Any]) -> list[tuple[str, Any]]:
        """The given arguments with their names."""
        beyond = (f"argument {i}" for i in range(len(self.positional), len(args)))
        return [*zip([*self.positional[: len(args)], *beyond], args), *kwargs.items()]


def _first(
    arguments: list[tuple[str, Any]], order: list[str], axes: Axes, lead: int
) -> tuple[str, Tensor]:
    """The argument that defines the batch; `lead` is the number of axes in front of it."""
    given = {}
    for name, value in arguments:
        found = next((t for t in tensors(value) if t.ndim > lead), None)
        if found is not None:
            given[name] = found
    named = (name for name, axis in axes.items() if axis is not None)
    unnamed = (n for n in (*order, *given) if n not in _NO_ROWS and n not in axes)
    for name in chain(named, _FIRST, unnamed):
        if name in given and axes.get(name, 0) is not None:
            return name, given[name]
    raise ValueError("the model's inputs hold no tensor with a batch axis")


def unfold(output: Any, axes: Sequence[Axis], particles: int) -> Any:
    """(K·m, ...) -> (K, m, ...) for every tensor of the output, with the axis of its particles."""
    remaining = iter(axes)

    def one(t: Tensor) -> Tensor:
        axis = next(remaining)
        if axis is None:
            return t
        if not isinstance(axis, int):
            return t.expand(particles, *t.shape)
        rows = t.shape[axis] // particles
        return t.view(*t.shape[:axis], particles, rows, *t.shape[axis + 1 :]).movedim(axis, 0)

    return map_tensors(one, output)


def conventional_axes(output: Any, rows: int, axes: Axes | int | None) -> list[Axis]:
    """The particles' axis of every output tensor by `output_axes`, else the leading one where it
    has `rows` rows."""

    def axis(name: str, t: Tensor) -> int | None:
        if axes is None or (isinstance(axes, Mapping) and name not in axes):
            return 0 if t.ndim and t.shape[0] == rows else None
        chosen = axes[name] if isinstance(axes, Mapping) else axes
        if chosen is None or not t.ndim:
            return None
        if t.ndim <= chosen:
            raise ValueError(f"output_axes: output {name!r} {tuple(t.shape)} has no axis {chosen}")
        return chosen

    return [axis(name, t) for name, t in named_tensors(output)]


def stack(outputs: list[Any]) -> Any:
    """The outputs of K particles as one, with the particle axis in front of every tensor."""
    return join(outputs, [None] * sum(1 for _ in tensors(outputs[0])))


def join(outputs: list[Any], axes: Sequence[Axis]) -> Any:
    """The outputs of several particles as one: tensors with an axis of rows one behind the other,
    and all others stacked.

    Raises:
        ValueError: the outputs do not have the same tensors, or these differ in shape.
    """
    leaves = [list(_leaves(output)) for output in outputs]
    if len({len(each) for each in leaves}) > 1:
        raise ValueError(
            f"the particles' outputs have {[len(each) for each in leaves]} parts, which must be "
            "equally many"
        )
    remaining = iter(axes)

    def one(values: tuple) -> Any:
        if not isinstance(values[0], Tensor):
            same = all(v is values[0] or _is_equal(v, values[0]) for v in values)
            return values[0] if same else PerParticle(values)
        axis = next(remaining)
        shapes = {tuple(v.shape) for v in values}
        rest = {s[:axis] + s[axis + 1 :] for s in shapes} if isinstance(axis, int) else shapes
        if len(rest) > 1:
            raise ValueError(
                f"the particles' outputs differ in shape, {sorted(shapes)}, and a loop pads nothing"
            )
        return torch.cat(values, axis) if isinstance(axis, int) else torch.stack(values)

    joined = iter([one(values) for values in zip(*leaves)])
    return map_leaves(lambda _: next(joined), outputs[0])


def _is_equal(a: Any, b: Any) -> bool:
    return isinstance(a, (bool, int, float, str)) and type(a) is type(b) and a == b


def tensors(tree: Any) -> Iterator[Tensor]:
    """The tensors in tuples, lists, dicts and dataclasses."""
    return (leaf for leaf in _leaves(tree) if isinstance(leaf, Tensor))


def named_tensors(output: Any) -> list[tuple[str, Tensor]]:
    """Every tensor of an output with its field or index; "" where the output is the tensor."""
    if isinstance(output, Tensor):
        return [("", output)]
    parts = _parts(output)
    fields = getattr(output, "_fields", None)
    names = parts[1] or fields or range(len(parts[0])) if parts else ()
    return [(str(n), t) for n, part in zip(names, parts[0] if parts else ()) for t in tensors(part)]


def map_tensors(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """`tree` with function(t) in place of every tensor t."""
    return map_leaves(lambda x: function(x) if isinstance(x, Tensor) else x, tree)


def map_leaves(function: Callable[[Any], Any], tree: Any) -> Any:
    """`tree` with function(leaf) for every leaf of its tuples, lists, dicts and dataclasses."""
    parts = _parts(tree)
    if parts is None:
        return function(tree)
    values, keys = parts
    values = [map_leaves(function, value) for value in values]
    if isinstance(tree, Mapping):
        named = dict(zip(tree, values))
        if dataclasses.is_dataclass(tree):  # ModelOutput
            return type(tree)(**named)
        return OrderedDict(named) if isinstance(tree, OrderedDict) else named
    if keys is not None:
        return dataclasses.replace(tree, **dict(zip(keys, values)))
    return type(tree)(*values) if hasattr(tree, "_fields") else type(tree)(values)


def _leaves(tree: Any) -> Iterator[Any]:
    parts = _parts(tree)
    if parts is None:
        yield tree
        return
    for value in parts[0]:
        yield from _leaves(value)


def _parts(tree: Any) -> tuple[list[Any], list[str] | None] | None:
    """The values in a container and their names, if it has any; None for a leaf."""
    if isinstance(tree, Mapping):
        return list(tree.values()), list(tree)
    if isinstance(tree, (list, tuple)) and not isinstance(tree, (PerParticle, torch.Size)):
        return list(tree), None
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        names = [field.name for field in dataclasses.fields(tree) if field.init]
        return [getattr(tree, name) for name in names], names
    return None
