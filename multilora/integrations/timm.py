"""timm models and image folders, as a particle task needs them."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset, Subset


def create_base(
    name: str, num_classes: int, pretrained: bool = True, **model_args: Any
) -> nn.Module:
    """A timm model with a new head of `num_classes`; model_args go to timm.create_model."""
    import timm

    try:
        return timm.create_model(
            name, pretrained=pretrained, num_classes=num_classes, **model_args
        ).eval()
    except Exception as error:
        if not pretrained:
            raise
        raise RuntimeError(
            f"timm could not create {name!r} with pretrained weights: {error}. Without a network, "
            "use weights that are in timm's cache already, or pretrained=False"
        ) from error


def classifier_name(model: nn.Module) -> str:
    """The name of the model's classification head, for `modules_to_save`."""
    head = model.get_classifier()
    for name, module in model.named_modules():
        if module is head:
            return name
    raise ValueError(f"{type(model).__name__} has no classification head to train")


def default_targets(model: nn.Module) -> list[str]:
    """Attention's fused query-key-value projections, as the papers adapt ViTs.

    Raises ValueError, naming the linear layers there are, for a model without them.
    """
    if any(name.split(".")[-1] == "qkv" for name, _ in model.named_modules()):
        return ["qkv"]
    layers = {n.split(".")[-1] for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    raise ValueError(
        f"{type(model).__name__} has no `qkv` layers; choose targets among {sorted(layers)}"
    )


def class_names(root: str | Path) -> list[str]:
    """The class folders of root/train, or of root where it has no train/."""
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"the image folder {root} does not exist")
    top = root / "train" if (root / "train").is_dir() else root
    names = sorted(p.name for p in top.iterdir() if p.is_dir())
    if len(names) < 2:
        raise ValueError(f"{top} needs a folder of images for each of at least two classes")
    return names


def transforms(
    model: nn.Module, augment: bool = False, whole: bool = False, **model_args: Any
) -> tuple[Callable, Callable]:
    """(training, evaluation) transforms by the data configuration that `model` comes with.

    Its image size, interpolation, mean and standard deviation; model_args are those it was created
    with, of which img_size and in_chans decide the images' shape.

    augment: training images get timm's random crops, flips and colours; otherwise they are
        prepared as evaluation images are.
    whole: the whole image is resized to the model's size, also where that changes its aspect
        ratio; otherwise evaluation takes the model's own central crop.
    """
    from timm.data import create_transform, resolve_model_data_config

    config = resolve_model_data_config(model, args=model_args)
    crop = {"crop_pct": 1.0, "crop_mode": "squash"} if whole else {}
    evaluation = create_transform(**config | crop, is_training=False)
    if not augment:
        return evaluation, evaluation
    return create_transform(**config, is_training=True), evaluation


class Augmented(Dataset):
    """`data`, whose transforms are random, with randomness from seed, epoch and index alone.

    A run that was stopped then continues with the images that it would have seen.
    """

    def __init__(self, data: Dataset, seed: int):
        self.data, self.seed, self.epoch = data, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        # timm's transforms draw from both of these.
        python, pytorch = random.getstate(), torch.get_rng_state()
        try:
            random.seed(f"{self.seed} {self.epoch} {index}")
            torch.default_generator.manual_seed(random.getrandbits(63))
            return self.data[index]
        finally:
            random.setstate(python)
            torch.set_rng_state(pytorch)


def image_folder(
    root: str | Path, model: nn.Module, augment: bool = False, seed: int = 0, **model_args: Any
) -> tuple[Dataset, Dataset, list[str]]:
    """(train, test, class names) of a folder of images, prepared as `model` was pretrained.

    augment, model_args: see `transforms`; the seed draws the augmentation.

    root holds train/CLASS/*.jpg and val/ or test/ beside it; or just CLASS/*.jpg, of which every
    fifth image by name becomes the test set.
    """
    from torchvision.datasets import ImageFolder

    root = Path(root)
    training, evaluation = transforms(model, augment, **model_args)
    if (root / "train").is_dir():
        held_out = next((root / n for n in ("val", "test") if (root / n).is_dir()), None)
        if held_out is None:
            raise FileNotFoundError(f"{root} has train/ but neither val/ nor test/")
        train = ImageFolder(str(root / "train"), training)
        test = ImageFolder(str(held_out), evaluation)
        if train.classes != test.classes:
            raise ValueError(
                f"{root}/train and {held_out} have different classes: "
                f"{train.classes} and {test.classes}"
            )
        return Augmented(train, seed) if augment else train, test, train.classes
    train, test = ImageFolder(str(root), training), ImageFolder(str(root), evaluation)
    order = range(len(train))
    classes = train.classes
    train = Subset(train, [i for i in order if i % 5 != 4])
    test = Subset(test, [i for i in order if i % 5 == 4])
    return Augmented(train, seed) if augment else train, test, classes
