"""The definition of a task, and the options that all tasks share."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils.data import Dataset

from multilora.app import untrusted
from multilora.app.options import FLAG, PAIRS, TEXT, TEXTS, Checked, option

Report = Callable[[str], None]
#: The mean and the standard deviation of the normalisation of images, one number for each channel.
Normalisation = tuple[Sequence[float], Sequence[float]]


def _call(model: Callable[..., Any], x: Any) -> Any:
    """The logits of inputs x: one argument, or the keywords of a model of transformers."""
    return model(**x).logits if isinstance(x, Mapping) else model(x)


def call_and_pass(model: Callable[..., Any], x: Any, y: Tensor) -> tuple[Tensor, Tensor]:
    """The logits of inputs x, and y as their targets."""
    logits = _call(model, x)
    if not isinstance(logits, Tensor):
        raise ValueError(
            f"in training mode the model returns a {type(logits).__name__} instead of class "
            "logits: it computes its own training loss, which particles do not use"
        )
    return logits, y


@dataclass(frozen=True)
class Task:
    """A pretrained base, what to adapt in it, and the data sets of (input, label) pairs.

    Attributes:
        validation: Examples that are neither trained on nor tested on, to choose soups and steps,
            and to fit a temperature.
        head: The classification head, which is new and trained whole: a name, or two names.
        shifted: Further test sets of the same classes, by name: disturbed copies, other domains.
        ood: Data sets of inputs of other classes, by name; their labels are not read.
        transform: Makes the model's input from an RGB image, as for the test set. None where the
            inputs are no images from files.
        normalisation: The (mean, standard deviation) per channel by which pixels in [0, 1] became
            inputs. None where the inputs are no images.
        collate: Makes a batch of (inputs, labels) from pairs; inputs are a tensor or a dict of
            tensors. None is PyTorch's default.
        read_set: read_set(path, labelled) reads one more set, for --shift (labelled) and --ood.
            None where these name folders of images.
        predict: predict(model, x) gives the particles' logits (K, N, classes) for evaluation.
        learn: learn(model, x, y) gives the logits and targets that a method's closure returns.
    """

    base: nn.Module
    targets: list[str]
    head: str | tuple[str, ...] | None
    classes: list[str]
    train: Dataset
    test: Dataset
    validation: Dataset | None = None
    shifted: dict[str, Dataset] = field(default_factory=dict)
    ood: dict[str, Dataset] = field(default_factory=dict)
    transform: Callable[[Any], Tensor] | None = None
    normalisation: Normalisation | None = None
    collate: Callable[[list[Any]], tuple[Any, Tensor]] | None = None
    read_set: Callable[[str, bool], Dataset] | None = None
    predict: Callable[[nn.Module, Any], Tensor] = _call
    learn: Callable[[nn.Module, Any, Tensor], tuple[Tensor, Tensor]] = call_and_pass
    evaluation_batch: int = 256
    human_confidence: Tensor | None = None


def of_images(what: str, normalisation: Normalisation | None) -> Normalisation:
    """`normalisation`. Raises ValueError, which says `what` needs it, where there is none."""
    if normalisation is None:
        raise ValueError(f"{what} needs a task whose inputs are images")
    return normalisation


@dataclass(frozen=True, kw_only=True)
class TaskOptions(Checked):
    """The options of a task, and the task's name.

    Each module in this package has a subclass `Options` and a function
    make(options, seed, report) -> Task.
    """

    task: str

    @classmethod
    def recipe(cls, task: str, method: str, given: Mapping[str, Any]) -> dict[str, Any]:
        """The values that the task recommends for a method where the user gives none."""
        return {}


@dataclass(frozen=True, kw_only=True)
class ModelOptions(TaskOptions):
    """The options of a task with a model and data of the user's choice."""

    model: str = option(TEXT, "name of a model")
    data: str = option(TEXT, "folder of the data")
    pretrained: bool = option(FLAG, "start from random weights", True)
    targets: tuple[str, ...] | None = option(
        TEXTS, "layers to adapt, as PEFT's target_modules", None
    )
    model_args: tuple[tuple[str, Any], ...] = option(PAIRS, "arguments of the model", ())
    #: Whether a run's folder named the model, so that nobody vouches for it. See `untrusted`.
    from_file: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        # A run's folder may hold this one, which is ignored in favour of the user's word.
        names = {f.name for f in fields(self)} - {"trust_remote_code"}
        reserved = sorted(dict(self.model_args).keys() & (names | {"task", "seed", "report"}))
        if reserved:
            raise ValueError(f"model_args cannot give {reserved}, which are settings of the run")

    def check_model(self, where: str, run: Path) -> None:
        """Raise ValueError where the file `where` of the folder `run` may not name this model."""
        untrusted.check_timm_name(where, self.model)


def existing(
    base: nn.Module, targets: Sequence[str], working: Collection[str] | None = None
) -> list[str]:
    """`targets` as a list, after a check that each is the name of a layer, or its end.

    Args:
        working: The layers to choose among, for the message; the linears where it is None.

    Raises:
        ValueError: A target is in no layer's name.
    """
    layers = [name for name, _ in base.named_modules()]
    missing = [t for t in targets if not any(f".{name}".endswith(f".{t}") for name in layers)]
    if missing:
        if working is None:
            working = {
                name.rpartition(".")[2]
                for name, module in base.named_modules()
                if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
            }
        raise ValueError(
            f"{type(base).__name__} has no layers {missing}; choose targets among {sorted(working)}"
        )
    return list(targets)
