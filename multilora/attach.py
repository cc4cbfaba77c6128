"""Attach K particles to a model: PEFT's configuration in, one ParticleModel out."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from multilora import checks
from multilora.copies import StackedModule
from multilora.fold import Axes, Names
from multilora.model import MOST_PARTICLES, ParticleModel
from multilora.parallel import Processes
from multilora.slots import adapt, check_heads, stack, start_particle
from multilora.targets import (
    check_base,
    check_config,
    check_copied,
    check_plain,
    drawn_anew,
    just_created,
    redrawn_heads,
    resolve_each,
)
from multilora.trunk import check_cut

if TYPE_CHECKING:
    import peft
    from torch.distributed.device_mesh import DeviceMesh


def get_particle_model(
    base: nn.Module,
    config: peft.LoraConfig | Sequence[peft.LoraConfig] | None,
    num_particles: int | None = None,
    seed: int | Sequence[int] = 0,
    head_init: str | None = None,
    share_trunk: bool | str = False,
    mesh: DeviceMesh | None = None,
    *,
    fold: str = "batch",
    batch_axes: Axes | None = None,
    output_axes: Mapping[str, int | None] | int | None = None,
    check_isolation: bool = True,
    head: str | Sequence[str] = (),
    heads: Mapping[str, Sequence[int | nn.Module | None]] | None = None,
) -> ParticleModel:
    """K LoRA particles over `base`, which is frozen and changed in place.

    The adapters differ from the start: each particle has its own random A, and B is zero. Adapters
    of half-precision layers are float32 masters. BatchNorm of the base stays in eval mode.

    With config=None, the particles are K copies of the whole base, in the memory of K + 1 models:
    all that requires gradients in it is trained, at float32 or better. `model.base` holds them, and
    `base` itself is not changed. They start equal but for the modules in `head`. With fold="batch"
    they run under torch.func.vmap, and a model whose path depends on its data needs fold="loop".

    Args:
        base: any module. Its targets are nn.Linear, transformers' Conv1D and nn.Conv2d (one group,
            no dilation, zero padding), found and named by PEFT itself. A linear whose forward is
            not nn.Linear's (`layers.has_own_forward`) is a target too: it is quantised, or
            tensor-parallel and returns all features. Such a layer is called as it is, once for all
            particles.
        config: these fields are used: r, lora_alpha, target_modules, exclude_modules,
            lora_dropout (every particle draws its own mask), use_rslora, rank_pattern,
            alpha_pattern, layers_to_transform, target_parameters (the matrices of transformers'
            banks of experts, such as `mlp.experts.gate_up_proj` and `mlp.experts.down_proj`),
            init_lora_weights (True or "gaussian"), modules_to_save (with a stacked copy for each
            particle), fan_in_fan_out and task_type. None: full copies. A list of K configurations
            gives every particle its own: rank, alpha, dropout, targets and modules to save may
            differ, and what particle k starts from is what it would start from alone. Smaller ranks
            are padded with zeros, which are not trained and not saved. Soups, and methods that
            learn one posterior for all particles, need particles of one configuration.
        num_particles: K >= 1; with a list of configurations, its length is K.
        seed: an integer, or K of them, one for each particle. With one integer, particle k starts
            from `particle_seeds(seed, K)[k]`, whatever K is. Several must differ, except with a
            list of configurations, whose particles may have nothing to do with each other.
        head_init: how `modules_to_save`, or with full copies `head`, start. "reset" redraws every
            particle's copy at the scale of the original, so that the particles start from different
            functions. "copy" keeps the original's weights, as is right for a module that was
            trained. By default, modules are copied, except those that were just created, which are
            redrawn with a warning: their weights were in no checkpoint that transformers read, or a
            timm classifier has another number of classes than its checkpoint, or the model is of
            neither library. Token embeddings and language-model heads are always copied.
        share_trunk: your promise that nothing below the first adapted block is random, keeps state
            or has hooks; it then runs once for all particles that share their inputs. True: the cut
            lies before the first block with an adapter, in the innermost nn.ModuleList or
            nn.Sequential that holds them all. A name: the cut lies before that module. It is also
            an attribute of the model, and it does not work under torch.compile.
        mesh: the processes that share the work, a DeviceMesh with the axes "data", "particle" or
            both. Along "particle", each process holds K/P particles, which is then
            `model.num_particles`; they are the particles that a single process would have. Methods
            communicate.
        fold: "batch" runs all particles in one pass over K·B rows. "loop" runs one after another,
            which is right for any model, at the speed of a loop.
        batch_axes: the axis of the batch in the arguments of the base's forward, by name, or None
            for an argument that all rows share, as `in_dims` of torch.func.vmap. It is needed where
            it cannot be inferred from names and lengths: an ambiguous axis raises.
        output_axes: the same for the outputs, by field (or index of a tuple), or one number for
            all, where the isolation check does not find it.
        check_isolation: compare the first forward of each mode and form of inputs with that of one
            particle alone. The check cannot see what other inputs of the same form would mix,
            states other than buffers, tensors and numbers that are attributes of modules, or
            whether a scalar such as `.loss` is more than a mean. It does not run in calls with a
            key-value cache, or under torch.compile.
        head: with config=None, names of modules that are heads: `head_init` is about these.
        heads: with a list of configurations, heads of other widths: for the name of an nn.Linear,
            K entries, which are the number of outputs of a freshly drawn head, an nn.Linear to
            start from, or None for the base's own. It must be in the modules to save of every
            particle that gives an entry. Logits then come as a list of K tensors (B, C_k).

    Returns:
        The particle model, in the mode of `base`.

    Raises:
        NotImplementedError: a field of LoraConfig is not supported for particles.
        TypeError: a target is neither a linear nor a convolution; or, for full copies, the base has
            BatchNorm, packed weights, or embeddings with padding_idx or max_norm.
        ValueError: a number is out of range, or weights of the base have no memory (meta).
            `base` is left unchanged by all of these.
    """
    configs, num_particles = _configs(config, num_particles)
    _check_options(num_particles, head_init, share_trunk, fold, check_isolation)
    _check_axes(base, batch_axes, output_axes)
    check_base(base)
    processes = Processes.of_mesh(mesh)
    if processes.particle_size > 1 and (heads or len({id(c) for c in configs or ()}) > 1):
        raise NotImplementedError("particles of several processes share one configuration")
    seeds = _seeds(seed, num_particles, isinstance(config, Sequence))
    own_seeds = processes.own(seeds)
    if configs is None:
        base, new, redrawn = _copied(base, own_seeds, head, head_init, share_trunk)
    elif head:
        raise ValueError(f"head = {head!r} is for config=None; LoraConfig has modules_to_save")
    else:
        configs = configs[: len(own_seeds)]
        configs, new, redrawn = _adapted(
            base, configs, own_seeds, head_init, share_trunk, heads or {}
        )
    if head_init is None and redrawn:
        warnings.warn(drawn_anew({name: new[name] for name in redrawn}), stacklevel=2)
    return ParticleModel(
        base,
        configs,
        len(own_seeds),
        seeds,
        share_trunk,
        processes,
        fold,
        batch_axes,
        output_axes,
        check_isolation,
        head_init,
        new,
    )


def _configs(
    config: Any, num_particles: int | None
) -> tuple[Sequence[peft.LoraConfig] | None, int]:
    """The configuration of every particle, and K."""
    if config is None or not isinstance(config, Sequence):
        if num_particles is None:
            raise ValueError("num_particles is needed, or a list of K configurations")
        if config is not None:
            check_config(config)
        checks.integer("num_particles", num_particles, 1, MOST_PARTICLES)
        return None if config is None else [config] * num_particles, num_particles
    if not config or num_particles not in (None, len(config)):
        raise ValueError(
            f"config has {len(config)} configurations, which is K; got num_particles="
            f"{num_particles!r}"
        )
    return list(config), len(config)


def _adapted(
    base: nn.Module,
    configs: Sequence[peft.LoraConfig],
    seeds: Sequence[int],
    head_init: str | None,
    share_trunk: bool | str,
    heads: Mapping[str, Sequence[int | nn.Module | None]],
) -> tuple[Sequence[peft.LoraConfig], dict[str, str], list[str]]:
    """Put the particles' layers into the base.

    Returns:
        The complete configurations, `just_created` of the modules to save, and `redrawn_heads`.
    """
    chosen = resolve_each(base, configs)
    saved = {name: base.get_submodule(name) for name in chosen.saved}
    widths = check_heads(saved, chosen.saved, heads)
    if isinstance(share_trunk, str):
        base.get_submodule(share_trunk)
    new = just_created(base, saved)
    redrawn = redrawn_heads(base, saved, head_init, new)
    base.requires_grad_(False)
    # The adapters of a parameter may hold others as their base layer.
    for name in reversed(chosen.adapted):
        adapt(base, name, chosen.adapted[name], chosen.parameters.get(name))
    for name, trained in chosen.saved.items():
        stack(base, name, trained, widths.get(name))
    for particle, seed in enumerate(seeds):
        start_particle(base, particle, seed, chosen.configs[particle], redrawn, heads)
    _disable_fast_paths(base)
    return chosen.configs, new, redrawn


def _copied(
    base: nn.Module,
    seeds: Sequence[int],
    head: str | Sequence[str],
    head_init: str | None,
    share_trunk: bool | str,
) -> tuple[StackedModule, dict[str, str], list[str]]:
    """Copies of the whole base, `just_created` of its heads, and `redrawn_heads`."""
    check_plain(base)
    check_copied(base)
    if share_trunk:
        raise ValueError("share_trunk needs adapters: full copies have nothing in common")
    names = [head] if isinstance(head, str) else list(head)
    modules = dict(base.named_modules())
    if missing := [name for name in names if name not in modules or not name]:
        raise ValueError(f"head: {type(base).__name__} has no modules {missing}")
    if head_init == "reset" and not names:
        raise ValueError('head_init="reset" needs the names of the modules to redraw: head')
    new = just_created(base, {name: modules[name] for name in names})
    redrawn = redrawn_heads(base, names, head_init, new)
    if len(seeds) > 1 and not redrawn and head_init is None:
        warnings.warn(
            f"the {len(seeds)} copies of {type(base).__name__} start equal, and stay so on equal "
            'batches: name a head to redraw (head, head_init="reset"), set them apart, or say with '
            'head_init="copy" that this is meant',
            stacklevel=3,
        )
    copies = StackedModule(base, len(seeds))
    copies.train(base.training)
    for parameter, original in zip(copies.module.parameters(), base.parameters()):
        parameter.requires_grad_(original.requires_grad)
    for particle, seed in enumerate(seeds):
        generator = torch.Generator().manual_seed(seed)
        for name in redrawn:
            copies.reset_particle(particle, generator, name)
    return copies, new, redrawn


def particle_seeds(seed: int, num_particles: int) -> list[int]:
    """K well-separated seeds; that of particle k does not depend on K."""
    # The golden-ratio multiplier keeps the particles of neighbouring seeds apart.
    return [(seed * 0x9E3779B97F4A7C15 + k) % 2**63 for k in range(num_particles)]


def _check_options(
    num_particles: int,
    head_init: str | None,
    share_trunk: bool | str,
    fold: str,
    check_isolation: bool,
) -> None:
    checks.integer("num_particles", num_particles, 1, MOST_PARTICLES)
    if head_init is not None:
        checks.choice("head_init", head_init, ("reset", "copy"))
    checks.choice("fold", fold, ("batch", "loop"))
    checks.flag("check_isolation", check_isolation)
    check_cut(share_trunk)
    if share_trunk and fold == "loop":
        raise ValueError('share_trunk needs fold="batch": in a loop nothing runs together')


def _check_axes(base: nn.Module, inputs: Any, outputs: Any) -> None:
    names = Names(base.forward)
    for what, axes in (("batch_axes", inputs), ("output_axes", outputs)):
        if isinstance(axes, int) and what == "output_axes":
            axes = {"all": axes}
        if not isinstance(axes, Mapping | None):
            raise ValueError(f"{what} must be a mapping of names to axes; got {axes!r}")
        for name, axis in (axes or {}).items():
            if what == "batch_axes" and name not in names.order and not names.takes_any:
                raise ValueError(f"{what}: forward has the arguments {names.order}; got {name!r}")
            if axis is not None and (type(axis) is not int or axis < 0):
                raise ValueError(
                    f"{what}: an axis is an integer >= 0 or None; got {name}: {axis!r}"
                )


def _seeds(seed: int | Sequence[int], num_particles: int, may_repeat: bool) -> list[int]:
    if isinstance(seed, int):
        return particle_seeds(seed, num_particles)
    if isinstance(seed, (str, bytes)) or not isinstance(seed, Sequence):
        raise ValueError(f"seed needs one integer or {num_particles} of them; got {seed!r}")
    seeds = list(seed)
    if len(seeds) != num_particles:
        raise ValueError(f"seed needs one integer or {num_particles} of them; got {len(seeds)}")
    if not all(type(s) is int and 0 <= s < 2**63 for s in seeds):
        raise ValueError(f"seeds must be integers in [0, 2^63); got {seeds}")
    # torch's generator reads 32 bits of them.
    if not may_repeat and len({s % 2**32 for s in seeds}) < num_particles:
        raise ValueError(
            "seeds must differ, in their lower 32 bits: particles that start identical have "
            f"identical gradients and stay so under every method; got {seeds}"
        )
    return seeds


def _disable_fast_paths(base: nn.Module) -> None:
    """In evaluation, nn.TransformerEncoderLayer would read the weights of its linears instead of
    calling them."""
    for module in base.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0
