"""What tasks of small grey images share: their parts, disturbed copies, and a pretrained ViT."""

from __future__ import annotations

import hashlib
import json
import math
import os
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from multilora import checks
from multilora.app.tasks.images import create_base
from multilora.app.tasks.task import Report, Task

TARGETS = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]
#: Pixels are in [−1, 1].
NORMALISATION = ((0.5,), (0.5,))


@dataclass(frozen=True)
class Recipe:
    """The ViT of a task, and how it is pretrained.

    Attributes:
        name: The task's, in messages and in the name of the cached file.
        model: Arguments of timm's ViT.
        pretraining: seed, steps, batch_size, lr and weight_decay. With `orientations` = 8, each
            turned and mirrored copy of an image is of another class (Lee et al. 2020, "Self-
            supervised label augmentation via input transformations"), and `warp` is the standard
            deviation of random affine maps, which take the place of small shifts.
    """

    name: str
    model: dict[str, Any]
    pretraining: dict[str, Any]


# --- the parts of the data -----------------------------------------------------------------------


@dataclass(frozen=True)
class Thirds:
    """Disjoint sets of (images, labels), which depend on no run's seed.

    Attributes:
        pretraining: The digits 0–3, on which the base is pretrained.
        reservoir: Images of the digits 4–7, of which a run's seed draws its training examples.
        validation: Other images of 4–7, as many for each digit.
        test: The same again.
        unseen: The digits 8 and 9, which neither the base nor the particles see in training.
    """

    pretraining: tuple[Tensor, Tensor]
    reservoir: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    unseen: tuple[Tensor, Tensor]


def thirds(images: Tensor, labels: Tensor, validation: int, test: int) -> Thirds:
    """The five sets, where 4–7 have the labels 0–3.

    Args:
        validation, test: How many images of each of the digits 4–7 these sets have.
    """
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    of_digit = [order[labels[order] == digit] for digit in range(4, 8)]
    sizes = (validation, test)

    def part(first: int, last: int | None) -> tuple[Tensor, Tensor]:
        rows = torch.cat([rows[first:last] for rows in of_digit])
        return images[rows], labels[rows] - 4

    def digits(first: int, last: int) -> tuple[Tensor, Tensor]:
        inside = (labels >= first) & (labels <= last)
        return images[inside], labels[inside]

    return Thirds(
        pretraining=digits(0, 3),
        reservoir=part(sum(sizes), None),
        validation=part(0, validation),
        test=part(validation, sum(sizes)),
        unseen=digits(8, 9),
    )


def drawn(labels: Tensor, shots: int, seed: int) -> Tensor:
    """The indices of `shots` examples of each class 0 … C−1."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    classes = range(int(labels.max()) + 1)
    return torch.cat([order[labels[order] == c][:shots] for c in classes])


def three_way_task(
    recipe: Recipe,
    parts: Thirds,
    shots: int,
    severities: Mapping[str, Sequence[float]],
    seed: int,
    report: Report,
    shifted: Mapping[str, tuple[Tensor, Tensor]] | None = None,
) -> Task:
    """The task of adapting a ViT, pretrained on 0–3, to a few examples of each of 4–7.

    Shifted sets are `corrupted` copies of the test set, and those given. Out of distribution are
    "unseen", the digits 8 and 9, and "scrambled", the test images with random phases. The seed
    draws the training examples and the new head.

    Raises:
        ValueError: There are fewer than `shots` examples of a digit to draw from.
    """
    x, y = parts.reservoir
    checks.integer("shots", shots, 1, int(y.bincount(minlength=4).min()))
    chosen = drawn(y, shots, seed)
    x_test, y_test = parts.test
    return Task(
        base=pretrained_vit(recipe, *parts.pretraining, seed, report),
        targets=TARGETS,
        head="head",
        classes=[str(digit) for digit in range(4, 8)],
        train=TensorDataset(x[chosen], y[chosen]),
        test=TensorDataset(x_test, y_test),
        validation=TensorDataset(*parts.validation),
        shifted={
            **corrupted(x_test, y_test, severities),
            **{name: TensorDataset(*data) for name, data in (shifted or {}).items()},
        },
        ood={
            "unseen": TensorDataset(*parts.unseen),
            "scrambled": TensorDataset(scrambled(x_test), y_test),
        },
        normalisation=NORMALISATION,
    )


# --- disturbed copies ----------------------------------------------------------------------------


def corrupted(
    x: Tensor, y: Tensor, severities: Mapping[str, Sequence[float]]
) -> dict[str, TensorDataset]:
    """Noise, blur and low contrast, each at all its severities, always with the same noise.

    Args:
        x: Images (N, 1, H, W) in [−1, 1].
        y: Their labels (N,).
        severities: For noise, the standard deviations (pixels have a range of 2); for blur, those
            in pixels; for contrast, the factors of the distance to the image's mean.
    """
    generator = torch.Generator().manual_seed(0)
    noise = [x + s * torch.randn(x.shape, generator=generator) for s in severities["noise"]]
    mean = x.mean((1, 2, 3), keepdim=True)
    copies = {
        "noise": torch.cat(noise).clamp(-1, 1),
        "blur": torch.cat([_blurred(x, sigma) for sigma in severities["blur"]]),
        "contrast": torch.cat([mean + s * (x - mean) for s in severities["contrast"]]),
    }
    return {
        name: TensorDataset(images, y.repeat(len(images) // len(y)))
        for name, images in copies.items()
    }


def _blurred(x: Tensor, sigma: float) -> Tensor:
    """A Gaussian blur over a black border."""
    radius = max(2, math.ceil(2.5 * sigma))
    kernel = torch.exp(-0.5 * (torch.arange(-float(radius), radius + 1.0) / sigma) ** 2)
    kernel = torch.outer(kernel, kernel)
    kernel = (kernel / kernel.sum())[None, None]
    return F.conv2d(F.pad(x, 4 * (radius,), value=-1.0), kernel)


def scrambled(x: Tensor) -> Tensor:
    """Images with the amplitude spectra of x and random phases, clamped to [−1, 1].

    Each image keeps its mean and, up to the clamping, the strength of each spatial frequency; its
    shapes are gone. The phases are those of white noise of a constant seed, so the images are real.

    Args:
        x: Images (N, 1, H, W) in [−1, 1].
    """
    return _with_random_phases(x).clamp(-1, 1)


def _with_random_phases(x: Tensor) -> Tensor:
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    spectrum = torch.fft.rfft2(x)
    phases = torch.fft.rfft2(noise).angle()
    phases[..., 0, 0] = spectrum[..., 0, 0].angle()  # the mean
    return torch.fft.irfft2(torch.polar(spectrum.abs(), phases), s=x.shape[-2:])


# --- the pretrained ViT --------------------------------------------------------------------------


def pretrained_vit(
    recipe: Recipe, images: Tensor, labels: Tensor, seed: int, report: Report
) -> nn.Module:
    """The ViT, pretrained on these images, with a new head of as many classes that `seed` draws."""
    classes = int(labels.max()) + 1
    base: Any = _vit(recipe, classes * recipe.pretraining.get("orientations", 1))
    base.load_state_dict(_weights(recipe, base, images, labels, report))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        base.reset_classifier(classes)
    return base


def _vit(recipe: Recipe, num_classes: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.pretraining["seed"])
        return create_base("vit_tiny_patch16_224", num_classes, pretrained=False, **recipe.model)


def _weights(
    recipe: Recipe, model: nn.Module, images: Tensor, labels: Tensor, report: Report
) -> dict[str, Tensor]:
    """The weights after pretraining, which are computed once and kept in the cache folder.

    A damaged file is made again. Processes that make it at the same time write the same weights.
    """
    name = recipe.name
    text = json.dumps([recipe.model, recipe.pretraining], sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    file = cache_folder() / f"{name}-vit-{digest}.safetensors"
    if os.path.lexists(file):
        try:
            return read_cache(file, model.state_dict())
        except Exception as error:
            report(f"{file} is damaged and made again: {error}")
    digits = f"{int(labels.min())}–{int(labels.max())}"
    report(f"Pretraining the {name} ViT on the digits {digits} (once; it is kept in the cache)")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.pretraining["seed"])
        weights = _pretrain(model, recipe.pretraining, images, labels).state_dict()
    try:
        write_cache(file, weights)
    except OSError as error:
        report(f"The pretrained {name} ViT cannot be kept: {error}")
    return weights


def _pretrain(
    model: nn.Module, pretraining: Mapping[str, Any], images: Tensor, labels: Tensor
) -> nn.Module:
    steps, lr = pretraining["steps"], pretraining["lr"]
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=lr, weight_decay=pretraining["weight_decay"]
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps)
    model.train()
    for _ in range(steps):
        chosen = torch.randint(len(labels), (pretraining["batch_size"],))
        x, y = _augmented(images[chosen], labels[chosen], pretraining)
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
    return model.eval()


def _augmented(x: Tensor, y: Tensor, pretraining: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Move the images, change their contrast, add noise: features then survive mild corruption."""
    if "orientations" in pretraining:
        x, y = _turned(x, y)
    if "warp" in pretraining:
        x = _warped(x, pretraining["warp"])
    else:
        x = torch.roll(x, torch.randint(-1, 2, (2,)).tolist(), (-2, -1))
    mean = x.mean((1, 2, 3), keepdim=True)
    x = mean + (x - mean) * torch.empty(len(x), 1, 1, 1).uniform_(0.4, 1.2)
    return x + torch.randn_like(x) * torch.empty(len(x), 1, 1, 1).uniform_(0, 0.4), y


def _turned(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Each image in one of its eight orientations o, and the class 8·y + o."""
    orientation = torch.randint(8, (len(x),))
    every = [torch.rot90(t, turns, (2, 3)) for t in (x, x.flip(3)) for turns in range(4)]
    return torch.stack(every)[orientation, torch.arange(len(x))], 8 * y + orientation


def _warped(x: Tensor, scale: float) -> Tensor:
    """Each image under a random affine map, with black around it."""
    theta = torch.eye(2, 3).repeat(len(x), 1, 1)
    theta[:, :, :2] += scale * torch.randn(len(x), 2, 2)
    theta[:, :, 2] += 0.1 * torch.randn(len(x), 2)
    grid = F.affine_grid(theta, [*x.shape], align_corners=False)
    return F.grid_sample(x + 1, grid, align_corners=False) - 1


# --- the cache -----------------------------------------------------------------------------------


def cache_folder() -> Path:
    """$MULTILORA_CACHE, or multilora in the user's cache folder."""
    if "MULTILORA_CACHE" in os.environ:
        return Path(os.environ["MULTILORA_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "multilora"


def read_cache(file: Path, expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """Read the file. Raises some Exception if `write_cache` did not make it of such tensors."""
    from safetensors import safe_open

    with safe_open(file, "pt") as stored:
        metadata, names = stored.metadata() or {}, stored.keys()
        shapes = {name: stored.get_slice(name).get_shape() for name in names}
        if shapes != {name: list(t.shape) for name, t in expected.items()}:
            raise ValueError("it holds other tensors")
        weights = {name: stored.get_tensor(name) for name in names}
    if metadata.get("sha256", _digest(weights)) != _digest(weights):
        raise ValueError("its SHA-256 has changed since it was written")
    return weights


def write_cache(file: Path, weights: dict[str, Tensor]) -> None:
    from safetensors.torch import save_file

    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{uuid.uuid4().hex}")
    try:
        save_file(weights, temporary, {"sha256": _digest(weights)})
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def _digest(weights: dict[str, Tensor]) -> str:
    """SHA-256 of the values, in the order of their names."""
    sha = hashlib.sha256()
    for _, tensor in sorted(weights.items()):
        sha.update(tensor.contiguous().numpy().tobytes())
    return sha.hexdigest()
