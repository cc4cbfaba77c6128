"""The operators as Triton kernels: one function an operator, under the operator's name."""

import sys

import triton
from triton.runtime.jit import JITFunction

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

if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 8):
    # There a kernel's key in Triton's cache depends on which of the functions that it calls had
    # theirs before it. So all get it here, in one order: what one process compiled, another finds.
    for _module in [m for n, m in sys.modules.items() if n.startswith(f"{__name__}.")]:
        for _function in list(vars(_module).values()):
            if isinstance(_function, JITFunction):
                _function.cache_key  # noqa: B018
