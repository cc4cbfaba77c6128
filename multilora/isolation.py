"""The isolation check: do K particles in one batch compute what each computes alone?"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from multilora.comparison import Snapshot, distances, own_part
from multilora.fold import Axis, Inputs, map_tensors, named_tensors, tensors
from multilora.forward_state import ForwardState
from multilora.layers import lora_layers
from multilora.randomness import RandomState, WithoutRandomness
from multilora.walk import evaluating

#: How many particles run where their adapters are moved apart.
_SEVERAL = 4


class ParticleIsolationError(ValueError):
    """The model's outputs for K particles in one batch differ from those for each particle alone.

    The cure is fold="loop", or axes that are given with batch_axes.
    """


class _Run(NamedTuple):
    """The output of a call of some particles, and the modules' state after it."""

    output: Any
    snapshot: Snapshot


class IsolationCheck:
    """One check of one call: it runs before the call, and `axes` then looks at the call's output.

    The model runs for `particle` alone, from the random state of the call, and must give that
    particle's part of the call's output. That would not show a mixture where the model draws random
    numbers, or where the adapters are still equal. Then four particles with adapters moved apart
    run on a few of the rows without randomness, and one of them runs alone. Where constants in
    place of the random numbers may hide what the numbers do (choose rows to mix), the four run
    twice with the numbers: no particle may change with the adapters of the others.

    Args:
        base, function, inputs: the model, its method, and the arguments of the call.
        particle: a particle whose place in the call's output would show a mixture; 0 where none
            would, see `Runner`.
        particles: how many particles run in the call.
        first: the place of the first of them in inputs with a particle axis.
        shared: whether the call has a shared trunk, without which the particle alone runs.
        sharded: whether other processes run along, so that nothing may depend on the data.
    """

    def __init__(
        self,
        base: nn.Module,
        function: Callable[..., Any],
        inputs: Inputs,
        particle: int,
        particles: int,
        first: int,
        shared: bool,
        sharded: bool = False,
    ):
        self.base, self.function, self.inputs = base, function, inputs
        self.particle, self.particles, self.first = particle, particles, first
        self.shared, self.sharded = shared, sharded
        self.devices = list({p.device: None for p in base.parameters()})
        self.random, self.snapshot = RandomState(self.devices), Snapshot(base)
        #: Whether the rows were such that a mixture of them would have shown.
        self.telling = not inputs.is_uniform()
        #: Whether the check could not be made.
        self.unknown = False
        self.failure: Exception | None = None
        self._alone: _Run | None = None
        self._axes: list[Axis] | None = None
        self._names = {module: name for name, module in base.named_modules()}
        try:
            self._run()
        except (torch.OutOfMemoryError, ParticleIsolationError):
            raise
        except Exception as error:
            # The call raises it too, where it is the model's own.
            self.failure = error
        finally:
            self._restore()

    @torch.no_grad()
    def axes(self, output: Any) -> list[Axis] | None:
        """The axis of the particles in every tensor of the call's output; None if unknown.

        Raises:
            ParticleIsolationError: the model mixes particles.
        """
        if self.failure is not None:
            raise self._error(
                f"the model runs for {self.particles} particles together, and for one alone it "
                f"raises {type(self.failure).__name__}: {self.failure}"
            ) from self.failure
        if self._alone is not None and self._drew():
            # One particle alone drew nothing, because there is nothing to choose among its rows.
            self._alone = None
            with self._before_the_call():
                self._compare_beside_others()
        if self._axes is None:
            if self._alone is None:
                return None
            call = _Run(output, Snapshot(self.base))
            return self._judge(call, self._alone, self.particles, self.particle, self.inputs.batch)
        fitted = []
        for axis, (name, t) in zip(self._axes, named_tensors(output), strict=True):
            if isinstance(axis, int) and (t.ndim <= axis or t.shape[axis] % self.particles):
                raise self._error(f"output {name!r} has no place for particles: {tuple(t.shape)}")
            fitted.append(axis)
        return fitted

    @property
    def axes_of_rows(self) -> list[Axis] | None:
        """The axis of the rows in every tensor of an output; None where the check does not know."""
        return self._axes

    def raised(self, error: Exception) -> ParticleIsolationError:
        """The error to raise where the call raised, and one particle alone did not."""
        return self._error(
            f"the model runs for one particle alone, and for several together it raises "
            f"{type(error).__name__}: {error}"
        )

    @torch.no_grad()
    def _run(self) -> None:
        if self.particle > 0 and not self._all_equal():
            alone = self._run_alone()
            if not self._drew():
                self._alone = alone
                return
            self._restore()
        elif self._is_compared(contextlib.nullcontext()):
            return
        held = WithoutRandomness()
        known = self._is_compared(held)
        if known and not held.guessed:
            return
        if not known and self.base.training:
            with evaluating(self.base):
                self._is_compared(held)
        self._compare_beside_others()

    def _is_compared(self, quiet: contextlib.AbstractContextManager) -> bool:
        """Compare one particle with itself beside others, on a few rows.

        Returns:
            False where random numbers were drawn, so that the comparison says nothing.
        """
        with quiet:
            alone = self._run_alone(self._part(), self._few_rows())
            if self._drew():
                self._restore()
                return False
            self._restore()
            try:
                several = self._run_several()
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                raise self.raised(error) from error
            drew = self._drew()
            if not drew:
                self._axes = self._judge(several, alone, _SEVERAL, 1, len(self._few_rows()))
        self._restore()
        return not drew

    def _compare_beside_others(self) -> None:
        """Compare a particle with itself beside others that are moved, random numbers the same."""
        start, rows = self.random, self._few_rows(4)
        try:
            # Often enough that rows chosen at random are hardly ever the particle's own each time.
            for _ in range(4 // len(rows) or 1):
                alone = self._run_alone(self._part(), rows)
                self._restore()
                run = self._run_several(rows=rows)
                later = RandomState(self.devices)
                self._axes = self._places(run, alone, _SEVERAL, len(rows))
                if not self._is_repeated(run, rows, other=1) and not self.sharded:
                    if self._is_repeated(run, rows, other=0):
                        raise self._error("a particle changes with the adapters of the others")
                    self._give_up()
                    return
                self.random = later
        finally:
            self.random = start
            self._restore()

    def _is_repeated(self, run: _Run, rows: Tensor, other: int) -> bool:
        """Whether a particle comes out as in `run`, with the same random numbers."""
        self._restore()
        again = self._run_several(other, rows)
        self._restore()
        assert self._axes is not None
        return self._is_same(run, again, self._axes, _SEVERAL, 1)

    def _give_up(self) -> None:
        self.telling, self.unknown, self._axes = False, True, None
        warnings.warn(
            f"{type(self.base).__name__} draws random numbers that cannot be held, so it was not "
            "checked that its particles do not mix",
            stacklevel=8,
        )

    def _drew(self) -> bool:
        """Whether random numbers were drawn since the call began."""
        return self.random != RandomState(self.devices)

    def _all_equal(self) -> bool:
        """Whether no adapter tells two particles apart, as at the start."""
        factors = (layer.lora_B for _, layer in lora_layers(self.base))
        return all(bool((B - B[:1] == 0).all()) for B in factors)

    # --- the runs ---

    def _run_alone(self, part=None, rows: Tensor | None = None) -> _Run:
        k = self.particle
        part = (lambda p: p[k : k + 1]) if part is None else (lambda p, moved=part: moved(p)[1:2])
        return self._call(
            self.inputs.of_particle(self.first + k, rows), ForwardState(None, 1, part=part)
        )

    def _run_several(self, other: int = 0, rows: Tensor | None = None) -> _Run:
        rows, some = self._few_rows() if rows is None else rows, self._several()
        if self.shared:
            inputs = self.inputs.of_particle(self.first + some[1], rows)
        else:
            inputs = self.inputs.folded([self.first + k for k in some], rows)
        batch = len(rows) if self.shared else None
        state = ForwardState(None, _SEVERAL, _SEVERAL * len(rows), batch, self._part(other))
        return self._call(inputs, state)

    def _run_all(self, part: Callable[[Tensor], Tensor] | None = None) -> _Run:
        which = range(self.first, self.first + self.particles)
        rows = self.particles * self.inputs.batch
        if self.shared:
            inputs, batch = self.inputs.of_particle(self.first), self.inputs.batch
        else:
            inputs, batch = self.inputs.folded(which), None
        return self._call(inputs, ForwardState(None, self.particles, rows, batch, part))

    def _call(self, inputs: tuple[tuple, dict], state: ForwardState) -> _Run:
        # Copies: the model may write into them.
        args, kwargs = map_tensors(Tensor.clone, inputs)
        with torch.no_grad(), state.active():
            return _Run(self.function(*args, **kwargs), Snapshot(self.base))

    def _restore(self) -> None:
        self.random.restore()
        self.snapshot.restore()
        torch.clear_autocast_cache()

    @contextlib.contextmanager
    def _before_the_call(self) -> Iterator[None]:
        """Inside, random numbers and modules are as they were before the call."""
        before, now = (
            (self.random, self.snapshot),
            (RandomState(self.devices), Snapshot(self.base)),
        )
        self._restore()
        try:
            yield
        finally:
            self.random, self.snapshot = now
            self._restore()
            self.random, self.snapshot = before

    def _several(self) -> tuple[int, ...]:
        """The particle to compare, in the second place, with others before and behind it."""
        k, n = self.particle, self.particles
        return (k + 1) % n, k, (k - 1) % n, (k + 2) % n

    def _part(self, other: int = 0) -> Callable[[Tensor], Tensor]:
        """A function to the tensors (4, ...) of `_several`, moved apart.

        Args:
            other: 0 or 1, two ways to move the other three particles.
        """
        scaling: dict[Tensor, float] = {m.lora_B: m.scaling for _, m in lora_layers(self.base)}

        @functools.cache
        def part(parameter: Tensor) -> Tensor:
            some = parameter[list(self._several())]
            if parameter not in scaling:
                return some
            # Irregular numbers that no generator draws.
            noise = torch.arange(1, 1 + some[0].numel(), dtype=torch.float64).outer(
                torch.tensor(
                    (78.233, 39.346, 91.719, 63.7264)
                    if other
                    else (12.9898, 39.346, 57.131, 27.1828),
                    dtype=torch.float64,
                )
            )
            noise = noise.sin().mT.reshape(some.shape).to(some)
            if other:
                # Another size changes whatever the model computes over all rows.
                noise[[0, 2, 3]] *= 0.25
            # With A at its usual start, B·A is then as large as the frozen product.
            return some + noise / (abs(scaling[parameter]) or 1.0) / parameter.shape[-1] ** 0.5

        return part

    def _others(self) -> Callable[[Tensor], Tensor]:
        """A function to all particles' tensors, with the others moved as `_part` moves them."""
        part = self._part()

        @functools.cache
        def moved(parameter: Tensor) -> Tensor:
            others = (parameter + (part(parameter)[0] - parameter[self._several()[0]])).detach()
            others[self.particle] = parameter[self.particle].detach()
            return others

        return moved

    def _few_rows(self, least: int = 2) -> Tensor:
        batch = self.inputs.batch
        few = min(batch, max(least, batch // (_SEVERAL + 2)))
        return torch.arange(few) * batch // max(few, 1)

    # --- the comparison ---

    def _judge(self, many: _Run, one: _Run, n: int, particle: int, batch: int) -> list[Axis]:
        """The axis of n particles in every tensor of `many`; raises where the rows of `particle`
        differ from those in `one`, where it is alone with its batch."""
        axes = self._places(many, one, n, batch)
        apart = [
            (distances(*own_part(a, b, axis, n, particle), axis), name)
            for (name, a), b, axis in zip(named_tensors(many.output), tensors(one.output), axes)
            if a.ndim  # a scalar such as `.loss` is a mean over all particles
        ]
        for (worst, typical), name in apart:
            # In half precision a router may send a row to another expert, but not most rows.
            gross = typical > self._most if self._is_rough else worst > self._most
            if gross or (worst > self._least and not self._is_rounding(many, axes, n, particle)):
                raise self._error(f"output {name!r} differs by {worst:.2g} of its size")
        changed = many.snapshot.difference(one.snapshot, self._least)
        if changed is not None:
            name = f"{self._names[changed[0]]}.{changed[1]}".strip(".")
            raise self._error(f"{name} is a state that the rows of all particles change together")
        return axes

    def _places(self, many: _Run, one: _Run, n: int, batch: int) -> list[Axis]:
        """The axis of n particles in every tensor of `many`; raises where they have none."""
        axes: list[Axis] = []
        names = [name for name, _ in named_tensors(many.output)]
        if names != [name for name, _ in named_tensors(one.output)]:
            raise self._error("the output of one particle alone has other fields")
        for name, a, b in zip(names, tensors(many.output), tensors(one.output)):
            try:
                axes.append(self._axis(a, b, n, batch))
            except LookupError:
                raise self._error(
                    f"output {name!r} is {tuple(a.shape)} for {n} particles with a batch of "
                    f"{batch} each, and {tuple(b.shape)} for one"
                ) from None
        if all(axis is None for axis in axes):
            raise self._error("no output has rows for every particle")
        return axes

    def _axis(self, many: Tensor, one: Tensor, n: int, batch: int) -> Axis:
        """The axis of n particles in `many`. Raises LookupError where it has none."""
        if many.shape == one.shape:
            is_rows = self.shared and many.ndim > 0 and many.shape[0] == batch
            return "same" if is_rows else None
        if many.ndim == one.ndim:
            differ = [i for i, (a, b) in enumerate(zip(many.shape, one.shape)) if a != b]
            if len(differ) == 1 and many.shape[differ[0]] == n * one.shape[differ[0]]:
                return differ[0]
        raise LookupError

    @functools.cached_property
    def _eps(self) -> float:
        """The relative rounding of the least exact dtype that the model computes with."""
        dtypes = {p.dtype for p in self.base.parameters() if p.dtype.is_floating_point}
        dtypes |= {leaf.tensor.dtype for leaf in self.inputs.leaves} | {torch.float32}
        for kind in {d.type for d in self.devices}:
            if torch.is_autocast_enabled(kind):
                dtypes.add(torch.get_autocast_dtype(kind))
        # Tensor cores round float32 to 11 bits.
        rough = 2.0**-11 if any(d.type not in ("cpu", "meta") for d in self.devices) else 0.0
        return max(rough, *(torch.finfo(d).eps for d in dtypes if d.is_floating_point))

    @property
    def _is_rough(self) -> bool:
        return self._eps > torch.finfo(torch.float32).eps

    @property
    def _least(self) -> float:
        """The difference of a row that rounding explains; beyond it, `_is_rounding` decides."""
        return min(100 * self._eps, 2e-3)

    @property
    def _most(self) -> float:
        return 0.1 if self._is_rough else 1e-3

    def _is_rounding(self, many: _Run, axes: list[Axis], n: int, particle: int) -> bool:
        """Whether a particle stays the same beside others that are moved. The very same kernels
        run, so that the smallest mixture shows."""
        if self.sharded:
            return True
        with self._before_the_call():
            again = self._run_several(1) if self._alone is None else self._run_all(self._others())
        return self._is_same(many, again, axes, n, particle)

    def _is_same(self, one: _Run, two: _Run, axes: list[Axis], n: int, particle: int) -> bool:
        """Whether that particle's rows are the same in both."""
        for axis, a, b in zip(axes, tensors(one.output), tensors(two.output)):
            if a.shape != b.shape:
                return False
            if isinstance(axis, int):
                a, b = (t.unflatten(axis, (n, -1)).select(axis, particle) for t in (a, b))
                if distances(a, b, axis)[0] > self._least / 4:
                    return False
        return True

    def _error(self, what: str) -> ParticleIsolationError:
        return ParticleIsolationError(
            f"{type(self.base).__name__} does not keep its particles apart: {what.rstrip('.')}"
            f"{self._first_difference()}. Particles ride on the batch axis. If an input has its "
            "batch elsewhere or none, say so with batch_axes={name: axis or None}; else use "
            'fold="loop", which runs one particle after another and is right for any model. '
            "check_isolation=False switches this check off"
        )

    def _first_difference(self) -> str:
        """The module where the difference begins, for the message."""
        seen: list[tuple[nn.Module, list[Tensor]]] = []
        found: list[str] = []
        few = self._axes is not None or self._alone is None

        def record(module: nn.Module, args: tuple, output: Any) -> None:
            seen.append((module, [t.detach() for t in tensors(output)]))

        def compare(module: nn.Module, args: tuple, output: Any) -> None:
            if found:
                return
            expected, of_one = next(one, (None, []))
            name = f"; first at {self._names[module] or 'the model'} ({type(module).__name__})"
            if expected is not module:
                found.append(name)
                return
            for a, b in zip(tensors(output), of_one):
                try:
                    axis = self._axis(a, b, n, batch)
                except LookupError:
                    differs = True
                else:
                    differs = distances(*own_part(a, b, axis, n, k), axis)[0] > self._least
                if differs:
                    found.append(f"{name}: {tuple(a.shape)} together, {tuple(b.shape)} alone")
                    return

        n, k = (_SEVERAL, 1) if few else (self.particles, self.particle)
        batch = len(self._few_rows()) if few else self.inputs.batch
        quiet = contextlib.nullcontext() if not few else WithoutRandomness()
        with contextlib.suppress(Exception), quiet:
            self._restore()
            with _watching(self._names, record):
                self._run_alone(*((self._part(), self._few_rows()) if few else ()))
            one = iter(seen)
            self._restore()
            with _watching(self._names, compare):
                self._run_several() if few else self._run_all()
        self._restore()
        return found[0] if found else ""


@contextlib.contextmanager
def _watching(modules: dict[nn.Module, str], hook: Callable[..., None]) -> Iterator[None]:
    handles = [module.register_forward_hook(hook) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
