"""The loop of `fit_many`: runs that share every pass, each at its own pace."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from multilora import particle_folders, peft_tensors
from multilora.attach import get_particle_model
from multilora.many.active import Active, decayed
from multilora.many.data import Batches
from multilora.many.evaluation import evaluate
from multilora.many.labels import StepMeans
from multilora.many.progress import Bars
from multilora.many.runs import Planned
from multilora.many.table import Results, Row, best
from multilora.methods import Independent
from multilora.optim import ParticleAdamW, clip_grad_norm_
from multilora.randomness import RandomState
from multilora.run import is_compiled
from multilora.slots import check_heads
from multilora.targets import check_plain, resolve_each

#: Errors that are of the machine, and of no run.
_OF_ALL = (torch.OutOfMemoryError, MemoryError)


class Sweep:
    """The runs of `fit_many`, their model, and where they are.

    Attributes:
        active: the runs that are under way, by the particle that they have the place of.
        rows: of the runs that have ended, by number.
        history: (place, number) of every run that has begun, in order.
    """

    def __init__(
        self,
        base: nn.Module,
        plans: Sequence[Planned],
        at_once: int,
        out: Path | None,
        keep: int | None,
        particle_chunk: int | None,
        options: Mapping[str, Any],
    ):
        self.plans, self.at_once, self.out, self.keep = list(plans), at_once, out, keep
        first = self.plans[:at_once]
        self.model = _model(base, first, options).train()
        self.method = Independent(
            self.model,
            losses=[plan.run.loss for plan in first],
            names=[plan.name for plan in first],
            particle_chunk=particle_chunk,
            nonfinite="skip",
        )
        self.method._tell = lambda _: None  # the table says it
        self._apart: set[int] = set()  # the runs that are known not to share a pass
        self.means = StepMeans(self.model)
        self.active: dict[int, Active] = {}
        self.rows: dict[int, Row] = {}
        self.history: list[tuple[int, int]] = []
        groups = [group for k, plan in enumerate(first) for group in self._groups(k, plan)]
        self.optimizer = ParticleAdamW(groups)
        for k in range(len(first)):
            self.history.append((k, k))
            try:
                self._begin(k, k)
            except Exception as error:
                self.cannot_begin(k, error)

    def run(self, bars: Bars, save: Callable[[], None] | None, save_every: int) -> None:
        """Train until all runs have ended.

        Args:
            save: is called whenever a run has ended, and after every `save_every` passes.
        """
        passes = 0
        while self.active:
            ended = len(self.rows)
            self._pass(bars)
            passes += 1
            if save is not None and (passes % save_every == 0 or len(self.rows) > ended):
                save()

    def results(self) -> Results:
        """The rows of the runs that have ended, in the runs' order."""
        return Results([self.rows[number] for number in sorted(self.rows)])

    def place(self, particle: int, number: int) -> None:
        """Give a particle's place to a run.

        Raises:
            Exception: the run does not fit the base, or cannot begin.
        """
        plan = self.plans[number]
        run = plan.run
        self.model.replace_particle(particle, run.config, plan.arguments.seed, run.heads)
        self.history.append((particle, number))
        assert self.method.names is not None
        self.method.names[particle] = plan.name
        self.method.losses[particle] = self.method.named_loss(particle, run.loss)
        self.optimizer.replace(particle, self._groups(particle, plan))
        self._begin(particle, number)

    def _begin(self, particle: int, number: int) -> None:
        from transformers import get_scheduler

        plan = self.plans[number]
        arguments = plan.arguments
        active = Active(plan, number, Batches(plan.run, arguments, self.model.base))
        active.schedule = get_scheduler(
            arguments.lr_scheduler_type,
            self.optimizer.of(particle),
            num_warmup_steps=arguments.warmup(active.steps),
            num_training_steps=active.steps,
            scheduler_specific_kwargs=arguments.lr_scheduler_kwargs,
        )
        self.active[particle] = active

    def cannot_begin(self, number: int, error: Exception) -> None:
        """Tell in the table why a run has not begun."""
        self.rows[number] = Row(self.plans[number].name, "failed", error=_told(error))

    def _groups(self, particle: int, plan: Planned) -> list[dict[str, Any]]:
        """Trainer's groups of the particle's parameters: decayed, not decayed."""
        arguments = plan.arguments
        # One group is faster than two.
        decays = decayed(self.model) if arguments.weight_decay else set()
        leaves = self.method.parameters_of(particle)
        common = {
            "lr": arguments.learning_rate,
            "betas": (arguments.adam_beta1, arguments.adam_beta2),
            "eps": arguments.adam_epsilon,
        }
        parts = [
            ([p for p in leaves if id(p.stacked) in decays], arguments.weight_decay),
            ([p for p in leaves if id(p.stacked) not in decays], 0.0),
        ]
        return [{"params": p, "weight_decay": decay, **common} for p, decay in parts if p]

    def _pass(self, bars: Bars) -> None:
        """A micro-batch of every run that is under way."""
        started = time.perf_counter()
        there = list(self.active.values())
        batches: dict[int, Any] = {}
        for k, active in list(self.active.items()):
            try:
                batches[k] = active.next_batch(self._items_of(active))
            except Exception as error:  # whatever a dataset raises is that run's
                self._failed(k, error)
        answered = self._attempt(self._backward, batches) if batches else {}
        stepping = [k for k, a in self.active.items() if k in answered and a.ran(*answered[k])]
        self._step(stepping)
        seconds = time.perf_counter() - started
        for active in there:
            active.seconds += seconds
        for k in stepping:
            active = self.active[k]
            bars.step(active.name, active.step, active.steps, active.step_loss)
        self._look(stepping, bars)
        self._fill()

    def _attempt(
        self, call: Callable[[dict[int, Any]], dict[int, Any]], batches: dict[int, Any]
    ) -> dict[int, Any]:
        """call(batches), or of each of them alone where that raises: it names no run surely."""
        before = RandomState(self.model.devices())
        try:
            return call(batches)
        except _OF_ALL:
            raise
        except Exception as error:
            if len(batches) == 1:
                self._failed(next(iter(batches)), error)
                return {}
            why = _told(error)
        answered: dict[int, Any] = {}
        for k, batch in batches.items():
            before.restore()
            answered |= self._attempt(call, {k: batch})
        if len(answered) == len(batches):  # else it was the one that failed
            self._warn_of(batches, why)
        return answered

    def _warn_of(self, particles: Collection[int], why: str) -> None:
        """Warn, once for each run, that it cannot share a pass with others."""
        runs = [self.active[k] for k in particles if self.active[k].number not in self._apart]
        self._apart |= {active.number for active in runs}
        if runs:
            names = ", ".join(repr(active.name) for active in runs)
            warnings.warn(
                f"fit_many: the batches of the runs {names} cannot share a pass, so they run one "
                f"after another, which is slower: {why}",
                stacklevel=2,
            )

    def _backward(self, batches: dict[int, Any]) -> dict[int, tuple[float, int]]:
        """Gradients of the batches -> the weighted loss and the number of rows of each."""
        scales = [0.0] * self.at_once
        for k, batch in batches.items():
            own_loss = self.active[k].planned.run.loss is not None
            scales[k] = self.active[k].scale(not own_loss and self.means.sums_means(batch))
        items = {k: self.active[k].items for k in batches}
        self.method.backward(batches, scales, items)
        assert self.method.particle_loss is not None
        losses = self.method.particle_loss.tolist()
        for k in self.method.skipped:
            where = f"step {self.active[k].step + 1}"
            self._failed(k, FloatingPointError(f"the loss or gradient of {where} is not finite"))
        rows = self.method.rows
        return {k: (losses[k] * scales[k], rows[k]) for k in batches if k in self.active}

    def _items_of(self, active: Active) -> Callable[[list[Any]], float | None]:
        """How the labels of a run's step are counted: not at all for a loss of its own."""
        return self.means.items if active.planned.run.loss is None else lambda _: None

    def _step(self, stepping: Sequence[int]) -> None:
        if not stepping:
            return
        limits = [math.inf] * self.at_once
        for k in stepping:
            limits[k] = self.active[k].arguments.max_grad_norm or math.inf
        if min(limits) < math.inf:
            clip_grad_norm_(self.model, limits)
        self.optimizer.step(particles=stepping)
        self.optimizer.zero_grad(particles=stepping)
        for k in stepping:
            self.active[k].schedule.step()

    def _look(self, stepping: Sequence[int], bars: Bars) -> None:
        """Evaluate the runs that are due after a step, and end those that are at their end."""
        at_end = [k for k in stepping if self.active[k].step == self.active[k].steps]
        due = [
            k
            for k in stepping
            if self.active[k].is_due_for_evaluation()
            or (k in at_end and self.active[k].planned.run.eval_dataset is not None)
        ]
        self._measure(due)
        for k in stepping:
            if k not in self.active:
                continue
            if k in at_end:
                self._end(k, "finished", bars)
            elif self.active[k].is_out_of_patience:
                self._end(k, "stopped early", bars)

    def _measure(self, due: Sequence[int]) -> None:
        if not due:
            return
        runs = {k: self.active[k] for k in due}
        for k, measures in evaluate(self.method, runs, self._attempt, self._failed).items():
            active = self.active[k]
            try:
                is_best = active.measured(measures)
            except ValueError as error:
                self._failed(k, error)
                continue
            if is_best and active.arguments.load_best_model_at_end:
                leaves = self.method.parameters_of(k)
                active.best_parameters = [p.detach().clone() for p in leaves]

    @torch.no_grad()
    def _end(self, k: int, status: str, bars: Bars) -> None:
        """A run has reached its end: keep its adapter, if it is among the best."""
        active = self.active.pop(k)
        if active.best_parameters is not None:
            for p, value in zip(self.method.parameters_of(k), active.best_parameters):
                p.copy_(value)
        row = self.rows[active.number] = active.row(status)
        if self.out is None:
            tensors = peft_tensors.of_particle(
                self.model.base,
                k,
                peft_tensors.of_all_processes(self.model.base, self.model.processes),
            )
            row.adapter = {name: t.detach().cpu().clone() for name, t in tensors.items()}
        else:
            folder = self.out / active.name
            self.model.save_particle(k, folder)
            row.folder = active.name
        self._keep_the_best()
        bars.end(active.name, status)

    def _keep_the_best(self) -> None:
        if self.keep is None:
            return
        kept = best(list(self.rows.values()), self.plans[0].arguments.greater)[: self.keep]
        for row in self.rows.values():
            if row.metric is None or any(row is one for one in kept):
                continue
            row.adapter = None
            if self.out is not None and row.folder is not None:
                row.folder = None
                particle_folders.remove_one(self.out / row.name)

    def _failed(self, k: int, error: Exception) -> None:
        """A run has failed: it leaves, with what it was about to add to its gradient."""
        active = self.active.pop(k)
        self.rows[active.number] = active.row("failed", _told(error))
        self.optimizer.zero_grad(particles=[k])

    def _fill(self) -> None:
        """Give free places to the runs that wait."""
        for k in range(self.at_once):
            while k not in self.active:
                number = 1 + max([n for _, n in self.history] + list(self.rows))
                if number >= len(self.plans):
                    break
                try:
                    self.place(k, number)
                except _OF_ALL:
                    raise
                except Exception as error:
                    self.cannot_begin(number, error)


def check_configurations(base: nn.Module, plans: Sequence[Planned]) -> None:
    """Raise ValueError, TypeError or NotImplementedError where the adapter of a run does not fit
    the base by itself; the message names the run."""
    if is_compiled(base):
        raise NotImplementedError("fit_many does not run a compiled base")
    check_plain(base)
    saved: dict[str, Mapping[str, Sequence[bool]]] = {}
    for plan in plans:
        heads = {name: [entry] for name, entry in (plan.run.heads or {}).items()}
        try:
            if plan.adapter not in saved:
                saved[plan.adapter] = resolve_each(base, [plan.run.config]).saved
            own = saved[plan.adapter]
            check_heads({name: base.get_submodule(name) for name in own}, own, heads)
        except (ValueError, TypeError, NotImplementedError) as error:
            raise type(error)(f"run {plan.name!r}: {error}") from error


def _model(base: nn.Module, plans: Sequence[Planned], options: Mapping[str, Any]) -> Any:
    """The model of the first runs. An error says which particle is whose."""
    heads: dict[str, list[Any]] = {}
    for k, plan in enumerate(plans):
        for name, entry in (plan.run.heads or {}).items():
            heads.setdefault(name, [None] * len(plans))[k] = entry
    try:
        return get_particle_model(
            base,
            [plan.run.config for plan in plans],
            seed=[plan.arguments.seed for plan in plans],
            heads=heads or None,
            **options,
        )
    except (ValueError, TypeError, NotImplementedError) as error:
        names = ", ".join(f"{k} is of run {plan.name!r}" for k, plan in enumerate(plans))
        raise type(error)(f"{error} (particle {names})") from error


def _told(error: Exception) -> str:
    """An error as the table has it."""
    return f"{type(error).__name__}: {error}"
