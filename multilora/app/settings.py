"""Everything that decides the numbers of a run, and the file that holds it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from multilora import checks
from multilora.app import recipes
from multilora.app.tasks import commonsense, names, vtab

METHODS = ("ibdr", "svgd", "ensemble", "single")
#: Of a run's folder.
SETTINGS = "run.json"
#: What run.json may have, in bytes: it is a kilobyte.
_MAX_SETTINGS = 2**20
#: The integers of Settings, which begin at 1 (the seed at 0), and where they end.
INTEGERS = {
    "particles": 2**16,
    "rank": 2**16,
    "seed": 2**32 - 1,
    "steps": 10**9,
    "batch_size": 2**20,
    "shots": 10**6,
    "max_length": 2**24,
}


@dataclass(frozen=True)
class Settings:
    """Everything that decides a run's numbers."""

    task: str = "digits"
    method: str = "ibdr"
    particles: int = 4
    rank: int = 8
    seed: int = 0
    steps: int = 200
    batch_size: int = 16
    lr: float = 3e-3
    weight_decay: float = 0.01
    shots: int = 20
    model: str | None = None
    data: str | None = None
    pretrained: bool = True
    targets: tuple[str, ...] | None = None
    model_args: tuple[tuple[str, Any], ...] = ()
    lora_alpha: float | None = None  # the rank
    method_args: tuple[tuple[str, Any], ...] = ()
    augment: bool = False
    split: str = "test"
    classes: str = "answers"
    max_length: int = 512

    def __post_init__(self):
        checks.choice("method", self.method, METHODS)
        checks.choice("split", self.split, vtab.SPLITS)
        checks.choice("classes", self.classes, commonsense.CLASSES)
        for name, high in INTEGERS.items():
            checks.integer(name, getattr(self, name), 0 if name == "seed" else 1, high)
        checks.number("lr", self.lr, 0, 1e3, open_low=True)
        checks.number("weight_decay", self.weight_decay, 0, 1e3)
        if self.lora_alpha is not None:
            checks.number("lora_alpha", self.lora_alpha, 0, 1e6, open_low=True)
        for name in ("pretrained", "augment"):
            checks.flag(name, getattr(self, name))
        self._check_texts()
        if (self.model is None) != (self.data is None):
            raise ValueError("a task of your own needs both --model and --data")
        if self.task not in names():
            raise ValueError(f"the tasks are {', '.join(names())}; got {self.task!r}")
        if self.task == "digits" and self.model is not None:
            object.__setattr__(self, "task", "images")
        if self.task != "digits" and self.model is None:
            raise ValueError(f"the task {self.task!r} needs --model and --data")
        self._check_options()
        if self.method == "single" and self.particles != 1:
            raise ValueError(f"a single model has 1 particle; got {self.particles}")

    @property
    def particle_chunk(self) -> int | None:
        """How many particles run at a time; None: all."""
        return dict(self.method_args).get("particle_chunk")

    def _check_texts(self) -> None:
        for name in ("model", "data"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, str) and value):
                raise ValueError(f"{name} must be a name or a folder; got {value!r}")
        targets = self.targets
        if isinstance(targets, list):
            object.__setattr__(self, "targets", targets := tuple(targets))
        if targets is not None and not (
            isinstance(targets, tuple)
            and targets
            and all(isinstance(t, str) and t for t in targets)
        ):
            raise ValueError(f"targets must be names of layers; got {targets!r}")
        for name in ("model_args", "method_args"):
            pairs = getattr(self, name)
            if not isinstance(pairs, (tuple, list)) or not all(map(_is_named, pairs)):
                raise ValueError(f"{name} must be pairs of a name and a value; got {pairs!r}")
            for key, value in pairs:
                try:
                    json.dumps(value, allow_nan=False)
                except (ValueError, TypeError) as error:
                    raise ValueError(f"{name}: {key} = {value!r}: {error}") from error

    def _check_options(self) -> None:
        """An option that the task would ignore is an error."""
        for option, tasks in (
            ("augment", ("images", "vtab")),
            ("split", ("vtab", *commonsense.names())),
            ("classes", commonsense.names()),
            ("max_length", commonsense.names()),
        ):
            value = getattr(self, option)
            if self.task not in tasks and value != getattr(Settings, option):
                raise ValueError(
                    f"{option} = {value!r} is for the tasks {', '.join(tasks)}; "
                    f"got the task {self.task!r}"
                )


def recommended(
    task: str = "digits", method: str = "ibdr", data: str | None = None, **given: Any
) -> Settings:
    """The settings of the task's recipe (recipes/*.json), with those given in place of its own.

    given: fields of Settings; method_args are merged by name.
    """
    recipe: dict[str, Any] = {"particles": {"svgd": 5, "single": 1}.get(method, 4)}
    if task == "vtab":
        if data is None:
            raise ValueError("the task 'vtab' needs --data, the folder of one of its data sets")
        vtab.num_classes(data)  # says what is wrong with the folder's name
        recipe = recipes.settings(recipes.read("vtab1k"), vtab.dataset_name(data), method)
    elif task in commonsense.names():
        recipe = recipes.settings(recipes.read("commonsense"), task, method)
    method_args = recipe.pop("method_args", {}) | dict(given.pop("method_args", ()))
    chosen = {"task": task, "method": method, "data": data} | recipe | given
    if chosen.get("targets"):
        chosen["targets"] = tuple(chosen["targets"])
    return Settings(**chosen, method_args=tuple(method_args.items()))


def differences(theirs: dict[str, Any], ours: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """{name: (theirs, ours)} of the settings that differ."""
    names = [*ours, *(name for name in theirs if name not in ours)]
    return {n: (theirs.get(n), ours.get(n)) for n in names if theirs.get(n) != ours.get(n)}


def read_settings(folder: Path) -> Settings:
    file = folder / SETTINGS
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: {folder} holds no run of `multilora train`")
    try:
        if file.stat().st_size > _MAX_SETTINGS:
            raise ValueError(f"it has {file.stat().st_size} bytes")
        values = json.loads(file.read_text())
        if not isinstance(values, dict):
            raise ValueError(f"it holds a {type(values).__name__}")
        for name in ("model_args", "method_args"):
            values[name] = tuple(map(tuple, values.get(name, ())))
        return Settings(**values)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{file} is damaged: {error!r}") from error


def _is_named(pair: Any) -> bool:
    return isinstance(pair, (tuple, list)) and len(pair) == 2 and isinstance(pair[0], str)
