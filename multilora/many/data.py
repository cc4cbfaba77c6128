"""The batches of a run, in the order that transformers' Trainer takes them."""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.data import default_collate

from multilora.many.arguments import RunArguments
from multilora.many.runs import Run

_LABELS = ("label", "label_ids", "labels", "shift_labels")


class DataEnded(RuntimeError):
    """There are no more examples, and the run is not at its end."""


class Batches:
    """The micro-batches of a run, step by step, and where it is in its data.

    Epoch e of a dataset with a length is in the order that torch.randperm draws from the seed
    seed + e, as in Trainer. A window of the last micro-batches of an epoch may have fewer of them.
    """

    def __init__(self, run: Run, arguments: RunArguments, base: nn.Module):
        self.run, self.arguments = run, arguments
        self.columns = set(inspect.signature(base.forward).parameters)
        self.epoch, self.position = 0, 0
        self._stream: Iterator[Any] | None = None
        self.has_length = hasattr(run.dataset, "__len__")
        size, count = arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps
        self.per_epoch = 0
        if self.has_length:
            whole, rest = divmod(len(run.dataset), size)
            self.per_epoch = whole + (rest > 0 and not arguments.dataloader_drop_last)
        self.steps_per_epoch = max(math.ceil(self.per_epoch / count), 1)
        self.steps = arguments.max_steps
        if self.steps <= 0:
            self.steps = math.ceil(arguments.num_train_epochs * self.steps_per_epoch)

    def window(self) -> list[Any]:
        """The micro-batches of the next step.

        Raises:
            DataEnded: there are none. Errors of the dataset come through.
        """
        count = self.arguments.gradient_accumulation_steps
        if not self.has_length:
            return [self._next_of_stream() for _ in range(count)]
        if self.per_epoch == 0:
            raise DataEnded(f"the data has {len(self.run.dataset)} examples, which make no batch")
        if self.position == self.per_epoch:
            self.epoch, self.position = self.epoch + 1, 0
        last = min(self.position + count, self.per_epoch)
        order = self._order()
        made = [self._batch(order, i) for i in range(self.position, last)]
        self.position = last
        return made

    @property
    def at_epochs_end(self) -> bool:
        return self.has_length and self.position == self.per_epoch

    def _order(self) -> list[int]:
        examples = len(self.run.dataset)
        if self.arguments.train_sampling_strategy == "sequential":
            return list(range(examples))
        seed = self.arguments.seed if self.arguments.data_seed is None else self.arguments.data_seed
        generator = torch.Generator().manual_seed(seed + self.epoch)
        return torch.randperm(examples, generator=generator, device="cpu").tolist()

    def _batch(self, order: list[int], number: int) -> Any:
        size = self.arguments.per_device_train_batch_size
        chosen = order[number * size : (number + 1) * size]
        try:
            examples = [self.run.dataset[i] for i in chosen]
        except (StopIteration, IndexError) as error:
            raise DataEnded(
                f"the data ended at one of the examples {chosen[:4]} …, of {len(order)}: {error!r}"
            ) from error
        return self.collate(examples)

    def _next_of_stream(self) -> Any:
        size = self.arguments.per_device_train_batch_size
        for _ in range(2):
            if self._stream is None:
                self._stream = iter(self.run.dataset)
            examples = [e for _, e in zip(range(size), self._stream)]
            if len(examples) == size or (examples and not self.arguments.dataloader_drop_last):
                self.position += 1
                return self.collate(examples)
            # The next epoch.
            self._stream, self.epoch, self.position = None, self.epoch + 1, 0
        raise DataEnded("the data has ended, and does not begin anew")

    def evaluation(self) -> Iterator[Any]:
        """The batches of the eval_dataset; where Trainer evaluates, drop_last is of these too."""
        size = self.arguments.per_device_eval_batch_size
        drops = self.arguments.dataloader_drop_last and self.arguments.eval_strategy != "no"
        least = size if drops else 1
        data = self.run.eval_dataset
        stream = (data[i] for i in range(len(data))) if hasattr(data, "__len__") else iter(data)
        while len(examples := list(itertools.islice(stream, size))) >= least:
            yield self.collate(examples)

    def collate(self, examples: list[Any]) -> Any:
        """A batch: a mapping of tensors, or a pair."""
        if isinstance(examples[0], Mapping) and self.arguments.remove_unused_columns:
            kept = self.columns | set(_LABELS)
            examples = [{n: v for n, v in e.items() if n in kept} for e in examples]
        if self.run.collate is not None:
            batch = self.run.collate(examples)
        elif isinstance(examples[0], Mapping):
            from transformers import default_data_collator

            batch = default_data_collator(examples)
        else:
            batch = default_collate(examples)
        return dict(batch) if isinstance(batch, Mapping) else batch

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go to that place. An iterable is read up to it."""
        self.epoch, self.position = state["epoch"], state["position"]
        if not self.has_length and self.position:
            self._stream = iter(self.run.dataset)
            size = self.arguments.per_device_train_batch_size
            for _ in zip(range(self.position * size), self._stream):
                pass
