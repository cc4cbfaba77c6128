"""The task `vtab`: nineteen data sets of 1000 training images, in their usual layout."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import Dataset

from multilora.app import recipes
from multilora.app.options import TEXT, choice, option
from multilora.app.tasks import images
from multilora.app.tasks.images import Augmented, transforms
from multilora.app.tasks.task import Report, Task
from multilora.integrations.image_files import ImageFiles, read_list

# The lists of the images to train on and to evaluate on.
SPLITS = {"test": ("train800val200.txt", "test.txt"), "tune": ("train800.txt", "val200.txt")}


def dataset_name(root: str | Path) -> str:
    """The data set that a folder holds: its own name, such as "cifar"."""
    return Path(os.path.abspath(root)).name


def num_classes(root: str | Path) -> int:
    """How many classes the data set in `root` has. Raises ValueError for an unknown name."""
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

    Args:
        root: A folder such as vtab-1k/cifar, with the lists train800.txt, val200.txt,
            train800val200.txt and test.txt. Each line is `path label`, with the path relative to
            root.
        split: "test" trains on train800val200 and evaluates on test; "tune" trains on train800 and
            evaluates on val200.
        augment: Use timm's training augmentation, drawn by the seed. The default is the
            benchmark's protocol: resize the whole image to the model's input and normalise it as
            the model was trained.

    Raises:
        ValueError: The folder has another name, a list is empty, a line is not `path label`, or a
            label is out of range. The message names the list and the line.
        FileNotFoundError: A list or an image is missing.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {tuple(SPLITS)}; got {split!r}")
    classes = num_classes(root)
    training, evaluation = transforms(model, augment, whole=True, **model_args)
    names = [str(label) for label in range(classes)]
    train, test = (
        ImageFiles(read_list(Path(root) / file, classes), transform, names)
        for file, transform in zip(SPLITS[split], (training, evaluation))
    )
    return Augmented(train, seed) if augment else train, test, names


@dataclass(frozen=True, kw_only=True)
class Options(images.Options):
    task: str = "vtab"
    data: str = option(TEXT, "a data set's folder under its name in VTAB-1K, such as vtab-1k/cifar")
    split: str = option(
        choice(*SPLITS),
        "test: train on train800val200, evaluate on test; tune: train on train800, evaluate on "
        "val200",
        "test",
    )

    @classmethod
    def recipe(cls, task: str, method: str, given: Mapping[str, Any]) -> dict[str, Any]:
        if given.get("data") is None:
            raise ValueError("the task 'vtab' needs --data, the folder of one of its data sets")
        num_classes(given["data"])  # says what is wrong with the folder's name
        return recipes.settings(recipes.read("vtab1k"), dataset_name(given["data"]), method)


def make(options: Options, seed: int, report: Report = print) -> Task:
    """Any timm model on a data set of VTAB-1K; see `vtab` for its layout."""
    base = images.timm_base(options, num_classes(options.data), seed)
    model_args = dict(options.model_args)
    train, test, classes = vtab(
        options.data, base, options.split, options.augment, seed, **model_args
    )
    _, evaluation = transforms(base, whole=True, **model_args)
    return images.image_task(options, base, train, test, classes, evaluation)
