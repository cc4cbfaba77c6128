"""The seven functions of a backend as Triton kernels."""

import sys

import triton
from triton.runtime.jit import JITFunction

from multilora.ops.triton.frobenius import factor_gradients, traces
from multilora.ops.triton.linear import lora_add_, lora_linear, lora_linear_backward
from multilora.ops.triton.loss import volume, volume_backward

__all__ = [
    "factor_gradients",
    "lora_add_",
    "lora_linear",
    "lora_linear_backward",
    "traces",
    "volume",
    "volume_backward",
]

if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 8):
    # There a kernel's key in Triton's cache depends on which of the functions that it calls had
    # theirs before it. So all get it here, in one order: what one process compiled, another finds.
    for _module in [m for n, m in sys.modules.items() if n.startswith(f"{__name__}.")]:
        for _function in list(vars(_module).values()):
            if isinstance(_function, JITFunction):
                _function.cache_key  # noqa: B018
