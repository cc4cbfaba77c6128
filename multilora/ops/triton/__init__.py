"""The Triton backend: all nine functions of a backend."""

import sys
from typing import Any

import triton
from triton.runtime.jit import JITFunction

from multilora.ops.common import LOGITS_OF, too_many_particles
from multilora.ops.triton import frobenius
from multilora.ops.triton.frobenius import factor_gradients, traces
from multilora.ops.triton.grouped import grouped_linear, grouped_linear_backward
from multilora.ops.triton.linear import lora_add_, lora_linear, lora_linear_backward
from multilora.ops.triton.loss import MAX_PARTICLES, volume, volume_backward

__all__ = [
    "LEAVES",
    "factor_gradients",
    "grouped_linear",
    "grouped_linear_backward",
    "lora_add_",
    "lora_linear",
    "lora_linear_backward",
    "refuses",
    "traces",
    "volume",
    "volume_backward",
]

LEAVES: dict[str, str] = {}


def refuses(op: str, args: tuple[Any, ...]) -> str | None:
    """Why the kernels do not take these arguments, or None."""
    if op in LOGITS_OF:
        return too_many_particles(op, args, MAX_PARTICLES)
    if op.startswith(("lora_linear", "lora_add", "grouped_linear")):
        return None
    # The geometry's operators end in lora_A, lora_B and scaling.
    return frobenius.refuses(args[-3])


if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 8):
    # There a kernel's key in Triton's cache depends on which of the functions that it calls had
    # theirs before it. So all get it here, in one order: what one process compiled, another finds.
    for _module in [m for n, m in sys.modules.items() if n.startswith(f"{__name__}.")]:
        for _function in list(vars(_module).values()):
            if isinstance(_function, JITFunction):
                _function.cache_key  # noqa: B018
