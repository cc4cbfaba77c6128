"""The files of a PEFT adapter folder: what they hold, and what is accepted.

A folder may come from anybody. Nothing is allocated whose size its files only declare: tensors are
mapped, and compared with what PEFT itself would make of the configuration before they are read.
"""

from __future__ import annotations

import copy
import itertools
import math
import pickletools
import re
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from multilora import atomic
from multilora.experts import bank_name
from multilora.layers import has_own_forward, linear_sizes
from multilora.targets import check_plain

if TYPE_CHECKING:
    import peft

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
# The file that PEFT writes with safe_serialization=False.
PICKLED = "adapter_model.bin"
# The prefix in PEFT's files for the names of tensors of a wrapped model.
PREFIX = "base_model.model."

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _is_rank(value: Any) -> bool:
    return type(value) is int and value >= 1


def _is_number(value: Any) -> bool:
    try:
        return type(value) in (int, float) and math.isfinite(value)
    except OverflowError:
        return False


def _is_rate(value: Any) -> bool:
    return _is_number(value) and 0 <= value <= 1


def _is_list(of: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(of, value))


def _is_dict(of: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(map(of, value.values()))


def _or(*kinds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: any(kind(value) for kind in kinds)


def _is_none(value: Any) -> bool:
    return value is None


_names = _or(_is_none, _is_text, _is_list(_is_text))
_is_index = _or(lambda value: type(value) is int)

# The fields of LoraConfig that particles honour, with what may stand in each.
_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "r": (_is_rank, "an integer >= 1"),
    "lora_alpha": (_is_number, "a finite number"),
    "lora_dropout": (_is_rate, "a number in [0, 1]"),
    "rank_pattern": (_or(_is_none, _is_dict(_is_rank)), "integers >= 1 by names of modules"),
    "alpha_pattern": (_or(_is_none, _is_dict(_is_number)), "finite numbers by names of modules"),
    "use_rslora": (_is_bool, "true or false"),
    "fan_in_fan_out": (_is_bool, "true or false"),
    "inference_mode": (_is_bool, "true or false"),
    "init_lora_weights": (_or(_is_bool, _is_text), "true, false or a name"),
    "target_modules": (_names, "a text or a list of texts"),
    "exclude_modules": (_names, "a text or a list of texts"),
    "layers_pattern": (_names, "a text or a list of texts"),
    "layers_to_transform": (_or(_is_none, _is_index, _is_list(_is_index)), "integers"),
    "target_parameters": (_or(_is_none, _is_list(_is_text)), "a list of texts"),
    "modules_to_save": (_or(_is_none, _is_list(_is_text)), "a list of texts"),
    "task_type": (_or(_is_none, _is_text), "a text"),
    "auto_mapping": (_or(_is_none, _is_dict(lambda value: True)), "an object"),
    "base_model_name_or_path": (_or(_is_none, _is_text), "a text"),
    "revision": (_or(_is_none, _is_text), "a text"),
    "peft_version": (_or(_is_none, _is_text), "a text"),
}
# Fields for how an adapter began, how it was trained, and options of features that are off. They do
# not change what its trained factors compute.
_WITHOUT_EFFECT = frozenset(
    """
    runtime_config loftq_config eva_config corda_config lora_ga_config velora_config megatron_core
    qalora_group_size
    """.split()
)
# Ways to begin of which only the factors are left when an adapter is trained.
_PLAIN_INITS = ("orthogonal", "eva", "mica")
# Ways to begin with which PEFT takes a part out of the base's weights, at every load.
_INITS_THAT_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")

# The fields in which the K adapters may differ; the first one's value is kept. Differences in the
# first of these tuples are not worth a warning.
_DESCRIPTIONS = ("base_model_name_or_path", "revision", "peft_version", "auto_mapping")
_FREE_FIELDS = (*_DESCRIPTIONS, "lora_dropout", "init_lora_weights", "fan_in_fan_out")


def read_config(file: Path) -> peft.LoraConfig:
    """The configuration in the adapter_config.json of a LoRA adapter.

    How the adapter began is not kept: its init_lora_weights is True or "gaussian", for particles
    that start anew from this configuration.

    Raises:
        ValueError: the file is damaged, the adapter is of another kind, a value means nothing, or
            particles do not support a field. The message names the file and the field.
    """
    import peft

    content = atomic.read_json(file)
    kind = content.pop("peft_type", None)
    if kind is None:
        raise ValueError(f"{file} is damaged: it has no peft_type")
    if kind != "LORA":
        raise ValueError(f"{file} is a {kind} adapter; particles are LoRA")
    values = {}
    for key, value in content.items():
        if key in _FIELDS:
            is_valid, expected = _FIELDS[key]
            if not is_valid(value):
                raise ValueError(f"{file}: {key} = {value!r} is not {expected}")
            values[key] = value
        elif value and key not in _WITHOUT_EFFECT and (key, value) != ("bias", "none"):
            raise ValueError(f"{file}: {key} = {value!r} is not supported for particles")
    values |= {key: values.get(key) or {} for key in ("rank_pattern", "alpha_pattern")}
    values["init_lora_weights"] = _init(file, values.get("init_lora_weights", True))
    values["inference_mode"] = False
    with atomic.reading(file):
        return peft.LoraConfig(**values)


def _init(file: Path, init: bool | str) -> bool | str:
    name = init.lower() if isinstance(init, str) else init
    if name in (True, "gaussian"):
        return name
    if not isinstance(name, str) or name in _PLAIN_INITS:
        return True
    if name.startswith(_INITS_THAT_CHANGE_THE_BASE):
        raise ValueError(
            f"{file}: init_lora_weights = {init!r}: when PEFT loads such an adapter, it takes the "
            "part of the base's weights out that the factors began as, so they do not belong to "
            "the base itself. Convert it by PEFT's save_pretrained("
            "path_initial_model_for_weight_conversion=...), or save the changed base and set "
            "init_lora_weights to true"
        )
    raise ValueError(f"{file}: init_lora_weights = {init!r} is not known")


def check_same(config_files: Sequence[Path], configs: Sequence[peft.LoraConfig]) -> None:
    """Raise ValueError where K configurations differ in what their adapters compute.

    Where they differ in other fields that particles share, a warning says that the first one's
    values are kept.
    """

    def comparable(value: Any) -> Any:
        # Names of modules: their order and repetition mean nothing.
        return set(value) if isinstance(value, list) and all(map(_is_text, value)) else value

    first = configs[0].to_dict()
    differing = set()
    for file, config in zip(config_files, configs):
        for key, value in config.to_dict().items():
            if comparable(value) == comparable(first[key]):
                continue
            unset = key == "task_type" and None in (value, first[key])
            if key not in _FREE_FIELDS and not unset:
                raise ValueError(
                    f"{file}: {key} = {value!r}, but {config_files[0]} has {first[key]!r}; "
                    "particles share one configuration, unless own_configurations=True"
                )
            differing.add(key)
    if notable := sorted(differing.difference(_DESCRIPTIONS)):
        kept = {key: first[key] for key in notable}
        warnings.warn(
            f"the adapters differ in {notable}, of which particles share one: those of "
            f"{config_files[0]} are kept, {kept}",
            stacklevel=4,
        )


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a file of weights, mapped into memory: none of them is read yet.

    Raises:
        ValueError: the file is damaged, or a pickle of anything but tensors; the message names it.
    """
    with atomic.reading(file):
        return _unpickle(file) if file.suffix == ".bin" else load_file(file)


# The globals that a pickle of tensors names.
_OF_TENSORS = re.compile(
    r"collections OrderedDict|torch \w+Storage|torch._utils _rebuild_(tensor_v2|parameter)"
)


def _unpickle(file: Path) -> dict[str, Tensor]:
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        if any(e.compress_type != zipfile.ZIP_STORED for e in entries):
            raise ValueError("it is compressed, as torch.save never does it")
        (pickled,) = (e for e in entries if e.filename.endswith("/data.pkl"))
        operations = list(pickletools.genops(archive.read(pickled)))
    # torch.load(weights_only=True) executes nothing either, but lets calls pass that allocate.
    for operation, argument, _ in operations:
        named = operation.name in ("GLOBAL", "STACK_GLOBAL", "INST")
        if named and not (operation.name == "GLOBAL" and _OF_TENSORS.fullmatch(str(argument))):
            raise ValueError(f"it holds {argument or 'a global'}, which is not a tensor")
    tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    if not isinstance(tensors, dict):
        raise ValueError(f"it holds a {type(tensors).__name__}, not tensors by name")
    for key, tensor in tensors.items():
        if not isinstance(key, str) or not isinstance(tensor, Tensor):
            raise ValueError(f"it holds {key!r}, a {type(tensor).__name__}, not a tensor by name")
    # A tensor of any size can be a view of one number. A tied tensor occurs a few times.
    size = file.stat().st_size
    declared = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if declared > 4 * size:
        raise ValueError(f"it has {size} bytes, and its tensors would take {declared}")
    return {key: tensor.detach() for key, tensor in tensors.items()}


class Expected(NamedTuple):
    """A tensor that an adapter's file must hold."""

    shape: tuple[int, ...]
    dtype: torch.dtype  # that its numbers are computed with
    is_shared: bool = False  # by the particles: a buffer of a module to save


def expected_tensors(
    base: nn.Module, config: peft.LoraConfig, vocabulary: int | None = None
) -> dict[str, Expected]:
    """The tensors in PEFT's file of an adapter over the plain model `base`; nothing is allocated.

    Args:
        vocabulary: the number of tokens that the base will be given, if that is another one.

    Raises:
        ValueError: a scaling overflows in the dtype of its layer, or `base` has adapters. PEFT's
            errors for a configuration that does not fit come through.
    """
    from peft import get_peft_model
    from peft.tuners.lora import LoraLayer as PeftLoraLayer
    from peft.utils.other import ModulesToSaveWrapper, get_pattern_key
    from peft.utils.save_and_load import get_peft_model_state_dict

    check_plain(base)
    shadow: Any = _without_memory(base)
    plain = copy.deepcopy(config)
    # PEFT would allocate the rank, if only for a moment, so ask it only for names and other sizes.
    plain.r, plain.rank_pattern, plain.alpha_pattern = 1, {}, {}
    with warnings.catch_warnings():
        # The same warnings come when the particles are made.
        warnings.simplefilter("ignore")
        if vocabulary is not None:
            shadow.resize_token_embeddings(vocabulary, mean_resizing=False)
        try:
            wrapped = get_peft_model(shadow, plain, low_cpu_mem_usage=True)
        except Exception as error:
            if config.target_parameters:
                raise ValueError(
                    f"target_parameters = {config.target_parameters!r}: {error}"
                ) from error
            raise
        state = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    expected = {key: Expected(tuple(t.shape), t.dtype) for key, t in state.items()}
    for name, layer in shadow.named_modules():
        if isinstance(layer, ModulesToSaveWrapper):
            for inner, _ in layer.original_module.named_buffers():
                key = f"{PREFIX}{name}.{inner}"
                if key in expected:  # buffers that are not persistent are not
                    expected[key] = expected[key]._replace(is_shared=True)
        if not isinstance(layer, PeftLoraLayer):
            continue
        if isinstance(layer.get_base_layer(), nn.Embedding):
            raise ValueError(
                f"target_modules name {name}, an embedding, and particles adapt linears and "
                "convolutions"
            )
        key, dtype = f"{PREFIX}{name}.lora_", computing_dtype(layer.get_base_layer())
        parameter = getattr(layer, "parameter_name", None)
        known = name if parameter is None else f"{bank_name(name)}.{parameter}"
        rank = config.rank_pattern.get(get_pattern_key(config.rank_pattern, known), config.r)
        alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, known), None)
        alpha = config.lora_alpha if alpha is None else alpha
        scaling = alpha / (math.sqrt(rank) if config.use_rslora else rank)
        if not abs(scaling) <= torch.finfo(dtype).max:
            raise ValueError(
                f"lora_alpha = {alpha!r} scales {name} by {scaling:g}, beyond the {dtype} that it "
                "computes with"
            )
        for factor, shape in ((f"{key}A.weight", "A"), (f"{key}B.weight", "B")):
            d = expected[factor].shape
            # A bank of E experts has E ranks side by side.
            d = (d[0] * rank, *d[1:]) if shape == "A" else (d[0], d[1] * rank, *d[2:])
            expected[factor] = Expected(d, dtype)
    return expected


def computing_dtype(layer: nn.Module) -> torch.dtype:
    """The dtype of a layer's weights; float32 where they are packed."""
    dtypes = [p.dtype for p in layer.parameters() if p.dtype in _FLOATS]
    return dtypes[0] if dtypes else torch.float32


def _without_memory(base: nn.Module) -> nn.Module:
    """A copy of a model with tensors on the meta device, and with plain linears for opaque ones."""
    copies: dict[int, Any] = {}
    for t in itertools.chain(base.parameters(), base.buffers()):
        copies[id(t)] = t
        if type(t) in (Tensor, nn.Parameter):
            empty = torch.empty_like(t, device="meta")
            is_parameter = isinstance(t, nn.Parameter)
            copies[id(t)] = nn.Parameter(empty, t.requires_grad) if is_parameter else empty
    for module in filter(has_own_forward, base.modules()):
        copies[id(module)] = nn.Linear(
            *linear_sizes(module),
            bias=getattr(module, "bias", None) is not None,
            device="meta",
            dtype=computing_dtype(module),
        )
    return copy.deepcopy(base, copies)


def check_tensors(
    file: Path, tensors: Mapping[str, Tensor], expected: Mapping[str, Expected], whose: str
) -> None:
    """Raise ValueError, naming the file, unless names, shapes, dtypes and numbers are right.

    All shapes are checked before any number. Numbers must be finite, also in the dtype that the
    layer computes with.
    """
    missing = sorted(expected.keys() - tensors.keys())
    unexpected = sorted(tensors.keys() - expected.keys())
    if missing or unexpected:
        raise ValueError(
            f"{file} does not fit {whose}: missing {missing[:3]}, unexpected "
            f"{unexpected[:3]} ({len(missing)} and {len(unexpected)} tensors)"
        )
    for key, tensor in tensors.items():
        shape = expected[key].shape
        if tensor.shape != shape:
            raise ValueError(
                f"{file}: {key} has shape {tuple(tensor.shape)}, {whose} needs {shape}"
            )
    for key, tensor in tensors.items():
        check_numbers(file, key, tensor, expected[key].dtype)


def check_numbers(file: Path, key: str, tensor: Tensor, dtype: torch.dtype) -> None:
    """Raise ValueError, naming the file, unless a tensor's numbers can be computed with in `dtype`.

    They must be stored as any floating-point dtype, or as `dtype` itself where that is another
    kind, and be finite both as they are and as `dtype`.
    """
    plain = tensor.layout == torch.strided and tensor.device.type == "cpu"
    kinds = _FLOATS if dtype in _FLOATS else (dtype,)
    if not plain or tensor.dtype not in kinds:
        raise ValueError(
            f"{file}: {key} has {tensor.dtype}, {tensor.layout} on {tensor.device}; what is "
            f"needed is a dense tensor of {' or '.join(map(str, kinds))}"
        )
    for numbers, what in ((tensor, "not finite"), (tensor.to(dtype), f"beyond {dtype}")):
        wrong = numbers.numel() - int(numbers.isfinite().sum())
        if wrong:
            raise ValueError(f"{file}: {wrong} of {numbers.numel()} numbers of {key} are {what}")
