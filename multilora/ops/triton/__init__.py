"""The operators as Triton kernels: one function an operator, under the operator's name."""

from multilora.ops.triton.geometry import (
    lora_gram,
    lora_gram_backward,
    pairwise_frobenius,
    svgd_update,
)
from multilora.ops.triton.lora_linear import lora_add_, lora_linear, lora_linear_backward
from multilora.ops.triton.proven import proven_backends
from multilora.ops.triton.volume import (
    gram_volume,
    gram_volume_backward,
    particle_loss,
    particle_loss_backward,
)

__all__ = [
    "gram_volume",
    "gram_volume_backward",
    "lora_add_",
    "lora_gram",
    "lora_gram_backward",
    "lora_linear",
    "lora_linear_backward",
    "pairwise_frobenius",
    "particle_loss",
    "particle_loss_backward",
    "proven_backends",
    "svgd_update",
]
