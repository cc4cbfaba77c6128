"""A task: a pretrained base, what to adapt in it, and data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils.data import Dataset

Report = Callable[[str], None]


def _call(model: nn.Module, x: Any) -> Tensor:
    return model(x)


def _call_and_pass(model: nn.Module, x: Any, y: Tensor) -> tuple[Tensor, Tensor]:
    logits = model(x)
    if not isinstance(logits, Tensor):
        raise ValueError(
            f"in training mode the model returns a {type(logits).__name__}, not class logits: its "
            "training has a loss of its own, which particles do not have"
        )
    return logits, y


@dataclass(frozen=True)
class Task:
    """A pretrained base, what to adapt in it, and the data sets of (input, label) pairs.

    head: the classification head, which is new and trained whole; a name, or those of two.
    A batch of inputs is a tensor, or what `collate` makes of them: a dict of tensors.
    predict(model, x): the particles' logits (K, N, classes), which are evaluated against labels.
    learn(model, x, y): the logits and targets that a method's closure returns.
    """

    base: nn.Module
    targets: list[str]
    head: str | tuple[str, ...] | None
    classes: list[str]
    train: Dataset
    test: Dataset
    corrupted: dict[str, Dataset] = field(default_factory=dict)
    ood: Dataset | None = None
    collate: Callable[[list[Any]], tuple[Any, Tensor]] | None = None
    predict: Callable[[nn.Module, Any], Tensor] = _call
    learn: Callable[[nn.Module, Any, Tensor], tuple[Tensor, Tensor]] = _call_and_pass
    evaluation_batch: int = 256


def existing(
    base: nn.Module, targets: Sequence[str], working: Sequence[str] | None = None
) -> list[str]:
    """`targets`, checked: each is the name of a layer, or its end.

    working: what to choose among; the linears where it is None.
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
