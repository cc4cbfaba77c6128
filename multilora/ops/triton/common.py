"""What all Triton kernels share: the chip, the launch, products at full precision."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Whether the kernels run in Triton's interpreter (TRITON_INTERPRET=1): on the CPU, for tests.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@dataclass(frozen=True)
class Chip:
    """What launch configurations depend on: compute capability, as 10·major + minor, and SMs."""

    capability: int
    processors: int

    @property
    def is_hopper_sized(self) -> bool:
        """Whether a block can have more than 200 KB of shared memory: data-centre chips."""
        return 90 <= self.capability < 120


#: The chips that `multilora kernels` compiles for, and the one that the interpreter plays: with
#: two processors, so that small tests run persistent loops more than once.
A100, H200 = Chip(80, 108), Chip(90, 132)
_PLAYED = Chip(90, 2)

_launcher: Callable[..., Any] | None = None
_compiled_for: Chip | None = None


def compile_only(chip: Chip | None, launcher: Callable[..., Any] | None) -> None:
    """Hand every launch to `launcher(kernel, grid, args, meta)` instead of running it.

    The tensors may be meta tensors, and chip() answers `chip`. None and None: run again.
    """
    global _launcher, _compiled_for
    _launcher, _compiled_for = launcher, chip


def chip(device: torch.device) -> Chip:
    """The chip that tensors on `device` live on."""
    if _compiled_for is not None:
        return _compiled_for
    if INTERPRETED.value:
        return _PLAYED
    return _properties(device.index if device.index is not None else torch.cuda.current_device())


@functools.cache
def _properties(index: int) -> Chip:
    properties = torch.cuda.get_device_properties(index)
    return Chip(10 * properties.major + properties.minor, properties.multi_processor_count)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
    """kernel[grid](*args, **meta) on the device of the first tensor; an empty grid does nothing."""
    if 0 in grid:
        return
    # The default of Triton 3.6; later versions ask for a decision.
    meta["enable_fp_fusion"] = True
    if _launcher is not None:
        _launcher(kernel, grid, args, meta)
        return
    device = _device(args)
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        # Triton launches on the current device, whatever device the tensors are on.
        with torch.cuda.device(device):
            kernel[grid](*args, **meta)
    else:
        kernel[grid](*args, **meta)


def _device(args: tuple[Any, ...]) -> torch.device:
    for arg in args:
        if isinstance(arg, Tensor):
            return arg.device
        if isinstance(getattr(arg, "base", None), Tensor):
            return arg.base.device
    raise AssertionError("a launch without a tensor")


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def precision(dtype: torch.dtype) -> str:
    """The `PRECISION` of products of `dtype`: TF32 for float32 only where PyTorch takes it too."""
    chosen = torch.backends.cuda.matmul.fp32_precision
    if chosen == "none":
        chosen = torch.backends.fp32_precision
    return "tf32" if dtype == torch.float32 and chosen == "tf32" else "ieee"


@triton.constexpr_function
def accumulator_of(dtype):
    """The Triton dtype that products of `dtype` are summed in."""
    return tl.float64 if dtype == tl.float64 else tl.float32


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a·b, accumulated in acc's dtype."""
    if INTERPRETED and a.dtype == tl.bfloat16:
        # The interpreter multiplies the bits of bfloat16 as integers. In float32 the products are
        # exact, as they are in a tensor core.
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)
