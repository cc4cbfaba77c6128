"""The operators as C++ kernels for the CPU: one function an operator, under the operator's name.

`lora_linear` and `lora_add_` are the reference's: their products are the vendor library's, which
nothing here beats.
"""

from multilora.ops.cpu.geometry import (
    lora_gram,
    lora_gram_backward,
    pairwise_frobenius,
    svgd_update,
)
from multilora.ops.cpu.volume import (
    gram_volume,
    gram_volume_backward,
    particle_loss,
    particle_loss_backward,
)
from multilora.ops.reference import lora_add_, lora_linear, lora_linear_backward

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
