"""What a killed run continues from, in one file that is replaced as a whole."""

from __future__ import annotations

import random
import zipfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from multilora import atomic
from multilora.app.settings import Settings, differences
from multilora.model import ParticleModel

#: Of a run's folder.
CHECKPOINT = "checkpoint.pt"


class RunState:
    """The state of a run that is under way.

    load() -> how many steps are done, and their times. Raises ValueError, naming the file, where it
    is damaged or of another run, before anything is changed.
    """

    def __init__(self, file: Path, settings: Settings, model, method, optimizer, schedule):
        self.file, self.settings, self.model = file, settings, model
        self.parts = {"method": method, "optimizer": optimizer, "schedule": schedule}

    def save(self, step: int, step_ms: list[float]) -> None:
        kind, keys, *rest = np.random.get_state()
        state = {name: part.state_dict() for name, part in self.parts.items()}
        state |= {
            "settings": asdict(self.settings),
            "step": step,
            "step_ms": step_ms,
            "parameters": {name: p.detach() for name, p in self._trained().items()},
            "base": _fingerprint(self.model),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            "numpy_rng": (kind, keys.tolist(), *rest),
            "python_rng": random.getstate(),
        }
        atomic.write_file(self.file, lambda stream: torch.save(state, stream))

    def load(self) -> tuple[int, list[float]]:
        if not self.file.is_file():
            return 0, []
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
        parameters = self._trained()
        with torch.no_grad():
            for name, value in state["parameters"].items():
                parameters[name].copy_(value)
        return state["step"], state["step_ms"]

    def _trained(self) -> dict[str, Tensor]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def _check(self, state: dict[str, Any]) -> None:
        """Raise ValueError where `state` is not of this run."""
        keys = "settings step step_ms parameters base rng cuda_rng numpy_rng python_rng".split()
        missing = [key for key in [*keys, *self.parts] if key not in state]
        if missing:
            raise ValueError(
                f"{self.file} lacks {missing}: another version of multilora, or none, wrote it"
            )
        different = differences(state["settings"], asdict(self.settings))
        if different:
            raise ValueError(
                f"{self.file} is of a run of other settings (there, here): {different}"
            )
        check_base(self.file, state, self.model)
        step, steps = state["step"], self.settings.steps
        if type(step) is not int or not 1 <= step <= steps or len(state["step_ms"]) != step:
            raise ValueError(
                f"{self.file} is damaged: it is of step {step!r} of {steps}, and has "
                f"{len(state['step_ms'])} times of steps"
            )
        trained, optimizer = self._trained(), self.parts["optimizer"]
        self._check_layout(state["parameters"], trained, "parameters")
        self._check_layout(state["method"], self.parts["method"].state_dict(), "method")
        tensors = [p for group in optimizer.param_groups for p in group["params"]]
        expected = {
            # AdamW's two means of every parameter; "step" is a number.
            i: {"step": None, "exp_avg": p, "exp_avg_sq": p}
            for i, p in enumerate(tensors)
        }
        expected = {"state": expected, "param_groups": None}
        self._check_layout(state["optimizer"], expected, "optimizer")

    def _check_layout(self, there: Any, here: Any, what: str) -> None:
        """Raise ValueError where dictionaries differ in keys or tensors in shape, at any depth."""
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


def read_state(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing")
    try:
        with open(file, "rb") as stream:
            archive = zipfile.ZipFile(stream)
            # torch.save compresses nothing, so that a file cannot unfold to more than its size.
            whole = sum(entry.file_size for entry in archive.infolist())
            if whole > file.stat().st_size:
                raise ValueError(f"it unfolds to {whole} bytes")
            # torch.save writes checksums, and torch.load does not look at them.
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
    """Two sums over the frozen weights, which another base model would not have."""
    frozen = [p.detach().double() for p in model.parameters() if not p.requires_grad]
    sums = (sum(p.sum().item() for p in frozen), sum(p.abs().sum().item() for p in frozen))
    return [float(f"{s:.9g}") for s in sums]
