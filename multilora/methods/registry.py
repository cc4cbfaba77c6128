"""The methods by name, for everything that lists or chooses them: the one place that knows all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from multilora.methods.base import Method
from multilora.methods.ensemble import Ensemble
from multilora.methods.ibdr import IBDR
from multilora.methods.svgd import SVGD


@dataclass(frozen=True)
class Entry:
    """A method as a command offers it.

    Attributes:
        make: make(model, **keywords) -> the method. Whoever calls it gives it seed, num_data (the
            number of training examples), total_steps and lr where it has such keywords.
        particles: K by default.
        summary: one line about it, for a list of methods.
        search: the keywords worth tuning: (low, high) on a logarithmic scale, or a list of choices.
        optimizer: "adamw", or "sgd", plain and without weight decay.
        posthoc: what makes K particles, or K masks, of the one that is trained: "mc_dropout",
            "laplace" or "tfb". None where all K are trained.
        lora_dropout: of the adapters.
        split_batch: whether each particle trains on its own part of the batch.
    """

    make: Callable[..., Method]
    particles: int
    summary: str
    search: Mapping[str, tuple[float, float] | list[Any]] = field(default_factory=dict)
    optimizer: str = "adamw"
    posthoc: str | None = None
    lora_dropout: float = 0.0
    split_batch: bool = False

    @property
    def most_particles(self) -> int | None:
        """The largest K; None where there is no limit."""
        return 1 if self.particles == 1 else None

    def trained(self, particles: int) -> int:
        """How many particles are trained for a result of K."""
        return 1 if self.posthoc else particles


METHODS: dict[str, Entry] = {
    "single": Entry(Ensemble, 1, "one adapter, the baseline"),
    "ensemble": Entry(
        Ensemble, 4, "K adapters that do not interact; hard to beat in accuracy, so start with it"
    ),
    "mc_dropout": Entry(
        Ensemble,
        10,
        "one adapter with dropout, predicting with K dropout masks",
        posthoc="mc_dropout",
        lora_dropout=0.1,
    ),
    "svgd": Entry(
        SVGD,
        5,
        "pushes the particles' weights apart",
        search={"gamma": (1e-3, 1.0), "scope": ["layer", "global"]},
    ),
    "ibdr": Entry(
        IBDR,
        4,
        "pushes the particles' predictions apart and descends from a worse place nearby; a step "
        "runs the model twice",
        search={"alpha": (1e-3, 1.0), "rho": (3e-3, 0.3), "sigma": (1e-4, 1e-1)},
    ),
}
