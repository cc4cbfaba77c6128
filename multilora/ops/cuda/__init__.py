"""The operators as CUDA C++ kernels: one function an operator, under the operator's name."""

from multilora.ops.cuda.geometry import (
    lora_gram,
    lora_gram_backward,
    pairwise_frobenius,
    svgd_update,
)
from multilora.ops.cuda.lora_linear import lora_linear, lora_linear_backward
from multilora.ops.cuda.volume import (
    gram_volume,
    gram_volume_backward,
    particle_loss,
    particle_loss_backward,
)
from multilora.ops.reference import lora_add_

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
    "svgd_update",
]
