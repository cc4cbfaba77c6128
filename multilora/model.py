"""Attach K particles to a model: PEFT's configuration in, one stacked model out."""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from multilora import checks
from multilora.calls import Call
from multilora.fold import Axes, Names
from multilora.layers import (
    LoraConv2d,
    LoraLayer,
    LoraLinear,
    LoraOpaqueLinear,
    ParticleLayer,
    StackedModule,
    has_own_forward,
)
from multilora.parallel import Processes
from multilora.run import ParticleView, Runner
from multilora.targets import (
    check_base,
    check_config,
    check_targets,
    just_created,
    resolve,
    vocabulary,
)
from multilora.trunk import Cut, TrunkRows

if TYPE_CHECKING:
    import peft
    from torch.distributed.device_mesh import DeviceMesh


_MOST = 2**20  # particles, which nobody has memory for


class Adapter(NamedTuple):
    """One adapted layer: ΔW_k = scaling · lora_B[k] @ lora_A[k]."""

    name: str
    lora_A: Tensor  # (K, r, d_in)
    lora_B: Tensor  # (K, d_out, r)
    scaling: float


class ParticleModel(nn.Module):
    """K particles over one frozen base. See get_particle_model."""

    def __init__(
        self,
        base: nn.Module,
        config: peft.LoraConfig,
        num_particles: int,
        seeds: Sequence[int],
        share_trunk: bool | str = False,
        processes: Processes | None = None,
        fold: str = "batch",
        batch_axes: Axes | None = None,
        output_axes: Mapping[str, int | None] | int | None = None,
        check_isolation: bool = True,
    ):
        super().__init__()
        self.base = base
        self.peft_config = config
        self.num_particles = num_particles
        self.seeds = tuple(seeds)  # of all processes' particles
        self.processes = processes or Processes()
        self.fold, self.check_isolation = fold, check_isolation
        self.batch_axes, self.output_axes = dict(batch_axes or {}), output_axes
        self.training = base.training
        # The particles that run, of those that there are, inside `particles()`, and whose thread
        # is there.
        self.every, self.window = num_particles, slice(0, num_particles)
        self.thread: int | None = None
        self._runner, self._cut = Runner(), None
        self.share_trunk = share_trunk
        self._freeze_statistics()

    @property
    def share_trunk(self) -> bool | str:
        """Whether what lies below the cut runs once for all particles: a promise of the user's."""
        return self._share_trunk

    @share_trunk.setter
    def share_trunk(self, where: bool | str) -> None:
        _check_trunk(where)
        if where and self.fold == "loop":
            raise ValueError('share_trunk needs fold="batch": in a loop nothing runs together')
        if self._cut is not None:
            self._cut.remove()
        self._cut = Cut(self.base, where) if where else None
        self._share_trunk = where

    @property
    def ranks(self) -> Processes:
        """The old name of `processes`, kept for one release."""
        return self.processes

    @property
    def has_cut(self) -> bool:
        """Whether there is a place in the base from which on every particle has its own rows."""
        return self._cut is not None and bool(self._cut.above)

    def forward(self, *args: Any, per_particle: bool = False, **kwargs: Any) -> Any:
        """The base model's forward, for every particle: x (B, ...) -> (K, B, ...).

        Every input with a batch axis goes to all particles; with per_particle=True it is
        (K, B, ...), a mini-batch for each. The batch is that of the first argument, or of
        `input_ids`, `pixel_values` and their like; `batch_axes` of get_particle_model says what is
        not plain. Outputs with rows for every particle come back as (K, B, ...), inside tuples,
        dicts and transformers' ModelOutput too; anything else comes back as the base returned it.
        So `.loss` of a transformers model is one mean over all particles: a method makes its own
        from logits and labels. With fold="loop" every output tensor has the particle axis in front.

        The first forward of each mode and each form of the inputs is checked against one particle
        alone. A transformers decoder makes no key-value cache in training mode. One argument that
        is `trunk(...)` goes on from there.

        Raises ParticleIsolationError where the model mixes particles, ValueError where a batch axis
        is ambiguous or no adapter runs.
        """
        if len(args) == 1 and isinstance(args[0], TrunkRows):
            rows, kwargs = args[0], args[0].kwargs | kwargs
            return self._runner.run(self, "forward", rows.args, kwargs, False, rows)
        return self._runner.run(self, "forward", args, kwargs, per_particle)

    def call(self, name: str, *args: Any, per_particle: bool = False, **kwargs: Any) -> Any:
        """Another method of the base, folded and checked like its forward.

        name: such as "get_image_features", or with a path, "vision_model.forward".
        """
        return self._runner.run(self, name, args, kwargs, per_particle)

    def trunk(self, *args: Any, **kwargs: Any) -> TrunkRows:
        """What lies below the cut of the shared trunk, run once without a graph: B rows, to be
        passed to the model in place of its inputs any number of times.

        Raises ValueError where the trunk is not shared, or holds no blocks.
        """
        if self._cut is None or not self._cut.below:
            raise ValueError("trunk needs share_trunk with at least one block below its cut")
        return self._runner.rows_at_the_cut(self, args, kwargs)

    @contextlib.contextmanager
    def base_only(self) -> Iterator[None]:
        """Inside, `model(x)`, `model.base(x)` and its methods are the frozen base's, (B, ...)."""
        with Call(self, 0, frozen=True).active():
            yield

    def particle(self, particle: int) -> ParticleView:
        """One particle's own model: `view(x)` -> (B, ...), and any method of the base."""
        if type(particle) is not int or not 0 <= particle < self.num_particles:
            raise ValueError(f"there are {self.num_particles} particles; got {particle!r}")
        return ParticleView(self, particle)

    @contextlib.contextmanager
    def particles(self, start: int, stop: int) -> Iterator[None]:
        """Inside, this is a model of the particles start … stop − 1 alone.

        Its trainable tensors are then leaves (stop − start, ...) of their own, with gradients of
        their own, over the memory of the stacked ones. Inputs with per_particle=True are still
        those of all K particles.
        """
        whole = type(start) is type(stop) is int
        if not (whole and 0 <= start < stop <= self.num_particles):
            raise ValueError(
                f"particles needs integers 0 <= start < stop <= {self.num_particles}; got "
                f"{start!r}, {stop!r}"
            )
        layers = [m for m in self.base.modules() if isinstance(m, ParticleLayer)]
        stacked = [slot for layer in layers for slot in layer.stacked()]
        parts = {
            parameter: nn.Parameter(parameter.detach()[start:stop], parameter.requires_grad)
            for _, _, parameter in stacked
        }
        before = self.num_particles, self.window, self.thread
        self.thread = threading.get_ident()
        try:
            for module, name, parameter in stacked:
                module._parameters[name] = parts[parameter]
            self.num_particles = stop - start
            self.window = slice(self.window.start + start, self.window.start + stop)
            yield
        finally:
            for module, name, parameter in stacked:
                module._parameters[name] = parameter
            self.num_particles, self.window, self.thread = before

    def in_chunks(self, particle_chunk: int, run: Callable[[], Tensor]) -> Tensor:
        """run() (K, ...) from its results for `particle_chunk` particles at a time, joined."""
        if checks.integer("particle_chunk", particle_chunk, 1) >= self.num_particles:
            return run()
        parts = []
        for start in range(0, self.num_particles, particle_chunk):
            with self.particles(start, min(start + particle_chunk, self.num_particles)):
                parts.append(run())
        return torch.cat(parts)

    def devices(self) -> list[torch.device]:
        """Where the model's parameters are, without repetition."""
        return list({p.device: None for p in self.parameters()})

    def particle_parameters(self, separate: bool = False) -> list[nn.Parameter]:
        """The stacked trainable tensors, particle axis first: adapters and heads.

        separate: K leaves a tensor instead, one a particle, which share its memory and its
            gradient. An optimizer whose step depends on a whole tensor (Adafactor, Muon), or that
            is to have a learning rate a particle, needs them; one that looks at all its parameters
            at once (timm's LAMB clips their common norm) needs `EachParticle` instead. See
            `optim.separate_parameters`.
        """
        if separate:
            from multilora.optim import separate_parameters

            return separate_parameters(self)
        # As parameters() finds them; but every step asks, and that opens a generator a module.
        found: dict[int, nn.Parameter] = {}
        seen: set[nn.Module] = set()
        waiting: list[nn.Module | None] = [self]
        while waiting:
            module = waiting.pop()
            if module is None or module in seen:
                continue
            seen.add(module)
            for p in module._parameters.values():
                if p is not None and p.requires_grad:
                    found[id(p)] = p
            waiting += reversed(module._modules.values())
        return list(found.values())

    def adapters(self) -> list[Adapter]:
        """The adapted layers in module order, by their names in the base model."""
        return [
            Adapter(name, layer.lora_A, layer.lora_B, layer.scaling)
            for name, layer in self.lora_layers()
        ]

    def heads(self) -> list[tuple[str, dict[str, nn.Parameter]]]:
        """(name, stacked parameters by name) of every module in `modules_to_save`."""
        return [(n, dict(m.module.named_parameters())) for n, m in self.stacked_modules()]

    def lora_layers(self) -> Iterator[tuple[str, LoraLayer]]:
        for name, module in self.base.named_modules():
            if isinstance(module, LoraLayer):
                yield name, module

    def stacked_modules(self) -> Iterator[tuple[str, StackedModule]]:
        for name, module in self.base.named_modules():
            if isinstance(module, StackedModule):
                yield name, module

    def train(self, mode: bool = True) -> ParticleModel:
        """Training mode, but for BatchNorm: the frozen base keeps its statistics.

        Batch statistics would be taken over the rows of all particles and so mix them.
        """
        super().train(mode)
        self._freeze_statistics()
        return self

    def _freeze_statistics(self) -> None:
        for module in self.base.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
                module.reset_running_stats = _statistics_are_frozen

    # The file format lives above this module; it is imported when files are asked for.

    def save_pretrained(
        self, path: str | Path, save_embedding_layers: bool | Literal["auto"] = "auto"
    ) -> None:
        """Write path/particle_0 … particle_{K-1}, plain PEFT adapters, and path/multilora.json. See
        `checkpoint.save_pretrained`."""
        from multilora import checkpoint

        checkpoint.save_pretrained(self, path, save_embedding_layers)

    def soup(self, path: str | Path, kind: str = "exact") -> None:
        """Write the averaged ΔW as one PEFT adapter folder. See `checkpoint.soup`."""
        from multilora import checkpoint

        checkpoint.soup(self, path, kind)


def _statistics_are_frozen() -> None:
    raise RuntimeError(
        "the statistics of the base's BatchNorm layers are frozen, since batches of K particles "
        "would mix in them: leave update_bn out, the averaged adapters need none"
    )


def get_particle_model(
    base: nn.Module,
    config: peft.LoraConfig,
    num_particles: int,
    seed: int | Sequence[int] = 0,
    head_init: str | None = None,
    share_trunk: bool | str = False,
    mesh: DeviceMesh | None = None,
    *,
    fold: str = "batch",
    batch_axes: Axes | None = None,
    output_axes: Mapping[str, int | None] | int | None = None,
    check_isolation: bool = True,
) -> ParticleModel:
    """K LoRA particles over `base`, which is frozen and changed in place.

    base: any module. Targets are nn.Linear, transformers' Conv1D and nn.Conv2d (one group, no
        dilation, zero padding), found and named by PEFT itself, and linears whose forward is their
        own (`layers.has_own_forward`): quantised ones, tensor-parallel ones that return all
        features. Such a layer runs as it is, once for all particles.
    config: honoured are r, lora_alpha, target_modules, exclude_modules, lora_dropout (a mask of
        its own for every particle), use_rslora, rank_pattern, alpha_pattern, layers_to_transform,
        init_lora_weights (True or "gaussian"), modules_to_save (a stacked copy a particle),
        fan_in_fan_out and task_type.
    num_particles: K >= 1.
    seed: an integer, or K of them, one a particle. Particle k of an integer seed starts from
        `particle_seeds(seed, K)[k]`, whatever K is.
    head_init: "reset" redraws every particle's copy of `modules_to_save` at the scale of the
        original, so that particles start from different functions; "copy" keeps the original's
        weights, for a module that was trained. By default, modules are copied, but for those that
        were just created, which are redrawn with a warning: transformers says which weights were in
        no checkpoint, a timm classifier has another number of classes than its checkpoint, and any
        other model has no checkpoint that we know of. Token embeddings and language-model heads
        are always copied. The adapters differ in any case: every particle has its own A; B is zero.
    share_trunk: a promise that what lies below the first adapted block is the same for all
        particles (nothing random, no state, no hooks), so that it may run once for all of them
        where they share their inputs. True: the cut lies before the first block with an adapter, in
        the innermost nn.ModuleList or nn.Sequential that holds them all; or the name of the module
        before which it lies. Also an attribute of the model. Not under torch.compile.
    mesh: processes that share the work: a DeviceMesh with the axes "data", "particle" or both.
        Along "particle", each process holds K/P particles, and `model.num_particles` is that
        number; the particles are those that one process would have. Methods communicate.
    fold: "batch", all particles in one pass over K·B rows; or "loop", one after another, which is
        right for any model, at the speed of a loop.
    batch_axes: the axis of the batch in the arguments of the base's forward, by name, or None for
        what is the same for all rows, as `in_dims` of torch.func.vmap. Needed where names and
        lengths do not say it: an argument whose axis is ambiguous raises.
    output_axes: the same of its outputs, by field (or index of a tuple), or a number for all, where
        the isolation check does not find it.
    check_isolation: compare the first forward of each mode and form of inputs with one particle
        alone. It cannot see what other inputs of the same form would mix, states other than
        buffers, tensors and numbers that are attributes of modules, or whether a scalar such as
        `.loss` is more than a mean; and it does not run on calls with a key-value cache, or under
        torch.compile.

    Adapters of half-precision layers are float32 masters. BatchNorm of the base stays in eval mode.

    Raises NotImplementedError for a field of LoraConfig that particles do not support, TypeError
    for a target that is no linear or convolution, ValueError for bad numbers and for a base whose
    weights are not there (meta); `base` is then as it was.
    """
    check_config(config)
    checks.integer("num_particles", num_particles, 1, _MOST)
    if head_init is not None:
        checks.choice("head_init", head_init, ("reset", "copy"))
    checks.choice("fold", fold, ("batch", "loop"))
    checks.flag("check_isolation", check_isolation)
    _check_trunk(share_trunk)
    _check_axes(base, batch_axes, output_axes)
    if share_trunk and fold == "loop":
        raise ValueError('share_trunk needs fold="batch": in a loop nothing runs together')
    check_base(base)
    processes = Processes.of_mesh(mesh)
    seeds = _seeds(seed, num_particles)
    num_particles = len(processes.own(seeds))
    config, targets, saved = resolve(base, config)
    check_targets(targets, saved)
    if isinstance(share_trunk, str):
        base.get_submodule(share_trunk)
    new = just_created(base, saved) if head_init is None else {}
    for parameter in base.parameters():
        parameter.requires_grad_(False)
    kept = vocabulary(base)
    redrawn = []
    for name, target in targets.items():
        layer = _layer_type(target.layer)(
            target.layer, num_particles, target.rank, target.scaling, target.dropout
        )
        redrawn.append((layer, (config.init_lora_weights,)))
        layer.train(target.layer.training)
        _replace(base, name, layer)
    reset = []
    for name, module in saved.items():
        stacked = StackedModule(module, num_particles)
        stacked.train(module.training)
        if (head_init == "reset" or name in new) and module not in kept:
            reset.append(name)
            redrawn.append((stacked, ()))
        _replace(base, name, stacked)
    if head_init is None and reset:
        warnings.warn(
            f"modules_to_save {reset} start from weights drawn anew for every particle, since "
            f'{new[reset[0]]}; head_init="copy" keeps what they hold, head_init="reset" says that '
            "this is meant",
            stacklevel=2,
        )
    for particle, particle_seed in enumerate(processes.own(seeds)):
        generator = torch.Generator().manual_seed(particle_seed)
        for layer, how in redrawn:
            layer.reset_particle(particle, generator, *how)
    for module in base.modules():
        # Its fast path reads the weights of its linears, in evaluation.
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0
    return ParticleModel(
        base,
        config,
        num_particles,
        seeds,
        share_trunk,
        processes,
        fold,
        batch_axes,
        output_axes,
        check_isolation,
    )


def _check_trunk(where: bool | str) -> None:
    if not (isinstance(where, bool) or (isinstance(where, str) and where)):
        raise ValueError(f"share_trunk must be True, False or a module's name; got {where!r}")


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


def _layer_type(target: nn.Module) -> type[LoraLayer]:
    if isinstance(target, nn.Conv2d):
        return LoraConv2d
    return LoraOpaqueLinear if has_own_forward(target) else LoraLinear


def _seeds(seed: int | Sequence[int], num_particles: int) -> list[int]:
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
    if len({s % 2**32 for s in seeds}) < num_particles:
        raise ValueError(
            "seeds must differ, in their lower 32 bits: particles that start identical have "
            f"identical gradients and stay so under every method; got {seeds}"
        )
    return seeds


def particle_seeds(seed: int, num_particles: int) -> list[int]:
    """K well-separated seeds; particle k's does not depend on K."""
    # The golden-ratio multiplier keeps the particles of neighbouring seeds apart.
    return [(seed * 0x9E3779B97F4A7C15 + k) % 2**63 for k in range(num_particles)]


def _replace(root: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(root.get_submodule(parent), leaf, module)
