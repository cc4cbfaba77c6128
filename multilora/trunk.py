"""The shared trunk: what lies below the first particle layer runs once for all particles.

Inside a particle model every batch has K·B rows, and until the first particle layer has run those
of all particles are the same. A frozen module that runs before it is therefore given the B rows of
one particle, and its outputs are repeated. That this is right is checked, not assumed: at first a
module runs both ways, and is shared from then on only if both gave the same. A module that draws
random numbers (dropout in training), mixes examples or keeps a state (a key-value cache) is not,
nor is one with hooks inside of it, which are to see the rows of all particles.
"""

from __future__ import annotations

import contextlib
import inspect
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from multilora.layers import ParticleLayer, ParticleRows

# An input or output of any other type may hold a state, and its module is not shared.
_VALUES = (type(None), bool, int, float, str, torch.dtype, torch.device)
_PLAIN = (Tensor, *_VALUES)
#: Forms of its inputs in which a module is tried. One that is called with ever new numbers is not
#: shared beyond.
_MOST_FORMS = 64


class TrunkRows(ParticleRows):
    """The forward that is under way, and what its trunk gave for the same inputs before."""

    def __init__(self):
        self.devices: list[torch.device] = []  # of the model, whose generators may be drawn from
        self._random: list[tuple[torch.device, Tensor]] = []
        self._memory: dict[Any, Any] | None = None
        self._inputs: tuple[Any, list[tuple[Any, int | None]]] = (None, [])
        self._calls: Counter = Counter()

    def start(self, count: int, shared: int | None, inputs: Any) -> None:
        """A forward of `count` rows begins; shared: B where all particles have the same inputs."""
        self.count = count
        self.shared = None
        if shared is None or torch.compiler.is_compiling() or _capturing():
            return
        if self._memory is None and shared == count:
            return  # one particle, one forward: nothing to share
        leaves, form = tree_flatten(inputs)
        self.shared = shared
        self._random = random_state(self.devices)
        if self._memory is None:
            return
        self._calls.clear()
        versions = [(leaf, _version(leaf)) for leaf in leaves]
        before, theirs = self._inputs
        same = form == before and all(
            _is_same(a, b) and version == other and version is not None
            for (a, version), (b, other) in zip(versions, theirs)
        )
        if not same:
            self._memory.clear()
            self._inputs = form, versions

    def stop(self) -> None:
        self.count = self.shared = None

    def still_shared(self) -> bool:
        """Whether the particles' rows are still the same: no layer and no random number came
        between them."""
        if self.shared is not None and not _equal(self._random, random_state(self.devices)):
            self.shared = None
        return self.shared is not None

    @contextlib.contextmanager
    def remembering(self) -> Iterator[None]:
        """Inside, forwards of the very same input tensors run the trunk once altogether."""
        if self._memory is not None:
            yield
            return
        self._memory = {}
        try:
            yield
        finally:
            self._memory, self._inputs = None, (None, [])
            self._calls.clear()

    def recall(self, shared: SharedForward, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The module's output, from memory where this forward is a repetition."""
        leaves, _ = tree_flatten((args, kwargs))
        if self._memory is None or any(isinstance(t, Tensor) and t.requires_grad for t in leaves):
            return shared.inner(*args, **kwargs)
        self._calls[id(shared)] += 1
        key = (id(shared), self._calls[id(shared)], shared.module.training, _autocast())
        if key not in self._memory:
            output = shared.inner(*args, **kwargs)
            if not self.still_shared():
                return output
            self._memory[key] = output
        return self._memory[key]


class _OtherOutputs(RuntimeError):
    """A module's outputs are not of the form that they had when it was tried."""


class _Plan(NamedTuple):
    """How a module is shared: which inputs and outputs have a row for every example."""

    count: int
    batch: int
    inputs: list[bool]
    outputs: list[bool]


class SharedForward:
    """Stands in for the `forward` of a frozen module that may lie below all particle layers."""

    def __init__(self, module: nn.Module, rows: TrunkRows):
        self.module, self.rows = module, rows
        # Somebody else's stand-in, such as a hook of accelerate.
        self.override = module.__dict__.get("forward")
        # By mode and by form and values of the inputs: the flags of the outputs, or None: not to be
        # shared.
        self.known: dict[Any, list[bool] | None] = {}
        self.last: _Plan | None = None

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.override or type(self.module).forward)

    def inner(self, *args: Any, **kwargs: Any) -> Any:
        if self.override is not None:
            return self.override(*args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        rows = self.rows
        if torch.compiler.is_compiling():
            return self.inner(*args, **kwargs)
        if rows.recomputing:
            # A checkpoint that runs its part of a forward again does what that forward did.
            if self.last is None:
                return self.inner(*args, **kwargs)
            return self._once(self.last, args, kwargs)
        self.last = None
        if not rows.still_shared():
            return self.inner(*args, **kwargs)
        if self._has_hooks():
            rows.shared = None
            return self.inner(*args, **kwargs)
        count, batch = rows.count, rows.shared
        leaves, form = tree_flatten((args, kwargs))
        flags = [_has_rows(leaf, count) for leaf in leaves]
        values = (leaf if isinstance(leaf, _VALUES) else type(leaf) for leaf in leaves)
        key = (self.module.training, count == batch, repr(form), *flags, *values)
        if key not in self.known and len(self.known) < _MOST_FORMS:
            self.known[key] = self._try(leaves, flags, form)
        if self.known.get(key) is not None:
            self.last = _Plan(count, batch, flags, self.known[key])
            state = random_state(rows.devices)
            with contextlib.suppress(_OtherOutputs):
                output = self._once(self.last, args, kwargs)
                if rows.still_shared():
                    return output
            # It drew random numbers, for one particle, or gave outputs of another form, which it
            # did not when it was tried.
            set_random_state(state)
            self.known[key] = self.last = None
        rows.shared = None
        return self.inner(*args, **kwargs)

    def _has_hooks(self) -> bool:
        """Whether somebody looks at what is computed inside; hooks of the module itself see all."""
        return any(
            module._forward_hooks or module._forward_pre_hooks
            for module in self.module.modules()
            if module is not self.module
        )

    def _once(self, plan: _Plan, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The outputs for one particle's rows, repeated for all."""
        leaves, form = tree_flatten((args, kwargs))
        args, kwargs = tree_unflatten(_narrowed(leaves, plan.inputs, plan.batch), form)
        if self.rows.recomputing:
            output = self.inner(*args, **kwargs)
        else:
            output = self.rows.recall(self, args, kwargs)
        leaves, form = tree_flatten(output)
        if len(leaves) != len(plan.outputs) or not all(
            _has_rows(leaf, plan.batch) for leaf, flag in zip(leaves, plan.outputs) if flag
        ):
            raise _OtherOutputs(f"{type(self.module).__name__} gave outputs of another form")
        particles = plan.count // plan.batch
        # Copies, all of them: what is remembered must not be changed in place.
        repeated = [
            leaf.repeat(particles if flag else 1, *[1] * (leaf.ndim - 1))
            if isinstance(leaf, Tensor) and leaf.ndim
            else leaf
            for leaf, flag in zip(leaves, plan.outputs)
        ]
        return tree_unflatten(repeated, form)

    def _try(self, leaves: list[Any], flags: list[bool], form: Any) -> list[bool] | None:
        """The flags of the outputs, where all rows and those of one particle give the same."""
        count, batch = self.rows.count, self.rows.shared
        if not all(isinstance(leaf, _PLAIN) for leaf in leaves) or not any(flags):
            return None
        # Weights that are sharded now: every process must run such a module equally often.
        if any(hasattr(p, "placements") for p in self.module.parameters()):
            return None
        state, outputs = random_state(self.rows.devices), []
        buffers = [(b, b.clone()) for b in self.module.buffers()]
        for inputs in (leaves, _narrowed(leaves, flags, batch)):
            # Copies: a module that writes into its inputs must not do so twice, nor be shared.
            inputs = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in inputs]
            before = [_version(leaf) for leaf in inputs]
            args, kwargs = tree_unflatten(inputs, form)
            try:
                with torch.no_grad():
                    outputs.append(self.inner(*args, **kwargs))
            except torch.OutOfMemoryError:
                raise
            except Exception:
                # It may well refuse fewer rows; an error of its own comes back in the real call.
                outputs.append(None)
            pure = _equal(state, random_state(self.rows.devices))
            pure = pure and before == [_version(leaf) for leaf in inputs]
            set_random_state(state)
            for buffer, value in buffers:
                if not torch.equal(buffer, value):
                    pure = False
                    buffer.copy_(value)
            if not pure or outputs[-1] is None:
                return None
        (full, form), (once, other) = map(tree_flatten, outputs)
        if form != other:
            return None
        agreed = [_agree(a, b, count, batch) for a, b in zip(full, once)]
        return None if None in agreed else agreed


def share_forwards(base: nn.Module, rows: TrunkRows) -> None:
    """Let the largest frozen modules without particles in them share their forward."""
    holders = {
        name.rpartition(".")[0]
        for name, module in base.named_modules()
        if isinstance(module, ParticleLayer)
    }
    # Every ancestor of a particle layer.
    seen: set[nn.Module] = set()
    holders |= {h[:i] for h in list(holders) for i, c in enumerate(h) if c == "."} | {""}

    def visit(module: nn.Module, name: str) -> None:
        if isinstance(module, ParticleLayer):
            return
        container = isinstance(module, (nn.ModuleList, nn.ModuleDict))
        if name in holders or container:
            for child, inner in module.named_children():
                visit(inner, f"{name}.{child}" if name else child)
        elif next(module.parameters(), None) is not None and module not in seen:
            seen.add(module)
            module.forward = SharedForward(module, rows)

    visit(base, "")


def _agree(full: Any, once: Any, count: int, batch: int) -> bool | None:
    """Whether two outputs say the same: True with a row for every example, False without; None
    where they do not."""
    if not isinstance(full, Tensor) or not isinstance(once, Tensor):
        plain = isinstance(full, _PLAIN) and type(full) is type(once)
        return False if plain and full == once else None
    has_rows = _has_rows(full, count) and count != batch
    expected = (batch, *full.shape[1:]) if has_rows else full.shape
    if once.shape != expected or once.dtype != full.dtype:
        return None
    if has_rows:
        full = full.unflatten(0, (-1, batch))
    if not full.is_floating_point():
        return has_rows if bool((full == once).all()) else None
    # Other batch sizes round otherwise; anything that mixes rows or draws differs by far more.
    error, size = (t.double().square() for t in (full - once, full))
    axes = tuple(range(2 if has_rows else 1, full.ndim))
    if axes:
        error, size = error.mean(axes), size.mean(axes)
    # Of every row by itself; a row of zeros may round too.
    scale = torch.finfo(full.dtype).eps * (size + 1e-6 * size.mean())
    return has_rows if bool((error <= scale).all()) else None


def _narrowed(leaves: list[Any], flags: list[bool], batch: int) -> list[Any]:
    return [leaf[:batch] if flag else leaf for leaf, flag in zip(leaves, flags)]


def _has_rows(leaf: Any, count: int) -> bool:
    return isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.shape[0] == count


def _is_same(a: Any, b: Any) -> bool:
    return a is b or (
        type(a) is type(b) and not isinstance(a, Tensor) and isinstance(a, _PLAIN) and a == b
    )


def _version(leaf: Any) -> int | None:
    """What changes when a tensor is written to; None for an inference tensor, which keeps none."""
    if not isinstance(leaf, Tensor):
        return 0
    return None if leaf.is_inference() else leaf._version


def _autocast() -> tuple:
    return tuple(
        torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
        for device in ("cpu", "cuda")
    )


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _equal(
    before: list[tuple[torch.device, Tensor]], now: list[tuple[torch.device, Tensor]]
) -> bool:
    return all(torch.equal(a, b) for (_, a), (_, b) in zip(before, now))


def random_state(devices: Iterable[torch.device]) -> list[tuple[torch.device, Tensor]]:
    """The states of PyTorch's generators of the CPU and `devices`; a random number changes one."""
    state = [(torch.device("cpu"), torch.get_rng_state())]
    for device in devices:
        if device.type not in ("cpu", "meta"):
            state.append((device, torch.get_device_module(device).get_rng_state(device)))
    return state


def set_random_state(state: list[tuple[torch.device, Tensor]]) -> None:
    for device, value in state:
        if device.type == "cpu":
            torch.set_rng_state(value)
        else:
            torch.get_device_module(device).set_rng_state(value, device)
