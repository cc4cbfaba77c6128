"""Attach K particles to a model: PEFT's configuration in, one stacked model out."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from multilora.layers import (
    LoraConv2d,
    LoraForeignLinear,
    LoraLayer,
    LoraLinear,
    ParticleLayer,
    StackedModule,
    is_foreign_linear,
)
from multilora.parallel import Ranks
from multilora.trunk import TrunkRows, share_forwards

if TYPE_CHECKING:
    import peft
    from torch.distributed.device_mesh import DeviceMesh

# LoraConfig's fields that particles honour. The last line names, dates and loads a configuration
# and changes no arithmetic. Any other field away from its default raises.
_HONOURED = frozenset(
    """
    r lora_alpha target_modules exclude_modules lora_dropout use_rslora rank_pattern alpha_pattern
    layers_to_transform layers_pattern init_lora_weights modules_to_save fan_in_fan_out task_type
    peft_type auto_mapping peft_version base_model_name_or_path revision inference_mode
    """.split()
)
_ADAPTER = "default"


class Adapter(NamedTuple):
    """One adapted layer: ΔW_k = scaling · lora_B[k] @ lora_A[k]."""

    name: str
    lora_A: Tensor  # (K, r, d_in)
    lora_B: Tensor  # (K, d_out, r)
    scaling: float


class ParticleModel(nn.Module):
    """K particles over one frozen base, run as one batch of K·B rows. See get_particle_model."""

    def __init__(
        self,
        base: nn.Module,
        config: peft.LoraConfig,
        num_particles: int,
        seeds: Sequence[int],
        rows: TrunkRows,
        share_trunk: bool = True,
        ranks: Ranks | None = None,
    ):
        super().__init__()
        self.base = base
        self.peft_config = config
        self.num_particles = num_particles
        self.seeds = tuple(seeds)  # of all processes' particles
        self.rows = rows
        self.share_trunk = share_trunk
        self.ranks = ranks or Ranks()
        self.training = base.training
        # The particles that run, of those that there are, inside `particles()`.
        self._every, self._window = num_particles, slice(0, num_particles)
        self._caches = "use_cache" in inspect.signature(base.forward).parameters
        self._used_layers_checked = False
        self._freeze_statistics()

    def forward(self, *args: Any, per_particle: bool = False, **kwargs: Any) -> Any:
        """The base model's forward, for every particle: x (B, ...) -> (K, B, ...).

        Every input tensor whose leading axis is the batch goes to all particles; with
        per_particle=True such a tensor is (K, B, ...), a mini-batch for each. Every output tensor
        whose leading axis is the batch comes back as (K, B, ...), inside tuples, dicts and
        transformers' ModelOutput too; anything else comes back as the base returned it. So `.loss`
        of a transformers model is one mean over all particles: a method makes its own from
        logits and labels.

        Where the particles share their inputs, frozen modules below the first adapted layer run
        once for all of them (`share_trunk`), but for those that draw random numbers, and not under
        torch.compile. A transformers decoder makes no key-value cache in training mode.
        """
        particles = self.num_particles
        batch = _batch_size((args, kwargs), self._every if per_particle else None)
        lead = (self._every, batch) if per_particle else (batch,)
        if self._caches and self.training:
            kwargs.setdefault("use_cache", False)

        def fold(t: Tensor) -> Tensor:
            if t.ndim < len(lead) or t.shape[: len(lead)] != lead:
                return t
            stacked = t[self._window] if per_particle else t.expand(particles, *t.shape)
            return stacked.reshape(particles * batch, *stacked.shape[2:])

        def unfold(t: Tensor) -> Tensor:
            if t.ndim == 0 or t.shape[0] != particles * batch:
                return t
            return t.view(particles, batch, *t.shape[1:])

        shared = batch if self.share_trunk and not per_particle else None
        check_use = not self._used_layers_checked and not torch.compiler.is_compiling()
        try:
            if not torch.compiler.is_compiling():
                self.rows.devices = self.devices()
            self.rows.start(particles * batch, shared, (args, kwargs))
            args, kwargs = _map_tensors(fold, args), _map_kwargs(fold, kwargs)
            output = self._first_forward(args, kwargs) if check_use else self.base(*args, **kwargs)
        finally:
            self.rows.stop()
        return _map_tensors(unfold, output)

    @contextlib.contextmanager
    def particles(self, start: int, stop: int) -> Iterator[None]:
        """Inside, this is a model of the particles start … stop − 1 alone.

        Its trainable tensors are then leaves (stop − start, ...) of their own, with gradients of
        their own, over the memory of the stacked ones. Inputs with per_particle=True are still
        those of all K particles.
        """
        if not 0 <= start < stop <= self.num_particles:
            raise ValueError(
                f"particles needs 0 <= start < stop <= {self.num_particles}; got {start}, {stop}"
            )
        layers = [m for m in self.base.modules() if isinstance(m, ParticleLayer)]
        stacked = [slot for layer in layers for slot in layer.stacked()]
        parts = {
            parameter: nn.Parameter(parameter.detach()[start:stop], parameter.requires_grad)
            for _, _, parameter in stacked
        }
        before = self.num_particles, self._window
        try:
            for module, name, parameter in stacked:
                module._parameters[name] = parts[parameter]
            self.num_particles = stop - start
            self._window = slice(self._window.start + start, self._window.start + stop)
            yield
        finally:
            for module, name, parameter in stacked:
                module._parameters[name] = parameter
            self.num_particles, self._window = before

    def in_chunks(self, particle_chunk: int, run: Callable[[], Tensor]) -> Tensor:
        """run() (K, ...) from its results for `particle_chunk` particles at a time, joined.

        The trunk runs once where `run` calls this model on the same inputs each time.
        """
        if type(particle_chunk) is not int or particle_chunk < 1:
            raise ValueError(f"particle_chunk must be an integer >= 1; got {particle_chunk!r}")
        if particle_chunk >= self.num_particles:
            return run()
        parts = []
        with self.rows.remembering():
            for start in range(0, self.num_particles, particle_chunk):
                with self.particles(start, min(start + particle_chunk, self.num_particles)):
                    parts.append(run())
        return torch.cat(parts)

    def devices(self) -> list[torch.device]:
        """Where the model's parameters are, without repetition."""
        return list({p.device: None for p in self.parameters()})

    def particle_parameters(self) -> list[nn.Parameter]:
        """The stacked trainable tensors, particle axis first: adapters and heads."""
        return [p for p in self.parameters() if p.requires_grad]

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

    # The file format lives above this module; it is imported when files are asked for.

    def save_pretrained(self, path: str | Path) -> None:
        """Write path/particle_0 … particle_{K-1}, plain PEFT adapters, and path/multilora.json."""
        from multilora import checkpoint

        checkpoint.save_pretrained(self, path)

    def soup(self, path: str | Path, kind: str = "exact") -> None:
        """Write the averaged ΔW as one PEFT adapter folder. See `checkpoint.soup`."""
        from multilora import checkpoint

        checkpoint.soup(self, path, kind)

    def _first_forward(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The base's forward, and a warning where it did not call some particle layer."""
        layers = dict([*self.lora_layers(), *self.stacked_modules()])
        unused = set(layers)
        hooks = [
            layer.register_forward_hook(lambda *_, name=name: unused.discard(name))
            for name, layer in layers.items()
        ]
        try:
            output = self.base(*args, **kwargs)
        finally:
            for hook in hooks:
                hook.remove()
        self._used_layers_checked = True
        if unused:
            warnings.warn(
                f"{len(unused)} of {len(layers)} particle layers did not run in the first forward "
                f"and so have no effect in it: {', '.join(sorted(unused)[:5])}. The model may read "
                "their weights instead of calling them.",
                stacklevel=3,
            )
        return output


def get_particle_model(
    base: nn.Module,
    config: peft.LoraConfig,
    num_particles: int,
    seed: int | Sequence[int] = 0,
    head_init: str = "reset",
    share_trunk: bool = True,
    mesh: DeviceMesh | None = None,
) -> ParticleModel:
    """K LoRA particles over `base`, which is frozen and changed in place.

    base: any module. Targets are nn.Linear, transformers' Conv1D and nn.Conv2d (one group, no
        dilation, zero padding), found and named by PEFT itself, and linears whose forward is their
        own (`layers.is_foreign_linear`): quantised ones, tensor-parallel ones that return all
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
        weights, for a head that was trained. Token embeddings and language-model heads are always
        copied. The adapters differ in either case: every particle has its own A; B is zero.
    share_trunk: where particles share their inputs, run what lies below the first adapted layer
        once for all of them; also an attribute of the model, to be set at any time.
    mesh: processes that share the work: a DeviceMesh with the axes "data", "particle" or both.
        Along "particle", each process holds K/P particles, and `model.num_particles` is that
        number; the particles are those that one process would have. Methods communicate.

    Adapters of half-precision layers are float32 masters. BatchNorm of the base stays in eval mode.

    Raises NotImplementedError for a field of LoraConfig that particles do not support, TypeError
    for a target that is no linear or convolution, ValueError for bad numbers; `base` is then as
    it was.
    """
    _check_config(config)
    if type(num_particles) is not int or num_particles < 1:
        raise ValueError(f"num_particles must be an integer >= 1; got {num_particles!r}")
    if head_init not in ("reset", "copy"):
        raise ValueError(f'head_init must be "reset" or "copy"; got {head_init!r}')
    ranks = Ranks.of_mesh(mesh)
    seeds = _seeds(seed, num_particles)
    num_particles = len(ranks.own(seeds))
    config, targets, saved = _resolve(base, config)
    _check_targets(targets, saved)
    for parameter in base.parameters():
        parameter.requires_grad_(False)
    rows = TrunkRows()
    vocabulary = _vocabulary(base)
    redrawn = []
    for name, target in targets.items():
        layer = _layer_type(target.layer)(
            target.layer, num_particles, rows, target.rank, target.scaling, target.dropout
        )
        redrawn.append((layer, (config.init_lora_weights,)))
        layer.train(target.layer.training)
        _replace(base, name, layer)
    for name, module in saved.items():
        stacked = StackedModule(module, num_particles, rows)
        stacked.train(module.training)
        if head_init == "reset" and module not in vocabulary:
            redrawn.append((stacked, ()))
        _replace(base, name, stacked)
    for particle, particle_seed in enumerate(ranks.own(seeds)):
        generator = torch.Generator().manual_seed(particle_seed)
        for layer, how in redrawn:
            layer.reset_particle(particle, generator, *how)
    share_forwards(base, rows)
    return ParticleModel(base, config, num_particles, seeds, rows, share_trunk, ranks)


def _layer_type(target: nn.Module) -> type[LoraLayer]:
    if isinstance(target, nn.Conv2d):
        return LoraConv2d
    return LoraForeignLinear if is_foreign_linear(target) else LoraLinear


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


class _Target(NamedTuple):
    layer: nn.Module
    rank: int
    scaling: float
    dropout: float


def _check_config(config: peft.LoraConfig) -> None:
    import peft

    if not isinstance(config, peft.LoraConfig):
        raise TypeError(f"config must be a peft.LoraConfig; got {type(config).__name__}")
    default = peft.LoraConfig()
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name not in _HONOURED and value != getattr(default, field.name):
            raise NotImplementedError(
                f"LoraConfig.{field.name} = {value!r} is not supported for particles; "
                f"leave it at {getattr(default, field.name)!r}"
            )
    if config.init_lora_weights not in (True, "gaussian"):
        raise NotImplementedError(
            f"LoraConfig.init_lora_weights = {config.init_lora_weights!r} is not supported for "
            'particles; use True or "gaussian"'
        )


def _resolve(
    base: nn.Module, config: peft.LoraConfig
) -> tuple[peft.LoraConfig, dict[str, _Target], dict[str, nn.Module]]:
    """What PEFT would adapt, asked of PEFT itself; `base` stays as it is.

    -> the config as PEFT completes it, the targets and the modules to save by name.
    """
    from peft import get_peft_model
    from peft.tuners.lora import LoraLayer as PeftLoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    if any(isinstance(m, (BaseTunerLayer, LoraLayer, StackedModule)) for m in base.modules()):
        raise ValueError("base already has adapters; pass the plain model")
    config = copy.deepcopy(config)
    trainable = {name: p.requires_grad for name, p in base.named_parameters()}
    # PEFT changes a model's modules, hooks and attributes. It gets a copy of them, over the same
    # tensors.
    shared = {id(t): t for t in [*base.parameters(), *base.buffers()]}
    # Of linears with a forward of their own it knows some. It gets plain ones of their sizes.
    for module in filter(is_foreign_linear, base.modules()):
        sizes = (module.in_features, module.out_features)
        shared[id(module)] = nn.Linear(*sizes, bias=False, device="meta")
    shadow = copy.deepcopy(base, shared)
    targets, saved = {}, {}
    try:
        # The adapters are made on the meta device: no memory, no random numbers.
        get_peft_model(shadow, config, _ADAPTER, low_cpu_mem_usage=True)
        wrappers = {
            name: module
            for name, module in shadow.named_modules()
            if isinstance(module, (PeftLoraLayer, AuxiliaryTrainingWrapper))
        }
    finally:
        for name, parameter in base.named_parameters():
            parameter.requires_grad_(trainable[name])
    for name, wrapper in wrappers.items():
        outer = next((n for n in wrappers if name.startswith(f"{n}.")), None)
        if outer in saved:
            raise ValueError(
                f"modules_to_save {outer!r} also contains {name!r}, which is adapted or saved "
                "itself; choose one"
            )
        if outer is not None:
            continue  # inside a layer that PEFT takes apart; that layer is refused below
        if isinstance(wrapper, AuxiliaryTrainingWrapper):
            saved[name] = base.get_submodule(name)
        else:
            targets[name] = _Target(
                base.get_submodule(name),
                wrapper.r.get(_ADAPTER, 0),
                float(wrapper.scaling.get(_ADAPTER, 0)),
                config.lora_dropout,
            )
    if config.modules_to_save is not None:
        # PEFT appends a task's head at every load.
        config.modules_to_save = list(dict.fromkeys(config.modules_to_save))
    return config, targets, saved


def _check_targets(targets: dict[str, _Target], saved: dict[str, nn.Module]) -> None:
    from transformers.pytorch_utils import Conv1D

    for name, target in targets.items():
        layer = target.layer
        if isinstance(layer, nn.Conv2d):
            plain = layer.groups == 1 and layer.dilation == (1, 1) and layer.padding_mode == "zeros"
            if not plain:
                raise TypeError(
                    f"target {name!r} is a Conv2d with groups={layer.groups}, "
                    f"dilation={layer.dilation}, padding_mode={layer.padding_mode!r}; particles "
                    "support groups=1, dilation=1 and zero padding"
                )
        elif isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear):
            raise TypeError(
                f"target {name!r} belongs to an nn.MultiheadAttention, which reads its weight and "
                "never calls it: an adapter there would do nothing"
            )
        elif is_foreign_linear(layer):
            if not any(True for _ in (*layer.parameters(), *layer.buffers())):
                raise TypeError(
                    f"target {name!r} is a {type(layer).__name__} without parameters and buffers, "
                    "which would say on which device its adapters belong"
                )
        elif not (
            isinstance(layer, Conv1D)
            or (isinstance(layer, nn.Linear) and type(layer).forward is nn.Linear.forward)
        ):
            raise TypeError(
                f"target {name!r} is a {type(layer).__name__}; particles support nn.Linear, "
                "transformers' Conv1D, nn.Conv2d, and modules without children that are linears of "
                "in_features and out_features"
            )
    for name, module in saved.items():
        quantised = [
            type(m).__name__
            for m in module.modules()
            if is_foreign_linear(m) and not _is_trainable(m)
        ]
        if quantised:
            raise TypeError(
                f"modules_to_save {name!r} contains a {quantised[0]}, whose packed weight cannot "
                "be trained; adapt it, or keep it out of the quantisation"
            )
        if any(isinstance(m, _BatchNorm) for m in module.modules()):
            raise TypeError(
                f"modules_to_save {name!r} contains BatchNorm, whose running statistics cannot "
                "be kept a particle"
            )
        for inner in module.modules():
            plain = inner is module and type(inner) is nn.Embedding and inner.max_norm is None
            if isinstance(inner, nn.Embedding) and not plain and _is_particular(inner):
                raise TypeError(
                    f"modules_to_save {name!r} contains {inner}: inside another module, particles "
                    "support embeddings without padding_idx and max_norm"
                )


def _is_trainable(module: nn.Module) -> bool:
    parameters = list(module.parameters())
    return bool(parameters) and all(p.is_floating_point() for p in parameters)


def _is_particular(embedding: nn.Embedding) -> bool:
    return embedding.padding_idx is not None or embedding.max_norm is not None


def _vocabulary(base: nn.Module) -> list[nn.Module]:
    """Token embeddings and language-model heads, which hold a pretrained vocabulary."""
    modules = []
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        # transformers' models for images have the getters, which raise.
        with contextlib.suppress(AttributeError, NotImplementedError):
            modules.append(getattr(base, getter)())
    return modules


def _replace(root: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(root.get_submodule(parent), leaf, module)


def _batch_size(inputs: Any, particles: int | None) -> int:
    """The length of the batch axis, by the first input tensor that has one."""
    axis = 0 if particles is None else 1
    for t in _tensors(inputs):
        if t.ndim > axis:
            if particles is not None and t.shape[0] != particles:
                raise ValueError(
                    f"per_particle=True needs inputs (K, B, ...) with K = {particles}; "
                    f"got {tuple(t.shape)}"
                )
            return t.shape[axis]
    raise ValueError("the model's inputs hold no tensor with a batch axis")


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from _tensors(value)
    elif isinstance(tree, (list, tuple)):
        for value in tree:
            yield from _tensors(value)


def _map_kwargs(function, kwargs: dict[str, Any]) -> dict[str, Any]:
    # transformers' cache_position counts tokens; its length can equal the batch by accident.
    return {
        key: value if key == "cache_position" else _map_tensors(function, value)
        for key, value in kwargs.items()
    }


def _map_tensors(function, tree: Any) -> Any:
    """`tree` with function(tensor) for every tensor in tuples, lists, dicts and ModelOutputs."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(_map_tensors(function, value) for value in tree))
    if isinstance(tree, (list, tuple)):
        return type(tree)(_map_tensors(function, value) for value in tree)
    if dataclasses.is_dataclass(tree) and isinstance(tree, Mapping):  # ModelOutput
        return type(tree)(**{key: _map_tensors(function, value) for key, value in tree.items()})
    if isinstance(tree, Mapping):
        kind = OrderedDict if isinstance(tree, OrderedDict) else dict
        return kind((key, _map_tensors(function, value)) for key, value in tree.items())
    return tree
