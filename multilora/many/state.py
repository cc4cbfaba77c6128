"""The file that a killed sweep goes on from."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from multilora import atomic
from multilora.gradients import note_without, without_gradient
from multilora.many.sweep import Sweep
from multilora.many.table import restored, stored

_FORMAT = 2


def save(sweep: Sweep, file: Path) -> None:
    """Write everything that the sweep needs to go on, as a whole."""
    named = dict(sweep.model.named_parameters()) if sweep.active else {}
    trained = {name: p for name, p in named.items() if p.requires_grad}
    grads = {
        name: (p.grad.detach(), sorted(without_gradient(p.grad)))
        for name, p in trained.items()
        if p.grad is not None
    }
    state = {
        "format": _FORMAT,
        "runs": [(plan.name, plan.fingerprint) for plan in sweep.plans],
        "at_once": sweep.at_once,
        "history": sweep.history,
        "rows": {number: stored(row) for number, row in sweep.rows.items()},
        "parameters": {name: p.detach() for name, p in trained.items()},
        "gradients": grads,
        "optimizer": sweep.optimizer.state_dict() if sweep.active else {},
        "active": {k: active.state_dict() for k, active in sweep.active.items()},
        "rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy_rng": _plain(np.random.get_state()),
        "python_rng": random.getstate(),
    }
    atomic.write_file(file, lambda stream: torch.save(state, stream))


def read(file: Path, runs: list[tuple[str, str]], at_once: int | None) -> dict[str, Any]:
    """The state of a sweep of these runs, `at_once` of them in a pass; None fits any.

    Raises:
        ValueError: the file is damaged, or of other runs; the message names the first one.
    """
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        there, places = [tuple(run) for run in state["runs"]], state["at_once"]
        if state["format"] != _FORMAT:
            raise ValueError(f"it has format {state['format']!r}")
    except Exception as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    if there != runs:
        pairs = zip([*there, *[("none", "")] * len(runs)], runs)
        other = next(((a, b) for a, b in pairs if a != b), (("none", ""), ("none", "")))
        raise ValueError(
            f"{file} is of {len(there)} other runs: it has {other[0][0]!r} where there is "
            f"{other[1][0]!r} here, or with other settings; choose another folder"
        )
    if at_once not in (None, places):
        raise ValueError(f"{file} is of a sweep with at_once={places}; got {at_once}")
    return state


def restore(sweep: Sweep, state: dict[str, Any], file: Path) -> None:
    """Go on from a state, which `read` has returned for this sweep's runs.

    Raises:
        ValueError: a part of it does not fit; the message names `file`.
    """
    try:
        # The tensors have the sizes to which the runs before have made them grow.
        for particle, number in state["history"][len(sweep.history) :]:
            sweep.active.pop(particle, None)
            try:
                sweep.place(particle, number)
            except Exception as error:  # its dataset may have changed
                sweep.cannot_begin(number, error)
        for particle in list(sweep.active):
            if particle not in state["active"]:
                sweep.active.pop(particle)
        # Others could not begin again.
        sweep.rows |= {number: restored(row) for number, row in state["rows"].items()}
        named = dict(sweep.model.named_parameters())
        with torch.no_grad():
            for name, value in state["parameters"].items():
                named[name].copy_(value)
        for name, (grad, without) in state["gradients"].items():
            named[name].grad = grad.to(named[name])
            note_without(named[name].grad, frozenset(without))
        if sweep.active:
            sweep.optimizer.load_state_dict(state["optimizer"])
        for particle, active in sweep.active.items():
            active.load_state_dict(state["active"][particle])
    except Exception as error:
        raise ValueError(f"{file} does not fit these runs: {error!r}") from error
    torch.set_rng_state(state["rng"])
    if torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda_rng"])
    name, keys, *rest = state["numpy_rng"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    random.setstate(state["python_rng"])


def _plain(state: Any) -> tuple[Any, ...]:
    """NumPy's state without arrays, which torch.load would not read."""
    name, keys, *rest = state
    return (str(name), [int(key) for key in keys], *rest)
