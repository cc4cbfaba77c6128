"""Images in files: reading one, and data sets of many."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset


def read_image(path: str | Path) -> Any:
    """The image in RGB. Raises ValueError, with the file's name, if it cannot be read."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except Exception as error:
        raise ValueError(f"the image {path} cannot be read: {error}") from error


class ImageFiles(Dataset):
    """(transform(image), label) of each pair of a file and a label.

    Args:
        samples: (path, label) of every image.
        transform: It gets the image in RGB.
        classes: The classes' names, by label.
    """

    def __init__(
        self,
        samples: Sequence[tuple[Path, int]],
        transform: Callable[[Any], Any],
        classes: Sequence[str] = (),
    ):
        self.samples, self.transform, self.classes = samples, transform, list(classes)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        path, label = self.samples[index]
        return self.transform(read_image(path)), label


def read_list(file: Path, num_classes: int | None = None) -> list[tuple[Path, int]]:
    """(path, label) of every line `path label`, with the path relative to the list's folder.

    Raises:
        ValueError: The list is empty, a line is not `path label`, or a label is not in
            [0, num_classes). The message names the list and the line.
        FileNotFoundError: The list or an image is missing.
    """
    if not file.is_file():
        raise FileNotFoundError(f"the list {file} is missing")
    samples = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        path, _, label = line.rstrip().rpartition(" ")
        if not path or not label.isascii() or not label.isdigit():
            raise ValueError(f"{file}, line {number}: `path label` is needed; got {line!r}")
        if num_classes is not None and int(label) >= num_classes:
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
