"""K PEFT adapter folders <-> one particle model, and soups of its particles."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from multilora import files
from multilora.layers import LoraConv2d
from multilora.model import ParticleModel, get_particle_model

if TYPE_CHECKING:
    import peft
    from torch.distributed.device_mesh import DeviceMesh

# Format 1 has no list of its files; it is still read.
FORMAT = 2
_INDEX = "multilora.json"
_WEIGHTS = "adapter_model.safetensors"
_CONFIG = "adapter_config.json"
# How PEFT names the tensors of a wrapped model in its files.
_PREFIX = "base_model.model."


T = TypeVar("T")


def save_pretrained(model: ParticleModel, path: str | Path) -> None:
    """Write path/particle_k for every particle and path/multilora.json.

    Each folder is a plain PEFT adapter: peft.PeftModel.from_pretrained(base, path/particle_k)
    gives the outputs of particle k. multilora.json lists the size and SHA-256 of every file.

    All files are replaced or none: whenever the process is killed, `load_particle_model` finds the
    older particles or the new ones. (PEFT, which reads one file after the other, may find new ones
    beside old ones until the next save.) Other files in `path` are left, among them the folders of
    a larger K that it held before; multilora.json says how many count.

    Where processes share the particles (a mesh), all of them call this, and the first one writes.

    Raises NotADirectoryError where `path` is a file.
    """
    whole = _whole(model)
    particles = len(model.seeds)

    def write(folder: Path) -> None:
        for particle in range(particles):
            tensors = _particle(model, particle, whole)
            _write_adapter(folder / f"particle_{particle}", tensors, model.peft_config)
        index = {
            "format": FORMAT,
            "num_particles": particles,
            "seeds": model.seeds,
            "files": {
                name: {
                    "bytes": (folder / name).stat().st_size,
                    "sha256": files.digest(folder / name),
                }
                for name in _names(particles)
            },
        }
        (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n")

    _write(model, path, write)


def load_particle_model(
    base: nn.Module, path: str | Path | Sequence[str | Path], mesh: DeviceMesh | None = None
) -> ParticleModel:
    """The particle model that `save_pretrained` wrote to `path`, over the plain model `base`.

    path: that folder, or a sequence of K PEFT LoRA adapter folders of one configuration, trained
    by anything, which become the K particles. The files of a folder must be those that its
    multilora.json lists; a sequence of its particle folders is read whatever is in them.
    mesh: as in `get_particle_model`; it need not be the one that the particles were trained on.

    Raises FileNotFoundError or ValueError, naming the file and the mismatch, where a file is
    missing, damaged, of another save, not finite, or does not fit the others: `base` is then as it
    was. The same where the files do not fit `base`, which may have been changed by then, so try
    again with a fresh one.
    """
    saved = _read(path)
    try:
        model = get_particle_model(
            base,
            saved.configs[0],
            len(saved.configs),
            seed=saved.seeds,
            head_init="copy",
            mesh=mesh,
        )
    except NotImplementedError as error:
        raise ValueError(f"{saved.config_files[0]}: {error}") from error
    except (ValueError, TypeError) as error:
        raise ValueError(f"{saved.config_files[0]} does not fit the base model: {error}") from error
    _fill(model, saved, "the base model")
    return model


def load_particles(model: ParticleModel, path: str | Path | Sequence[str | Path]) -> None:
    """Put the particles that `save_pretrained` wrote to `path` into `model`, in place.

    path: as in `load_particle_model`. Its K, ranks, scalings, and the names and shapes of its
    tensors must be the model's; values are cast to the dtypes of the model's parameters, which
    stay the objects that an optimizer holds. The model's seeds stay as they are.

    Raises FileNotFoundError or ValueError, naming the file and the mismatch; everything is read
    and checked before the model is changed.
    """
    saved = _read(path)
    if len(saved.configs) != len(model.seeds):
        raise ValueError(
            f"{saved.source} has {len(saved.configs)} particles; the model has {len(model.seeds)}"
        )
    for key in ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"):
        theirs, ours = getattr(saved.configs[0], key), getattr(model.peft_config, key)
        if theirs != ours:
            raise ValueError(
                f"{saved.config_files[0]}: {key} = {theirs!r}; the model has {key} = {ours!r}"
            )
    _fill(model, saved, "the model")


def soup(model: ParticleModel, path: str | Path, kind: str = "exact") -> None:
    """Write the mean over particles of ΔW as one PEFT adapter folder.

    kind "exact": rank K·r, [A_1; …; A_K] with [B_1 … B_K]/K, which is the mean to the last bit
    of its arithmetic. "svd": rank r, the best approximation of it in the Frobenius norm, found
    on the factors. Modules to save are averaged weight by weight.

    The mean of the weights is one model; its predictions are not the mean of the particles'.
    Averaging A and B separately would be wrong: the mean of products is no product of means.

    As in `save_pretrained`, an older adapter in `path` is replaced as a whole.
    """
    if kind not in ("exact", "svd"):
        raise ValueError(f'kind must be "exact" or "svd"; got {kind!r}')
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    whole = _whole(model)
    for name, layer in model.lora_layers():
        A, B = _mean_factors(whole[layer.lora_A], whole[layer.lora_B] * layer.scaling)
        if kind == "svd":
            A, B = _truncate(A, B, layer.rank)
        ranks[name] = A.shape[0]
        tensors |= _adapter_tensors(name, layer, A, B)
    for name, stacked in model.stacked_modules():
        for inner, parameter in stacked.module.named_parameters():
            tensors[f"{_PREFIX}{name}.{inner}"] = whole[parameter].mean(0)
        tensors |= _buffers(name, stacked.module)
    config = copy.deepcopy(model.peft_config)
    # The scaling is inside B now: alpha = rank everywhere.
    config.r = config.lora_alpha = max(ranks.values())
    config.use_rslora = False
    config.rank_pattern = {f"^{name}": rank for name, rank in ranks.items() if rank != config.r}
    config.alpha_pattern = dict(config.rank_pattern)
    _write(model, path, lambda folder: _write_adapter(folder, tensors, config))


def _mean_factors(lora_A: Tensor, lora_B: Tensor) -> tuple[Tensor, Tensor]:
    """(K, r, d_in), (K, d_out, r) -> A (K·r, d_in), B (d_out, K·r) with B A the mean product."""
    particles = lora_A.shape[0]
    return lora_A.flatten(0, 1), lora_B.transpose(0, 1).flatten(1, 2) / particles


def _truncate(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best rank-`rank` factors of B A, through the QR of both: no d_out × d_in matrix."""
    dtype = A.dtype
    q_b, r_b = torch.linalg.qr(B.double())
    q_a, r_a = torch.linalg.qr(A.double().mT)
    u, s, vh = torch.linalg.svd(r_b @ r_a.mT, full_matrices=False)
    root = s[:rank].sqrt()
    A = root[:, None] * (vh[:rank] @ q_a.mT)
    B = (q_b @ u[:, :rank]) * root
    # A rank that the matrix does not have is filled with zeros.
    A = nn.functional.pad(A, (0, 0, 0, rank - A.shape[0]))
    B = nn.functional.pad(B, (0, rank - B.shape[1]))
    return A.to(dtype), B.to(dtype)


def _write(model: ParticleModel, path: str | Path, write: Callable[[Path], object]) -> None:
    device = next(iter(model.parameters())).device
    model.ranks.write(lambda: files.replace_files(Path(path), write), device)


def _stacked(model: ParticleModel) -> list[Tensor]:
    layers = [layer for _, layer in (*model.lora_layers(), *model.stacked_modules())]
    return [parameter for layer in layers for _, _, parameter in layer.stacked()]


def _whole(model: ParticleModel) -> dict[Tensor, Tensor]:
    """Every stacked tensor with the particles of all processes."""
    stacked = _stacked(model)
    return dict(zip(stacked, model.ranks.gather_all(stacked)))


def _particle(
    model: ParticleModel, particle: int, whole: dict[Tensor, Tensor]
) -> dict[str, Tensor]:
    """One particle's tensors under PEFT's names and in PEFT's shapes."""
    tensors: dict[str, Tensor] = {}
    for name, layer in model.lora_layers():
        A, B = whole[layer.lora_A][particle], whole[layer.lora_B][particle]
        tensors |= _adapter_tensors(name, layer, A, B)
    for name, stacked in model.stacked_modules():
        for inner, parameter in stacked.module.named_parameters():
            tensors[f"{_PREFIX}{name}.{inner}"] = whole[parameter][particle]
        tensors |= _buffers(name, stacked.module)
    return tensors


def _buffers(name: str, module: nn.Module) -> dict[str, Tensor]:
    """The persistent buffers of a module to save, which the particles share."""
    parameters = dict(module.named_parameters())
    return {
        f"{_PREFIX}{name}.{inner}": value
        for inner, value in module.state_dict().items()
        if inner not in parameters
    }


def _adapter_tensors(name: str, layer: nn.Module, A: Tensor, B: Tensor) -> dict[str, Tensor]:
    if isinstance(layer, LoraConv2d):
        A = A.view(A.shape[0], *layer.base_layer.weight.shape[1:])
        B = B[..., None, None]
    return {f"{_PREFIX}{name}.lora_A.weight": A, f"{_PREFIX}{name}.lora_B.weight": B}


class _Saved(NamedTuple):
    """K adapters as they were read, each with the file that it is from."""

    source: str
    seeds: int | list[int]  # that the particles were made with; 0 where they are not known
    configs: list[peft.LoraConfig]
    config_files: list[Path]
    tensors: list[dict[str, Tensor]]
    tensor_files: list[Path]


def _read(path: str | Path | Sequence[str | Path]) -> _Saved:
    """The adapters of a folder or of a sequence of them, checked as far as no model is needed."""
    if isinstance(path, (str, Path)):
        root = Path(path)
        index = files.newest(root, _INDEX)
        seeds, listed = _read_index(index)
        source = str(index)
        config_files, tensor_files = (
            [files.newest(root, f"particle_{k}/{name}") for k in range(len(seeds))]
            for name in (_CONFIG, _WEIGHTS)
        )
    else:
        folders = [Path(p) for p in path]
        if not folders:
            raise ValueError("at least one adapter folder is needed; got none")
        seeds, listed, source = 0, None, "the list of folders"
        config_files, tensor_files = (
            [files.newest(folder, name) for folder in folders] for name in (_CONFIG, _WEIGHTS)
        )

    def read(function: Callable[[Path], T], file: Path) -> T:
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing: {file.parent} is no PEFT adapter folder")
        if listed is None:
            return function(file)
        return _read_listed(function, file, listed[f"{file.parent.name}/{file.name}"], index)

    configs = [read(_read_config, file) for file in config_files]
    _check_same(config_files, configs)
    tensors = [read(_read_tensors, file) for file in tensor_files]
    return _Saved(source, seeds, configs, config_files, tensors, tensor_files)


def _names(num_particles: int) -> list[str]:
    """The files of K particles, relative to their folder."""
    return [f"particle_{k}/{name}" for k in range(num_particles) for name in (_CONFIG, _WEIGHTS)]


def _read_index(file: Path) -> tuple[list[int], dict[str, dict[str, Any]] | None]:
    """The seeds of the K particles; the size and digest of each file, None in format 1."""
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: {file.parent} holds no particle model")
    try:
        index = json.loads(file.read_text())
        version, particles, seeds = index["format"], index["num_particles"], list(index["seeds"])
        listed = {} if version == 1 else dict(index["files"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is damaged: {error!r}") from error
    if version not in (1, FORMAT):
        raise ValueError(f"{file} has format {version}; this version reads 1 to {FORMAT}")
    if type(particles) is not int or particles < 1 or len(seeds) != particles:
        raise ValueError(f"{file} is damaged: {particles!r} particles, {len(seeds)} seeds")
    if not all(type(seed) is int for seed in seeds):
        raise ValueError(f"{file} is damaged: the seeds {seeds!r} are no integers")
    if version == 1:
        return seeds, None
    names = _names(particles)
    if sorted(listed) != sorted(names):
        raise ValueError(
            f"{file} is damaged: it lists {sorted(listed)}, and {particles} particles have {names}"
        )
    for name, entry in listed.items():
        if not isinstance(entry, dict) or entry.keys() != {"bytes", "sha256"}:
            raise ValueError(f"{file} is damaged: {name} has {entry!r} for bytes and sha256")
    return seeds, listed


def _read_listed(
    function: Callable[[Path], T], file: Path, listed: dict[str, Any], index: Path
) -> T:
    """function(file), of a file that is the one in the index."""
    size = file.stat().st_size
    if size != listed["bytes"]:
        raise ValueError(
            f"{file} is damaged or of another save: it has {size} bytes, and {index} lists "
            f"{listed['bytes']}"
        )
    content = function(file)
    # Digested after it was read: a save by another process in between shows.
    if files.digest(file) != listed["sha256"]:
        raise ValueError(
            f"{file} is damaged or of another save: its SHA-256 is not the one in {index}"
        )
    return content


def _read_config(file: Path) -> peft.LoraConfig:
    import peft

    try:
        config = peft.PeftConfig.from_pretrained(str(file.parent))
    except Exception as error:
        raise ValueError(f"{file} is damaged: {error!r}") from error
    if not isinstance(config, peft.LoraConfig):
        raise ValueError(f"{file} is a {config.peft_type} adapter; particles are LoRA")
    config.inference_mode = False
    return config


def _read_tensors(file: Path) -> dict[str, Tensor]:
    try:
        tensors = load_file(file)
    except Exception as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    for key, tensor in tensors.items():
        wrong = tensor.numel() - int(tensor.isfinite().sum())
        if wrong:
            raise ValueError(f"{file}: {wrong} of {tensor.numel()} numbers of {key} are not finite")
    return tensors


def _check_same(config_files: list[Path], configs: list[peft.LoraConfig]) -> None:
    ignored = ("base_model_name_or_path", "revision", "peft_version", "auto_mapping")

    def comparable(value):
        # Names of modules: their order and repetition mean nothing.
        return set(value) if isinstance(value, list) and all(map(_is_text, value)) else value

    first = configs[0].to_dict()
    for file, config in zip(config_files, configs):
        for key, value in config.to_dict().items():
            if key not in ignored and comparable(value) != comparable(first[key]):
                raise ValueError(
                    f"{file}: {key} = {value!r}, but {config_files[0]} has {first[key]!r}; "
                    "particles share one configuration"
                )


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _fill(model: ParticleModel, saved: _Saved, whose: str) -> None:
    """Copy the tensors into the model, once all of them are known to fit."""
    expected = _particle(model, 0, {p: p.detach() for p in _stacked(model)})
    for file, loaded in zip(saved.tensor_files, saved.tensors):
        missing = sorted(expected.keys() - loaded.keys())
        unexpected = sorted(loaded.keys() - expected.keys())
        if missing or unexpected:
            raise ValueError(
                f"{file} does not fit {whose}: missing {missing[:3]}, unexpected "
                f"{unexpected[:3]} ({len(missing)} and {len(unexpected)} tensors)"
            )
        for key, tensor in loaded.items():
            if tensor.shape != expected[key].shape:
                raise ValueError(
                    f"{file}: {key} has shape {tuple(tensor.shape)}, "
                    f"{whose} needs {tuple(expected[key].shape)}"
                )
    slots: dict[str, Tensor] = {}
    for name, layer in model.lora_layers():
        slots[f"{_PREFIX}{name}.lora_A.weight"] = layer.lora_A
        slots[f"{_PREFIX}{name}.lora_B.weight"] = layer.lora_B
    for name, stacked in model.heads():
        slots |= {f"{_PREFIX}{name}.{inner}": p for inner, p in stacked.items()}
    shared: dict[str, Tensor] = {}
    for name, stacked in model.stacked_modules():
        shared |= _buffers(name, stacked.module)
    with torch.no_grad():
        for particle, loaded in enumerate(model.ranks.own(saved.tensors)):
            for key, tensor in loaded.items():
                slot = shared[key] if key in shared else slots[key][particle]
                slot.copy_(tensor.reshape(slot.shape))


def _write_adapter(folder: Path, tensors: dict[str, Tensor], config: peft.LoraConfig) -> None:
    folder.mkdir(exist_ok=True)
    config = copy.deepcopy(config)
    config.inference_mode = True
    config.save_pretrained(folder)
    tensors = {key: tensor.contiguous().cpu() for key, tensor in tensors.items()}
    save_file(tensors, folder / _WEIGHTS, {"format": "pt"})
