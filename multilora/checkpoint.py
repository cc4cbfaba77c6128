"""K PEFT adapter folders <-> one particle model, and soups of its particles."""

from __future__ import annotations

import copy
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from multilora.layers import LoraConv2d
from multilora.model import ParticleModel, get_particle_model

if TYPE_CHECKING:
    import peft

FORMAT = 1
_INDEX = "multilora.json"
_WEIGHTS = "adapter_model.safetensors"
_CONFIG = "adapter_config.json"
# How PEFT names the tensors of a wrapped model in its files.
_PREFIX = "base_model.model."


def save_pretrained(model: ParticleModel, path: str | Path) -> None:
    """Write path/particle_k for every particle and path/multilora.json.

    Each folder is a plain PEFT adapter: peft.PeftModel.from_pretrained(base, path/particle_k)
    gives the outputs of particle k. Every file is written whole or not at all. Folders of a
    larger K that `path` held before are left; multilora.json says how many count.
    """
    path = Path(path)
    for particle in range(model.num_particles):
        _write_adapter(path / f"particle_{particle}", _particle(model, particle), model.peft_config)
    index = {"format": FORMAT, "num_particles": model.num_particles, "seeds": model.seeds}
    _write_text(path / _INDEX, json.dumps(index, indent=2) + "\n")


def load_particle_model(base: nn.Module, path: str | Path | Sequence[str | Path]) -> ParticleModel:
    """The particle model that `save_pretrained` wrote to `path`, over the plain model `base`.

    path: that folder, or a sequence of K PEFT LoRA adapter folders of one configuration, trained
    by anything, which become the K particles.

    Raises FileNotFoundError or ValueError, naming the file and the mismatch, where a folder is
    missing, damaged or does not fit `base`. `base` may have been changed by then, so try again
    with a fresh one.
    """
    folders, seeds = _folders(path)
    configs = [_read_config(folder / _CONFIG) for folder in folders]
    _check_same(folders, configs)
    # Everything is read before the base is touched.
    tensors = [_read(folder / _WEIGHTS) for folder in folders]
    try:
        model = get_particle_model(base, configs[0], len(folders), seed=seeds, head_init="copy")
    except (ValueError, TypeError) as error:
        raise ValueError(f"{folders[0] / _CONFIG} does not fit the base model: {error}") from error
    for particle, (folder, loaded) in enumerate(zip(folders, tensors)):
        _load_particle(model, particle, loaded, folder / _WEIGHTS)
    return model


def soup(model: ParticleModel, path: str | Path, kind: str = "exact") -> None:
    """Write the mean over particles of ΔW as one PEFT adapter folder.

    kind "exact": rank K·r, [A_1; …; A_K] with [B_1 … B_K]/K, which is the mean to the last bit
    of its arithmetic. "svd": rank r, the best approximation of it in the Frobenius norm, found
    on the factors. Modules to save are averaged weight by weight.

    The mean of the weights is one model; its predictions are not the mean of the particles'.
    Averaging A and B separately would be wrong: the mean of products is no product of means.
    """
    if kind not in ("exact", "svd"):
        raise ValueError(f'kind must be "exact" or "svd"; got {kind!r}')
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for name, layer in model.lora_layers():
        A, B = _mean_factors(layer.lora_A.detach(), layer.lora_B.detach() * layer.scaling)
        if kind == "svd":
            A, B = _truncate(A, B, layer.rank)
        ranks[name] = A.shape[0]
        tensors |= _adapter_tensors(name, layer, A, B)
    for name, stacked in model.stacked_modules():
        for inner, parameter in stacked.module.named_parameters():
            tensors[f"{_PREFIX}{name}.{inner}"] = parameter.detach().mean(0)
        tensors |= _buffers(name, stacked.module)
    config = copy.deepcopy(model.peft_config)
    # The scaling is inside B now: alpha = rank everywhere.
    config.r = config.lora_alpha = max(ranks.values())
    config.use_rslora = False
    config.rank_pattern = {f"^{name}": rank for name, rank in ranks.items() if rank != config.r}
    config.alpha_pattern = dict(config.rank_pattern)
    _write_adapter(Path(path), tensors, config)


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


def _particle(model: ParticleModel, particle: int) -> dict[str, Tensor]:
    """One particle's tensors under PEFT's names and in PEFT's shapes."""
    tensors: dict[str, Tensor] = {}
    for name, layer in model.lora_layers():
        A, B = layer.lora_A.detach()[particle], layer.lora_B.detach()[particle]
        tensors |= _adapter_tensors(name, layer, A, B)
    for name, stacked in model.stacked_modules():
        for inner, parameter in stacked.module.named_parameters():
            tensors[f"{_PREFIX}{name}.{inner}"] = parameter.detach()[particle]
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


def _load_particle(
    model: ParticleModel, particle: int, loaded: dict[str, Tensor], file: Path
) -> None:
    slots: dict[str, Tensor] = {}
    for name, layer in model.lora_layers():
        slots[f"{_PREFIX}{name}.lora_A.weight"] = layer.lora_A
        slots[f"{_PREFIX}{name}.lora_B.weight"] = layer.lora_B
    for name, stacked in model.heads():
        slots |= {f"{_PREFIX}{name}.{inner}": p for inner, p in stacked.items()}
    shared: dict[str, Tensor] = {}
    for name, stacked in model.stacked_modules():
        shared |= _buffers(name, stacked.module)
    expected = _particle(model, particle)
    missing = sorted(expected.keys() - loaded.keys())
    unexpected = sorted(loaded.keys() - expected.keys())
    if missing or unexpected:
        raise ValueError(
            f"{file} does not fit the base model: missing {missing[:3]}, unexpected "
            f"{unexpected[:3]} ({len(missing)} and {len(unexpected)} tensors)"
        )
    for key, tensor in loaded.items():
        if tensor.shape != expected[key].shape:
            raise ValueError(
                f"{file}: {key} has shape {tuple(tensor.shape)}, "
                f"the base model needs {tuple(expected[key].shape)}"
            )
    with torch.no_grad():
        for key, tensor in loaded.items():
            slot = shared[key] if key in shared else slots[key][particle]
            slot.copy_(tensor.reshape(slot.shape))


def _read_config(file: Path) -> peft.LoraConfig:
    import peft

    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: {file.parent} is no PEFT adapter folder")
    try:
        config = peft.PeftConfig.from_pretrained(str(file.parent))
    except Exception as error:
        raise ValueError(f"{file} is damaged: {error!r}") from error
    if not isinstance(config, peft.LoraConfig):
        raise ValueError(f"{file} is a {config.peft_type} adapter; particles are LoRA")
    config.inference_mode = False
    return config


def _folders(path: str | Path | Sequence[str | Path]) -> tuple[list[Path], int | list[int]]:
    """The adapter folders, and the seeds that the model was made with where they are known."""
    if not isinstance(path, (str, Path)):
        folders = [Path(p) for p in path]
        if not folders:
            raise ValueError("load_particle_model needs at least one adapter folder; got none")
        return folders, 0
    path = Path(path)
    file = path / _INDEX
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: {path} holds no particle model")
    try:
        index = json.loads(file.read_text())
        version, particles, seeds = index["format"], index["num_particles"], list(index["seeds"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is damaged: {error!r}") from error
    if version != FORMAT:
        raise ValueError(f"{file} has format {version}; this version reads format {FORMAT}")
    if not isinstance(particles, int) or particles < 1 or len(seeds) != particles:
        raise ValueError(f"{file} is damaged: {particles!r} particles, {len(seeds)} seeds")
    if not all(isinstance(seed, int) for seed in seeds):
        raise ValueError(f"{file} is damaged: the seeds {seeds!r} are no integers")
    return [path / f"particle_{k}" for k in range(particles)], seeds


def _check_same(folders: list[Path], configs: list[peft.LoraConfig]) -> None:
    ignored = ("base_model_name_or_path", "revision", "peft_version", "auto_mapping")

    def comparable(value):
        # Names of modules: their order and repetition mean nothing.
        return set(value) if isinstance(value, list) and all(map(_is_text, value)) else value

    first = configs[0].to_dict()
    for folder, config in zip(folders, configs):
        for key, value in config.to_dict().items():
            if key not in ignored and comparable(value) != comparable(first[key]):
                raise ValueError(
                    f"{folder / _CONFIG}: {key} = {value!r}, but {folders[0] / _CONFIG} has "
                    f"{first[key]!r}; particles share one configuration"
                )


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _read(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing")
    try:
        return load_file(file)
    except Exception as error:
        raise ValueError(f"{file} is damaged: {error}") from error


def _write_adapter(folder: Path, tensors: dict[str, Tensor], config: peft.LoraConfig) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    config = copy.deepcopy(config)
    config.inference_mode = True
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        config.save_pretrained(scratch)
        os.replace(Path(scratch) / _CONFIG, folder / _CONFIG)
    temporary = folder / f".{_WEIGHTS}.tmp"
    save_file({k: t.contiguous().cpu() for k, t in tensors.items()}, temporary, {"format": "pt"})
    os.replace(temporary, folder / _WEIGHTS)


def _write_text(file: Path, text: str) -> None:
    temporary = file.with_name(f".{file.name}.tmp")
    temporary.write_text(text)
    os.replace(temporary, file)
