"""VTAB-1K: nineteen data sets of 1000 training images, read as they are widely laid out."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import Dataset

from multilora.app import recipes
from multilora.app.tasks.images import (
    Augmented,
    image_task,
    read_image,
    timm_base,
    transforms,
)
from multilora.app.tasks.task import Task

# What is trained on and what is evaluated on.
SPLITS = {"test": ("train800val200.txt", "test.txt"), "tune": ("train800.txt", "val200.txt")}


def dataset_name(root: str | Path) -> str:
    """The data set that a folder holds: its own name, such as "cifar"."""
    return Path(os.path.abspath(root)).name


def num_classes(root: str | Path) -> int:
    """Of the data set in the folder `root`. Raises ValueError where its name is none of the 19."""
    known = recipes.read("vtab1k")["datasets"]
    if dataset_name(root) not in known:
        raise ValueError(
            f"{root} is not named as a data set of VTAB-1K; the 19 are {', '.join(known)}"
        )
    return known[dataset_name(root)]["classes"]


def vtab(
    root: str | Path,
    model: nn.Module,
    split: str = "test",
    augment: bool = False,
    seed: int = 0,
    **model_args: Any,
) -> tuple[Dataset, Dataset, list[str]]:
    """(train, test, class names) of one VTAB-1K data set for a timm model.

    root: a folder such as vtab-1k/cifar, with the lists train800.txt, val200.txt,
        train800val200.txt and test.txt; a line of them is `path label`, the path relative to root.
    split: "test", train on train800val200 and evaluate on test; "tune", train on train800 and
        evaluate on val200.
    augment: timm's training augmentation, drawn by the seed. The default is the benchmark's
        protocol: the whole image resized to the model's input and normalised as the model was
        trained, nothing else.

    Raises ValueError for a folder that is named otherwise, an empty list, a line that is not
    `path label` and a label out of range, FileNotFoundError for a missing list or image; each
    names the list's file and line.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {tuple(SPLITS)}; got {split!r}")
    classes = num_classes(root)
    training, evaluation = transforms(model, augment, whole=True, **model_args)
    first, second = (Path(root) / name for name in SPLITS[split])
    train, test = ImageList(first, classes, training), ImageList(second, classes, evaluation)
    return Augmented(train, seed) if augment else train, test, [str(c) for c in range(classes)]


class ImageList(Dataset):
    """The images of a list file: (transform(image), label); see `vtab` for files and errors."""

    def __init__(self, file: str | Path, num_classes: int, transform: Callable):
        self.samples, self.transform = _read_list(Path(file), num_classes), transform

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        path, label = self.samples[index]
        return self.transform(read_image(path)), label


def _read_list(file: Path, num_classes: int) -> list[tuple[Path, int]]:
    if not file.is_file():
        raise FileNotFoundError(f"the list {file} is missing")
    samples = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        path, _, label = line.rstrip().rpartition(" ")
        if not path or not label.isascii() or not label.isdigit():
            raise ValueError(f"{file}, line {number}: `path label` is needed; got {line!r}")
        if int(label) >= num_classes:
            raise ValueError(
                f"{file}, line {number}: label {label} of {path} is not in [0, {num_classes})"
            )
        image = file.parent / path
        if not image.is_file():
            raise FileNotFoundError(f"{file}, line {number}: the image {image} is missing")
        samples.append((image, int(label)))
    if not samples:
        raise ValueError(f"the list {file} is empty")
    return samples


def vtab1k(
    data: str | Path,
    model: str,
    pretrained: bool = True,
    targets: Sequence[str] | None = None,
    seed: int = 0,
    augment: bool = False,
    split: str = "test",
    from_file: bool = False,
    **model_args: Any,
) -> Task:
    """Any timm model on a data set of VTAB-1K; see `vtab` for its layout."""
    base = timm_base(model, num_classes(data), pretrained, seed, from_file, model_args)
    train, test, classes = vtab(data, base, split, augment, seed, **model_args)
    return image_task(base, targets, train, test, classes, model_args)
