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


@contextlib.contextmanager
def _of_base(model: ParticleModel) -> Iterator[None]:
    """Inside, the base runs without particles, dropout or graph; generators stay as they are."""
    before = RandomState(model.devices())
    try:
        with torch.no_grad(), model.base_only(), evaluating(model.base):
            yield
    finally:
        before.restore()


def hides_padding(
    model: ParticleModel, reader: Reader, batches: Mapping[int, Batch]
) -> bool | None:
    """Whether the shortest sequences have the logits that they have alone, beside the longest.

    Returns:
        None where these batches do not tell.
    """
    ordered = sorted(batches.values(), key=lambda batch: batch.longest)
    short, long = (_first_row(batch) for batch in (ordered[0], ordered[-1]))
    try:
        with _of_base(model):
            alone = _logits(model, Pack(reader, {0: short}))
            beside = _logits(model, Pack(reader, {0: short, 1: long}))
    except OF_INPUTS:
        return None  # the batches' own pass raises it, with their names
    if alone.shape != beside.shape:
        return None
    read, dtypes = _read(short, alone), (alone.dtype, next(model.base.parameters()).dtype)
    half = torch.is_autocast_enabled(alone.device.type) or any(d.itemsize < 4 for d in dtypes)
    limit = 1e-5 if alone.is_cpu else 5e-3  # tensor cores round float32 to 11 bits
    alone, beside = alone[read].double(), beside[read].double()
    if not alone.numel() or not bool(alone.isfinite().all()):
        return None
    off = (alone - beside).flatten(1).norm(dim=1) / alone.flatten(1).norm(dim=1).clamp_min(1e-30)
    # In half precision a few tokens may go to other experts.
    return bool(off.mean() < 0.05) if half else bool(off.max() < limit)


def _first_row(batch: Batch) -> Batch:
    """A row tells as much as all of them, in less memory."""
    inputs = {n: v[:1] if isinstance(v, Tensor) else v for n, v in batch.inputs.items()}
    mask = None if batch.mask is None else batch.mask[:1]
    targets = batch.targets[:1] if isinstance(batch.targets, Tensor) else batch.targets
    return dataclasses.replace(batch, inputs=inputs, targets=targets, rows=1, mask=mask)


def _logits(model: ParticleModel, pack: Pack) -> Tensor:
    """Those of the first batch in a pack."""
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


def check_own_loss(model: ParticleModel, reader: Reader, batch: Mapping[str, Any]) -> bool:
    """Whether a batch with labels tells that the base's own loss is what `reader.task` computes.

    Raises:
        ValueError: it is another one.
    """
    task = reader.task
    if "labels" not in task.columns or "shift_labels" in batch:
        return False
    # Two rows, since the logits of all may be too many.
    some = {n: v[:2] if isinstance(v, Tensor) else v for n, v in batch.items()}
    no_cache = {"use_cache": False} if "use_cache" in task.columns else {}
    try:
        with _of_base(model):
            different = task.differs(some, model.base(**some | no_cache))
    except OF_INPUTS:
        return False
    if different is not None:
        theirs, ours = different
        raise ValueError(
            f"the loss of {type(model.base).__name__} itself is {theirs:.6g} for this batch, and "
            f"the cross-entropy at its labels is {ours:.6g}, so it would train another loss than "
            'alone: give its loss, or losses="particle" for the cross-entropy'
        )
    return True
