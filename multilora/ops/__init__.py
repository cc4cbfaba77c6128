"""The operators. The only place that knows torch.library; imports torch and nothing else."""

from multilora.ops.dispatch import BackendUnavailableError, use_backend
from multilora.ops.geometry import lora_gram, pairwise_frobenius
from multilora.ops.lora_add import lora_add
from multilora.ops.lora_linear import lora_linear
from multilora.ops.svgd import svgd_update
from multilora.ops.volume import gram_volume, particle_loss

__all__ = [
    "BackendUnavailableError",
    "gram_volume",
    "lora_add",
    "lora_gram",
    "lora_linear",
    "pairwise_frobenius",
    "particle_loss",
    "svgd_update",
    "use_backend",
]
