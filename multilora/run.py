"""How a particle model calls its base: all particles in one batch, one after another, or one.

The way of a batch from model(x) to the layers and back:

1. `ParticleModel.forward` gives its arguments to `Runner.run`, as `call` does for other methods
   of the base.
2. `fold.Inputs` finds the batch axis of every tensor among them (B rows), and `Inputs.folded` puts
   the particles in front of it: K·B rows, particle first. With a shared trunk the B rows stay as
   they are until a hook of `trunk.Cut` repeats them at the cut. With fold="loop" the base is called
   once for each particle, with the B rows.
3. Where inputs of this form are new, `isolation.IsolationCheck` first runs one particle alone.
4. The runner opens a `forward_state.ForwardState` (how many particles run, on how many rows) and
   calls the base. Frozen layers see one large batch.
5. Every `layers.ParticleLayer` reads the state that is open, views its input (K·B, ...) as
   (K, B, ...), applies particle k's tensors to part k, and returns (K·B, ...).
6. The runner closes the state, the check compares, and `fold.unfold` turns every output with rows
   for all particles into (K, B, ...).

With `particle=index`, `rows.Rows` puts the rows of each particle side by side, the state has their
counts, and the layers read (N, ...) by them; outputs come back in the order of the rows.

A backward that runs a checkpointed part of the base again finds the state of its forward through
hooks on the outputs (`ForwardState.mark`).
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from multilora import forward_state
from multilora.copies import StackedModule
from multilora.fold import (
    Axis,
    Inputs,
    Names,
    PerParticle,
    conventional_axes,
    join,
    map_leaves,
    map_tensors,
    named_tensors,
    stack,
    tensors,
    unfold,
)
from multilora.forward_state import ForwardState
from multilora.isolation import IsolationCheck, ParticleIsolationError
from multilora.ops._library import FrozenTensorError
from multilora.rows import Rows
from multilora.trunk import Reached, TrunkOutput
from multilora.walk import modules_of

if TYPE_CHECKING:
    from multilora.model import ParticleModel


class _AdaptersDoNotRun(ValueError):
    """Adapters have no effect, for which the batch is not to blame: a loop would not help."""


#: Errors for which the batch of particles is not to blame.
_NOT_OF_THE_BATCH = (
    torch.OutOfMemoryError,
    ParticleIsolationError,
    FrozenTensorError,
    _AdaptersDoNotRun,
)


class Runner:
    """Calls the base of a model, and remembers what earlier calls have shown about it."""

    def __init__(self):
        self._names: dict[str, Names] = {}
        # The particles' axis in the outputs, for each method, mode and form of the inputs.
        self._checked: dict[Any, list[Axis] | None] = {}
        # The particle layers that ran in the first forward of each mode.
        self._ran: dict[bool, set[str]] = {}

    def run(
        self,
        model: ParticleModel,
        name: str,
        args: tuple,
        kwargs: dict[str, Any],
        per_particle: bool,
        rows: TrunkOutput | None = None,
    ) -> Any:
        """The method `name` of the base, for every particle."""
        function = _method(model.base, name)
        if name == "forward":
            kwargs = self._without_cache(model, kwargs)
        if not torch.compiler.is_compiling() and _is_frozen(model):
            return function(*args, **kwargs)
        if model.fold == "loop":
            return self._loop(model, name, function, args, kwargs, per_particle)
        if name == "generate" and model.check_isolation:
            self._look_at_prompts(model, args, kwargs, per_particle)
        inputs = self.inputs(model, name, args, kwargs, per_particle)
        if torch.compiler.is_compiling():
            _refuse_guesses(model, inputs)
            args, kwargs = inputs.folded(range(model.num_particles))
            return _unfolded(model, name, function(*args, **kwargs), inputs, None)
        return self._batch(model, name, function, inputs, rows)

    def run_rows(
        self,
        model: ParticleModel,
        name: str,
        args: tuple,
        kwargs: dict[str, Any],
        particle: Tensor | Sequence[int],
    ) -> Any:
        """The method `name` of the base, row n for particle[n] alone."""
        function = _method(model.base, name)
        if model.processes.particle_size > 1:
            raise NotImplementedError("rows for particles of their own need all in one process")
        if name == "forward":
            kwargs = self._without_cache(model, kwargs)
        if _is_frozen(model):
            return function(*args, **kwargs)
        inputs = self.inputs(model, name, args, kwargs, False)
        rows = Rows(particle, inputs.batch, model.num_particles)
        if not rows.present:
            raise ValueError("particle is empty: there is no row to run")
        if model.fold == "loop":
            return self._loop_rows(model, name, function, inputs, rows)
        if name == "generate" and model.check_isolation:
            # With the rows themselves: for every particle it would run K times as many.
            self._look_at_prompts(model, args, kwargs, False, particle)
        axes = self._axes_of_rows(model, name, function, inputs)
        args, kwargs = rows.sorted(inputs)
        several = len(rows.present) > 1
        state = ForwardState(
            model,
            len(rows.present),
            inputs.batch if several else None,
            part=rows.part(model.num_particles),
            counts=rows.unequal_counts if several else None,
            which=rows.present,
        )
        output = self._called(model, name, state, partial(function, *args, **kwargs))
        if axes is None or len(axes) != sum(1 for _ in tensors(output)):
            axes = _conventional(model, name, output, inputs.batch)
        return rows.back(output, axes)

    def run_one(
        self,
        model: ParticleModel,
        particle: int,
        name: str,
        function: Callable[..., Any],
        args: tuple,
        kwargs: dict[str, Any],
    ) -> Any:
        """A method of the base for one particle alone."""
        state = ForwardState(model, 1, part=_of(particle))
        output = self._called(model, name, state, partial(function, *args, **kwargs))
        return own_columns(model, output, particle)

    def _axes_of_rows(
        self, model: ParticleModel, name: str, function: Callable[..., Any], inputs: Inputs
    ) -> list[Axis] | None:
        """The axis of the rows in every tensor of the output; checks a form of inputs that is new.

        It is checked with as many rows for each particle, of which no two have the same.
        """
        key = ("rows", name, model.training, inputs.form())
        if key in self._checked:
            return self._checked[key]
        if not _can_check(model, inputs):
            _refuse_guesses(model, inputs)
            return None
        if name == "generate":  # checked by its forward
            return None
        apart = inputs.shifted()
        check = IsolationCheck(model.base, function, apart, 0, model.num_particles, 0, False)
        if check.failure is not None:
            raise check.failure
        axes = check.axes_of_rows
        if check.telling:
            self._checked[key] = axes
        return axes

    def _loop_rows(
        self,
        model: ParticleModel,
        name: str,
        function: Callable[..., Any],
        inputs: Inputs,
        rows: Rows,
    ) -> Any:
        """One particle after another, each over its own rows.

        Output tensors without rows are stacked, (k, ...) for the k particles that have rows.
        """
        _refuse_guesses(model, inputs)
        outputs, done = [], 0
        for k, count in zip(rows.present, rows.counts):
            own = torch.tensor(rows.order[done : done + count])
            args, kwargs = inputs.some_rows(own)
            state = ForwardState(model, 1, part=_of(k))
            outputs.append(self._called(model, name, state, partial(function, *args, **kwargs)))
            done += count
        every = [_conventional(model, name, o, n) for o, n in zip(outputs, rows.counts)]
        axes = [at[0] if len(set(at)) == 1 else None for at in zip(*every)]
        return rows.back(join(outputs, axes), axes)

    def rows_at_the_cut(self, model: ParticleModel, args: tuple, kwargs: dict) -> TrunkOutput:
        """The base up to the cut of its trunk, without a graph."""
        rows = TrunkOutput(args, kwargs)
        batch = self.inputs(model, "forward", args, kwargs, False).batch
        state = ForwardState(model, model.num_particles, shared_batch=batch, trunk=rows)
        try:
            with torch.no_grad(), state.active():
                model.base(*args, **self._without_cache(model, kwargs))
        except Reached:
            return rows
        raise ValueError("the model did not come to the cut of its trunk")

    def inputs(
        self,
        model: ParticleModel,
        name: str,
        args: tuple,
        kwargs: dict[str, Any],
        per_particle: bool,
    ) -> Inputs:
        every = model.every if per_particle else None
        names, strict = self._names_of(model, name), model.num_particles > 1
        return Inputs(names, args, kwargs, model.batch_axes, every, strict)

    def _batch(
        self,
        model: ParticleModel,
        name: str,
        function: Callable[..., Any],
        inputs: Inputs,
        rows: TrunkOutput | None,
    ) -> Any:
        """All particles in one batch, checked where this form of inputs is new."""
        sharded = _is_sharded(model.base)
        shares = model.has_cut and inputs.particles is None and name != "generate"
        check = None
        cut = model.share_trunk if shares else False
        key = (name, model.training, cut, inputs.form(of_one=not sharded))
        if sharded or (key not in self._checked and not _can_check(model, inputs)):
            _refuse_guesses(model, inputs)
        if key not in self._checked and name != "generate" and _can_check(model, inputs):
            check = IsolationCheck(
                model.base,
                function,
                inputs,
                self._next_particle(model.num_particles),
                model.num_particles,
                model.window.start,
                shares,
                sharded,
            )
        if shares or (model.num_particles == 1 and inputs.particles is None):
            args, kwargs = inputs.args, inputs.kwargs
        else:
            args, kwargs = inputs.folded(range(model.window.start, model.window.stop))
        total = None if model.num_particles == 1 else model.num_particles * inputs.batch
        state = ForwardState(
            model, model.num_particles, total, inputs.batch if shares else None, trunk=rows
        )
        try:
            output = self._called(model, name, state, partial(function, *args, **kwargs))
        except _NOT_OF_THE_BATCH:
            raise
        except Exception as error:
            if check is None or check.failure is not None or check.unknown:
                raise
            raise check.raised(error) from error
        axes = self._checked.get(key)
        if check is not None:
            axes = check.axes(output)
            if check.telling or sharded:
                self._checked[key] = axes
        return _unfolded(model, name, output, inputs, None if name == "generate" else axes)

    def _next_particle(self, particles: int) -> int:
        """The particle to compare, another one for each check; 0 where none would do.

        The rows of the first and the last may be where they would be without the others. Those of
        the one in the middle stay there where a model turns the batch round.
        """
        telling = [k for k in range(1, particles - 1) if 2 * k != particles - 1]
        return telling[len(self._checked) % len(telling)] if telling else 0

    def _loop(
        self,
        model: ParticleModel,
        name: str,
        function: Callable[..., Any],
        args: tuple,
        kwargs: dict[str, Any],
        per_particle: bool,
    ) -> Any:
        """One particle after another, over the same inputs."""
        if torch.compiler.is_compiling() or is_compiled(model.base):
            raise NotImplementedError('fold="loop" does not run under torch.compile')
        inputs = self.inputs(model, name, args, kwargs, True) if per_particle else None
        before = [(t, _version(t)) for t in tensors((args, kwargs))]
        parts: dict[Tensor, tuple[Tensor, ...]] = {}
        outputs = []
        for k in range(model.num_particles):

            def part(parameter: Tensor, k: int = k) -> Tensor:
                if parameter not in parts:
                    parts[parameter] = parameter.split(1)
                return parts[parameter][k]

            def entry(x: Any, k: int = k) -> Any:
                return x[k] if isinstance(x, PerParticle) else x

            mine = (args, kwargs) if inputs is None else inputs.of_particle(model.window.start + k)
            mine = map_leaves(entry, mine)
            run = partial(function, *mine[0], **mine[1])
            outputs.append(self._called(model, name, ForwardState(model, 1, part=part), run))
            if any(_version(t) != version for t, version in before):
                raise ParticleIsolationError(
                    f"{type(model.base).__name__} writes into its input, which the next particle "
                    "reads: let it write into a copy"
                )
        return own_columns(model, stack(outputs))

    def _called(
        self, model: ParticleModel, name: str, state: ForwardState, run: Callable[[], Any]
    ) -> Any:
        """run() while `state` is current; the first forward of a mode checks which layers ran."""
        first = name == "forward" and model.training not in self._ran
        entered: set[nn.Module] = set()
        hooks = []
        if first and not model.training:
            parents = {_parent(model.base, layer) for layer in self._ran.get(True, ())}
            hooks = [p.register_forward_pre_hook(lambda m, _: entered.add(m)) for p in parents]
        try:
            with state.active():
                output = run()
        finally:
            for hook in hooks:
                hook.remove()
        if first:
            self._look_at_layers(model, state.ran, entered)
        for t in tensors(output):
            state.mark(t)
        return output

    def _look_at_layers(
        self, model: ParticleModel, ran: set[nn.Module], entered: set[nn.Module]
    ) -> None:
        """After a mode's first forward, raise where no adapter ran, and warn where some did not."""
        if is_compiled(model.base):  # layers in there do not say that they run
            self._ran[model.training] = set()
            return
        adapters = dict(model.lora_layers())
        layers = adapters | dict(model.stacked_modules())
        names = {name for name, layer in layers.items() if layer in ran}
        base = type(model.base).__name__
        if adapters and not names & adapters.keys():
            raise _AdaptersDoNotRun(
                f"none of the {len(adapters)} adapters ran: {base} reads the weights of "
                f"{', '.join(sorted(adapters)[:3])} instead of calling them, and adapters there "
                "have no effect; choose other target_modules"
            )
        if not model.training:
            trained = self._ran.get(True, set()) - names
            missing = sorted(n for n in trained if _parent(model.base, n) in entered)
            if missing:
                raise _AdaptersDoNotRun(
                    f"{', '.join(missing[:5])} ran in training mode and not in evaluation, where "
                    f"{type(_parent(model.base, missing[0])).__name__} reads the weights instead: "
                    "the adapters would have no effect there; choose other target_modules"
                )
        unused = layers.keys() - names
        if unused and not self._ran:
            warnings.warn(
                f"{len(unused)} of {len(layers)} particle layers did not run in the first forward "
                f"and so have no effect in it: {', '.join(sorted(unused)[:5])}. The model may read "
                "their weights instead of calling them.",
                stacklevel=7,
            )
        self._ran[model.training] = names

    def _look_at_prompts(
        self,
        model: ParticleModel,
        args: tuple,
        kwargs: dict[str, Any],
        per_particle: bool,
        particle: Tensor | Sequence[int] | None = None,
    ) -> None:
        """Check the forward that generation calls. The output of generation cannot be compared,
        because it is as long as the longest answer of all particles."""
        prompts = dict(self._names_of(model, "generate").of(args, kwargs))
        known = self._names_of(model, "forward").order
        if "inputs" in prompts:
            prompts[getattr(model.base, "main_input_name", known[0])] = prompts["inputs"]
        prompts = {n: v for n, v in prompts.items() if n in known and v is not None}
        start = getattr(getattr(model.base, "config", None), "decoder_start_token_id", None)
        first = next((t for t in prompts.values() if isinstance(t, Tensor)), None)
        if first is not None and start is not None and "decoder_input_ids" in known:
            rows = first.shape[: 2 if per_particle else 1]
            answers = torch.full((*rows, 1), start, device=first.device)
            prompts = {"decoder_input_ids": answers} | prompts
        prompts = self._without_cache(model, prompts)
        with torch.no_grad():
            if particle is None:
                self.run(model, "forward", (), prompts, per_particle)
                return
            form = self.inputs(model, "forward", (), prompts, False).form()
            if ("rows", "forward", model.training, form) not in self._checked:
                self.run_rows(model, "forward", (), prompts, particle)

    def _names_of(self, model: ParticleModel, name: str) -> Names:
        if name not in self._names:
            method = _method(model.base, name)
            if isinstance(method, StackedModule):  # copies of the whole base
                method = method.template
            self._names[name] = Names(method.forward if isinstance(method, nn.Module) else method)
        return self._names[name]

    def _without_cache(self, model: ParticleModel, kwargs: dict[str, Any]) -> dict[str, Any]:
        whole = isinstance(model.base, StackedModule)  # vmap returns tensors, which a cache is not
        if (model.training or whole) and "use_cache" in self._names_of(model, "forward").order:
            return {"use_cache": False} | kwargs
        return kwargs


class ParticleView:
    """One particle of a model, which is called as the base is: rows (B, ...) in and out.

    Gradients go to the particle's part of the stacked tensors. Attributes are those of the base,
    whose methods run with this particle's adapters.
    """

    def __init__(self, model: ParticleModel, particle: int):
        self._model, self._particle = model, particle

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._within("forward", self._model.base, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._model.base, name)
        if not callable(value) or isinstance(value, nn.Module):
            return value
        return partial(self._within, name, value)

    def _within(self, name: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self._model._runner.run_one(
            self._model, self._particle, name, function, args, kwargs
        )


def _is_frozen(model: ParticleModel) -> bool:
    """Whether the base runs without particles; raises where another thread runs some of them."""
    if model.thread not in (None, threading.get_ident()):
        raise RuntimeError("another thread runs some of the particles (particle_chunk)")
    state = forward_state.current()
    return state is not None and state.owner is model and state.frozen


def _of(particle: int) -> Callable[[Tensor], Tensor]:
    return lambda p: p[particle : particle + 1]


def _method(base: nn.Module, name: str) -> Callable[..., Any]:
    """The base itself for its forward, so that hooks run; another method by its name or path."""
    if name == "forward":
        return base
    path, _, last = name.rpartition(".")
    module = base.get_submodule(path)
    return module if last == "forward" else getattr(module, last)


def _parent(base: nn.Module, name: str) -> nn.Module:
    return base.get_submodule(name.rpartition(".")[0])


def _can_check(model: ParticleModel, inputs: Inputs) -> bool:
    return (
        model.check_isolation
        and model.num_particles > 1
        and inputs.batch > 0
        and not any(leaf.tensor.is_meta for leaf in inputs.leaves)
        and not inputs.has_cache
        and not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())
        and not is_compiled(model.base)
    )


def _refuse_guesses(model: ParticleModel, inputs: Inputs) -> None:
    """Raise where only its length says that an input has a batch, and no check will follow."""
    if model.num_particles > 1 and inputs.guessed:
        name = inputs.guessed[0]
        raise ValueError(
            f"{name} has the length of the batch, {inputs.batch}, and nothing says whether it is "
            f"one: say so with batch_axes={{{name!r}: 0}} (or None) in get_particle_model"
        )


def _unfolded(
    model: ParticleModel, name: str, output: Any, inputs: Inputs, axes: list[Axis] | None
) -> Any:
    if axes is None or len(axes) != sum(1 for _ in tensors(output)):
        axes = _conventional(model, name, output, model.num_particles * inputs.batch)
    return own_columns(model, unfold(output, axes, model.num_particles))


def _conventional(model: ParticleModel, name: str, output: Any, rows: int) -> list[Axis]:
    """The axis of the rows in every tensor of an output that no check has looked at."""
    if name == "generate":  # any number of answers to a prompt
        return conventional_axes(output, 0, 0)
    return conventional_axes(output, rows, model.output_axes)


def own_columns(model: ParticleModel, output: Any, particle: int | None = None) -> Any:
    """Logits of heads that have widths of their own as K tensors, or as one particle's.

    Logits are the output, an entry of a tuple, or a field "...logits", with as many columns as the
    widest head.
    """
    heads = (m for m in modules_of(model.base) if isinstance(m, StackedModule))
    head = next((m for m in heads if m.widths is not None), None)
    if head is None or head.widths is None:
        return output
    widths, widest = head.widths, head.template.out_features
    names = iter([name for name, _ in named_tensors(output)])

    def cut(t: Tensor) -> Any:
        name = next(names)
        is_logits = not name or name.isdigit() or name.endswith("logits")
        if not is_logits or t.shape[-1:] != (widest,):
            return t
        if particle is not None:
            return t[..., : widths[particle]]
        return [one[..., :width] for one, width in zip(t, widths)]

    return map_tensors(cut, output)


def is_compiled(base: nn.Module) -> bool:
    """Whether torch.compile has the base, or a part of it."""
    return any(
        "_orig_mod" in m._modules or m._compiled_call_impl is not None for m in modules_of(base)
    )


def _is_sharded(base: nn.Module) -> bool:
    """Whether processes run the base together: they must do the same, whatever their data."""
    if not (dist.is_available() and dist.is_initialized()):
        return False
    return any(hasattr(p, "placements") for p in base.parameters())


def _version(t: Tensor) -> int:
    """The counter of writes to a tensor; an inference tensor has none."""
    return 0 if t.is_inference() else t._version
