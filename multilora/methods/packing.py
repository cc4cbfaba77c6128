"""Batches of unrelated runs in one pass: what they hold, side by side, and each one's own again."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multilora.isolation import ParticleIsolationError
from multilora.labels import Task
from multilora.model import ParticleModel
from multilora.ops.common import IGNORE_INDEX

#: What sequences (B, T, ...) of these names are padded with at their ends; None is the token for
#: padding.
_PADDING: dict[str, int | None] = {
    "input_ids": None,
    "attention_mask": 0,
    "token_type_ids": 0,
    "position_ids": 0,
    "inputs_embeds": 0,
    "decoder_input_ids": None,
    "decoder_inputs_embeds": 0,
    "decoder_attention_mask": 0,
    "labels": IGNORE_INDEX,
}
#: The sequences that an attention mask is of.
_SEQUENCES = ("input_ids", "inputs_embeds")
#: Those that a decoder reads beside them; the logits then have their length.
_DECODED = ("decoder_input_ids", "decoder_inputs_embeds", "labels")
#: What a base raises where a batch does not fit it.
OF_INPUTS = (
    ValueError,
    TypeError,
    RuntimeError,
    IndexError,
    KeyError,
    AttributeError,
    NotImplementedError,
    ParticleIsolationError,
)


@dataclass
class Batch:
    """A run's batch.

    Attributes:
        who: the particle and its run, for messages.
        inputs: tensors (B, ...) and other values, by name; positional ones by their number.
        targets: as the loss wants them.
        rows: B.
        columns: of its logits (B, T, C), which have a target each; None for all of them.
        labelled: whether it came with "labels", as a model of transformers takes it.
        mask: its attention mask, as it came.
    """

    who: str
    inputs: dict[str | int, Any]
    targets: Any
    rows: int
    columns: slice | None = None
    labelled: bool = False
    mask: Tensor | None = None

    def lengths(self, names: Sequence[str]) -> list[int]:
        """T of its sequences of these names."""
        return [self.inputs[n].shape[1] for n in names if _is_sequence(n, self.inputs.get(n))]

    @property
    def longest(self) -> int:
        """The length of its longest sequences; 0 where it has none."""
        return max(self.lengths((*_SEQUENCES, *_DECODED)), default=0)

    @property
    def sizes(self) -> tuple[int, ...]:
        """The lengths of all its sequences; equal ones share a pass without padding."""
        return tuple(self.lengths((*_SEQUENCES, *_DECODED)))

    @functools.cached_property
    def is_packed(self) -> bool:
        """Whether its rows hold several texts each, whose places alone say where they begin.

        An attention mask, which padding needs, would take its place.
        """
        places = self.inputs.get("position_ids")
        if self.mask is not None or not isinstance(places, Tensor) or places.ndim != 2:
            return False
        return bool((places.diff(dim=1) != 1).any())

    @functools.cached_property
    def masked_first(self) -> Tensor | None:
        """How many tokens a mask hides in front of each row (B,); None without such a mask."""
        if self.mask is None or self.mask.ndim != 2:
            return None
        return (self.mask.cumsum(1) == 0).sum(1)

    @functools.cached_property
    def begins_masked(self) -> bool:
        """Whether some row is padded on the left."""
        return self.masked_first is not None and bool(self.masked_first.any())

    @property
    def length(self) -> int | None:
        """T, of the sequences that the logits have an entry for."""
        return next(iter(self.lengths((*_DECODED, *_SEQUENCES))), None)


class Reader:
    """Reads batches for a base: (inputs, targets), or a mapping with "labels"."""

    def __init__(self, base: nn.Module):
        self.base = base
        self.columns = list(inspect.signature(base.forward).parameters)
        self._task: Task | None = None

    @property
    def task(self) -> Task:
        """The base's own loss, for batches with labels."""
        if self._task is None:
            self._task = Task(self.base)
        return self._task

    def read(self, entry: Any, who: str, device: torch.device) -> Batch:
        """A run's batch.

        Raises:
            TypeError, ValueError: it is none, or its inputs and targets do not fit; it names `who`.
        """
        if isinstance(entry, Mapping):
            return self._with_labels(on(device, entry), who)
        if not isinstance(entry, (tuple, list)) or len(entry) != 2:
            raise TypeError(
                f"{who}: a batch is (inputs, targets), a mapping with labels, a closure or None; "
                f"got {_shown(entry)}"
            )
        inputs, targets = (on(device, part) for part in entry)
        if isinstance(inputs, Mapping):
            named: dict[str | int, Any] = dict(inputs)
        elif isinstance(inputs, Tensor) and self.columns[:1] == ["input_ids"]:
            named = {"input_ids": inputs}
        else:
            named = dict(enumerate(inputs if isinstance(inputs, (tuple, list)) else (inputs,)))
        if "use_cache" in self.columns:
            named.setdefault("use_cache", False)
        rows = _rows(named, who)
        if isinstance(targets, Tensor) and (targets.ndim == 0 or len(targets) != rows):
            raise ValueError(
                f"{who}: the inputs have {rows} rows, and the targets are {tuple(targets.shape)}"
            )
        return Batch(who, named, targets, rows, mask=named.get("attention_mask"))

    def _with_labels(self, batch: dict[str, Any], who: str) -> Batch:
        if not isinstance(batch.get("labels"), Tensor):
            raise ValueError(f"{who}: a batch needs labels; got {sorted(map(str, batch))}")
        rows = _rows(batch, who)
        try:
            inputs, targets = self.task.split(batch)
        except ValueError as error:
            raise ValueError(f"{who}: {error}") from error
        assert targets is not None
        inputs.pop("logits_to_keep", None)
        columns = None
        if self.task.shifts:
            length = batch["labels"].shape[1]
            columns = slice(length - targets.shape[1], length)
        named: dict[str | int, Any] = dict(inputs.items())
        return Batch(who, named, targets, rows, columns, True, inputs.get("attention_mask"))


def packed(
    batches: Mapping[int, Batch],
    most: int | None = None,
    tokens: int | None = None,
    pads: bool = True,
) -> list[dict[int, Batch]]:
    """Batches by particle, in as many passes as they need; those of like lengths are together.

    most: of the particles in one pass.
    tokens: of the sequences in one pass, padded to the longest; a batch that has more runs alone.
    pads: whether sequences of unequal lengths may share a pass.
    """
    found: list[dict[int, Batch]] = []
    rows, before = 0, None

    def order(entry: tuple[int, Batch]) -> Any:
        return entry[1].longest, entry[1].sizes, entry[1].is_packed

    # In one pass, sequences are padded to the longest of them, which is the next.
    for k, batch in sorted(batches.items(), key=order):
        rows += batch.rows
        is_full = before is None or len(found[-1]) == most or not _fit(before, batch, pads)
        if is_full or (tokens is not None and rows * batch.longest > tokens):
            found.append({})
            rows = batch.rows
        found[-1][k] = before = batch
    return [dict(sorted(one.items())) for one in found]


def _fit(one: Batch, other: Batch, pads: bool) -> bool:
    """Whether two batches may share a pass."""
    if one.is_packed or other.is_packed:
        return one.is_packed and other.is_packed and one.sizes == other.sizes
    return pads or one.sizes == other.sizes


class Pack:
    """Batches of several particles in one: rows of one particle after those of another.

    Args:
        reader: of the base.
        batches: by particle, in ascending order.

    Raises:
        ValueError: they have other keys or shapes than the first one's; the message names both.
    """

    def __init__(self, reader: Reader, batches: Mapping[int, Batch]):
        self.reader, self.batches = reader, batches
        self.lengths = {k: b.length for k, b in batches.items()}
        self.longest = max((t for t in self.lengths.values() if t is not None), default=None)
        self.index = [k for k, b in batches.items() for _ in range(b.rows)]
        self._inputs = self._side_by_side()

    def run(self, model: ParticleModel) -> Any:
        """The model's output for all rows. What it raises has the names of the runs."""
        # A particle by itself needs no place among the rows of others.
        call: Callable[..., Any] = model.particle(self.index[0])
        if len(self.batches) > 1:
            call = functools.partial(model, particle=self.index)
        try:
            return self.called(call)
        except Exception as error:
            # Subclasses tell more than their text does, such as that memory is short.
            if type(error) not in OF_INPUTS:
                raise
            raise type(error)(
                f"{first_few(b.who for b in self.batches.values())}: {error}"
            ) from error

    def called(self, call: Callable[..., Any]) -> Any:
        """call(...) of all rows."""
        named = dict(self._inputs)
        first = self._first_column()
        if first and self.longest is not None:
            named["logits_to_keep"] = self.longest - first
        positions = sorted(n for n in named if isinstance(n, int))
        args = [named.pop(n) for n in positions]
        return call(*args, **{str(n): v for n, v in named.items()})

    def _first_column(self) -> int:
        """The first column of the logits that some batch has a target for."""
        every = [b.columns for b in self.batches.values()]
        if "logits_to_keep" not in self.reader.columns:
            return 0
        return min(0 if c is None else c.start for c in every)

    def logits(self, output: Any, widths: Sequence[int] | None) -> dict[int, Tensor]:
        """Each particle's own logits (B, ..., C).

        Args:
            widths: the classes of each particle's head; None where all have the same.

        Raises:
            ValueError: the output has no logits, or they may be of padding.
        """
        logits = getattr(output, "logits", output)
        if not isinstance(logits, Tensor) or logits.shape[:1] != (len(self.index),):
            raise ValueError(
                f"{type(self.reader.base).__name__} returns {_shown(logits)} where logits "
                f"({len(self.index)}, ..., C) are needed"
            )
        batches = list(self.batches.values())
        embedded = {n for batch in batches for n in batch.lengths(["inputs_embeds"])}
        if logits.ndim == 2 and len(embedded) > 1:
            raise ValueError(
                f"{first_few(b.who for b in batches)}: of embeddings of unequal lengths, "
                f"{type(self.reader.base).__name__} may have classified the padding: give "
                "input_ids, or run them apart"
            )
        own = {}
        # The gradient of a slice is as large as the whole; that of all parts is made once.
        parts = logits.split([batch.rows for batch in batches])
        for (k, batch), part in zip(self.batches.items(), parts):
            length = self.lengths[k]
            if self.longest is not None and length is not None and part.ndim > 2:
                # Columns are counted from the first that the model returned.
                before = self.longest - part.shape[1]
                columns = batch.columns or slice(0, length)
                if before >= 0 and (columns.start, columns.stop) != (before, self.longest):
                    part = part[:, columns.start - before : columns.stop - before]
            own[k] = part if widths is None else part[..., : widths[k]]
        return own

    def router_losses(self, output: Any, particles: Sequence[int]) -> dict[int, Tensor]:
        """What the base adds to its loss for its router, for those of `particles` with labels."""
        mine = [k for k in particles if self.batches[k].labelled]
        router = self.reader.task.router if mine else None
        if router is None:
            return {}
        layers = [t.reshape(len(self.index), -1, t.shape[-1]) for t in output.router_logits]
        found, start = {}, 0
        for k, batch in self.batches.items():
            rows = slice(start, start := start + batch.rows)
            if k in mine:
                length = self.lengths[k]
                own = [t[rows, :length].reshape(-1, t.shape[-1]) for t in layers]
                found[k] = router.of_one(own, batch.mask)
        return found

    def _side_by_side(self) -> dict[str | int, Any]:
        batches = list(self.batches.values())
        masks = {"attention_mask" in b.inputs for b in batches}
        if len(masks) > 1 or len({t for b in batches for t in b.lengths(_SEQUENCES)}) > 1:
            batches = [self._masked(b) for b in batches]
        first = batches[0]
        for other in batches[1:]:
            if other.inputs.keys() != first.inputs.keys():
                raise ValueError(
                    f"{other.who} has the inputs {sorted(map(str, other.inputs))}, and {first.who} "
                    f"{sorted(map(str, first.inputs))}: they cannot run in one pass"
                )
        return {name: self._together(name, batches) for name in first.inputs}

    def _masked(self, batch: Batch) -> Batch:
        """The batch with an attention mask, as sequences of unequal lengths need it."""
        if "attention_mask" in batch.inputs:
            return batch
        if "attention_mask" not in self.reader.columns:
            lengths = {b.who: b.lengths(_SEQUENCES) for b in self.batches.values()}
            raise ValueError(
                f"sequences of unequal lengths, {lengths}, need an attention mask, which "
                f"{type(self.reader.base).__name__} does not take: pad them yourself"
            )
        ids = next(batch.inputs[n] for n in _SEQUENCES if n in batch.inputs)
        mask = torch.ones(ids.shape[:2], dtype=torch.int64, device=ids.device)
        return dataclasses.replace(batch, inputs=batch.inputs | {"attention_mask": mask})

    def _together(self, name: str | int, batches: Sequence[Batch]) -> Any:
        values = [b.inputs[name] for b in batches]
        if not all(isinstance(v, Tensor) for v in values):
            for batch, value in zip(batches, values):
                if not _are_equal(value, values[0]):
                    raise ValueError(
                        f"{batch.who} has {_input(name)} {_shown(value)}, and {batches[0].who} "
                        f"{_shown(values[0])}: they cannot run in one pass"
                    )
            return values[0]
        lengths = [v.shape[1] for v in values if _is_sequence(name, v)]
        if name in _PADDING and len(lengths) == len(values) and len({*lengths}) > 1:
            values = [self._padded(str(name), v, max(lengths)) for v in values]
        for batch, value in zip(batches, values):
            same = value.shape[1:] == values[0].shape[1:] and value.dtype == values[0].dtype
            if not same:
                raise ValueError(
                    f"{batch.who} has {_input(name)} {value.dtype} {tuple(value.shape)}, and "
                    f"{batches[0].who} {values[0].dtype} {tuple(values[0].shape)}: they cannot run "
                    "in one pass"
                )
        return torch.cat(values) if len(values) > 1 else values[0]

    def _padded(self, name: str, value: Tensor, length: int) -> Tensor:
        fill = _PADDING[name]
        if fill is None:
            config = getattr(self.reader.base, "config", None)
            token = getattr(config, "pad_token_id", None)
            fill = token if isinstance(token, int) and token >= 0 else 0
        missing = length - value.shape[1]
        return F.pad(value, (0, 0) * (value.ndim - 2) + (0, missing), value=fill)


def _is_sequence(name: Any, value: Any) -> bool:
    """Whether it is tokens (B, T) or embeddings (B, T, d); of a multiple choice, it is not."""
    axes = 3 if str(name).endswith("inputs_embeds") else 2
    return isinstance(value, Tensor) and value.ndim == axes


def _are_equal(one: Any, other: Any) -> bool:
    try:
        return bool(one == other)
    except (RuntimeError, ValueError):  # of several tensors
        return one is other


def first_few(names: Iterable[str]) -> str:
    """Some particles' names, for messages."""
    named = list(names)
    return ", ".join(named[:4]) + (f" and {len(named) - 4} others" if len(named) > 4 else "")


def on(device: torch.device, value: Any) -> Any:
    """The tensors of a batch on a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {name: on(device, v) for name, v in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(on(device, v) for v in value)
    return value


def _rows(inputs: Mapping[Any, Any], who: str) -> int:
    """B, the length of all tensors."""
    shapes = {_input(n): tuple(v.shape) for n, v in inputs.items() if isinstance(v, Tensor)}
    if not shapes or len({s[:1] for s in shapes.values()}) > 1 or () in shapes.values():
        raise ValueError(f"{who}: inputs and labels need tensors of one batch; got {shapes}")
    rows = next(iter(shapes.values()))[0]
    if rows == 0:
        raise ValueError(f"{who}: the batch is empty; got {shapes}")
    return rows


def _input(name: Any) -> str:
    return f"input {name}" if isinstance(name, int) else str(name)


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)}"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)}"
    if isinstance(value, (str, int, float)) or value is None:
        return repr(value)
    return f"a {type(value).__name__}"
