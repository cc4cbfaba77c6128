"""Folders of K particles: PEFT adapters, or whole models, and the index that makes them one set."""

from __future__ import annotations

import contextlib
import copy
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from multilora import atomic, embeddings, peft_tensors
from multilora.parallel import Processes
from multilora.peft_format import (
    CONFIG,
    PICKLED,
    WEIGHTS,
    Expected,
    check_same,
    check_tensors,
    read_config,
    read_tensors,
)
from multilora.slots import is_uniform

if TYPE_CHECKING:
    import peft

# Format 1 has no list of its files; it is still read.
FORMAT = 2
#: A process that has all particles.
ALONE = Processes()
#: Lists the files of a set of particles.
INDEX = "multilora.json"
# The file of a full copy.
_MODEL = "model.safetensors"
#: What a particle's folder may have.
FILES = (CONFIG, WEIGHTS, _MODEL)


def save(
    base: nn.Module,
    configs: Sequence[peft.LoraConfig] | None,
    processes: Processes,
    path: str | Path,
    seeds: Sequence[int],
    save_embedding_layers: bool | Literal["auto"],
) -> None:
    """Write every particle and the index; see `ParticleModel.save_pretrained`.

    configs: those of this process's adapters, which are equal where processes share the particles;
    None for full copies.
    """
    whole = peft_tensors.of_all_processes(base, processes)
    shared = {} if configs is None else embeddings.to_save(base, save_embedding_layers)
    kind = "full" if configs is None else "lora"

    def write(folder: Path) -> None:
        for particle in range(len(seeds)):
            tensors = peft_tensors.of_particle(base, particle, whole) | shared
            own = folder / f"particle_{particle}"
            if configs is None:
                own.mkdir()
                _write_tensors(own / _MODEL, tensors)
            else:
                write_adapter(own, tensors, configs[particle % len(configs)])
        listed = {
            name: {
                "bytes": (folder / name).stat().st_size,
                "sha256": atomic.digest(folder / name),
            }
            for name in _names(len(seeds), kind)
        }
        index = {"format": FORMAT, "num_particles": len(seeds), "seeds": seeds, "files": listed}
        if kind != "lora":
            index["kind"] = kind
        if configs is not None and not is_uniform(base):
            index["own_configurations"] = True
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")

    replace(base, processes, path, write)


def replace(
    base: nn.Module, processes: Processes, path: str | Path, write: Callable[[Path], object]
) -> None:
    """Replace the files that write(folder) makes, all or none, from the first process."""
    device = next(base.parameters()).device
    processes.write(lambda: atomic.replace_files(Path(path), write), device)


def write_adapter(folder: Path, tensors: Mapping[str, Tensor], config: peft.LoraConfig) -> None:
    """Write one PEFT adapter into `folder`, whose parent is there."""
    folder.mkdir(exist_ok=True)
    config = copy.deepcopy(config)
    config.inference_mode = True
    config.save_pretrained(folder)
    _write_tensors(folder / WEIGHTS, tensors)


def save_one(base: nn.Module, particle: int, config: peft.LoraConfig, path: str | Path) -> None:
    """Write one particle as a PEFT adapter, in place of the one that `path` may hold.

    Its files are replaced together, as those of `save` are. All particles are in this process.
    """
    tensors = peft_tensors.of_particle(base, particle, peft_tensors.of_all_processes(base, ALONE))
    tensors |= embeddings.to_save(base, "auto")
    atomic.replace_files(Path(path), lambda folder: write_adapter(folder, tensors, config))


def remove_one(path: str | Path) -> None:
    """Remove the adapter that `save_one` wrote to `path`, and the folder where it is empty then."""
    for name in (WEIGHTS, CONFIG):  # a folder without weights is no adapter
        (Path(path) / name).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        Path(path).rmdir()


def _write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    contiguous = {key: tensor.contiguous().cpu() for key, tensor in tensors.items()}
    save_file(contiguous, file, {"format": "pt"})


class Saved(NamedTuple):
    """K particles as they were read, each with the file that it is from."""

    source: str
    seeds: int | list[int]  # that the particles were made with; 0 where they are not known
    configs: list[peft.LoraConfig]  # none for full copies
    config_files: list[Path]
    tensors: list[dict[str, Tensor]]
    tensor_files: list[Path]
    #: Whether the configurations may differ in what their adapters compute.
    is_own: bool = False

    def whose(self, particle: int) -> str:
        """What a particle's file must fit, for messages."""
        own = self.config_files[particle] if self.is_own else CONFIG
        return f"the base model with its {own}"


class _Particle(NamedTuple):
    config: peft.LoraConfig | None  # None for a full copy
    config_file: Path
    tensors: dict[str, Tensor]
    tensor_file: Path


def read(path: str | Path | Sequence[str | Path], may_differ: bool = False) -> Saved:
    """The particles of a folder, or adapters of a sequence, checked as far as it needs no model.

    may_differ: whether each may have a configuration of its own, as a folder may say by itself.
    """
    seeds: int | list[int] = 0
    is_own = False
    if isinstance(path, (str, os.PathLike)):
        root = Path(path)
        source = str(atomic.newest(root, INDEX))
        seeds, adapters, is_own = atomic.read_set(root, INDEX, lambda: _read_root(root))
    else:
        folders = [Path(p) for p in path]
        if not folders:
            raise ValueError("at least one adapter folder is needed; got none")
        source = "the list of folders"
        adapters = [_read_folder(folder) for folder in folders]
    found, config_files, tensors, tensor_files = (list(column) for column in zip(*adapters))
    configs = [config for config in found if config is not None]
    is_own |= may_differ
    if configs and not is_own:
        check_same(config_files, configs)
    return Saved(source, seeds, configs, config_files, tensors, tensor_files, is_own)


def _read_root(root: Path) -> tuple[list[int], list[_Particle], bool]:
    """The seeds of the K particles, their adapters, and whether they may differ."""
    index = atomic.newest(root, INDEX)
    seeds, listed, kind, is_own = _read_index(index)
    adapters = []
    for particle in range(len(seeds)):
        names = [f"particle_{particle}/{name}" for name in _FILES[kind]]
        found = [atomic.newest(root, name) for name in names]
        for name, file in zip(names, found):
            _require(file)
            if listed is not None:
                _check_listed(file, listed[name], index)
        if kind == "full":
            adapters.append(_Particle(None, index, read_tensors(*found), *found))
        else:
            adapters.append(_read_adapter(*found))
    return seeds, adapters, is_own


def _read_folder(folder: Path) -> _Particle:
    """An adapter folder, which may be a particle's that is saved with the others."""
    root, marker, inner = folder, CONFIG, ""
    if atomic.newest(folder.parent, INDEX).is_file() and folder.name.startswith("particle_"):
        root, marker, inner = folder.parent, INDEX, f"{folder.name}/"

    def read() -> _Particle:
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
    atomic.require_file(file, f"{file.parent} is not a PEFT adapter folder")


def _read_adapter(config: Path, weights: Path) -> _Particle:
    return _Particle(read_config(config), config, read_tensors(weights), weights)


#: The files of a particle, by its kind.
_FILES = {"lora": (CONFIG, WEIGHTS), "full": (_MODEL,)}


def _names(num_particles: int, kind: str) -> list[str]:
    """The files of K particles, relative to their folder."""
    return [f"particle_{k}/{name}" for k in range(num_particles) for name in _FILES[kind]]


def _read_index(file: Path) -> tuple[list[int], dict[str, dict[str, Any]] | None, str, bool]:
    """The seeds of the K particles; the size and digest of each file, None in format 1; the kind of
    the particles, a key of `_FILES`; whether their configurations may differ."""
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
            raise ValueError(f"{file} is damaged: its seed {seed!r} is not an integer in [0, 2^63)")
    if version == 1:
        return seeds, None, "lora", False
    is_own = index.get("own_configurations", False)
    if not isinstance(is_own, bool):
        raise ValueError(f"{file} is damaged: own_configurations is {is_own!r}")
    kind = index.get("kind", "lora")
    if not isinstance(kind, str) or kind not in _FILES:
        raise ValueError(
            f"{file} has particles of the kind {kind!r}; this version reads {[*_FILES]}"
        )
    listed = index.get("files")
    if not isinstance(listed, dict):
        raise ValueError(f"{file} is damaged: its files are a {type(listed).__name__}")
    names = _names(particles, kind)
    if sorted(listed) != sorted(names):
        raise ValueError(
            f"{file} is damaged: it lists {sorted(listed)}, and {particles} particles have {names}"
        )
    for name, entry in listed.items():
        if not isinstance(entry, dict) or entry.keys() != {"bytes", "sha256"}:
            raise ValueError(f"{file} is damaged: {name} has {entry!r} for bytes and sha256")
    return seeds, listed, kind, is_own


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


def check(saved: Saved, expected: Sequence[Mapping[str, Expected]], whose: str = "") -> None:
    """Raise ValueError, naming the file, where an adapter does not fit, or one the others.

    expected: of every particle.
    """
    first: dict[str, Tensor] = {}
    for k, (file, loaded) in enumerate(zip(saved.tensor_files, saved.tensors)):
        check_tensors(file, loaded, expected[k], whose or saved.whose(k))
        for key, tensor in loaded.items():
            shared = first.setdefault(key, tensor) if expected[k][key].is_shared else tensor
            if not torch.equal(tensor, shared):
                raise ValueError(
                    f"{file}: {key} is not that of {saved.tensor_files[0]}; particles share buffers"
                )
