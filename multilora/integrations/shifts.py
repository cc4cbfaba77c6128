"""Test sets under distribution shift, and out-of-distribution images, in their usual layouts.

`shifted_sets` recognises the layout of a folder:

- labels.npy lies there: CIFAR-10-C or CIFAR-100-C, read by `cifar_c`;
- lists DOMAIN_test.txt lie there, or folders DOMAIN/CLASS: domains, read by `domains`;
- train/CLASS and val/CLASS or test/CLASS lie there: the held-out part is one set;
- folders CLASS of images lie there: one set.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from multilora.integrations.image_files import ImageFiles, read_image, read_list

Transform = Callable[[Any], Any]
#: Other names of a class: STL-10 calls CIFAR-10's automobile a car.
ALIASES = {"car": "automobile"}
SEVERITIES = (1, 2, 3, 4, 5)


def shifted_sets(
    root: str | Path,
    transform: Transform,
    classes: Sequence[str],
    report: Callable[[str], None] = print,
) -> dict[str, Dataset]:
    """The test sets in a folder of any layout that this module knows.

    Args:
        root: The folder; the layouts are in the module's docstring.
        transform: It turns an RGB image into the model's input.
        classes: The task's class names. Images of other classes are left out, as `matched` does it;
            CIFAR-C has no names, and its labels count as the task's.
        report: It gets a line per set about the classes and images that stay.

    Returns:
        {name: data set of (input, label)}, with the name "" where the folder is one set.

    Raises:
        ValueError: The folder has no such layout, or does not fit the classes.
        FileNotFoundError: The folder is missing.
    """
    root = _folder(root)
    if (root / "labels.npy").is_file():
        return cifar_c(root, transform, num_classes=len(classes))
    top = _held_out(root)
    if any(root.glob("*_test.txt")) or (top == root and _has_folders(top, 2)):
        found = domains(root, transform)
    else:
        found = {"": _class_folders(top, transform)}
    return {
        name: matched(data, classes, report=report, where=str(root / name))
        for name, data in found.items()
    }


def cifar_c(
    root: str | Path,
    transform: Transform,
    corruptions: Sequence[str] | None = None,
    severities: Sequence[int] = SEVERITIES,
    num_classes: int | None = None,
) -> dict[str, Dataset]:
    """CIFAR-10-C or CIFAR-100-C (Hendrycks & Dietterich, 2019).

    Args:
        root: It holds CORRUPTION.npy, uint8 (50000, 32, 32, 3), whose five blocks of 10,000 images
            are the severities, and labels.npy, integers (50000,). The images stay on the disk
            until they are read.
        corruptions: The names to read; all where it is None.
        severities: Some of 1 to 5.
        num_classes: If given, the labels must have so many classes.

    Returns:
        {"CORRUPTION/SEVERITY": data set of (transform(image), label)}.

    Raises:
        ValueError: A corruption or a severity is unknown, a file has another shape or type, or the
            labels have another number of classes.
        FileNotFoundError: The folder or labels.npy is missing.
    """
    root = _folder(root)
    there = sorted(f.stem for f in root.glob("*.npy") if f.name != "labels.npy")
    chosen = there if corruptions is None else list(corruptions)
    if not chosen or set(chosen) - set(there):
        unknown = sorted(set(chosen) - set(there))
        raise ValueError(f"{root} has the corruptions {there}; got {unknown or 'none'}")
    if not severities or set(severities) - set(SEVERITIES):
        raise ValueError(f"severities must be some of {SEVERITIES}; got {tuple(severities)}")
    labels = _array(root / "labels.npy")
    if labels.ndim != 1 or labels.dtype.kind not in "iu" or len(labels) % 5 or not len(labels):
        raise ValueError(
            f"{root / 'labels.npy'} must be integers in five blocks of equal length; got "
            f"{labels.dtype} {labels.shape}"
        )
    if num_classes is not None and (labels.min(), labels.max() + 1) != (0, num_classes):
        raise ValueError(
            f"{root / 'labels.npy'} has labels from {labels.min()} to {labels.max()}; the task has "
            f"{num_classes} classes"
        )
    sets: dict[str, Dataset] = {}
    block = len(labels) // 5
    for name in chosen:
        images = _array(root / f"{name}.npy")
        if images.dtype != np.uint8 or images.shape != (len(labels), *images.shape[1:3], 3):
            raise ValueError(
                f"{root / name}.npy must be uint8 ({len(labels)}, height, width, 3), five blocks "
                f"of {block} images; got {images.dtype} {images.shape}"
            )
        for severity in severities:
            rows = slice(block * (severity - 1), block * severity)
            sets[f"{name}/{severity}"] = _Arrays(images[rows], labels[rows], transform)
    return sets


def domains(root: str | Path, transform: Transform, part: str = "test") -> dict[str, Any]:
    """The domains of a folder, such as DomainNet, PACS or Office-Home.

    Args:
        root: It holds DomainNet's lists DOMAIN_PART.txt, of lines `DOMAIN/CLASS/image label`; or,
            without lists, folders DOMAIN/CLASS of images.
        part: The lists to read.

    Returns:
        {DOMAIN: data set of (transform(image), label)}, each with `classes`, which are the names
        of the images' folders in alphabetical order, by label.

    Raises:
        ValueError: There are neither lists nor folders, a list is damaged, or the labels of a list
            contradict the folders.
        FileNotFoundError: The folder or a listed image is missing.
    """
    root = _folder(root)
    suffix = f"_{part}.txt"
    lists = sorted(root.glob(f"*{suffix}"))
    if lists:
        return {f.name.removesuffix(suffix): _listed(f, transform) for f in lists}
    if not _has_folders(root, 2):
        raise ValueError(f"{root} has neither lists DOMAIN{suffix} nor folders DOMAIN/CLASS")
    return {folder.name: _class_folders(folder, transform) for folder in _folders(root)}


def matched(
    dataset: Any,
    classes: Sequence[str],
    aliases: Mapping[str, str] = ALIASES,
    report: Callable[[str], None] = print,
    where: str | None = None,
) -> Dataset:
    """The part of a data set whose classes the task has, with the task's labels.

    Args:
        dataset: A data set of (input, label) with `classes`, the names by label, and the labels in
            `targets`, `labels` or `samples`: any of torchvision's with named classes.
        classes: The task's class names, by label.
        aliases: Pairs of names of one class, which hold in both directions.
        report: It gets a line that says how many classes and images stay.
        where: What the messages call the data set.

    Raises:
        ValueError: No class stays, or no image.
    """
    where = where or type(dataset).__name__
    theirs = list(dataset.classes)
    twins = {**aliases, **{b: a for a, b in aliases.items()}}
    ours = {name: label for label, name in enumerate(classes)}
    label_of = {}
    for label, name in enumerate(theirs):
        mine = ours.get(name, ours.get(twins.get(name, "")))
        if mine is not None:
            label_of[label] = mine
    labels = [int(label) for label in _labels(dataset)]
    kept = [i for i, label in enumerate(labels) if label in label_of]
    if not kept:
        raise ValueError(
            f"{where} has no images of the task's classes {_few(classes)}; its own are "
            f"{_few(theirs)}"
        )
    report(
        f"{where}: {len(label_of)} of its {len(theirs)} classes are the task's, with {len(kept)} "
        f"of {len(labels)} images"
    )
    return _Part(dataset, kept, [label_of[labels[i]] for i in kept])


def unlabelled(root: str | Path, transform: Transform) -> Dataset:
    """All images in a folder and its folders, each with the label 0, in the order of their paths.

    Of train/ beside val/ or test/, the held-out part is read.

    Raises:
        ValueError: There is no image.
        FileNotFoundError: The folder is missing.
    """
    from torchvision.datasets.folder import IMG_EXTENSIONS

    top = _held_out(_folder(root))
    files = sorted(f for f in top.rglob("*") if f.suffix.lower() in IMG_EXTENSIONS)
    if not files:
        raise ValueError(f"{top} holds no images ({', '.join(IMG_EXTENSIONS)})")
    return ImageFiles([(file, 0) for file in files], transform)


class _Arrays(Dataset):
    """(transform(image), label) of images (N, H, W, 3) in an array."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, transform: Transform):
        self.images, self.labels, self.transform = images, labels, transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        from PIL import Image

        image = Image.fromarray(np.ascontiguousarray(self.images[index]))
        return self.transform(image), int(self.labels[index])


class _Part(Dataset):
    """Some examples of a data set, with other labels."""

    def __init__(self, data: Any, indices: Sequence[int], labels: Sequence[int]):
        self.data, self.indices, self.labels = data, indices, labels

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.data[self.indices[index]][0], self.labels[index]


def _labels(dataset: Any) -> Sequence[int]:
    for name in ("targets", "labels"):
        if hasattr(dataset, name):
            return getattr(dataset, name)
    return [label for _, label in dataset.samples]


def _listed(file: Path, transform: Transform) -> ImageFiles:
    samples = read_list(file)
    pairs = {(path.parent.name, label) for path, label in samples}
    names, labels = {name for name, _ in pairs}, {label for _, label in pairs}
    if not len(pairs) == len(names) == len(labels):
        raise ValueError(
            f"{file} has {len(labels)} labels of images in {len(names)} folders: every class needs "
            "one label and one folder's name"
        )
    classes = sorted(names)
    label_of = {name: label for label, name in enumerate(classes)}
    return ImageFiles([(p, label_of[p.parent.name]) for p, _ in samples], transform, classes)


def _class_folders(root: Path, transform: Transform) -> Any:
    from torchvision.datasets import ImageFolder

    try:
        return ImageFolder(str(root), transform, loader=read_image)
    except FileNotFoundError as error:
        raise ValueError(f"{root} needs folders CLASS of images: {error}") from error


def _array(file: Path) -> np.ndarray:
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing")
    try:
        return np.load(file, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{file} is damaged: {error}") from error


def _folder(root: str | Path) -> Path:
    if not Path(root).is_dir():
        raise FileNotFoundError(f"the folder {root} does not exist")
    return Path(root)


def _held_out(root: Path) -> Path:
    """root/val or root/test where root/train lies beside it, else root."""
    parts = [root / name for name in ("val", "test") if (root / name).is_dir()]
    return parts[0] if parts and (root / "train").is_dir() else root


def _folders(root: Path) -> list[Path]:
    return sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))


def _has_folders(root: Path, depth: int) -> bool:
    return depth == 0 or any(_has_folders(folder, depth - 1) for folder in _folders(root))


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f" … ({len(names)})" if len(names) > 8 else "")
