"""The state that a killed run continues from, in one file that is replaced as a whole."""

from __future__ import annotations

import math
import random
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from multilora import atomic
from multilora.app.settings import Settings, differences
from multilora.app.steps import Training
from multilora.app.validation import Best, trained
from multilora.model import ParticleModel


class RunState:
    """The state of a run that is under way.

    Attributes:
        step: How many steps are done.
        step_ms: The time of each of them in milliseconds.
        history: The statistics of some of them, in order, each with the key "step".
        best: What the validation examples have said so far.
    """

    def __init__(self, file: Path, training: Training):
        self.file, self.training = file, training
        self.parts: dict[str, Any] = {
            "method": training.method,
            "optimizer": training.optimizer,
            "schedule": training.schedule,
        }
        self.step = 0
        self.step_ms: list[float] = []
        self.history: list[dict[str, float]] = []
        self.best = Best()

    def save(self) -> None:
        numpy_state: Any = np.random.get_state()
        kind, keys, *rest = numpy_state
        state = {name: part.state_dict() for name, part in self.parts.items()}
        state |= {
            "settings": self.training.settings.flat(),
            "step": self.step,
            "step_ms": self.step_ms,
            "history": self.history,
            "best": self.best.state_dict(),
            "parameters": {name: p.detach() for name, p in trained(self.training.model).items()},
            "base": _fingerprint(self.training.model),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            "numpy_rng": (kind, keys.tolist(), *rest),
            "python_rng": random.getstate(),
        }
        atomic.write_file(self.file, lambda stream: torch.save(state, stream))

    def load(self) -> None:
        """Go back to the saved state, if there is one.

        Raises:
            ValueError: The file, which the message names, is damaged or of another run. Nothing has
                been changed then.
        """
        if not self.file.is_file():
            return
        state = read_state(self.file)
        self._check(state)
        try:
            for name, part in self.parts.items():
                what = f"state of the {name}"
                part.load_state_dict(state[name])
            what = "random state"
            torch.set_rng_state(state["rng"])
            if torch.cuda.is_available():
                torch.cuda.set_rng_state_all(state["cuda_rng"])
            np.random.set_state(state["numpy_rng"])
            random.setstate(state["python_rng"])
        except Exception as error:
            raise ValueError(f"{self.file}: the {what} does not fit: {error!r}") from error
        Best(parameters=state["parameters"]).use(self.training.model)
        self.step, self.step_ms = state["step"], state["step_ms"]
        # Older versions had no validation, and no history or one with other names.
        self.history = [shown(row) for row in state.get("history", [])]
        self.best = Best(**state.get("best", {}))

    def _check(self, state: dict[str, Any]) -> None:
        """Raise ValueError if `state` is not of this run."""
        keys = "settings step step_ms parameters base rng cuda_rng numpy_rng python_rng".split()
        missing = [key for key in [*keys, *self.parts] if key not in state]
        if missing:
            raise ValueError(
                f"{self.file} lacks {missing}: another version of multilora, or none, wrote it"
            )
        try:
            theirs = Settings.of_file(state["settings"])
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{self.file} is damaged: its settings: {error}") from error
        different = differences(theirs, self.training.settings)
        if different:
            raise ValueError(
                f"{self.file} is of a run of other settings (there, here): {different}"
            )
        check_base(self.file, state, self.training.model)
        step, steps = state["step"], self.training.settings.steps
        if type(step) is not int or not 1 <= step <= steps or len(state["step_ms"]) != step:
            raise ValueError(
                f"{self.file} is damaged: it is of step {step!r} of {steps}, and has "
                f"{len(state['step_ms'])} times of steps"
            )
        if not _is_history(state.get("history", [])):
            raise ValueError(f"{self.file} is damaged: its history is not a list of numbers")
        own_parameters, optimizer = trained(self.training.model), self.training.optimizer
        self._check_layout(state["parameters"], own_parameters, "parameters")
        self._check_best(state.get("best", Best().state_dict()), step, own_parameters)
        self._check_layout(state["method"], self.training.method.state_dict(), "method")
        tensors = [p for group in optimizer.param_groups for p in group["params"]]
        own = {id(p) for p in self.training.method.parameters()}
        # AdamW has two means for each parameter that gets gradients; "step" is a number.
        means = {
            i: {"step": None, "exp_avg": p, "exp_avg_sq": p}
            for i, p in enumerate(tensors)
            if self.training.method.trains_particles or id(p) in own
        }
        keeps = isinstance(optimizer, torch.optim.AdamW)
        expected = {"state": means if keeps else {}, "param_groups": None}
        self._check_layout(state["optimizer"], expected, "optimizer")

    def _check_best(self, best: Any, done: int, parameters: dict[str, Tensor]) -> None:
        self._check_layout(best, dict.fromkeys(Best().state_dict()), "best")
        step, nll, waiting = numbers = best["step"], best["nll"], best["waiting"]
        right = [type(n) for n in numbers] == [int, float, int]
        if not right or not 0 <= step <= step + waiting <= done or math.isnan(nll):
            raise ValueError(
                f"{self.file} is damaged: its best step, NLL and measurements since then are "
                f"{numbers}, after {done} steps"
            )
        kept = step > 0 and self.training.settings.select == "best"
        if kept or best["parameters"] is not None:
            self._check_layout(best["parameters"], parameters, "best.parameters")

    def _check_layout(self, there: Any, here: Any, what: str) -> None:
        """Raise ValueError if dictionaries differ in keys or tensors in shape, at any depth."""
        if isinstance(here, dict):
            keys = list(there) if isinstance(there, dict) else type(there).__name__
            if not isinstance(there, dict) or set(keys) != set(here):
                raise ValueError(f"{self.file}: {what} has {keys}, this run {list(here)}")
            for key, value in here.items():
                self._check_layout(there[key], value, f"{what}.{key}")
        elif isinstance(here, Tensor):
            shape = tuple(there.shape) if isinstance(there, Tensor) else type(there).__name__
            if shape != tuple(here.shape):
                raise ValueError(
                    f"{self.file}: {what} has shape {shape}, this run {tuple(here.shape)}"
                )


def shown(stats: dict[str, float]) -> dict[str, float]:
    """A method's statistics as a run shows them: the loss is the particles' mean cross-entropy, and
    the objective is what is minimised where that is another number."""
    if "nll" not in stats:
        return stats
    others = {name: value for name, value in stats.items() if name not in ("loss", "nll")}
    same = stats["loss"] == stats["nll"]
    return {"loss": stats["nll"], **others, **({} if same else {"objective": stats["loss"]})}


def _is_history(history: Any) -> bool:
    return isinstance(history, list) and all(
        isinstance(row, dict)
        and "step" in row
        and all(type(k) is str and type(v) in (int, float) for k, v in row.items())
        for row in history
    )


def read_state(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing")
    try:
        with open(file, "rb") as stream:
            archive = zipfile.ZipFile(stream)
            # torch.save compresses nothing, so the contents are no larger than the file.
            whole = sum(entry.file_size for entry in archive.infolist())
            if whole > file.stat().st_size:
                raise ValueError(f"it unfolds to {whole} bytes")
            # torch.save writes checksums, but torch.load ignores them.
            broken = archive.testzip()
            if broken is not None:
                raise ValueError(f"the checksum of {broken} is wrong")
            stream.seek(0)
            state = torch.load(stream, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    if not isinstance(state, dict):
        raise ValueError(f"{file} holds a {type(state).__name__} and not the state of a run")
    return state


def check_base(file: Path, state: dict[str, Any], model: ParticleModel) -> None:
    here = _fingerprint(model)
    if state.get("base") != here:
        raise ValueError(
            f"{file} was trained over another base model: sums of its frozen weights are "
            f"{state.get('base')}, here {here}"
        )


def _fingerprint(model: ParticleModel) -> list[float]:
    """Two sums over the frozen weights, which tell base models apart."""
    frozen = [p.detach().double() for p in model.parameters() if not p.requires_grad]
    sums = (sum(p.sum().item() for p in frozen), sum(p.abs().sum().item() for p in frozen))
    return [float(f"{s:.9g}") for s in sums]
