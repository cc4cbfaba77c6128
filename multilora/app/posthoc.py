"""What makes K particles of the one that a run has trained, for the methods that need it.

The fields of each class are arguments of the run, which --method-args gives beside the method's.
They are checked before the training begins.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from multilora import checks, metrics, posthoc
from multilora.app.settings import Settings
from multilora.app.tasks import TASKS
from multilora.app.tasks.task import Task
from multilora.fold import map_tensors
from multilora.model import ParticleModel
from multilora.prediction import predict_loader


@dataclass(frozen=True)
class Tfb:
    """`posthoc.bayesianize`; the score is minus the NLL of examples that are not of the test set.

    These are the run's validation examples; where it has none, training examples.

    Attributes:
        tolerance: in nats.
        steps: of the bisection.
        anchors: the number of examples, drawn by the run's seed.
    """

    tolerance: float = 0.01
    steps: int = 12
    anchors: int = 256

    def __post_init__(self) -> None:
        checks.number("tolerance", self.tolerance, 0)
        checks.integer("steps", self.steps, 1, 1000)
        checks.integer("anchors", self.anchors, 1)

    def __call__(self, settings: Settings, model: ParticleModel, task: Task) -> ParticleModel:
        data: Any = task.train if task.validation is None else task.validation
        generator = torch.Generator().manual_seed(settings.seed)
        chosen = torch.randperm(len(data), generator=generator)[: self.anchors].tolist()
        # The same images in every evaluation, also where the data set augments them.
        anchors = list(_batches(Subset(data, chosen), task))

        def score(model: ParticleModel) -> float:
            chunk = settings.particle_chunk
            log_p, targets = predict_loader(model, anchors, chunk, forward=task.predict)
            return metrics.log_mean(log_p).gather(1, targets[:, None]).mean().item()

        posthoc.bayesianize(
            model, score, self.tolerance, settings.particles, self.steps, seed=settings.seed
        )
        return model


@dataclass(frozen=True)
class Laplace:
    """`posthoc.laplace` on all training examples.

    Attributes:
        subset: None is the last layer where the task has one head, and else all.
    """

    subset: str | None = None
    structure: str = "kron"
    prior_precision: str | float = "marglik"

    def __post_init__(self) -> None:
        posthoc.check_laplace(self.subset or "all", self.structure, self.prior_precision)
        if importlib.util.find_spec("laplace") is None:
            raise ModuleNotFoundError("No module named 'laplace'", name="laplace")

    def __call__(self, settings: Settings, model: ParticleModel, task: Task) -> ParticleModel:
        device = model.devices()[0]
        # The task's base holds the particle; the draws go over another one.
        base = TASKS[settings.task].make(settings.options, settings.seed, lambda line: None).base

        def forward(network: nn.Module, x: Any) -> Tensor:
            def as_particles(*args: Any, **kwargs: Any) -> Any:
                return map_tensors(lambda t: t[None], network(*args, **kwargs))

            return task.predict(as_particles, x)[0]  # type: ignore[arg-type]

        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            return posthoc.laplace(
                Path(folder) / "particle_0",
                base.to(device),
                _batches(task.train, task),
                settings.particles,
                subset=self.subset or ("last_layer" if isinstance(task.head, str) else "all"),
                structure=self.structure,
                prior_precision=self.prior_precision,
                forward=forward,
                seed=settings.seed,
            )


_KINDS: Mapping[str, type[Tfb] | type[Laplace]] = {"tfb": Tfb, "laplace": Laplace}


def arguments(kind: str | None) -> dict[str, Any]:
    """The arguments that Entry.posthoc of that name takes, with their defaults."""
    return {f.name: f.default for f in fields(_KINDS[kind])} if kind and kind in _KINDS else {}


def of(settings: Settings) -> Callable[[ParticleModel, Task], ParticleModel]:
    """The function that is called after the training; mostly it returns the model itself.

    Raises:
        ValueError: One of its arguments is out of range.
        ModuleNotFoundError: It needs a package that is not installed.
    """
    kind = settings.entry.posthoc
    if kind is None or kind not in _KINDS:
        return lambda model, task: model
    own = {name: v for name, v in settings.method_args if name in arguments(kind)}
    make = _KINDS[kind](**own)
    return lambda model, task: make(settings, model, task)


def _batches(data: Any, task: Task) -> DataLoader:
    # A loader draws a number when it starts: from a generator that nothing else uses.
    return DataLoader(
        data, task.evaluation_batch, collate_fn=task.collate, generator=torch.Generator()
    )
