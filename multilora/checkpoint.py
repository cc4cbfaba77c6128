"""K folders of PEFT adapters or full copies -> a particle model, or the particles of one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from multilora import checks, embeddings, particle_folders, peft_tensors
from multilora.attach import get_particle_model
from multilora.model import ParticleModel
from multilora.peft_format import PREFIX, Expected, expected_tensors
from multilora.slots import Heads

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

# The functions of version 0.1, for one more release.
save_pretrained = ParticleModel.save_pretrained
soup = ParticleModel.soup


def load_particle_model(
    base: nn.Module,
    path: str | Path | Sequence[str | Path],
    mesh: DeviceMesh | None = None,
    *,
    own_configurations: bool = False,
    **options: Any,
) -> ParticleModel:
    """The particle model that `save_pretrained` wrote to `path`, over the plain model `base`.

    Adapters may differ in their initialisation, in their dropout, and in whatever else does not
    change their outputs: the first one's configuration is kept, and a warning says so. Weights may
    be in adapter_model.bin. Token embeddings and language-model heads of the base that PEFT saved
    beside the adapters are put into `base`, which is given as many tokens; all K files must then
    hold the same. A small file cannot make the loader allocate much memory.

    Args:
        base: the plain model. It is left unchanged where loading fails.
        path: that folder, or a sequence of K PEFT LoRA adapter folders of one configuration,
            trained by anything, which become the K particles. The files of a folder must be those
            that its multilora.json lists; a sequence of its particle folders is read without that
            check. A folder to which another process saves is read as it was before or after that.
        mesh: as in `get_particle_model`.
        own_configurations: whether adapters may differ in rank, scaling, targets and heads too, as
            those of a folder may that was saved so. Each particle then keeps its own configuration.
        **options: other arguments of `get_particle_model`; they need not be those that the
            particles were trained with.

    Returns:
        The particle model, with the seeds that its particles were made with.

    Raises:
        FileNotFoundError: a file is missing.
        PermissionError: a file may not be read.
        ValueError: a file is damaged, comes from another save, is not finite, or does not fit the
            others or `base`. The message names the file and the mismatch.
    """
    checks.flag("own_configurations", own_configurations)
    saved = particle_folders.read(path, own_configurations or bool(options.get("heads")))
    if not saved.configs:
        return _load_copies(base, saved, mesh, options)
    rows = embeddings.tokens_in_files(base, saved.tensor_files, saved.tensors)
    expected = _expected(base, saved, rows)
    split = [embeddings.split(base, *each) for each in zip(saved.tensors, expected)]
    saved = saved._replace(tensors=[adapter for adapter, _ in split])
    if saved.is_own:
        options["heads"] = _own_heads(base, saved, expected, options.get("heads"))
    particle_folders.check(saved, expected)
    changes = embeddings.changes(
        base,
        saved.tensor_files,
        [stored for _, stored in split],
        rows,
        {key: e for each in expected for key, e in each.items()},
    )
    errors = (ValueError, TypeError, NotImplementedError)
    with embeddings.changed(base, changes, rows), _fitting(saved.config_files[0], *errors):
        model = get_particle_model(
            base,
            saved.configs if saved.is_own else [saved.configs[0]] * len(saved.configs),
            len(saved.configs),
            seed=saved.seeds,
            head_init="copy",
            mesh=mesh,
            **options,
        )
    model.head_init = None  # the files have the heads of these particles, not of those to come
    peft_tensors.fill(model.base, model.processes.own(saved.tensors))
    return model


def _expected(
    base: nn.Module, saved: particle_folders.Saved, rows: int | None
) -> list[dict[str, Expected]]:
    """What the file of every particle must hold."""
    if not saved.is_own:
        with _fitting(saved.config_files[0], Exception):
            return [expected_tensors(base, saved.configs[0], rows)] * len(saved.configs)
    found = []
    for config, file in zip(saved.configs, saved.config_files):
        with _fitting(file, Exception):
            found.append(dict(expected_tensors(base, config, rows)))
    return found


def _own_heads(
    base: nn.Module,
    saved: particle_folders.Saved,
    expected: Sequence[dict[str, Expected]],
    heads: Heads | None,
) -> Heads:
    """The heads of other widths: as given, or as the files have them. `expected` then has them."""
    found: dict[str, list[Any]] = {}
    for k, (tensors, wanted) in enumerate(zip(saved.tensors, expected)):
        for key in wanted.keys() & tensors.keys():
            name, _, own = key.removeprefix(PREFIX).rpartition(".")
            is_head = own == "weight" and not name.endswith(("lora_A", "lora_B"))
            if not is_head or type(base.get_submodule(name)) is not nn.Linear:
                continue
            out, width = wanted[key].shape[0], tensors[key].shape[:1]
            if width in ((), (0,), (out,)) or tensors[key].shape[1:] != wanted[key].shape[1:]:
                continue
            found.setdefault(name, [None] * len(expected))[k] = width[0]
            for part in (key, f"{PREFIX}{name}.bias"):
                if part in wanted:
                    wanted[part] = wanted[part]._replace(shape=(*width, *wanted[part].shape[1:]))
    return found | dict(heads or {})


def _load_copies(
    base: nn.Module, saved: particle_folders.Saved, mesh: DeviceMesh | None, options: dict[str, Any]
) -> ParticleModel:
    expected = peft_tensors.expected_copies(base)
    particle_folders.check(saved, [expected] * len(saved.tensors), "the base model")
    particles = len(saved.tensors)
    model = get_particle_model(base, None, particles, seed=saved.seeds, mesh=mesh, **options)
    peft_tensors.fill(model.base, model.processes.own(saved.tensors))
    return model


def load_particles(model: ParticleModel, path: str | Path | Sequence[str | Path]) -> None:
    """Put the particles that `save_pretrained` wrote to `path` into `model`, in place.

    Values are cast to the dtypes of the model's parameters, which stay the objects that an
    optimizer holds. The model's seeds stay as they are. Embeddings of the base in the files are put
    into the model's base. Everything is read and checked before the model is changed.

    Args:
        model: a model with the same K, ranks, scalings, and names and shapes of tensors.
        path: as in `load_particle_model`; the folders of a list may differ as the particles do.

    Raises:
        FileNotFoundError, ValueError, PermissionError: as `load_particle_model`.
        RuntimeError: the call is inside `particles` or `mixtures`.
    """
    model.require_whole("load_particles")
    saved = particle_folders.read(path, may_differ=not model.is_uniform)
    if len(saved.tensors) != len(model.seeds):
        raise ValueError(
            f"{saved.source} has {len(saved.tensors)} particles; the model has {len(model.seeds)}"
        )
    expected = [peft_tensors.expected(model.base, k) for k in range(model.num_particles)]
    if model.peft_configs is None or not saved.configs:
        expected = expected[:1] * len(saved.tensors)
        particle_folders.check(saved, expected, "the model")
        peft_tensors.fill(model.base, model.processes.own(saved.tensors))
        return
    if model.is_uniform:
        # The particles of other processes are like these.
        expected = expected[:1] * len(saved.tensors)
    _check_settings(model, saved)
    split = [embeddings.split(model.base, *each) for each in zip(saved.tensors, expected)]
    saved = saved._replace(tensors=[adapter for adapter, _ in split])
    particle_folders.check(saved, expected, "the model")
    changes = embeddings.changes(model.base, saved.tensor_files, [stored for _, stored in split])
    with embeddings.changed(model.base, changes):
        peft_tensors.fill(model.base, model.processes.own(saved.tensors))


def _check_settings(model: ParticleModel, saved: particle_folders.Saved) -> None:
    """Raise ValueError where an adapter was trained with other ranks or scalings than it has."""
    assert model.peft_configs is not None
    for k, (config, file) in enumerate(zip(saved.configs, saved.config_files)):
        own = model.peft_configs[k % len(model.peft_configs)]
        for key in ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"):
            theirs, ours = getattr(config, key), getattr(own, key)
            if theirs != ours:
                raise ValueError(f"{file}: {key} = {theirs!r}; the model has {key} = {ours!r}")


@contextlib.contextmanager
def _fitting(file: Path, *errors: type[Exception]) -> Iterator[None]:
    """An error of these kinds says that the configuration in `file` does not fit the base."""
    try:
        yield
    except NotImplementedError as error:
        raise ValueError(f"{file}: {error}") from error
    except errors as error:
        raise ValueError(f"{file} does not fit the base model: {error}") from error
