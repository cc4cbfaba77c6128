"""AdamW for K particles, each with its own settings, at its own pace."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from multilora import checks
from multilora.gradients import clear_gradients, without_gradient
from multilora.separate import SeparateParameter, separate_parameters


def groups_of_particles(groups: Any, what: str) -> dict[int, list[dict[str, Any]]]:
    """The parameter groups of each particle.

    Args:
        groups: a ParticleModel, separate parameters, or groups of these.
        what: what needs them, for messages.

    Raises:
        TypeError: the parameters are not separate ones.
    """
    if isinstance(groups, nn.Module):
        groups = separate_parameters(groups)
    groups = list(groups)
    if not groups or not isinstance(groups[0], dict):
        groups = [{"params": groups}]
    leaves = [leaf for group in groups for leaf in group["params"]]
    if not leaves or not all(isinstance(leaf, SeparateParameter) for leaf in leaves):
        kinds = sorted({type(leaf).__name__ for leaf in leaves})
        raise TypeError(f"{what} needs a non-empty list of separate parameters; got {kinds}")
    found: dict[int, list[dict[str, Any]]] = {}
    for k in sorted({leaf.particle for leaf in leaves}):
        of_k = [[p for p in group["params"] if p.particle == k] for group in groups]
        found[k] = [g | {"params": p} for g, p in zip(groups, of_k) if p]
    return found


@dataclass
class _Entry:
    """A stacked tensor: one of its leaves, the group of each particle in it, and the means.

    missed: in how many of a particle's steps it had no gradient here; they do not count.
    """

    leaf: SeparateParameter
    groups: dict[int, dict[str, Any]]
    exp_avg: Tensor
    exp_avg_sq: Tensor
    missed: dict[int, int] = field(default_factory=dict)
    # The particles' parts of the tensor and of its means: views, kept from step to step.
    _parts: list[tuple[Tensor, ...]] = field(default_factory=list)

    @classmethod
    def of(cls, leaf: SeparateParameter, before: _Entry | None) -> _Entry:
        """The entry of a leaf's stacked tensor, with the means that it had before, or zeros."""
        stacked = leaf.stacked.detach()
        if before is None:
            return cls(leaf, {}, torch.zeros_like(stacked), torch.zeros_like(stacked))
        before.follow(stacked)
        return cls(leaf, {}, before.exp_avg, before.exp_avg_sq, before.missed)

    def follow(self, stacked: Tensor) -> None:
        """Make the means those of the tensor, which has moved to another device or has grown."""
        if self.exp_avg.shape == stacked.shape and self.exp_avg.device == stacked.device:
            return
        for name in ("exp_avg", "exp_avg_sq"):
            old, new = getattr(self, name), torch.zeros_like(stacked.detach())
            new[tuple(slice(0, n) for n in old.shape)] = old.to(new)
            setattr(self, name, new)

    def parts(self) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Each particle's part of the tensor, of its gradient, and of its means."""
        stacked = self.leaf.stacked
        assert stacked.grad is not None
        self.follow(stacked)
        columns = (stacked, self.exp_avg, self.exp_avg_sq)
        same = self._parts and all(
            p[0].data_ptr() == t.data_ptr() for p, t in zip(self._parts, columns)
        )
        if not same:
            self._parts = [t.unbind(0) for t in columns]
        params, *means = self._parts
        return list(zip(params, stacked.grad.unbind(0), *means))


class ParticleAdamW(Optimizer):
    """K times torch.optim.AdamW in one, each over the parameters of one particle.

    Steps are those of torch.optim.AdamW, up to rounding, at each particle's own learning rate,
    decay, betas and ε; each counts its own steps. `param_groups` has one group, or some, for each
    particle, with its number as "particle". A scheduler for one particle is made over `of(k)`:

        optimizer = ParticleAdamW(model, lr=1e-3)
        schedules = [CosineAnnealingLR(optimizer.of(k), steps[k]) for k in range(K)]
        ...
        optimizer.of(k).step()           # when particle k is due
        schedules[k].step()
        optimizer.of(k).zero_grad()

    Args:
        groups: a ParticleModel, separate parameters (`model.particle_parameters(separate=True)`),
            or parameter groups of these, with options.
        lr, betas, eps, weight_decay: as in torch.optim.AdamW, but that ε > 0; for groups without
            their own.

    Raises:
        TypeError, ValueError: the parameters are not separate ones, or a number is out of range.
    """

    def __init__(
        self,
        groups: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ):
        each = groups_of_particles(groups, "ParticleAdamW")
        self._entries: list[_Entry] = []
        self._steps: dict[int, Tensor] = {}
        self._parts: dict[int, _OfOne] = {}
        options = {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay}
        super().__init__([g | {"particle": k} for k, of_k in each.items() for g in of_k], options)
        self._find()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        given = self.defaults | param_group
        checks.number("lr", given["lr"], 0)
        checks.number("eps", given["eps"], 0, open_low=True)
        checks.number("weight_decay", given["weight_decay"], 0)
        for beta in given["betas"]:
            checks.number("betas", beta, 0, 1, open_high=True)
        if "particle" not in given:
            raise TypeError("ParticleAdamW takes its parameters when it is made; see replace")
        super().add_param_group(param_group)

    def of(self, particle: int) -> Optimizer:
        """The optimizer of one particle, for its schedule and its steps. It shares the groups."""
        if particle not in self._steps:
            raise ValueError(f"there are the particles {sorted(self._steps)}; got {particle!r}")
        if particle not in self._parts:
            self._parts[particle] = _OfOne(self, particle)
        return self._parts[particle]

    def replace(self, particle: int, groups: Any, **options: Any) -> None:
        """Forget a particle's state and gradient, and take other parameters for it.

        Call it after `model.replace_particle`. What the optimizer knows of the others stays, also
        where the stacked tensors have grown.

        Args:
            particle: k.
            groups: the parameters of that particle (`Independent.parameters_of(k)`), or groups.
            options: for groups without their own; those of the optimizer by default.

        Raises:
            TypeError, ValueError: the parameters are another particle's, or a number is out of
                range; nothing is changed then.
        """
        each = groups_of_particles(groups, "ParticleAdamW")
        if set(each) != {particle} or particle not in self._steps:
            raise ValueError(f"these are parameters of {sorted(each)}; particle {particle} is due")
        before = list(self.param_groups)
        kept = [g for g in before if g["particle"] != particle]
        self.param_groups[:] = kept
        try:
            for group in each[particle]:
                self.add_param_group(options | group | {"particle": particle})
        except Exception:
            self.param_groups[:] = before
            raise
        self.param_groups.sort(key=lambda group: group["particle"])
        self._steps[particle].zero_()
        self._parts.pop(particle, None)
        self._find()
        for entry in self._entries:
            entry.exp_avg[particle].zero_()
            entry.exp_avg_sq[particle].zero_()
            entry.missed.pop(particle, None)
        self.zero_grad(particles=[particle])

    def _find(self) -> None:
        """Find the stacked tensors of all leaves; their means are kept where there are any."""
        before = {id(e.leaf.stacked): e for e in self._entries}
        found: dict[int, _Entry] = {}
        for group in self.param_groups:
            for leaf in group["params"]:
                stacked = leaf.stacked
                if id(stacked) not in found:
                    found[id(stacked)] = _Entry.of(leaf, before.get(id(stacked)))
                found[id(stacked)].groups[leaf.particle] = group
            self._steps.setdefault(group["particle"], torch.zeros(()))
        self._entries = list(found.values())

    # Optimizer.step may be given a closure.
    @torch.no_grad()
    def step(self, closure: None = None, particles: Collection[int] | None = None) -> None:  # type: ignore[override]
        """Step these particles; by default all that have gradients.

        What writes to gradients in place makes those of paused particles zeros in place of None,
        and a step then decays them and applies their momentum: torch.nn.utils.clip_grad_norm_ and
        GradScaler.unscale_ do. Name the particles after these, or step `of(k)`. `clip_grad_norm_`
        of this library, method.backward and zero_grad keep None.
        """
        if closure is not None:
            raise TypeError("ParticleAdamW takes no closure: call method.backward before the step")
        for k, work in self._work(particles).items():
            self._steps[k] += 1
            if k in self._parts:
                # What schedulers look for, and find where `of(k)` steps itself.
                setattr(self._parts[k], "_opt_called", True)  # noqa: B010
            for parts in work.values():
                group = parts["group"]
                device = parts["params"][0].device
                count = [(self._steps[k] - parts["missed"]).to(device)] * len(parts["params"])
                torch._fused_adamw_(
                    parts["params"],
                    parts["grads"],
                    parts["exp_avgs"],
                    parts["exp_avg_sqs"],
                    [],
                    count,
                    lr=float(group["lr"]),
                    beta1=group["betas"][0],
                    beta2=group["betas"][1],
                    weight_decay=group["weight_decay"],
                    eps=group["eps"],
                    amsgrad=False,
                    maximize=False,
                )

    def _work(self, particles: Collection[int] | None) -> dict[int, dict[Any, dict[str, Any]]]:
        """For each particle that steps, its parts of tensors that have as many steps behind them,
        of one group, device and dtype."""
        found: dict[int, dict[Any, dict[str, Any]]] = {}
        idle: list[tuple[_Entry, int]] = []
        for entry in self._entries:
            stacked = entry.leaf.stacked
            if stacked.grad is None:
                idle += [(entry, k) for k in entry.groups]
                continue
            without = without_gradient(stacked.grad)
            every = entry.parts()
            for k, group in entry.groups.items():
                if particles is not None and k not in particles:
                    continue
                if k in without:
                    idle.append((entry, k))
                    continue
                missed = entry.missed.get(k, 0)
                key = (id(group), stacked.device, stacked.dtype, missed)
                names = ("params", "grads", "exp_avgs", "exp_avg_sqs")
                parts = found.setdefault(k, {}).setdefault(
                    key, {"group": group, "missed": missed} | {name: [] for name in names}
                )
                for name, part in zip(names, every[k]):
                    parts[name].append(part)
        for entry, k in idle:
            if k in found:
                entry.missed[k] = entry.missed.get(k, 0) + 1
        return found

    @torch.no_grad()
    def zero_grad(self, set_to_none: bool = True, particles: Collection[int] | None = None) -> None:
        """Make the gradients None, of these particles; by default of all that are here."""
        every = self._steps if particles is None else particles
        clear_gradients([entry.leaf.stacked for entry in self._entries], every)

    def state_dict(self) -> dict[str, Any]:
        """The means, stacked, the steps of each particle, and its groups' options."""
        options = [{n: v for n, v in g.items() if n != "params"} for g in self.param_groups]
        return {
            "means": [(e.exp_avg.clone(), e.exp_avg_sq.clone()) for e in self._entries],
            "steps": {k: int(steps) for k, steps in self._steps.items()},
            "missed": [dict(e.missed) for e in self._entries],
            "groups": options,
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`. Raises ValueError where it is of other particles."""
        means, steps = state_dict["means"], state_dict["steps"]
        here = [(tuple(e.exp_avg.shape),) * 2 for e in self._entries]
        there = [(tuple(a.shape), tuple(b.shape)) for a, b in means]
        groups = [g["particle"] for g in state_dict["groups"]]
        if here != there or steps.keys() != self._steps.keys() or groups != self._particles():
            raise ValueError(
                f"the state is of the particles {list(steps)} with {len(there)} tensors; this is "
                f"of {list(self._steps)} with {len(here)}, or their shapes differ"
            )
        missed = state_dict.get("missed", [{}] * len(means))
        for entry, (exp_avg, exp_avg_sq), own in zip(self._entries, means, missed):
            entry.exp_avg.copy_(exp_avg)
            entry.exp_avg_sq.copy_(exp_avg_sq)
            entry.missed = dict(own)
        for k, count in steps.items():
            self._steps[k].fill_(count)
        for group, options in zip(self.param_groups, state_dict["groups"]):
            group.update(options)

    def _particles(self) -> list[int]:
        return [group["particle"] for group in self.param_groups]


class _OfOne(Optimizer):
    """The part of a ParticleAdamW for one particle."""

    def __init__(self, whole: ParticleAdamW, particle: int):
        self.whole, self.particle = whole, particle
        groups = self._groups()
        # As of an optimizer of its own: some schedules read the learning rate there.
        options = {name: groups[0][name] for name in whole.defaults}
        options["lr"] = groups[0].get("initial_lr", options["lr"])
        super().__init__(groups, options)

    def _groups(self) -> list[dict[str, Any]]:
        return [g for g in self.whole.param_groups if g["particle"] == self.particle]

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        self.whole.step(closure, [self.particle])

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.whole.zero_grad(set_to_none, [self.particle])
