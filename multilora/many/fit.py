"""`fit_many`: K fine-tunings over one frozen base, in one process."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from multilora import atomic, checks
from multilora.many import state
from multilora.many.progress import Bars
from multilora.many.runs import CHECKPOINT, Planned, Run, planned
from multilora.many.sweep import Sweep, check_configurations
from multilora.many.table import Results, restored


def fit_many(
    base: nn.Module,
    runs: Sequence[Run],
    *,
    out: str | Path | None = None,
    resume: bool = True,
    keep: int | None = None,
    at_once: int | None = None,
    save_every: int = 200,
    progress: bool = True,
    seed: int = 0,
    **options: Any,
) -> Results:
    """Train a LoRA adapter for each run, all over one frozen base and in its every pass.

    Each run ends as transformers' Trainer would end with its PEFT model and its arguments: same
    order of its data, accumulation, clipping, decay and schedule. Only random numbers in the model
    (dropout) and in the data (augmentations) are shared, and so are others than Trainer's. A run
    that has ended, also by early stopping, leaves its place to the next one.

    A run whose dataset raises or ends early, whose loss is not finite, or whose batches do not fit
    the model, has failed; the table says why. The others go on and lose nothing. Batches that
    cannot share a pass run one after another; a warning names their runs.

    Args:
        base: any module that `get_particle_model` takes; it is frozen, and changed in place.
        runs: what is trained.
        out: a folder for the table (table.json, table.csv), a PEFT adapter for each run under its
            name, and checkpoint.pt. By default nothing is written, and the rows hold the adapters.
        resume: go on from the checkpoint that `out` may hold. A sweep that was killed at any time
            ends with the numbers of one that was not. If False, there must be none.
        keep: how many adapters to keep, those with the best metric; by default all.
        at_once: how many runs share a pass; by default all, or as many as in the checkpoint, which
            takes no other number.
        save_every: passes between two checkpoints. Another is written whenever a run has ended.
        progress: bars on a terminal, if rich is there.
        seed: of dropout, and of what the data draw.
        options: particle_chunk, how many runs' batches go through the base at a time, and options
            of `get_particle_model`.

    Returns:
        A row for each run, in their order.

    Raises:
        TypeError, ValueError, NotImplementedError: a run or an argument is not supported; the
            message names both. Nothing is trained then, and the base is left as it was. `out` has a
            checkpoint of other runs.
        NotADirectoryError: `out` is a file.
    """
    plans = planned(runs)
    places = None
    if at_once is not None:
        places = min(checks.integer("at_once", at_once, 1), len(plans))
    checks.integer("save_every", save_every, 1)
    checks.integer("seed", seed, 0, 2**32 - 1)
    if keep is not None:
        checks.integer("keep", keep, 1)
        _require_one_metric(plans)
    chunk = options.pop("particle_chunk", None)
    folder = None if out is None else Path(out)
    file = None if folder is None else folder / CHECKPOINT
    found = None
    if file is not None and folder is not None:
        atomic.make_folder(folder)
        if file.exists():
            if not resume:
                raise ValueError(f"{folder} holds a sweep already; resume it, or choose another")
            found = state.read(file, [(p.name, p.fingerprint) for p in plans], places)
    if found is not None and not found["active"] and len(found["rows"]) == len(plans):
        return Results([restored(found["rows"][n]) for n in sorted(found["rows"])])
    if places is None:
        places = len(plans) if found is None else found["at_once"]
    check_configurations(base, plans)
    _seed_everything(seed)
    sweep = Sweep(base, plans, places, folder, keep, chunk, options)
    if found is not None and file is not None:
        state.restore(sweep, found, file)

    def save() -> None:
        assert file is not None and folder is not None
        state.save(sweep, file)
        if sweep.rows:
            sweep.results().write(folder)

    with Bars(progress) as bars:
        sweep.run(bars, None if file is None else save, save_every)
    return sweep.results()


def _require_one_metric(plans: Sequence[Planned]) -> None:
    metrics = {(p.arguments.metric, p.arguments.greater): p.name for p in plans}
    if len(metrics) > 1:
        shown = {name: metric for (metric, _), name in metrics.items()}
        raise ValueError(f"keep compares runs by one metric; these have others: {shown}")


def _seed_everything(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
