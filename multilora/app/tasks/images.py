"""The task `images`: timm models on folders of images."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import Dataset, Subset

from multilora.app import untrusted
from multilora.app.options import FLAG, PAIRS, TEXT, TEXTS, option
from multilora.app.tasks.task import ModelOptions, Report, Task, existing
from multilora.integrations.image_files import read_image


def create_base(
    name: str,
    num_classes: int,
    pretrained: bool = True,
    from_file: bool = False,
    **model_args: Any,
) -> nn.Module:
    """A timm model with a new head of `num_classes`.

    Args:
        name: One that timm knows, or the path of a folder with config.json and model.safetensors,
            as timm's save_for_hf writes it.
        from_file: A run's folder gave the name and the arguments, not the user. See `untrusted`.
            The name is then no path.
        model_args: Arguments of timm.create_model. A `checkpoint_path` is a file with the weights
            of all layers; its heads are ignored.

    Raises:
        FileNotFoundError: The folder or the checkpoint does not exist.
        RuntimeError: timm cannot create the model, or the weights are not those of its layers.
        ValueError: A file asks for what it must not.
    """
    import timm

    checkpoint = _checkpoint(model_args.pop("checkpoint_path", None))
    folder = None if from_file else _model_folder(name)

    def create(pretrained: bool = False) -> nn.Module:
        if folder is None:
            return timm.create_model(
                name, pretrained=pretrained, num_classes=num_classes, **model_args
            )
        # Weights with their own head are loaded strictly.
        model = timm.create_model(f"local-dir:{folder}", pretrained=pretrained, **model_args)
        model.reset_classifier(num_classes)
        return model

    if from_file:
        untrusted.check_memory(name, create)
    try:
        model = create(pretrained and checkpoint is None)
        if checkpoint is not None:
            _load_checkpoint(model, checkpoint)
        return model.eval()
    except Exception as error:
        how = f" with {model_args}" if model_args else ""
        message = f"timm could not create {name!r}{how}: {type(error).__name__}: {error}"
        if pretrained and folder is None and checkpoint is None:
            message += (
                ". Without a network, use pretrained weights that are in timm's cache already, or "
                "pretrained=False (--no-pretrained)"
            )
        raise RuntimeError(message) from error


def _model_folder(name: str) -> Path | None:
    """The folder that `name` is the path of; None where it is no path."""
    import timm

    source, _, path = name.rpartition(":")
    if source not in ("", "local-dir") or not (
        source or os.sep in name or (Path(name).is_dir() and not timm.is_model(name))
    ):
        return None
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(
            f"the model's folder {folder} does not exist; a name on the Hugging Face Hub starts "
            "with hf-hub:"
        )
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} is no model of timm: it has no config.json")
    return folder


def _checkpoint(path: str | None) -> Path | None:
    if path is None:
        return None
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"the checkpoint {file} does not exist")
    return file


def _load_checkpoint(model: nn.Module, file: Path) -> None:
    """Load all layers but the heads, whose classes may be others."""
    from timm.models import load_checkpoint

    heads = classifiers(model)

    def others(names: Iterable[str]) -> list[str]:
        return [n for n in names if not any(n.startswith(f"{head}.") for head in heads)]

    result = load_checkpoint(
        model, str(file), strict=False, filter_fn=lambda w, _: {n: w[n] for n in others(w)}
    )
    missing = others(result.missing_keys) if result else []  # NumPy's files are of no result
    if missing or (result and result.unexpected_keys):
        raise ValueError(
            f"{file} is of another model: it lacks {missing[:5]} and has the unknown "
            f"{result.unexpected_keys[:5]}"
        )


def classifiers(model: nn.Module) -> tuple[str, ...]:
    """The names of the model's classification heads, for `modules_to_save`.

    Most models have one head. A distilled DeiT has two, whose logits it averages. A head with
    BatchNorm cannot be copied for each particle, so the linears inside it are named instead.
    """
    timm_model: Any = model
    heads = timm_model.get_classifier() if hasattr(model, "get_classifier") else ()
    names = {module: name for name, module in model.named_modules()}
    found: list[str] = []
    for head in heads if isinstance(heads, (tuple, list)) else (heads,):
        if head not in names or not any(True for _ in head.parameters()):
            raise ValueError(f"{type(model).__name__} has no classification head to train")
        if any(isinstance(m, _BatchNorm) for m in head.modules()):
            inside = (m for m in head.modules() if isinstance(m, nn.Linear))
            found += [names[linear] for linear in inside]
        else:
            found.append(names[head])
    if not found:
        raise ValueError(f"{type(model).__name__} has no classification head to train")
    return tuple(found)


def working_layers(model: nn.Module, **model_args: Any) -> dict[str, int]:
    """The layers that particles can adapt, by name, and the number of axes of their inputs.

    Such a layer is called (BEiT, EVA and Swin V2 read `qkv.weight` instead), its input has a row or
    more for each image (and is not, say, a table of positions), and it computes what nn.Linear
    does, or nn.Conv2d with one group, no dilation and zero padding (timm's Conv2dSame and StdConv2d
    compute something else). The heads are left out. Two forwards, of one image and of two, find
    the layers.

    Raises:
        ValueError: The model does not turn images into class logits (N, C).
    """
    size = data_config(model, **model_args)["input_size"]
    heads = classifiers(model)
    layers = {
        name: module
        for name, module in model.named_modules()
        if _is_plain(module) and not any(f"{name}.".startswith(f"{head}.") for head in heads)
    }

    def inputs(images: int) -> dict[str, torch.Size]:
        seen: dict[str, torch.Size] = {}

        def see(name: str, args: tuple) -> None:
            if args:
                seen[name] = args[0].shape

        hooks = [
            layer.register_forward_pre_hook(lambda _, args, name=name: see(name, args))
            for name, layer in layers.items()
        ]
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                logits = model(torch.zeros(images, *size))
        except Exception as error:
            raise ValueError(
                f"{type(model).__name__} does not run on images {size}: "
                f"{type(error).__name__}: {error}"
            ) from error
        finally:
            for hook in hooks:
                hook.remove()
        shape = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        if shape != (images, model.num_classes):
            raise ValueError(
                f"{type(model).__name__} turns {images} images into {shape}; class logits "
                f"({images}, {model.num_classes}) are needed"
            )
        return seen

    one, two = inputs(1), inputs(2)
    return {
        name: len(two[name]) for name in layers if name in one and two[name][0] == 2 * one[name][0]
    }


def _is_plain(module: nn.Module) -> bool:
    if isinstance(module, nn.Conv2d):
        return (
            type(module).forward is nn.Conv2d.forward
            and type(module)._conv_forward is nn.Conv2d._conv_forward
            and (module.groups, module.dilation, module.padding_mode) == (1, (1, 1), "zeros")
        )
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward


def endings(model: nn.Module, layers: Iterable[str]) -> list[str]:
    """The shortest ends of names by which PEFT finds `layers` and no other module of the model."""
    names, wanted, found = [n for n, _ in model.named_modules()], set(layers), set()
    for layer in layers:
        parts = layer.split(".")
        for start in reversed(range(len(parts))):
            end = ".".join(parts[start:])
            if {n for n in names if f".{n}".endswith(f".{end}")} <= wanted:
                found.add(end)
                break
    return sorted(found)


def default_targets(model: nn.Module, working: Mapping[str, int]) -> list[str]:
    """Attention's fused query-key-value projections, which the papers adapt in ViTs.

    If they are not among the working layers, the targets are all linears that see tokens, or all
    layers in a model without such linears.

    Args:
        working: What `working_layers` found.

    Raises:
        ValueError: There is no working layer.
    """
    ends = endings(model, working)
    if "qkv" in ends:
        return ["qkv"]
    linears = [
        name
        for name, axes in working.items()
        if axes > 2 and isinstance(model.get_submodule(name), nn.Linear)
    ]
    ends = endings(model, linears) or ends
    if not ends:
        raise ValueError(
            f"{type(model).__name__} has no layer that particles can adapt: none that it calls is "
            "an nn.Linear, or an nn.Conv2d with one group, no dilation and zero padding"
        )
    return ends


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


def data_config(model: nn.Module, **model_args: Any) -> dict[str, Any]:
    """timm's data configuration of a model that was created with `model_args`.

    The arguments img_size, a number or (height, width), and in_chans decide the shape of the
    images. If there is one channel, it is normalised by the mean over the channels of the means and
    of the standard deviations.

    Raises:
        ValueError: The model has neither 1 channel (grey) nor 3 (colour).
    """
    from timm.data import resolve_model_data_config

    size, args = model_args.get("img_size"), dict(model_args)
    if isinstance(size, (list, tuple)):
        args["input_size"] = (model_args.get("in_chans", 3), *size)
    config = resolve_model_data_config(model, args=args)
    channels = model_args.get("in_chans", config["input_size"][0])
    if channels not in (1, 3):
        raise ValueError(f"images have 1 channel (grey) or 3; the model has in_chans = {channels}")
    config["input_size"] = (channels, *config["input_size"][1:])
    for name in ("mean", "std"):
        if channels == 1:
            config[name] = (fmean(config[name]),)
    return config


def transforms(
    model: nn.Module, augment: bool = False, whole: bool = False, **model_args: Any
) -> tuple[Callable, Callable]:
    """(training, evaluation) transforms by the data configuration that `model` comes with.

    That is its image size, interpolation, mean and standard deviation; see `data_config`. A model
    with one channel gets grey images.

    Args:
        augment: Training images get timm's random crops, flips and colours; otherwise they are
            prepared like evaluation images.
        whole: The whole image is resized to the model's size, even if that changes its aspect
            ratio; otherwise evaluation takes the model's own central crop.
    """
    from timm.data import create_transform
    from torchvision.transforms import Compose, Grayscale

    config = data_config(model, **model_args)
    crop = {"crop_pct": 1.0, "crop_mode": "squash"} if whole else {}

    def create(training: bool) -> Callable:
        transform = create_transform(**config | ({} if training else crop), is_training=training)
        return Compose([Grayscale(), transform]) if config["input_size"][0] == 1 else transform

    evaluation = create(training=False)
    return (create(training=True) if augment else evaluation), evaluation


class Augmented(Dataset):
    """`data` with random transforms that depend on the seed, the epoch and the index alone.

    A resumed run then sees the images that it would have seen without the interruption.
    """

    def __init__(self, data: Any, seed: int):
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

    Args:
        root: It holds train/CLASS/*.jpg and val/ or test/ beside it; or just CLASS/*.jpg, of which
            every fifth image by name becomes the test set.
        augment: See `transforms`; the seed draws the augmentation.
        model_args: The arguments that the model was created with.
    """
    from torchvision.datasets import ImageFolder

    root = Path(root)
    training, evaluation = transforms(model, augment, **model_args)
    if (root / "train").is_dir():
        held_out = next((root / n for n in ("val", "test") if (root / n).is_dir()), None)
        if held_out is None:
            raise FileNotFoundError(f"{root} has train/ but neither val/ nor test/")
        train = ImageFolder(str(root / "train"), training, loader=read_image)
        test = ImageFolder(str(held_out), evaluation, loader=read_image)
        if train.classes != test.classes:
            raise ValueError(
                f"{root}/train and {held_out} have different classes: "
                f"{train.classes} and {test.classes}"
            )
        return Augmented(train, seed) if augment else train, test, train.classes
    train, test = (
        ImageFolder(str(root), transform, loader=read_image) for transform in (training, evaluation)
    )
    order = range(len(train))
    classes = train.classes
    train = Subset(train, [i for i in order if i % 5 != 4])
    test = Subset(test, [i for i in order if i % 5 == 4])
    return Augmented(train, seed) if augment else train, test, classes


@dataclass(frozen=True, kw_only=True)
class Options(ModelOptions):
    task: str = "images"
    model: str = option(TEXT, "a timm model, or the folder of one")
    data: str = option(
        TEXT,
        "a folder of images, train/CLASS/ and val/CLASS/, or only CLASS/, of which a fifth is held "
        "out",
    )
    targets: tuple[str, ...] | None = option(TEXTS, "layers to adapt", None, shown="qkv")
    model_args: tuple[tuple[str, Any], ...] = option(
        PAIRS, "arguments of timm.create_model, e.g. img_size=32", ()
    )
    augment: bool = option(FLAG, "augment the training images as timm does", False)


def make(options: Options, seed: int, report: Report = print) -> Task:
    """Any timm model on a folder of images; see `image_folder` for its layout.

    The seed draws the new head (and, without pretraining, the model) and the augmentation.
    """
    base = timm_base(options, len(class_names(options.data)), seed)
    model_args = dict(options.model_args)
    train, test, classes = image_folder(options.data, base, options.augment, seed, **model_args)
    _, evaluation = transforms(base, **model_args)
    return image_task(options, base, train, test, classes, evaluation)


def timm_base(options: Options, classes: int, seed: int) -> nn.Module:
    model_args = dict(options.model_args)
    if "num_classes" in model_args:
        raise ValueError(f"the task has {classes} classes: leave num_classes out of --model-args")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return create_base(
            options.model, classes, options.pretrained, options.from_file, **model_args
        )


def image_task(
    options: Options,
    base: nn.Module,
    train: Dataset,
    test: Dataset,
    classes: list[str],
    transform: Callable,
) -> Task:
    model_args = dict(options.model_args)
    working = working_layers(base, **model_args)
    heads, config = classifiers(base), data_config(base, **model_args)
    return Task(
        base=base,
        targets=(
            existing(base, options.targets, endings(base, working))
            if options.targets
            else default_targets(base, working)
        ),
        head=heads[0] if len(heads) == 1 else heads,
        classes=classes,
        train=train,
        test=test,
        transform=transform,
        normalisation=(config["mean"], config["std"]),
    )
