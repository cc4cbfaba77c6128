"""Six corruptions of images at five severities, made when an image is read.

The strengths are those of ImageNet-C (Hendrycks & Dietterich, 2019). The code is another one, so
numbers measured with it do not compare with published ones.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from multilora import checks

#: The strength of each corruption at the severities 1 to 5; pixels are in [0, 1].
STRENGTHS: dict[str, tuple[float, ...]] = {
    "noise": (0.08, 0.12, 0.18, 0.26, 0.38),  # standard deviation
    "blur": (1, 2, 3, 4, 6),  # standard deviation, in 1/224 of the shorter side
    "contrast": (0.4, 0.3, 0.2, 0.1, 0.05),  # factor of the distance to the mean grey
    "brightness": (0.1, 0.2, 0.3, 0.4, 0.5),  # added to every pixel
    "jpeg": (25, 18, 15, 10, 7),  # quality
    "pixelate": (0.6, 0.5, 0.4, 0.3, 0.25),  # factor of the sides
}


def corrupt(pixels: Tensor, corruption: str, severity: int, seed: int = 0) -> Tensor:
    """An image with one of the corruptions in `STRENGTHS`.

    Args:
        pixels: Float (channels, H, W) in [0, 1], of 1 or 3 channels.
        severity: 1 to 5.
        seed: The noise's; at all severities it is the same noise, scaled.

    Returns:
        Another image of that shape and range.

    Raises:
        ValueError: The corruption or the severity is unknown, or `pixels` is no such image.
    """
    from torchvision.transforms.v2 import InterpolationMode
    from torchvision.transforms.v2 import functional as F

    checks.choice("corruption", corruption, STRENGTHS)
    strength = STRENGTHS[corruption][checks.integer("severity", severity, 1, 5) - 1]
    if pixels.ndim != 3 or pixels.shape[0] not in (1, 3) or not pixels.is_floating_point():
        raise ValueError(
            f"corrupt needs a float image (1 or 3 channels, H, W); got {pixels.dtype} "
            f"{tuple(pixels.shape)}"
        )
    size = list(pixels.shape[1:])
    if corruption == "noise":
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(pixels.shape, generator=generator, dtype=pixels.dtype, device="cpu")
        result = pixels + strength * noise.to(pixels.device)
    elif corruption == "blur":
        # The 0.4 pixels are there for small images, where the first term is next to nothing.
        sigma = math.hypot(strength * min(size) / 224, 0.4)
        width = 2 * math.ceil(3 * sigma) + 1
        result = F.gaussian_blur(pixels, [width, width], [sigma, sigma])
    elif corruption == "contrast":
        result = F.adjust_contrast(pixels, strength)
    elif corruption == "brightness":
        result = pixels + strength
    elif corruption == "jpeg":
        result = _through_jpeg(pixels, int(strength))
    else:
        small = F.resize(pixels, [max(1, round(strength * side)) for side in size])
        result = F.resize(small, size, InterpolationMode.NEAREST)
    return result.clamp(0, 1)


def _through_jpeg(pixels: Tensor, quality: int) -> Tensor:
    # Torchvision's own encoder is deprecated.
    from PIL import Image
    from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image

    file = io.BytesIO()
    to_pil_image((255 * pixels.cpu()).round().to(torch.uint8)).save(file, "JPEG", quality=quality)
    return pil_to_tensor(Image.open(file)).to(pixels) / 255


class Corrupted(Dataset):
    """Normalised images, each corrupted in pixel space. The index of an image seeds its noise.

    Args:
        data: (image, label) by index, the image (pixels − mean) / std of pixels in [0, 1].
        mean: One per channel.
        std: One per channel.
    """

    def __init__(
        self,
        data: Any,
        corruption: str,
        severity: int,
        mean: Sequence[float],
        std: Sequence[float],
    ):
        self.data, self.corruption, self.severity = data, corruption, severity
        self.mean, self.std = (torch.tensor(values)[:, None, None] for values in (mean, std))

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        x, y = self.data[index]
        pixels = (x * self.std + self.mean).clamp(0, 1)
        corrupted = corrupt(pixels, self.corruption, self.severity, seed=index)
        return (corrupted - self.mean) / self.std, y


def corrupted_sets(data: Any, mean: Sequence[float], std: Sequence[float]) -> dict[str, Dataset]:
    """{"CORRUPTION/SEVERITY": `Corrupted` data} of every corruption at every severity."""
    return {
        f"{name}/{severity}": Corrupted(data, name, severity, mean, std)
        for name, strengths in STRENGTHS.items()
        for severity in range(1, len(strengths) + 1)
    }
