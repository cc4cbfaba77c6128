"""The place of one particle in a base: its layers are put in, started, and given to another run."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from multilora.copies import StackedModule, grown, stacked_modules
from multilora.experts import LoraExperts, bank_name
from multilora.layers import (
    Adapted,
    LoraConv2d,
    LoraLayer,
    LoraLinear,
    LoraOpaqueLinear,
    has_own_forward,
    lora_layers,
)
from multilora.targets import drawn_anew, just_created, redrawn_heads, resolve_each

if TYPE_CHECKING:
    import peft

#: For the name of a head, what each particle starts from; see `get_particle_model`.
Heads = Mapping[str, Sequence[int | nn.Module | None]]

NOTHING = Adapted(0, 0.0, 0.0)


def adapt(
    base: nn.Module, name: str, each: Sequence[Adapted], parameter: str | None = None
) -> None:
    """Put adapters of K particles on a layer of the base, or on a parameter of a bank of experts,
    whose second layer goes around its first."""
    name = name if parameter is None else bank_name(name)
    target = base.get_submodule(name)
    numbers = len(each), *max(each)
    layer: LoraLayer
    if parameter is None:
        layer = _layer_type(target)(target, *numbers, each)
    else:
        layer = LoraExperts(target, *numbers, parameter, each)
    layer.train(target.training)
    _replace(base, name, layer)


def stack(
    base: nn.Module, name: str, trained: Sequence[bool], widths: Sequence[int] | None = None
) -> None:
    """Put copies of K particles in place of a module of the base."""
    module = base.get_submodule(name)
    stacked = StackedModule(module, len(trained), trained, widths)
    stacked.train(module.training)
    _replace(base, name, stacked)


def start_particle(
    base: nn.Module,
    particle: int,
    seed: int,
    config: peft.LoraConfig,
    redrawn: Collection[str],
    heads: Heads,
) -> None:
    """Draw what a particle starts from, in the order in which it would alone."""
    generator = torch.Generator().manual_seed(seed)
    for _, layer in lora_layers(base):
        layer.reset_particle(particle, generator, config.init_lora_weights)
    for name, stacked in stacked_modules(base):
        start = heads[name][particle] if name in heads else None
        if start is not None:
            _start_head(stacked, particle, start, generator)
        elif name in redrawn:
            stacked.reset_particle(particle, generator)


@torch.no_grad()
def _start_head(
    stacked: StackedModule, particle: int, start: int | nn.Module, generator: torch.Generator
) -> None:
    """A head of another width, drawn as nn.Linear draws its own, or a copy of one."""
    for name, whole in stacked.module.named_parameters():
        whole[particle] = 0
        one = stacked.part(name, whole, particle)
        assert one is not None
        if isinstance(start, nn.Module):
            one.copy_(start.get_parameter(name))
            continue
        bound = 1 / math.sqrt(stacked.template.in_features)
        fresh = torch.empty(one.shape).uniform_(-bound, bound, generator=generator)
        one.copy_(fresh)


def check_heads(
    saved: Mapping[str, nn.Module], trained: Mapping[str, Sequence[bool]], heads: Heads
) -> dict[str, list[int]]:
    """The width of every particle's head, by the names of heads of other widths.

    Raises:
        ValueError, TypeError: an entry does not fit; the message names the head and the particle.
    """
    widths: dict[str, list[int]] = {}
    for name, starts in heads.items():
        if name not in saved:
            raise ValueError(
                f"heads: {name!r} is not among the modules to save, {sorted(saved)}: add it to "
                "modules_to_save of the configurations"
            )
        head: Any = saved[name]
        if type(head) is not nn.Linear:
            raise TypeError(f"heads: {name!r} must be an nn.Linear; it is a {type(head).__name__}")
        if isinstance(starts, (int, nn.Module)) or len(starts) != len(trained[name]):
            raise ValueError(f"heads: {name!r} needs {len(trained[name])} entries; got {starts!r}")
        widths[name] = [
            _width(name, head, k, start, trained[name][k]) for k, start in enumerate(starts)
        ]
    return widths


def _width(name: str, head: Any, particle: int, start: Any, trained: bool) -> int:
    what = f"heads: particle {particle} of {name!r}"
    if start is None:
        return int(head.out_features)
    if not trained:
        raise ValueError(f"{what} has a head of its own, and modules_to_save do not name it")
    if type(start) is int and start >= 1:
        return start
    if type(start) is not nn.Linear:
        raise TypeError(f"{what} needs a number of outputs, an nn.Linear or None; got {start!r}")
    fits = start.in_features == head.in_features and (start.bias is None) == (head.bias is None)
    if not fits:
        raise ValueError(f"{what} is {start}, in the place of {head}")
    return start.out_features


def _layer_type(target: nn.Module) -> type[LoraLayer]:
    if isinstance(target, nn.Conv2d):
        return LoraConv2d
    return LoraOpaqueLinear if has_own_forward(target) else LoraLinear


def _replace(root: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(root.get_submodule(parent), leaf, module)


# --- another run in a particle's place -----------------------------------------------------------


@torch.no_grad()
def replace_particle(
    base: nn.Module,
    particles: int,
    particle: int,
    config: peft.LoraConfig,
    seed: int,
    heads: Mapping[str, int | nn.Module | None],
    head_init: str | None,
    new_heads: dict[str, str],
) -> peft.LoraConfig:
    """Give a particle's place to another configuration; see `ParticleModel.replace_particle`.

    new_heads: `just_created` of the modules to save so far; those that come are added.
    """
    chosen = resolve_each(plain(base), [config])
    layers, stacks = dict(lora_layers(base)), dict(stacked_modules(base))
    _check_places(chosen, layers, stacks)
    own = {name: [entry] for name, entry in heads.items()}
    saved: dict[str, nn.Module] = {n: _original(base, n) for n in chosen.saved}
    trained = dict.fromkeys(saved, (True,))
    widths = check_heads(saved, trained, own)
    redrawn = _redrawn(base, chosen.saved, stacks, head_init, new_heads)
    for name in reversed(chosen.adapted):
        if name not in layers:
            adapt(base, name, [NOTHING] * particles, chosen.parameters.get(name))
    for name in chosen.saved.keys() - stacks.keys():
        stack(base, name, [False] * particles)
    for name, layer in lora_layers(base):
        now = chosen.adapted.get(name, (NOTHING,))[0]
        each = [layer.adapted_by(k) for k in range(particles)]
        each[particle] = now
        if now.rank > layer.rank:
            layer.lora_A = grown(layer.lora_A, layer.lora_A.ndim - 2, now.rank)
            layer.lora_B = grown(layer.lora_B, layer.lora_B.ndim - 1, now.rank)
        layer.set_each(each)
    for name, stacked in stacked_modules(base):
        _restart_copy(stacked, particle, name in saved, widths.get(name, [None])[0])
    entries = {name: _only(particles, particle, entry) for name, entry in heads.items()}
    start_particle(base, particle, seed, chosen.configs[0], redrawn, entries)
    return chosen.configs[0]


def own_widths(base: nn.Module, particle: int) -> dict[str, int | nn.Module | None]:
    """The widths of a particle's heads where they are not those of the base."""
    return {
        name: stacked.widths[particle]
        for name, stacked in stacked_modules(base)
        if stacked.widths is not None and stacked.widths[particle] != stacked.original_width
    }


def _redrawn(
    base: nn.Module,
    saved: Collection[str],
    stacks: Collection[str],
    head_init: str | None,
    new_heads: dict[str, str],
) -> list[str]:
    """`redrawn_heads`, with a warning about those that are new to the model."""
    coming = {name: base.get_submodule(name) for name in saved if name not in stacks}
    new = just_created(base, coming)
    new_heads.update(new)
    redrawn = redrawn_heads(base, saved, head_init, new_heads)
    if head_init is None and (drawn := {n: new[n] for n in redrawn if n in new}):
        warnings.warn(drawn_anew(drawn), stacklevel=4)
    return redrawn


def plain(base: nn.Module) -> nn.Module:
    """The base as it was without particles, over the same frozen tensors."""
    memo: dict[int, Any] = {id(t): t for t in (*base.parameters(), *base.buffers())}
    for module in base.modules():
        if isinstance(module, LoraLayer):
            memo[id(module)] = module.plain_layer
        elif isinstance(module, StackedModule):
            memo[id(module)] = module.as_it_was()
    return copy.deepcopy(base, memo)


def _check_places(
    chosen: Any, layers: Mapping[str, LoraLayer], stacks: Mapping[str, StackedModule]
) -> None:
    banks = {bank_name(n) for n, layer in layers.items() if isinstance(layer, LoraExperts)}
    there = {n: m.parameter for n, m in layers.items() if isinstance(m, LoraExperts)}
    for name, parameter in chosen.parameters.items():
        if bank_name(name) in banks and there.get(name) != parameter:
            raise ValueError(
                f"the particles adapt {there} of the banks of experts, and the configuration "
                f"{chosen.parameters}: as in PEFT, all adapters of a bank must be on the same "
                "parameters"
            )
    for head in {**chosen.saved, **stacks}:
        for name in {**chosen.adapted, **layers}:
            if name == head or name.startswith(f"{head}."):
                raise ValueError(
                    f"{head!r} is saved as a copy, and {name!r} in it is adapted: particles over "
                    "one base must agree on one of the two"
                )


def _original(base: nn.Module, name: str) -> nn.Module:
    module = base.get_submodule(name)
    return module.as_it_was() if isinstance(module, StackedModule) else module


def _restart_copy(stacked: StackedModule, particle: int, trained: bool, width: int | None) -> None:
    """Put the original's numbers into a particle's copy, of another width where one is given."""
    particles = stacked.num_particles
    has_copy = [stacked.is_trained(k) for k in range(particles)]
    has_copy[particle] = trained
    widths = stacked.widths
    if widths is not None or width is not None:
        out = stacked.original_width
        each = list(widths or (out,) * particles)
        each[particle] = out if width is None else width
        stacked.widen(max(each))
        widths = tuple(each)
    stacked.set_each(has_copy, widths)
    for name, whole in stacked.module.named_parameters():
        original = stacked.originals_by_name()[name].to(whole)
        whole[particle] = 0
        if widths is None:
            whole[particle] = original
        else:
            rows = min(len(original), widths[particle])
            whole[particle, :rows] = original[:rows]


def _only(particles: int, particle: int, entry: Any) -> list[Any]:
    return [entry if k == particle else None for k in range(particles)]


def is_uniform(base: nn.Module) -> bool:
    """Whether all particles have adapters and copies of the same sizes, scalings and dropout."""
    return all(layer.each is None for _, layer in lora_layers(base)) and all(
        stacked.trained is None and stacked.widths is None for _, stacked in stacked_modules(base)
    )
