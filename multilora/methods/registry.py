"""The methods by name, for everything that lists or chooses them: the one place that knows all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from multilora import checks
from multilora.losses import Loss
from multilora.methods.base import Method
from multilora.methods.dverge import DVERGE
from multilora.methods.ensemble import Ensemble
from multilora.methods.ibdr import IBDR
from multilora.methods.mutual import MutualLearning
from multilora.methods.sam import SAM
from multilora.methods.sgld import SGLD
from multilora.methods.svgd import SVGD
from multilora.methods.variational import BLoB, Variational


@dataclass(frozen=True)
class Entry:
    """A method as a command offers it.

    Attributes:
        make: make(model, **keywords) -> the method. Whoever calls it gives it seed, num_data (the
            number of training examples), total_steps, lr, and mean and std (of the normalisation
            of images) where it has such keywords.
        particles: K by default.
        summary: one line about it, for a list of methods.
        search: the keywords worth tuning: (low, high) on a logarithmic scale, or a list of choices.
        optimizer: "adamw", or "sgd", plain and without weight decay.
        posthoc: what makes K particles, or K masks, of the one that is trained: "mc_dropout",
            "laplace" or "tfb". None where all K are trained.
        lora_dropout: of the adapters.
        split_batch: whether each particle trains on its own part of the batch.
        batch: batch(method, x, y) -> inputs and targets of each particle (K, B, ...), made of a
            batch. None where all particles see the batch itself.
    """

    make: Callable[..., Method]
    particles: int
    summary: str
    search: Mapping[str, tuple[float, float] | list[Any]] = field(default_factory=dict)
    optimizer: str = "adamw"
    posthoc: str | None = None
    lora_dropout: float = 0.0
    split_batch: bool = False
    batch: Callable[..., tuple[Any, Any]] | None = None

    @property
    def most_particles(self) -> int | None:
        """The largest K; None where there is no limit."""
        return 1 if self.particles == 1 else None

    def trained(self, particles: int) -> int:
        """How many particles are trained for a result of K."""
        return 1 if self.posthoc else particles

    def saved(self, particles: int) -> int:
        """How many particles are saved for a result of K: masks are drawn in each evaluation."""
        return 1 if self.posthoc == "mc_dropout" else particles


def _maximum_a_posteriori(
    model: Any,
    *,
    num_data: int,
    prior_std: float = 1.0,
    loss: str | Loss = "particle",
    particle_chunk: int | None = None,
    nonfinite: str = "raise",
) -> Method:
    """An ensemble under the prior N(0, τ²) of every number."""
    num_data = checks.integer("num_data", num_data, 1)
    prior_std = checks.number("prior_std", prior_std, 0, open_low=True)
    return Ensemble(
        model,
        prior_precision=1 / num_data / prior_std / prior_std,
        loss=loss,
        particle_chunk=particle_chunk,
        nonfinite=nonfinite,
    )


_VARIATIONAL = {"kl_weight": (1e-3, 1.0), "sigma": (1e-4, 1e-1), "prior_std": (1e-2, 1.0)}

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
    "dverge": Entry(
        DVERGE,
        4,
        "teaches each particle the labels of images that fool another, so that attacks transfer "
        "less; for images, and by default a step takes eleven forwards more",
        search={"epsilon": (1e-2, 0.2)},
        batch=DVERGE.batch,
    ),
    "ibdr": Entry(
        IBDR,
        4,
        "pushes the particles' predictions apart and descends from a worse place nearby; a step "
        "runs the model twice",
        search={"alpha": (1e-3, 1.0), "rho": (3e-3, 0.3), "sigma": (1e-4, 1e-1)},
    ),
    "mutual": Entry(
        MutualLearning,
        4,
        "particles learn from each other's predictions; late in training, their weights and "
        "features are pushed apart",
        search={"alpha": (1e-1, 1e3), "beta": (1e-1, 1e3), "temperature": (1.0, 4.0)},
    ),
    "map": Entry(
        _maximum_a_posteriori,
        4,
        "an ensemble under a Gaussian prior of the weights",
        search={"prior_std": (1e-1, 10.0)},
    ),
    "sam": Entry(
        SAM,
        4,
        "an ensemble that descends from the worst place nearby; a step runs the model twice",
        search={"rho": (3e-3, 0.3)},
    ),
    "sgld": Entry(
        SGLD,
        4,
        "SGD with noise, whose K chains sample the posterior; needs a larger --lr",
        search={"temperature": (1e-3, 1.0), "prior_std": (1e-2, 1.0)},
        optimizer="sgd",
    ),
    "bbb": Entry(
        Variational,
        10,
        "learns one Gaussian of the weights, and draws the particles from it",
        search=_VARIATIONAL,
        split_batch=True,
    ),
    "blob": Entry(
        BLoB,
        10,
        "bbb with noise in one factor of the adapters only",
        search=_VARIATIONAL,
        split_batch=True,
    ),
    "sa_bnn": Entry(
        partial(Variational, rho=0.05),
        10,
        "bbb whose draws descend from a worse place nearby; a step runs the model twice",
        search=_VARIATIONAL | {"rho": (3e-3, 0.3)},
        split_batch=True,
    ),
    "laplace": Entry(
        Ensemble,
        10,
        "one adapter is trained; then a Gaussian of the loss's curvature around it, K draws of it",
        posthoc="laplace",
    ),
    "tfb": Entry(
        Ensemble,
        10,
        "one adapter is trained; then the largest noise on it that training examples tolerate",
        search={"tolerance": (1e-3, 0.3)},
        posthoc="tfb",
    ),
}
