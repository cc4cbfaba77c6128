"""The task `digits`: handwritten digits, which need no download.

The images are scikit-learn's, the test set of Alpaydin and Kaynak, Optical Recognition of
Handwritten Digits, UCI Machine Learning Repository (1998).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from multilora import checks
from multilora.app.options import FLAG, choice, integer, option
from multilora.app.tasks import small_images
from multilora.app.tasks.mnist import as_digits, load_mnist
from multilora.app.tasks.small_images import Recipe, corrupted, drawn, pretrained_vit
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
_PRETRAINING: dict[str, Any] = {
    "seed": 0,
    "steps": 600,
    "batch_size": 64,
    "lr": 1e-3,
    "weight_decay": 0.05,
}
_SEVERITIES = {
    "noise": (0.2, 0.35, 0.5),
    "blur": (0.4, 0.55, 0.7),
    "contrast": (0.7, 0.5, 0.35),
}
#: With split = "thirds": images of each digit in the validation pool and in the test set.
_VALIDATION, _TEST = 50, 75


@dataclass(frozen=True, kw_only=True)
class Options(TaskOptions):
    task: str = "digits"
    shots: int = option(integer(1, 10**6), "training examples per class", 20)
    split: str = option(
        choice("halves", "thirds"),
        "halves: pretrained on the digits 0–4, adapted to 5–9, tested on all their other images; "
        "thirds: pretrained on 0–3, adapted to 4–7, with fixed sets to validate and to test, and "
        "8 and 9 unseen by both",
        "halves",
    )
    mnist: bool = option(
        FLAG, "with --split thirds: test also on MNIST's images of 4–7, shrunk to 8×8", False
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mnist and self.split != "thirds":
            raise ValueError(f"mnist needs split = 'thirds'; got {self.split!r}")


def make(options: Options, seed: int, report: Report = print) -> Task:
    """A ViT pretrained on some digits, to be adapted to a few examples of each of others.

    With split = "halves" it is pretrained on 0–4 and adapted to 5–9. The test images are the rest
    of 5–9; shifted copies of them have noise, blur or low contrast, at three severities each; the
    digits 0–4 are the out-of-distribution images, the set "source". The seed draws the training
    examples.

    With split = "thirds", about 220 images of 4–7 are there to draw training examples from, 200 to
    validate and 300 to test; see `small_images.three_way_task`. The set "mnist" is shifted too.

    Raises:
        ValueError: `options.shots` leaves no test images of a digit, or with "thirds" there are
            not as many images to draw from.
    """
    images, labels = _load_digits()
    return (_halves if options.split == "halves" else _thirds)(
        options, images, labels, seed, report
    )


def _halves(options: Options, images: Tensor, labels: Tensor, seed: int, report: Report) -> Task:
    source, target = labels < 5, labels >= 5
    fewest = int(labels[target].bincount()[5:].min())
    shots = checks.integer("shots", options.shots, 1, fewest - 1)
    recipe = Recipe("digits", DIGITS_MODEL, _PRETRAINING)
    x, y = images[target], labels[target] - 5
    chosen = drawn(y, shots, seed)
    held_out = torch.ones(len(y), dtype=torch.bool)
    held_out[chosen] = False
    x_test, y_test = x[held_out], y[held_out]
    return Task(
        base=pretrained_vit(recipe, images[source], labels[source], seed, report),
        targets=small_images.TARGETS,
        head="head",
        classes=[str(digit) for digit in range(5, 10)],
        train=TensorDataset(x[chosen], y[chosen]),
        test=TensorDataset(x_test, y_test),
        shifted=dict(corrupted(x_test, y_test, _SEVERITIES)),
        ood={"source": TensorDataset(images[source], labels[source])},
        normalisation=small_images.NORMALISATION,
    )


def _thirds(options: Options, images: Tensor, labels: Tensor, seed: int, report: Report) -> Task:
    recipe = Recipe("digits-thirds", DIGITS_MODEL, _PRETRAINING)
    parts = small_images.thirds(images, labels, _VALIDATION, _TEST)
    shifted = {}
    if options.mnist:
        x, y = load_mnist()
        same = (y >= 4) & (y < 8)
        shifted["mnist"] = as_digits(x[same]), y[same] - 4
    return small_images.three_way_task(
        recipe, parts, options.shots, _SEVERITIES, seed, report, shifted
    )


def _load_digits() -> tuple[Tensor, Tensor]:
    """images (1797, 1, 8, 8) in [−1, 1] and labels (1797,)."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.from_numpy(data.images).float().unsqueeze(1) / 8 - 1
    return images, torch.from_numpy(data.target).long()
