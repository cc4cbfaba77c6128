"""What a base is asked about batches of unrelated runs, before they share its passes."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from multilora.methods.packing import OF_INPUTS, Batch, Pack, Reader
from multilora.model import ParticleModel
from multilora.ops.common import IGNORE_INDEX
from multilora.randomness import RandomState
from multilora.walk import evaluating

#: Errors for which the batches are not to blame: memory is short, or torch.compile has the base.
_OF_OTHERS = (torch.OutOfMemoryError, NotImplementedError)


@contextlib.contextmanager
def _of_base(model: ParticleModel) -> Iterator[None]:
    """Inside, the base runs without particles, dropout or graph; generators stay as they are."""
    before = RandomState(model.devices())
    try:
        with torch.no_grad(), model.base_only(), evaluating(model.base):
            yield
    finally:
        before.restore()


def hides_padding(model: ParticleModel, reader: Reader, batches: Mapping[int, Batch]) -> bool:
    """Whether a row of a shorter batch has the logits that it has alone, beside the longest one.

    True too where it cannot run: the batches' own pass then raises, with their names.
    """
    ordered = sorted(batches.values(), key=lambda batch: batch.longest)
    # Padding at both ends tells more than at one.
    shorter = [b for b in ordered if b.begins_masked and b.longest < ordered[-1].longest]
    short, long = _telling_row([*shorter, *ordered][0]), _telling_row(ordered[-1])
    try:
        with _of_base(model):
            alone = _logits(model, Pack(reader, {0: short}))
            again = _logits(model, Pack(reader, {0: short, 1: short}))
            beside = _logits(model, Pack(reader, {0: short, 1: long}))
    except OF_INPUTS as error:
        if isinstance(error, _OF_OTHERS):
            raise
        return True
    if alone.shape != beside.shape:
        return True
    at, dtypes = _read(short, alone), (alone.dtype, next(model.base.parameters()).dtype)
    half = torch.is_autocast_enabled(alone.device.type) or any(d.itemsize < 4 for d in dtypes)
    # Tensor cores round float32 to 11 bits.
    least = 0.02 if half else 1e-5 if alone.is_cpu else 5e-3
    # With no padding, the size of a batch changes rounding, and with it a token's experts.
    return _off(alone, beside, at) <= max(least, 3 * _off(alone, again, at))


def _telling_row(batch: Batch) -> Batch:
    """The row that has most padding on its left: one tells as much as all, in less memory."""
    row = 0 if batch.masked_first is None else int(batch.masked_first.argmax())

    def cut(value: Any) -> Any:
        return value[row : row + 1] if isinstance(value, Tensor) else value

    inputs = {name: cut(value) for name, value in batch.inputs.items()}
    return dataclasses.replace(
        batch, inputs=inputs, targets=cut(batch.targets), rows=1, mask=cut(batch.mask)
    )


def _logits(model: ParticleModel, pack: Pack) -> Tensor:
    """The base's, of the first batch in a pack."""
    return pack.logits(pack.called(model.base), None)[0]


def _read(batch: Batch, logits: Tensor) -> Any:
    """Where a loss reads the logits: at labels, or wherever the mask has tokens."""
    targets, mask = batch.targets, batch.mask
    if isinstance(targets, Tensor) and targets.shape == logits.shape[:-1]:
        labelled = targets != IGNORE_INDEX
        if bool(labelled.any()):
            return labelled
    if mask is not None and mask.shape == logits.shape[:-1]:
        return mask.bool()
    return slice(None)


def _off(one: Tensor, other: Tensor, at: Any) -> float:
    """The largest difference of a token's logits, as a part of their size."""
    one, other = one[at].double(), other[at].double()
    off = (one - other).flatten(1).norm(dim=1) / one.flatten(1).norm(dim=1).clamp_min(1e-30)
    return float(off.max()) if len(off) else 0.0


def check_own_loss(model: ParticleModel, reader: Reader, batch: Mapping[str, Any]) -> bool:
    """Compare the base's own loss of a batch with what `reader.task` computes.

    Returns:
        Whether it was compared, or never can be; a batch without labels leaves it open.

    Raises:
        ValueError: it is another one.
    """
    task = reader.task
    # Two rows, since the logits of all may be too many.
    some = {n: v[:2] if isinstance(v, Tensor) else v for n, v in batch.items()}
    inputs, targets = task.split(some)
    # A particle's own head may have other classes than the base's.
    if targets is None or model.has_own_widths:
        return True
    labels = task.own_labels(some, targets)
    if labels is None:
        return True
    if not bool((targets != IGNORE_INDEX).any()):
        return False
    try:
        with _of_base(model):
            output = model.base(**inputs | {"labels": labels})
            different = task.differs(output, getattr(output, "logits", None), inputs, targets)
    except OF_INPUTS as error:
        if isinstance(error, _OF_OTHERS):
            raise
        return True
    if different is not None:
        theirs, ours = different
        raise ValueError(
            f"the loss of {type(model.base).__name__} itself is {theirs:.6g} for this batch, and "
            f"the cross-entropy at its labels is {ours:.6g}, so it would train another loss than "
            'alone: give its loss, or losses="particle" for the cross-entropy'
        )
    return True
