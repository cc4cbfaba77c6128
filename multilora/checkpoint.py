"""K folders of PEFT adapters or full copies -> a particle model, or the particles of one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from multilora import embeddings, particle_folders, peft_tensors
from multilora.attach import get_particle_model
from multilora.model import ParticleModel
from multilora.peft_format import CONFIG, expected_tensors

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

# The functions of version 0.1, for one more release.
save_pretrained = ParticleModel.save_pretrained
soup = ParticleModel.soup


def load_particle_model(
    base: nn.Module,
    path: str | Path | Sequence[str | Path],
    mesh: DeviceMesh | None = None,
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
    saved = particle_folders.read(path)
    if not saved.configs:
        return _load_copies(base, saved, mesh, options)
    config, file = saved.configs[0], saved.config_files[0]
    rows = embeddings.tokens_in_files(base, saved.tensor_files, saved.tensors)
    with _fitting(file, Exception):
        expected = expected_tensors(base, config, rows)
    split = [embeddings.split(base, tensors, expected) for tensors in saved.tensors]
    saved = saved._replace(tensors=[adapter for adapter, _ in split])
    particle_folders.check(saved, expected, f"the base model with its {CONFIG}")
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
    peft_tensors.fill(model.base, model.processes.own(saved.tensors))
    return model


def _load_copies(
    base: nn.Module, saved: particle_folders.Saved, mesh: DeviceMesh | None, options: dict[str, Any]
) -> ParticleModel:
    expected = peft_tensors.expected_copies(base)
    particle_folders.check(saved, expected, "the base model")
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
        path: as in `load_particle_model`.

    Raises:
        FileNotFoundError, ValueError, PermissionError: as `load_particle_model`.
        RuntimeError: the call is inside `particles` or `mixtures`.
    """
    model.require_whole("load_particles")
    saved = particle_folders.read(path)
    if len(saved.tensors) != len(model.seeds):
        raise ValueError(
            f"{saved.source} has {len(saved.tensors)} particles; the model has {len(model.seeds)}"
        )
    if model.peft_config is None or not saved.configs:
        particle_folders.check(saved, peft_tensors.expected(model.base), "the model")
        peft_tensors.fill(model.base, model.processes.own(saved.tensors))
        return
    for key in ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"):
        theirs, ours = getattr(saved.configs[0], key), getattr(model.peft_config, key)
        if theirs != ours:
            raise ValueError(
                f"{saved.config_files[0]}: {key} = {theirs!r}; the model has {key} = {ours!r}"
            )
    expected = peft_tensors.expected(model.base)
    split = [embeddings.split(model.base, tensors, expected) for tensors in saved.tensors]
    saved = saved._replace(tensors=[adapter for adapter, _ in split])
    particle_folders.check(saved, expected, "the model")
    changes = embeddings.changes(model.base, saved.tensor_files, [stored for _, stored in split])
    with embeddings.changed(model.base, changes):
        peft_tensors.fill(model.base, model.processes.own(saved.tensors))


@contextlib.contextmanager
def _fitting(file: Path, *errors: type[Exception]) -> Iterator[None]:
    """An error of these kinds says that the configuration in `file` does not fit the base."""
    try:
        yield
    except NotImplementedError as error:
        raise ValueError(f"{file}: {error}") from error
    except errors as error:
        raise ValueError(f"{file} does not fit the base model: {error}") from error
