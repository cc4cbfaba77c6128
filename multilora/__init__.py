"""multilora: K interacting LoRA particles trained at once over one frozen model."""

from multilora import metrics
from multilora._version import __version__
from multilora.checkpoint import load_particle_model
from multilora.isolation import ParticleIsolationError
from multilora.methods import IBDR, SVGD, Ensemble
from multilora.metrics import predict
from multilora.model import ParticleModel, get_particle_model
from multilora.ops import (
    BackendUnavailableError,
    gram_volume,
    lora_gram,
    lora_linear,
    pairwise_frobenius,
    particle_loss,
    use_backend,
)

__all__ = [
    "IBDR",
    "SVGD",
    "BackendUnavailableError",
    "Ensemble",
    "ParticleIsolationError",
    "ParticleModel",
    "__version__",
    "get_particle_model",
    "gram_volume",
    "load_particle_model",
    "lora_gram",
    "lora_linear",
    "metrics",
    "pairwise_frobenius",
    "particle_loss",
    "predict",
    "use_backend",
]
