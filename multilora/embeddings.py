"""Token embeddings and language-model heads of the base, which PEFT writes into adapter files.

PEFT writes them beside the factors where one of them is a target, or where the vocabulary of the
base was resized. They belong to the base, so the K particles share them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from multilora.layers import LoraLayer
from multilora.peft_format import PREFIX, check_numbers
from multilora.targets import vocabulary

# The name, in PEFT's files, under which it keeps a module that it has wrapped.
_WRAPPED = ("base_layer.", "original_module.")


def to_save(base: nn.Module, save: bool | Literal["auto"]) -> dict[str, Tensor]:
    """The tensors to write beside the factors, under PEFT's names; only the first of tied tensors.

    Args:
        save: "auto" writes them where the vocabulary was resized. That is PEFT's rule but for one
            case: a head among the targets is not written where the base was loaded with it.
    """
    if save not in (True, False, "auto"):
        raise ValueError(f'save_embedding_layers must be True, False or "auto"; got {save!r}')
    if save is False or (save == "auto" and not _is_resized(base)):
        return {}
    tensors: dict[str, Tensor] = {}
    known: set[int] = set()
    for name, module in _modules(base).items():
        infix = _WRAPPED[0] if isinstance(module, LoraLayer) else ""
        for inner, tensor in _plain(module).items():
            if id(tensor) not in known:
                known.add(id(tensor))
                tensors[f"{PREFIX}{name}.{infix}{inner}"] = tensor.detach()
    return tensors


def split(
    base: nn.Module, tensors: Mapping[str, Tensor], adapter: Mapping[str, object]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Split the tensors of a file into the adapter's, and the embeddings' by their names in `base`.

    Args:
        adapter: a mapping whose keys are the tensors that the adapter itself must hold.
    """
    modules, ours = _modules(base), _tensors(base)
    rest, stored = {}, {}
    for key, tensor in tensors.items():
        name, is_wrapped = _name_in_base(modules, key)
        if key not in adapter and name in ours:
            stored[name] = tensor
        # Any other tensor of a wrapper is the original of a module to save, or a copy of it.
        elif key in adapter or not is_wrapped:
            rest[key] = tensor
    return rest, stored


def tokens_in_files(
    base: nn.Module, tensor_files: Sequence[Path], tensors: Sequence[Mapping[str, Tensor]]
) -> int | None:
    """The number of tokens of the embeddings in the files; None where it is the base's, or unknown.

    Raises:
        ValueError: the files have embeddings of several sizes; the message names the file.
    """
    modules, ours = _modules(base), _tensors(base)
    found: dict[int, str] = {}
    for file, loaded in zip(tensor_files, tensors):
        for key, tensor in loaded.items():
            name, _ = _name_in_base(modules, key)
            if name in ours and name.endswith(".weight") and ours[name].ndim == 2:
                if tensor.ndim != 2 or tensor.shape[1] != ours[name].shape[1]:
                    raise ValueError(
                        f"{file}: {key} has shape {tuple(tensor.shape)}, the base model's "
                        f"{name} has {tuple(ours[name].shape)}"
                    )
                found.setdefault(tensor.shape[0], f"{key} in {file}")
    sizes = {tensor.shape[0] for name, tensor in ours.items() if name.endswith(".weight")}
    if len(found) > 1 and found.keys() != sizes:
        raise ValueError(f"embeddings of several vocabularies: {found}; particles share one base")
    return None if found.keys() <= sizes else next(iter(found))


def changes(
    base: nn.Module,
    tensor_files: Sequence[Path],
    stored: Sequence[Mapping[str, Tensor]],
    resized_to: int | None = None,
    adapter: Mapping[str, object] | None = None,
) -> dict[str, Tensor]:
    """The embeddings in the files that differ from those of the base, by their names in it.

    Args:
        stored: the embeddings of each of the K files, by those names. A missing one is the base's.
        resized_to: the number of tokens that the base will be given. What holds a new vocabulary
            must then be in the files or in the adapters.
        adapter: as in `split`.

    Raises:
        ValueError: the files differ, or an embedding does not fit; the message names the file.
    """
    ours, first = _tensors(base), stored[0]
    changed: dict[str, Tensor] = {}
    for name, own in ours.items():
        if not any(name in loaded for loaded in stored):
            same = {other for other, tensor in ours.items() if tensor is own}
            is_covered = not same.isdisjoint(first) or f"{PREFIX}{name}" in (adapter or ())
            if resized_to is not None and not is_covered:
                raise ValueError(
                    f"{tensor_files[0]} has embeddings of {resized_to} tokens, but not {name}, of "
                    f"which the base model has {tuple(own.shape)}: give the base model "
                    f"{resized_to} tokens, with the rows that the adapters were trained on"
                )
            continue
        if own.is_meta:
            raise ValueError(
                f"{name} of the base model has no memory (it is offloaded), so that the one in "
                f"{tensor_files[0]} cannot be compared with it"
            )
        shape = own.shape if resized_to is None else (resized_to, *own.shape[1:])
        for file, loaded in zip(tensor_files, stored):
            tensor = loaded.get(name, own)
            if name in loaded and tensor.shape != shape:
                raise ValueError(
                    f"{file}: {name} has shape {tuple(tensor.shape)}, the base model needs "
                    f"{tuple(shape)}"
                )
            if name in loaded:
                check_numbers(file, name, tensor, own.dtype)
            tied = [t for other, t in loaded.items() if ours[other] is own]
            if not all(_same(t, first.get(name, own), own.dtype) for t in (tensor, *tied)):
                raise ValueError(
                    f"{file}: {name} is not that of {tensor_files[0]}, or not that of the "
                    "embedding that it is tied to in the base model; particles share one base, so "
                    "their files must hold the same embedding"
                )
        if name in first and not _same(first[name], own, own.dtype):
            changed[name] = first[name]
    return changed


@contextlib.contextmanager
def changed(
    base: Any, embeddings: Mapping[str, Tensor], resized_to: int | None = None
) -> Iterator[None]:
    """Give the base these embeddings and as many tokens, and take them back if the body raises."""
    before, rows = {}, None
    if embeddings or resized_to is not None:
        before = {name: t.detach().clone() for name, t in _tensors(base).items()}
    if resized_to is not None:
        rows = base.get_input_embeddings().weight.shape[0]
    try:
        _put(base, embeddings, resized_to)
        yield
    except BaseException:
        _put(base, before, rows)
        raise


def _put(base: Any, embeddings: Mapping[str, Tensor], rows: int | None) -> None:
    if rows is not None:
        base.resize_token_embeddings(rows, mean_resizing=False)
    ours = _tensors(base)
    with torch.no_grad():
        for name, tensor in embeddings.items():
            ours[name].copy_(tensor)


def _modules(base: nn.Module) -> dict[str, nn.Module]:
    """The token embedding and the language-model head, by their names in the base."""
    names = {id(module): name for name, module in base.named_modules()}
    return {names[id(module)]: module for module in vocabulary(base) if id(module) in names}


def _plain(module: nn.Module) -> dict[str, Tensor]:
    """The frozen tensors of an embedding or a head by name, without those of the particles."""
    if isinstance(module, LoraLayer):
        module = module.base_layer
    if not isinstance(module, (nn.Embedding, nn.Linear)):
        return {}
    return dict(module.state_dict(keep_vars=True))


def _tensors(base: nn.Module) -> dict[str, Tensor]:
    return {
        f"{name}.{inner}": tensor
        for name, module in _modules(base).items()
        for inner, tensor in _plain(module).items()
    }


def _name_in_base(modules: Iterable[str], key: str) -> tuple[str | None, bool]:
    """The embedding's tensor that PEFT means by `key`, and whether it names its own wrapper."""
    for name in modules:
        if key.startswith(f"{PREFIX}{name}."):
            inner = key.removeprefix(f"{PREFIX}{name}.")
            for infix in _WRAPPED:
                if inner.startswith(infix):
                    return f"{name}.{inner.removeprefix(infix)}", True
            return f"{name}.{inner}", inner.startswith("modules_to_save.")
    return None, False


def _same(a: Tensor, b: Tensor, dtype: torch.dtype) -> bool:
    return a.shape == b.shape and torch.equal(a.cpu().to(dtype), b.detach().cpu().to(dtype))


def _is_resized(base: nn.Module) -> bool:
    """Whether the vocabulary is known to differ from the one that the base was made or loaded with.

    It is known where the configuration that the base was loaded with is on this machine, and where
    the model inside remembers the size that it was made with.
    """
    config: Any = getattr(base, "config", None)
    size = _vocabulary_size(config)
    if size is None:
        return False
    inner = getattr(base, getattr(base, "base_model_prefix", ""), None)
    if getattr(inner, "vocab_size", size) != size:
        return True
    name = getattr(config, "_name_or_path", None)
    if not name:
        return False
    try:
        loaded = type(config).from_pretrained(name, local_files_only=True)
    except Exception:
        # Neither a folder nor in the cache, or not what transformers reads.
        return False
    return _vocabulary_size(loaded) not in (None, size)


def _vocabulary_size(config: object) -> int | None:
    text = getattr(config, "text_config", None)
    size = getattr(config if text is None else text, "vocab_size", None)
    return size if type(size) is int else None
