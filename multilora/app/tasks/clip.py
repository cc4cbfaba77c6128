"""The task `clip`: CLIP's zero-shot classifier on a folder of images, as in Bella's protocol."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from multilora.app import recipes, untrusted
from multilora.app.options import FLAG, PAIRS, TEXT, TEXTS, option
from multilora.app.tasks.images import class_names, image_folder, transforms
from multilora.app.tasks.language import create_base, create_tokenizer
from multilora.app.tasks.task import ModelOptions, Report, Task, existing
from multilora.integrations.clip import TARGETS, TEMPLATE, classifier


@dataclass(frozen=True, kw_only=True)
class Options(ModelOptions):
    task: str = "clip"
    model: str = option(TEXT, "a CLIPModel of transformers, by name or folder")
    data: str = option(
        TEXT,
        "a folder of images, train/CLASS/ and val/CLASS/, or only CLASS/, of which a fifth is held "
        "out",
    )
    targets: tuple[str, ...] | None = option(TEXTS, "layers to adapt", TARGETS)
    model_args: tuple[tuple[str, Any], ...] = option(
        PAIRS, "arguments of transformers' from_pretrained", ()
    )
    augment: bool = option(FLAG, "augment the training images as timm does", False)
    template: str = option(
        TEXT, "prompt of a class; {} is its folder's name, with spaces for underscores", TEMPLATE
    )

    def check_model(self, where: str, run: Path) -> None:
        untrusted.check_transformers_name(where, self.model, run)

    @classmethod
    def recipe(cls, task: str, method: str, given: Mapping[str, Any]) -> dict[str, Any]:
        return recipes.settings(recipes.read("clip"), "images", method)


def make(options: Options, seed: int, report: Report = print) -> Task:
    """CLIP's vision encoder, with the text encoder's classes as its frozen head."""
    from timm.data.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    names = [name.replace("_", " ") for name in class_names(options.data)]
    model, _ = create_base(
        options.model,
        options.pretrained,
        seed,
        options.from_file,
        kind="AutoModel",
        **dict(options.model_args),
    )
    base = classifier(model, names, options.template, create_tokenizer(options.model))
    size = model.config.vision_config.image_size
    preparation = {
        "input_size": (3, size, size),
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "mean": OPENAI_CLIP_MEAN,
        "std": OPENAI_CLIP_STD,
    }
    train, test, classes = image_folder(options.data, base, options.augment, seed, **preparation)
    targets = existing(base, options.targets or TARGETS)
    return Task(
        base=base,
        targets=targets,
        head=None,
        classes=classes,
        train=train,
        test=test,
        transform=transforms(base, **preparation)[1],
        normalisation=(OPENAI_CLIP_MEAN, OPENAI_CLIP_STD),
    )
