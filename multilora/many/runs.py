"""A run of a sweep: what is trained, on what, and how."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn

from multilora.losses import named
from multilora.many.arguments import RunArguments, read
from multilora.targets import check_config

if TYPE_CHECKING:
    import peft

#: The files of a sweep's folder, beside the folders of its adapters.
TABLE, TABLE_CSV, CHECKPOINT = "table.json", "table.csv", "checkpoint.pt"
#: The file in which the command keeps what it was asked for.
ASKED = "sweep.json"
_NAME = re.compile(r"[\w=][\w=.,+-]*")
#: File systems have 255, of which a folder that is being written needs some.
_LONGEST_NAME = 200


@dataclass(frozen=True)
class Run:
    """A fine-tuning of `fit_many`.

    Args:
        config: of its adapter.
        dataset: of its examples, with a length and an order; or an iterable, which is read in its
            own order, again and again, and needs max_steps. Examples are mappings, as transformers
            has them, or pairs (input, target).
        arguments: TrainingArguments, `RunArguments`, or an object with such names.
        name: of its folder and its row in the table; "run_0", "run_1", ... by default.
        eval_dataset: is evaluated in its order.
        collate: makes a batch of a list of examples. By default transformers' default_data_collator
            for mappings, and torch's default_collate for others.
        loss: a name or a loss of `multilora.losses`, or a function (logits (B, ..., C), targets) ->
            a scalar. By default the base's own loss for batches with labels, and the mean
            cross-entropy for others.
        metrics: (logits, targets) of the whole eval_dataset -> measures by name, which the table
            has as eval_NAME. eval_loss and eval_accuracy come with it.
        heads: outputs of heads of another width than the base's, by name; see
            `get_particle_model`.
    """

    config: peft.LoraConfig
    dataset: Any
    arguments: Any = field(default_factory=RunArguments)
    name: str | None = None
    eval_dataset: Any = None
    collate: Callable[[list[Any]], Any] | None = None
    loss: Any = None
    metrics: Callable[[Any, Any], Mapping[str, float]] | None = None
    heads: Mapping[str, int | nn.Module] | None = None


@dataclass(frozen=True)
class Planned:
    """A run with its name, and its arguments as they are honoured."""

    run: Run
    name: str
    arguments: RunArguments

    @property
    def adapter(self) -> str:
        """A text that tells configurations apart."""
        config = self.run.config.to_dict()
        plain = {k: sorted(v) if isinstance(v, set) else v for k, v in config.items()}
        return json.dumps(plain, sort_keys=True, default=str)

    @property
    def fingerprint(self) -> str:
        """A text that tells runs apart, as far as their data are not concerned."""
        heads = {
            k: v if isinstance(v, int) else "module" for k, v in (self.run.heads or {}).items()
        }
        own = [vars(self.arguments), self.adapter, heads]
        return json.dumps(own, sort_keys=True, default=str)


def check_name(name: Any) -> None:
    """Raise ValueError for a name that a folder beside the files of a sweep cannot have."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(
            f"run {name!r}: a name has letters, digits and =.,+-_ and begins with none of .,+-"
        )
    if name.lower() in (TABLE, TABLE_CSV, CHECKPOINT, ASKED):
        raise ValueError(f"run {name!r} has the name of a file that the sweep writes")
    if len(name.encode()) > _LONGEST_NAME:
        raise ValueError(
            f"run {name!r}: a name, which is that of its folder, has at most {_LONGEST_NAME} bytes"
        )


def planned(runs: Sequence[Run]) -> list[Planned]:
    """The runs, checked.

    Raises:
        TypeError, ValueError, NotImplementedError: there is none, one is of another kind, names are
            equal or cannot be those of a folder, or arguments or a field of a configuration are not
            supported; the message names the run.
    """
    if not isinstance(runs, Sequence) or not runs or not all(isinstance(r, Run) for r in runs):
        raise TypeError("fit_many needs a non-empty list of Run")
    found: dict[str, Planned] = {}
    for number, run in enumerate(runs):
        name = f"run_{number}" if run.name is None else run.name
        check_name(name)
        if name in found:
            raise ValueError(f"two runs have the name {name!r}")
        who = f"run {name!r}"
        arguments = read(run.arguments, who)
        _check_schedule(arguments, who)
        try:
            check_config(run.config)
            _ = run.loss if run.loss is None else named(run.loss)
        except (ValueError, TypeError, NotImplementedError) as error:
            raise type(error)(f"{who}: {error}") from error
        if arguments.eval_strategy != "no" and run.eval_dataset is None:
            raise ValueError(f"{who}: eval_strategy = {arguments.eval_strategy!r}, no eval_dataset")
        _check_evaluation(run, arguments, who)
        if not hasattr(run.dataset, "__len__") and arguments.max_steps <= 0:
            raise ValueError(f"{who}: a dataset without a length needs max_steps")
        found[name] = Planned(run, name, arguments)
    return list(found.values())


def _check_evaluation(run: Run, arguments: RunArguments, who: str) -> None:
    """Raise ValueError for evaluations without examples, and a metric that none will have."""
    name, known = arguments.metric, ["eval_loss", "eval_accuracy"]
    if run.eval_dataset is None and (name != "eval_loss" or arguments.greater):
        raise ValueError(
            f"{who}: metric_for_best_model = {name!r} needs an eval_dataset; without one, runs are "
            "compared by their training loss, of which less is better"
        )
    size = arguments.per_device_eval_batch_size
    few = hasattr(run.eval_dataset, "__len__") and len(run.eval_dataset) < size
    if few and arguments.dataloader_drop_last and arguments.eval_strategy != "no":
        raise ValueError(
            f"{who}: the eval_dataset has {len(run.eval_dataset)} examples, fewer than a batch of "
            f"{size}, and dataloader_drop_last leaves them out"
        )
    if run.metrics is None and name not in known:
        raise ValueError(
            f"{who}: metric_for_best_model must be one of {known}, or of what Run.metrics returns; "
            f"got {name!r}"
        )


def _check_schedule(arguments: RunArguments, who: str) -> None:
    import torch
    from transformers import SchedulerType, get_scheduler

    known, kind = [one.value for one in SchedulerType], arguments.lr_scheduler_type
    if kind not in known:
        raise ValueError(f"{who}: lr_scheduler_type must be one of {known}; got {kind!r}")
    own, rate = arguments.lr_scheduler_kwargs, arguments.learning_rate
    try:
        get_scheduler(kind, torch.optim.SGD([torch.zeros(1)], rate), 1, 1000, own)
    except (ValueError, TypeError, ZeroDivisionError) as error:
        raise ValueError(f"{who}: lr_scheduler_type {kind!r} with {own}: {error}") from error
