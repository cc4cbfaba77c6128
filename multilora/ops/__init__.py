"""The operators. Only this package knows torch.library; importing it imports torch alone."""

from multilora.ops.dispatch import BackendUnavailableError, use_backend
from multilora.ops.frobenius import lora_gram, pairwise_frobenius, svgd_update
from multilora.ops.grouped import grouped_linear
from multilora.ops.lora import lora_add, lora_linear
from multilora.ops.volume import gram_volume, particle_loss

__all__ = [
    "BackendUnavailableError",
    "gram_volume",
    "grouped_linear",
    "lora_add",
    "lora_gram",
    "lora_linear",
    "pairwise_frobenius",
    "particle_loss",
    "svgd_update",
    "use_backend",
]
