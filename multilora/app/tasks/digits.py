"""The task `digits`: handwritten digits, which need no download."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from multilora import checks
from multilora.app.options import integer, option
from multilora.app.tasks.images import create_base
from multilora.app.tasks.task import Report, Task, TaskOptions

# A ViT of 0.17 M parameters on the 8×8 images that ship inside scikit-learn, 4×4 pixels a token.
DIGITS_MODEL: dict[str, Any] = {
    "img_size": 8,
    "patch_size": 4,
    "in_chans": 1,
    "embed_dim": 48,
    "depth": 6,
    "num_heads": 3,
}
DIGITS_TARGETS = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]
_PRETRAINING: dict[str, Any] = {
    "seed": 0,
    "steps": 600,
    "batch_size": 64,
    "lr": 1e-3,
    "weight_decay": 0.05,
}


@dataclass(frozen=True, kw_only=True)
class Options(TaskOptions):
    task: str = "digits"
    shots: int = option(integer(1, 10**6), "training examples per class", 20)


def make(options: Options, seed: int, report: Report = print) -> Task:
    """A ViT pretrained on the digits 0–4, to be adapted to a few examples of each of 5–9.

    The test images are the rest of 5–9; corrupted copies of them have noise, blur or low contrast,
    at three severities each; the digits 0–4 are the out-of-distribution images. The seed draws the
    training examples.

    Raises:
        ValueError: `options.shots` leaves no test images of a digit.
    """
    images, labels = _load_digits()
    source, target = labels < 5, labels >= 5
    fewest = int(labels[target].bincount()[5:].min())
    shots = checks.integer("shots", options.shots, 1, fewest - 1)
    base: Any = _digits_model(num_classes=5)
    base.load_state_dict(_pretrained_digits(images[source], labels[source], report))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        base.reset_classifier(5)
    x, y = images[target], labels[target] - 5
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(y), generator=generator)
    chosen = torch.cat([order[y[order] == c][:shots] for c in range(5)])
    held_out = torch.ones(len(y), dtype=torch.bool)
    held_out[chosen] = False
    x_test, y_test = x[held_out], y[held_out]
    return Task(
        base=base,
        targets=DIGITS_TARGETS,
        head="head",
        classes=[str(digit) for digit in range(5, 10)],
        train=TensorDataset(x[chosen], y[chosen]),
        test=TensorDataset(x_test, y_test),
        corrupted={
            name: TensorDataset(corrupted, y_test.repeat(len(_SEVERITIES[name])))
            for name, corrupted in _corrupt(x_test).items()
        },
        ood=TensorDataset(images[source], labels[source]),
        pixels=((0.5,), (0.5,)),  # see _load_digits
    )


def _load_digits() -> tuple[Tensor, Tensor]:
    """images (1797, 1, 8, 8) in [−1, 1] and labels (1797,)."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.from_numpy(data.images).float().unsqueeze(1) / 8 - 1
    return images, torch.from_numpy(data.target).long()


_SEVERITIES = {
    "noise": (0.2, 0.35, 0.5),  # standard deviation; pixels have a range of 2
    "blur": (0.4, 0.55, 0.7),  # standard deviation in pixels
    "contrast": (0.7, 0.5, 0.35),  # factor of the distance to the image's mean
}


def _corrupt(x: Tensor) -> dict[str, Tensor]:
    """Each corruption at its three severities, one after the other, always with the same noise."""
    generator = torch.Generator().manual_seed(0)
    noise = [x + s * torch.randn(x.shape, generator=generator) for s in _SEVERITIES["noise"]]
    blur = []
    for sigma in _SEVERITIES["blur"]:
        kernel = torch.exp(-0.5 * (torch.arange(-2.0, 3.0) / sigma) ** 2)
        kernel = torch.outer(kernel, kernel)
        kernel = (kernel / kernel.sum())[None, None]
        blur.append(F.conv2d(F.pad(x, (2, 2, 2, 2), value=-1.0), kernel))
    mean = x.mean((1, 2, 3), keepdim=True)
    contrast = [mean + s * (x - mean) for s in _SEVERITIES["contrast"]]
    return {
        "noise": torch.cat(noise).clamp(-1, 1),
        "blur": torch.cat(blur),
        "contrast": torch.cat(contrast),
    }


def _digits_model(num_classes: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_PRETRAINING["seed"])
        return create_base("vit_tiny_patch16_224", num_classes, pretrained=False, **DIGITS_MODEL)


def _pretrained_digits(images: Tensor, labels: Tensor, report: Report) -> dict[str, Tensor]:
    """The weights after pretraining, which are computed once and kept in the cache folder.

    A damaged file is made again. Processes that make it at the same time write the same weights.
    """
    recipe = json.dumps([DIGITS_MODEL, _PRETRAINING], sort_keys=True)
    name = f"digits-vit-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}.safetensors"
    file = cache_folder() / name
    model = _digits_model(num_classes=5)
    if os.path.lexists(file):
        try:
            return _read_cache(file, model.state_dict())
        except Exception as error:
            report(f"{file} is damaged and made again: {error}")
    report("Pretraining the digits ViT on the digits 0–4 (once; it is kept in the cache)")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_PRETRAINING["seed"])
        weights = _pretrain(model, images, labels).state_dict()
    try:
        _write_cache(file, weights)
    except OSError as error:
        report(f"The pretrained digits ViT cannot be kept: {error}")
    return weights


def _read_cache(file: Path, expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """Read the file. Raises some Exception if `_write_cache` did not make it of such tensors."""
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


def _write_cache(file: Path, weights: dict[str, Tensor]) -> None:
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


def _pretrain(model: nn.Module, images: Tensor, labels: Tensor) -> nn.Module:
    steps, size = _PRETRAINING["steps"], _PRETRAINING["batch_size"]
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=_PRETRAINING["lr"], weight_decay=_PRETRAINING["weight_decay"]
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _PRETRAINING["lr"], steps)
    model.train()
    for _ in range(steps):
        chosen = torch.randint(len(labels), (size,))
        x = _augment(images[chosen])
        F.cross_entropy(model(x), labels[chosen]).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
    return model.eval()


def _augment(x: Tensor) -> Tensor:
    """Shift by up to a pixel, change contrast, add noise: features then survive mild corruption."""
    x = torch.roll(x, torch.randint(-1, 2, (2,)).tolist(), (-2, -1))
    mean = x.mean((1, 2, 3), keepdim=True)
    x = mean + (x - mean) * torch.empty(len(x), 1, 1, 1).uniform_(0.4, 1.2)
    return x + torch.randn_like(x) * torch.empty(len(x), 1, 1, 1).uniform_(0, 0.4)


def cache_folder() -> Path:
    """$MULTILORA_CACHE, or multilora in the user's cache folder."""
    if "MULTILORA_CACHE" in os.environ:
        return Path(os.environ["MULTILORA_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "multilora"
