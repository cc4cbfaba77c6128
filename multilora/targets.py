"""Which modules of a model are adapted or saved, and whether particles support them.

PEFT itself finds their names. What particles do not support is refused before anything is changed.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from multilora.experts import bank_name, check_parameter
from multilora.layers import Adapted, has_own_forward, linear_sizes
from multilora.particle_layer import ParticleLayer

if TYPE_CHECKING:
    import peft

# LoraConfig's fields that particles honour. The last line names, dates and loads a configuration
# and changes no arithmetic. Any other field away from its default raises.
_HONOURED = frozenset(
    """
    r lora_alpha target_modules exclude_modules lora_dropout use_rslora rank_pattern alpha_pattern
    layers_to_transform layers_pattern init_lora_weights modules_to_save fan_in_fan_out task_type
    target_parameters
    peft_type auto_mapping peft_version base_model_name_or_path revision inference_mode
    """.split()
)
_ADAPTER = "default"


class Target(NamedTuple):
    """A layer to adapt, with its rank, scaling and dropout as PEFT chose them.

    parameter: which parameter of the layer is adapted, of LoraConfig.target_parameters. PEFT names
    the adapters of a layer's second parameter as the layer, and those of its first `base_layer`.
    """

    layer: nn.Module
    adapted: Adapted
    parameter: str | None = None


def check_config(config: peft.LoraConfig) -> None:
    """Raise TypeError for another configuration, NotImplementedError for an unsupported field."""
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
    if config.target_parameters and config.lora_dropout:
        raise ValueError(
            f"LoraConfig.lora_dropout = {config.lora_dropout!r} beside target_parameters: as in "
            "PEFT, adapters of parameters have no dropout; set lora_dropout=0"
        )
    if config.init_lora_weights not in (True, "gaussian"):
        raise NotImplementedError(
            f"LoraConfig.init_lora_weights = {config.init_lora_weights!r} is not supported for "
            'particles; use True or "gaussian"'
        )


def resolve(
    base: nn.Module, config: peft.LoraConfig
) -> tuple[peft.LoraConfig, dict[str, Target], dict[str, nn.Module]]:
    """Let PEFT choose what to adapt, on a copy of `base`.

    Returns:
        The configuration as PEFT completes it, the targets, and the modules to save by name.
    """
    from peft import get_peft_model
    from peft.tuners.lora import LoraLayer as PeftLoraLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    check_plain(base)
    config = copy.deepcopy(config)
    trainable = {name: p.requires_grad for name, p in base.named_parameters()}
    # PEFT changes a model's modules, hooks and attributes, so it gets a copy over the same tensors.
    shared: dict[int, Any] = {id(t): t for t in [*base.parameters(), *base.buffers()]}
    # PEFT recognises only some of the layers that we wrap: show it plain linears of the same size.
    for module in filter(has_own_forward, base.modules()):
        shared[id(module)] = nn.Linear(*linear_sizes(module), bias=False, device="meta")
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
        of: Any = getattr(wrapper, "parameter_name", None)
        if outer is not None and of is None:
            continue  # inside a layer that PEFT takes apart; that layer is refused below
        if isinstance(wrapper, AuxiliaryTrainingWrapper):
            saved[name] = base.get_submodule(name)
        else:
            targets[name] = Target(
                base.get_submodule(name if of is None else bank_name(name)),
                Adapted(
                    wrapper.r.get(_ADAPTER, 0),
                    float(wrapper.scaling.get(_ADAPTER, 0)),
                    config.lora_dropout,
                ),
                of,
            )
    if config.modules_to_save is not None:
        # PEFT appends a task's head at every load.
        config.modules_to_save = list(dict.fromkeys(config.modules_to_save))
    return config, targets, saved


class Chosen(NamedTuple):
    """What each of K particles adapts and saves in one base."""

    configs: tuple[peft.LoraConfig, ...]  # as PEFT completes them
    #: What every particle has on a layer, in module order; rank 0 where it has nothing.
    adapted: dict[str, tuple[Adapted, ...]]
    #: The parameter that a layer of a bank of experts adapts.
    parameters: dict[str, str]
    #: Which particles have a copy of a module.
    saved: dict[str, tuple[bool, ...]]


def resolve_each(base: nn.Module, configs: Sequence[peft.LoraConfig]) -> Chosen:
    """Let PEFT choose for every particle, and check that the particles fit together.

    Raises:
        ValueError, TypeError, NotImplementedError: a configuration does not fit the base, or a
            particle saves a module in which another adapts a layer. The message names the particle
            where there are several.
    """
    found: list[tuple[peft.LoraConfig, dict[str, Target], dict[str, nn.Module]]] = []
    seen: list[int] = []
    for k, config in enumerate(configs):
        same = next((i for i in seen if configs[i] is config), None)
        if same is None:
            with _naming(k, len(configs)):
                check_config(config)
                completed, targets, saved = resolve(base, config)
                check_targets(targets, saved)
            seen.append(k)
            found.append((completed, targets, saved))
        else:
            found.append(found[same])
    order = {name: i for i, (name, _) in enumerate(base.named_modules())}
    parameters = _parameters(found)
    # The layer of a bank's second parameter is around that of its first.
    names = sorted(
        {n for _, targets, _ in found for n in targets}, key=lambda n: (order[bank_name(n)], len(n))
    )
    heads = sorted({n for _, _, saved in found for n in saved}, key=order.__getitem__)
    for head in heads:
        if inside := [n for n in names if n == head or n.startswith(f"{head}.")]:
            savers = [k for k, (_, _, saved) in enumerate(found) if head in saved]
            adapters = [k for k, (_, targets, _) in enumerate(found) if inside[0] in targets]
            raise ValueError(
                f"particles {savers} save a copy of {head!r}, in which particles {adapters} adapt "
                f"{inside[0]!r}: particles over one base must agree on one of the two"
            )
    none = Adapted(0, 0.0, 0.0)
    return Chosen(
        tuple(config for config, _, _ in found),
        {n: tuple(t[n].adapted if n in t else none for _, t, _ in found) for n in names},
        parameters,
        {n: tuple(n in saved for _, _, saved in found) for n in heads},
    )


def _parameters(found: Sequence[tuple[Any, dict[str, Target], Any]]) -> dict[str, str]:
    """The parameter of a bank of experts that each layer of one adapts."""
    parameters: dict[str, str] = {}
    for k, (_, targets, _) in enumerate(found):
        for name, target in targets.items():
            of = target.parameter
            if of is not None and parameters.setdefault(name, of) != of:
                raise ValueError(
                    f"particle {k} adapts {of!r} of {bank_name(name)!r} where another particle "
                    f"adapts {parameters[name]!r}: as in PEFT, all adapters of a bank of experts "
                    "are on the same parameters"
                )
    return parameters


@contextlib.contextmanager
def _naming(particle: int, particles: int) -> Iterator[None]:
    """An error names the particle whose configuration it is about."""
    try:
        yield
    except (ValueError, TypeError, NotImplementedError) as error:
        if particles == 1:
            raise
        raise type(error)(f"the configuration of particle {particle}: {error}") from error


def check_targets(targets: dict[str, Target], saved: dict[str, nn.Module]) -> None:
    """Raise TypeError for a target or a module to save that particles do not support."""
    for name, target in targets.items():
        if target.parameter is not None:
            check_parameter(bank_name(name), target.layer, target.parameter)
        else:
            _check_target(name, target.layer)
    for name, module in saved.items():
        _check_saved(name, module)


def _check_target(name: str, layer: nn.Module) -> None:
    if isinstance(layer, nn.Conv2d):
        _check_convolution(name, layer)
    elif isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear):
        raise TypeError(
            f"target {name!r} belongs to an nn.MultiheadAttention, which reads its weight and "
            "never calls it: an adapter there would do nothing"
        )
    elif has_own_forward(layer):
        if not any(True for _ in (*layer.parameters(), *layer.buffers())):
            raise TypeError(
                f"target {name!r} is a {type(layer).__name__} without parameters and buffers, "
                "which would say on which device its adapters belong"
            )
    elif not (isinstance(layer, nn.Linear) or _is_conv1d(layer)):
        raise TypeError(
            f"target {name!r} is a {type(layer).__name__}; particles support nn.Linear, "
            "transformers' Conv1D, nn.Conv2d, and modules without children that are linears of "
            "in_features and out_features"
        )


def _check_convolution(name: str, layer: nn.Conv2d) -> None:
    own = type(layer).forward, type(layer)._conv_forward
    if own != (nn.Conv2d.forward, nn.Conv2d._conv_forward) or "forward" in vars(layer):
        raise TypeError(
            f"target {name!r} is a {type(layer).__name__}, whose forward is not that of "
            "nn.Conv2d: the files of its particles would be another function in PEFT"
        )
    if layer.groups != 1 or layer.dilation != (1, 1) or layer.padding_mode != "zeros":
        raise TypeError(
            f"target {name!r} is a Conv2d with groups={layer.groups}, "
            f"dilation={layer.dilation}, padding_mode={layer.padding_mode!r}; particles "
            "support groups=1, dilation=1 and zero padding"
        )


def _is_conv1d(layer: nn.Module) -> bool:
    """Whether it is transformers' Conv1D; a layer of it cannot be there before its module is."""
    module = sys.modules.get("transformers.pytorch_utils")
    return module is not None and isinstance(layer, module.Conv1D)


def check_copied(base: nn.Module) -> None:
    """Raise TypeError or ValueError where particles cannot be copies of the whole base."""
    parameters = list(base.parameters())
    if not any(p.requires_grad for p in parameters):
        raise ValueError(
            f"full copies train what requires gradients in the base, and none of the "
            f"{len(parameters)} parameters of {type(base).__name__} does"
        )
    _check_saved("", base)


def _check_saved(name: str, module: nn.Module) -> None:
    """name: "" for a whole base, which is copied."""
    what = f"modules_to_save {name!r}" if name else f"the base {type(module).__name__}"
    for inner in module.modules():
        if has_own_forward(inner) and not _is_trainable(inner):
            raise TypeError(
                f"{what} contains a {type(inner).__name__}, whose packed weight "
                "cannot be trained; adapt it, or keep it out of the quantisation"
            )
    if any(isinstance(m, _BatchNorm) for m in module.modules()):
        raise TypeError(
            f"{what} contains BatchNorm, whose running statistics cannot be kept for each particle"
        )
    for inner in module.modules():
        if type(inner).__name__ == "_SpectralNorm" or any(
            type(hook).__name__ == "SpectralNorm" for hook in inner._forward_pre_hooks.values()
        ):
            raise TypeError(
                f"{what} has spectral normalisation, whose running vectors "
                "cannot be kept for each particle"
            )
        plain = inner is module and type(inner) is nn.Embedding and inner.max_norm is None
        if isinstance(inner, nn.Embedding) and not plain and _has_special_rows(inner):
            raise TypeError(
                f"{what} contains {inner}: inside another module, particles "
                "support embeddings without padding_idx and max_norm"
            )


def _is_trainable(module: nn.Module) -> bool:
    parameters = list(module.parameters())
    return bool(parameters) and all(p.is_floating_point() for p in parameters)


def _has_special_rows(embedding: nn.Embedding) -> bool:
    return embedding.padding_idx is not None or embedding.max_norm is not None


def vocabulary(base: nn.Module) -> list[nn.Module]:
    """Token embeddings and language-model heads, which hold a pretrained vocabulary."""
    modules: list[nn.Module] = []
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        # transformers' models for images have the getters, which raise.
        with contextlib.suppress(AttributeError, NotImplementedError):
            modules.append(getattr(base, getter)())
    return modules


def check_plain(base: nn.Module) -> None:
    """Raise ValueError where the base has adapters of PEFT's or of ours."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    if any(isinstance(module, (BaseTunerLayer, ParticleLayer)) for module in base.modules()):
        raise ValueError("base already has adapters; pass the plain model")


def check_base(base: nn.Module) -> None:
    """Raise ValueError where some weights of the base are not in memory. (A base that is on the
    device meta as a whole, without hooks that fetch it, has shapes only, and so have its outputs.)
    """
    weights = dict(base.named_parameters())
    missing = [name for name, p in weights.items() if p.is_meta]
    fetched = any(hasattr(module, "_hf_hook") for module in base.modules())
    if missing and (fetched or len(missing) < len(weights)):
        raise ValueError(
            f"{len(missing)} weights of the base have no memory (the device meta), such as "
            f"{missing[0]!r}: it is offloaded or was not loaded. Adapters need the device that "
            "their layer computes on; load the base onto devices as a whole"
        )


def just_created(base: nn.Module, saved: dict[str, nn.Module]) -> dict[str, str]:
    """The modules to save that hold no pretrained weights, each with the reason to think so."""
    config: Any = getattr(base, "config", None)
    pretrained = getattr(base, "pretrained_cfg", None)
    new = {}
    for name, module in saved.items():
        if hasattr(config, "_name_or_path"):  # transformers, whose version 5 marks what it loaded
            marked = any(getattr(p, "_is_hf_initialized", False) for p in base.parameters())
            if marked:
                if not any(getattr(p, "_is_hf_initialized", False) for p in module.parameters()):
                    new[name] = "the checkpoint held none of their weights"
            elif not config._name_or_path:
                new[name] = "the model was made without a checkpoint"
        elif isinstance(pretrained, dict) or hasattr(pretrained, "num_classes"):  # timm
            as_dict = pretrained if isinstance(pretrained, dict) else vars(pretrained)
            classes = as_dict.get("num_classes")
            is_head = not _classifiers(base).isdisjoint(module.modules())
            if is_head and getattr(base, "num_classes", classes) != classes:
                new[name] = f"the checkpoint of this model is for {classes} classes"
        else:
            new[name] = "nothing says that they come from a checkpoint"
    return new


def redrawn_heads(
    base: nn.Module, saved: Collection[str], head_init: str | None, new: Mapping[str, str]
) -> list[str]:
    """The modules to save whose copies are drawn anew; `new` is what `just_created` has found."""
    kept = vocabulary(base)
    drawn: Collection[str] = {None: list(new), "reset": saved, "copy": ()}[head_init]
    return [n for n in saved if n in drawn and base.get_submodule(n) not in kept]


def drawn_anew(why: Mapping[str, str]) -> str:
    """A warning about modules to save that are drawn anew, each with the reason."""
    return (
        f"modules_to_save {list(why)} start from weights drawn anew for every particle, since "
        f'{next(iter(why.values()))}; head_init="copy" keeps what they hold, head_init="reset" '
        "says that this is meant"
    )


def _classifiers(base: Any) -> set[nn.Module]:
    """The heads of a timm model."""
    heads = base.get_classifier() if hasattr(base, "get_classifier") else ()
    return set(heads) if isinstance(heads, (tuple, list)) else {heads}
