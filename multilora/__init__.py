"""multilora: K interacting LoRA particles trained at once over one frozen model."""

from multilora import losses, metrics, posthoc, robustness, soups
from multilora._version import __version__
from multilora.attach import get_particle_model
from multilora.checkpoint import load_particle_model
from multilora.isolation import ParticleIsolationError
from multilora.losses import causal_targets
from multilora.many import Run, RunArguments, fit_many
from multilora.methods import (
    DVERGE,
    IBDR,
    SAM,
    SGLD,
    SVGD,
    BLoB,
    Ensemble,
    Independent,
    MutualLearning,
    Variational,
)
from multilora.model import ParticleModel
from multilora.ops import (
    BackendUnavailableError,
    gram_volume,
    lora_gram,
    lora_linear,
    pairwise_frobenius,
    particle_loss,
    use_backend,
)
from multilora.optim import clip_grad_norm_
from multilora.prediction import mc_dropout, predict

__all__ = [
    "DVERGE",
    "IBDR",
    "SAM",
    "SGLD",
    "SVGD",
    "BLoB",
    "BackendUnavailableError",
    "Ensemble",
    "Independent",
    "MutualLearning",
    "ParticleIsolationError",
    "ParticleModel",
    "Run",
    "RunArguments",
    "Variational",
    "__version__",
    "causal_targets",
    "clip_grad_norm_",
    "fit_many",
    "get_particle_model",
    "gram_volume",
    "load_particle_model",
    "lora_gram",
    "lora_linear",
    "losses",
    "mc_dropout",
    "metrics",
    "pairwise_frobenius",
    "particle_loss",
    "posthoc",
    "predict",
    "robustness",
    "soups",
    "use_backend",
]
