"""K PEFT adapter folders <-> one particle model, and soups of its particles."""

from __future__ import annotations

import contextlib
import copy
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from multilora import atomic, embeddings
from multilora.layers import LoraConv2d
from multilora.model import ParticleModel, get_particle_model
from multilora.peft_format import (
    CONFIG,
    PICKLED,
    PREFIX,
    WEIGHTS,
    Expected,
    check_same,
    check_tensors,
    computing_dtype,
    expected_tensors,
    read_config,
    read_tensors,
)

if TYPE_CHECKING:
    import peft
    from torch.distributed.device_mesh import DeviceMesh

# Format 1 has no list of its files; it is still read.
FORMAT = 2
_INDEX = "multilora.json"


def save_pretrained(
    model: ParticleModel,
    path: str | Path,
    save_embedding_layers: bool | Literal["auto"] = "auto",
) -> None:
    """Write path/particle_k for every particle and path/multilora.json.

    Each folder is a plain PEFT adapter: peft.PeftModel.from_pretrained(base, path/particle_k)
    gives the outputs of particle k. multilora.json lists the size and SHA-256 of every file.

    All files are replaced or none: whenever the process is killed, and at any moment in which
    another process reads, `load_particle_model` finds the older particles or the new ones. (PEFT,
    which reads one file after the other, may find new ones beside old ones until the next save.)
    Other files in `path` are left, among them the folders of a larger K that it held before;
    multilora.json says how many count.

    save_embedding_layers: as PEFT's: whether the token embedding and the language-model head of
    the base are written into each folder too. "auto" does so where the vocabulary of the base was
    resized, so that new rows come back.

    Where processes share the particles (a mesh), all of them call this, and the first one writes.

    Raises NotADirectoryError where `path` is a file.
    """
    whole = _whole(model)
    particles = len(model.seeds)
    shared = embeddings.to_save(model.base, save_embedding_layers)

    def write(folder: Path) -> None:
        for particle in range(particles):
            tensors = _particle(model, particle, whole) | shared
            _write_adapter(folder / f"particle_{particle}", tensors, model.peft_config)
        index = {
            "format": FORMAT,
            "num_particles": particles,
            "seeds": model.seeds,
            "files": {
                name: {
                    "bytes": (folder / name).stat().st_size,
                    "sha256": atomic.digest(folder / name),
                }
                for name in _names(particles)
            },
        }
        (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n")

    _write(model, path, write)


def load_particle_model(
    base: nn.Module,
    path: str | Path | Sequence[str | Path],
    mesh: DeviceMesh | None = None,
    **options: Any,
) -> ParticleModel:
    """The particle model that `save_pretrained` wrote to `path`, over the plain model `base`.

    path: that folder, or a sequence of K PEFT LoRA adapter folders of one configuration, trained
    by anything, which become the K particles. The files of a folder must be those that its
    multilora.json lists; a sequence of its particle folders is read whatever is in them. Folders
    in which another process saves are read as they were before or after it.
    mesh, options: as in `get_particle_model`; they need not be those that the particles were
    trained with.

    Adapters may differ in how they began, their dropout and what else their outputs do not depend
    on: the first one's configuration is kept, and a warning says so. Weights may be in
    adapter_model.bin. Token embeddings and language-model heads of the base that PEFT saved beside
    the adapters are put into `base`, which is given as many tokens; all K files must then hold the
    same.

    Raises FileNotFoundError or ValueError, naming the file and the mismatch, where a file is
    missing, damaged, of another save, not finite, or does not fit the others or `base`, and
    PermissionError: `base` is then as it was. Nothing of a size that the files only declare is
    allocated.
    """
    saved = _read(path)
    config, file = saved.configs[0], saved.config_files[0]
    rows = embeddings.vocabulary(base, saved.tensor_files, saved.tensors)
    with _fitting(file, Exception):
        expected = expected_tensors(base, config, rows)
    split = [embeddings.split(base, tensors, expected) for tensors in saved.tensors]
    saved = saved._replace(tensors=[adapter for adapter, _ in split])
    _check(saved, expected, f"the base model with its {CONFIG}")
    changes = embeddings.changes(
        base, saved.tensor_files, [stored for _, stored in split], rows, expected
    )
    errors = (ValueError, TypeError, NotImplementedError)
    with embeddings.changed(base, changes, rows), _fitting(file, *errors):
        model = get_particle_model(
            base,
            config,
            len(saved.configs),
            seed=saved.seeds,
            head_init="copy",
            mesh=mesh,
            **options,
        )
    _fill(model, saved)
    return model


def load_particles(model: ParticleModel, path: str | Path | Sequence[str | Path]) -> None:
    """Put the particles that `save_pretrained` wrote to `path` into `model`, in place.

    path: as in `load_particle_model`. Its K, ranks, scalings, and the names and shapes of its
    tensors must be the model's; values are cast to the dtypes of the model's parameters, which
    stay the objects that an optimizer holds. The model's seeds stay as they are. Embeddings of the
    base in the files are put into the model's base.

    Raises FileNotFoundError, ValueError or PermissionError, naming the file and the mismatch;
    everything is read and checked before the model is changed.
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
    expected = _expected(model)
    split = [embeddings.split(model.base, tensors, expected) for tensors in saved.tensors]
    saved = saved._replace(tensors=[adapter for adapter, _ in split])
    _check(saved, expected, "the model")
    changes = embeddings.changes(model.base, saved.tensor_files, [stored for _, stored in split])
    with embeddings.changed(model.base, changes):
        _fill(model, saved)


def soup(model: ParticleModel, path: str | Path, kind: str = "exact") -> None:
    """Write the mean over particles of ΔW as one PEFT adapter folder.

    kind "exact": rank K·r, [A_1; …; A_K] with [B_1 … B_K]/K, which is the mean to the last bit
    of its arithmetic. "svd": rank r, the best approximation of it in the Frobenius norm, found
    on the factors. Modules to save are averaged weight by weight.

    The mean of the weights is one model; its predictions are not the mean of the particles'.
    Averaging A and B separately would be wrong: the mean of products is no product of means.

    As in `save_pretrained`, an older adapter in `path` is replaced as a whole, and the embeddings
    of a base with a resized vocabulary are written.

    Raises ValueError, naming the tensor, where the mean is not finite; nothing is written then.
    """
    if kind not in ("exact", "svd"):
        raise ValueError(f'kind must be "exact" or "svd"; got {kind!r}')
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    whole = _whole(model)
    for name, layer in model.lora_layers():
        A, B = _mean_factors(whole[layer.lora_A], whole[layer.lora_B] * layer.scaling)
        for factor, what in ((A, "lora_A"), (B, "lora_B times its scaling")):
            _require_finite(f"{name}: {what}", factor)
        if kind == "svd":
            A, B = _truncate(A, B, layer.rank)
        ranks[name] = A.shape[0]
        tensors |= _adapter_tensors(name, layer, A, B)
    for name, stacked in model.stacked_modules():
        for inner, parameter in stacked.module.named_parameters():
            mean = whole[parameter].mean(0)
            _require_finite(f"{name}.{inner}", mean)
            tensors[f"{PREFIX}{name}.{inner}"] = mean
        tensors |= _buffers(name, stacked.module)
    tensors |= embeddings.to_save(model.base, "auto")
    config = copy.deepcopy(model.peft_config)
    # The scaling is inside B now: alpha = rank everywhere.
    config.r = config.lora_alpha = max(ranks.values())
    config.use_rslora = False
    config.rank_pattern = {f"^{name}": rank for name, rank in ranks.items() if rank != config.r}
    config.alpha_pattern = dict(config.rank_pattern)
    _write(model, path, lambda folder: _write_adapter(folder, tensors, config))


def _require_finite(name: str, tensor: Tensor) -> None:
    wrong = tensor.numel() - int(tensor.isfinite().sum())
    if wrong:
        raise ValueError(
            f"the mean of the particles is not finite: {wrong} of {tensor.numel()} numbers of "
            f"{name}"
        )


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
    model.processes.write(lambda: atomic.replace_files(Path(path), write), device)


def _stacked(model: ParticleModel) -> list[Tensor]:
    layers = [layer for _, layer in (*model.lora_layers(), *model.stacked_modules())]
    return [parameter for layer in layers for _, _, parameter in layer.stacked()]


def _whole(model: ParticleModel) -> dict[Tensor, Tensor]:
    """Every stacked tensor with the particles of all processes."""
    stacked = _stacked(model)
    return dict(zip(stacked, model.processes.gather_all(stacked)))


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
            tensors[f"{PREFIX}{name}.{inner}"] = whole[parameter][particle]
        tensors |= _buffers(name, stacked.module)
    return tensors


def _buffers(name: str, module: nn.Module) -> dict[str, Tensor]:
    """The persistent buffers of a module to save, which the particles share."""
    parameters = dict(module.named_parameters())
    return {
        f"{PREFIX}{name}.{inner}": value
        for inner, value in module.state_dict().items()
        if inner not in parameters
    }


def _adapter_tensors(name: str, layer: nn.Module, A: Tensor, B: Tensor) -> dict[str, Tensor]:
    if isinstance(layer, LoraConv2d):
        A = A.view(A.shape[0], *layer.base_layer.weight.shape[1:])
        B = B[..., None, None]
    return {f"{PREFIX}{name}.lora_A.weight": A, f"{PREFIX}{name}.lora_B.weight": B}


class _Saved(NamedTuple):
    """K adapters as they were read, each with the file that it is from."""

    source: str
    seeds: int | list[int]  # that the particles were made with; 0 where they are not known
    configs: list[peft.LoraConfig]
    config_files: list[Path]
    tensors: list[dict[str, Tensor]]
    tensor_files: list[Path]


class _Adapter(NamedTuple):
    config: peft.LoraConfig
    config_file: Path
    tensors: dict[str, Tensor]
    tensor_file: Path


def _read(path: str | Path | Sequence[str | Path]) -> _Saved:
    """The adapters of a folder or of a sequence of them, checked as far as no model is needed."""
    seeds: int | list[int] = 0
    if isinstance(path, (str, os.PathLike)):
        root = Path(path)
        source = atomic.newest(root, _INDEX)
        seeds, adapters = atomic.read_set(root, _INDEX, lambda: _read_root(root))
    else:
        folders = [Path(p) for p in path]
        if not folders:
            raise ValueError("at least one adapter folder is needed; got none")
        source = "the list of folders"
        adapters = [_read_folder(folder) for folder in folders]
    configs, config_files, tensors, tensor_files = (list(column) for column in zip(*adapters))
    check_same(config_files, configs)
    return _Saved(str(source), seeds, configs, config_files, tensors, tensor_files)


def _read_root(root: Path) -> tuple[list[int], list[_Adapter]]:
    """The seeds of the K particles, and their adapters."""
    index = atomic.newest(root, _INDEX)
    seeds, listed = _read_index(index)
    adapters = []
    for particle in range(len(seeds)):
        names = [f"particle_{particle}/{name}" for name in (CONFIG, WEIGHTS)]
        found = [atomic.newest(root, name) for name in names]
        for name, file in zip(names, found):
            _require(file)
            if listed is not None:
                _check_listed(file, listed[name], index)
        adapters.append(_read_adapter(*found))
    return seeds, adapters


def _read_folder(folder: Path) -> _Adapter:
    """An adapter folder, which may be a particle's that is saved with the others."""
    root, marker, inner = folder, CONFIG, ""
    if atomic.newest(folder.parent, _INDEX).is_file() and folder.name.startswith("particle_"):
        root, marker, inner = folder.parent, _INDEX, f"{folder.name}/"

    def read() -> _Adapter:
        config, weights, pickled = (
            atomic.newest(root, f"{inner}{name}") for name in (CONFIG, WEIGHTS, PICKLED)
        )
        if os.path.lexists(pickled) and not os.path.lexists(weights):
            weights = pickled
        _require(config)
        _require(weights)
        return _read_adapter(config, weights)

    return atomic.read_set(root, marker, read)


def _require(file: Path) -> None:
    atomic.require_file(file, f"{file.parent} is no PEFT adapter folder")


def _read_adapter(config: Path, weights: Path) -> _Adapter:
    return _Adapter(read_config(config), config, read_tensors(weights), weights)


def _names(num_particles: int) -> list[str]:
    """The files of K particles, relative to their folder."""
    return [f"particle_{k}/{name}" for k in range(num_particles) for name in (CONFIG, WEIGHTS)]


def _read_index(file: Path) -> tuple[list[int], dict[str, dict[str, Any]] | None]:
    """The seeds of the K particles; the size and digest of each file, None in format 1."""
    atomic.require_file(file, f"{file.parent} holds no particle model")
    index = atomic.read_json(file)
    if lacking := [key for key in ("format", "num_particles", "seeds") if key not in index]:
        raise ValueError(f"{file} is damaged: it lacks {lacking}")
    version, particles, seeds = index["format"], index["num_particles"], index["seeds"]
    if type(version) is not int or not 1 <= version <= FORMAT:
        raise ValueError(f"{file} has format {version!r}; this version reads 1 to {FORMAT}")
    if not isinstance(seeds, list):
        raise ValueError(f"{file} is damaged: its seeds are a {type(seeds).__name__}")
    if type(particles) is not int or particles < 1 or len(seeds) != particles:
        raise ValueError(f"{file} is damaged: {particles!r} particles, {len(seeds)} seeds")
    for seed in seeds:
        if type(seed) is not int or not 0 <= seed < 2**63:
            raise ValueError(f"{file} is damaged: its seed {seed!r} is no integer in [0, 2^63)")
    if version == 1:
        return seeds, None
    listed = index.get("files")
    if not isinstance(listed, dict):
        raise ValueError(f"{file} is damaged: its files are a {type(listed).__name__}")
    names = _names(particles)
    if sorted(listed) != sorted(names):
        raise ValueError(
            f"{file} is damaged: it lists {sorted(listed)}, and {particles} particles have {names}"
        )
    for name, entry in listed.items():
        if not isinstance(entry, dict) or entry.keys() != {"bytes", "sha256"}:
            raise ValueError(f"{file} is damaged: {name} has {entry!r} for bytes and sha256")
    return seeds, listed


def _check_listed(file: Path, listed: dict[str, Any], index: Path) -> None:
    """Raise ValueError where `file` is not the one in the index."""
    size = file.stat().st_size
    if size != listed["bytes"]:
        raise ValueError(
            f"{file} is damaged or of another save: it has {size} bytes, and {index} lists "
            f"{listed['bytes']}"
        )
    if atomic.digest(file) != listed["sha256"]:
        raise ValueError(
            f"{file} is damaged or of another save: its SHA-256 is not the one in {index}"
        )


@contextlib.contextmanager
def _fitting(file: Path, *errors: type[Exception]) -> Iterator[None]:
    """An error of these kinds says that the configuration in `file` does not fit the base."""
    try:
        yield
    except NotImplementedError as error:
        raise ValueError(f"{file}: {error}") from error
    except errors as error:
        raise ValueError(f"{file} does not fit the base model: {error}") from error


def _expected(model: ParticleModel) -> dict[str, Expected]:
    """What the file of a particle of `model` must hold."""
    tensors = _particle(model, 0, {p: p.detach() for p in _stacked(model)})
    expected = {key: Expected(tuple(t.shape), t.dtype) for key, t in tensors.items()}
    for name, stacked in model.stacked_modules():
        for key in _buffers(name, stacked.module):
            expected[key] = expected[key]._replace(is_shared=True)
    for name, layer in model.lora_layers():
        for factor in ("lora_A", "lora_B"):
            key = f"{PREFIX}{name}.{factor}.weight"
            expected[key] = expected[key]._replace(dtype=computing_dtype(layer.base_layer))
    return expected


def _check(saved: _Saved, expected: Mapping[str, Expected], whose: str) -> None:
    """Raise ValueError, naming the file, where an adapter does not fit, or one the others."""
    for file, loaded in zip(saved.tensor_files, saved.tensors):
        check_tensors(file, loaded, expected, whose)
        for key, tensor in loaded.items():
            if expected[key].is_shared and not torch.equal(tensor, saved.tensors[0][key]):
                raise ValueError(
                    f"{file}: {key} is not that of {saved.tensor_files[0]}; particles share buffers"
                )


def _fill(model: ParticleModel, saved: _Saved) -> None:
    """Copy the tensors, which fit, into the model."""
    slots: dict[str, Tensor] = {}
    for name, layer in model.lora_layers():
        slots[f"{PREFIX}{name}.lora_A.weight"] = layer.lora_A
        slots[f"{PREFIX}{name}.lora_B.weight"] = layer.lora_B
    for name, stacked in model.heads():
        slots |= {f"{PREFIX}{name}.{inner}": p for inner, p in stacked.items()}
    shared: dict[str, Tensor] = {}
    for name, stacked in model.stacked_modules():
        shared |= _buffers(name, stacked.module)
    with torch.no_grad():
        for particle, loaded in enumerate(model.processes.own(saved.tensors)):
            for key, tensor in loaded.items():
                slot = shared[key] if key in shared else slots[key][particle]
                slot.copy_(tensor.reshape(slot.shape))


def _write_adapter(folder: Path, tensors: dict[str, Tensor], config: peft.LoraConfig) -> None:
    folder.mkdir(exist_ok=True)
    config = copy.deepcopy(config)
    config.inference_mode = True
    config.save_pretrained(folder)
    tensors = {key: tensor.contiguous().cpu() for key, tensor in tensors.items()}
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
