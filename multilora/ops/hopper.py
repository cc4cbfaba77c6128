"""The K-particle LoRA linear: on Hopper one kernel for each of its large products.

y = [x | S]·[W | sB]ᵀ and dX = [dY | dS]·[W ; A] are single products with the adapters' part as a
last step (csrc/cuda/lora_gemm.cu). The thin ones, S = x Aᵀ, dS = s·dY·B, dA = dSᵀ·x and
dB = s·dYᵀ·S, are the passes of the Triton backend where that can run on the device
(`passes_of`): a pass reads x or dY once for all that it gives. Elsewhere they are PyTorch's, which
read x twice more and dY twice more. `multilora info` says which.

float32 and float64, chips other than compute capability 9.0, widths that are not multiples of 8
(the kernel's copies need rows of a multiple of 16 bytes) and an input that all particles share
leave the GEMM to the vendor's library: there, where x needs no gradient, and without a weight, the
reference runs.

Dims: K particles, T rows, r rank, and r filled to a multiple of 8 in what the kernel copies.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from multilora import _C_cuda
from multilora.ops import reference
from multilora.ops.native import DTYPES, stream


def lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """x (K or 1, T, d_in) -> y (K, T, d_out) and S = x Aᵀ (K, T, r)."""
    if not _is_ours(x, weight, lora_A):
        return reference.lora_linear(x, weight, lora_A, lora_B, bias, scaling)
    rank = lora_A.shape[1]
    x = _aligned(x)
    shrunk = _shrink(x, lora_A, lora_B)
    y = x.new_empty(x.shape[0], x.shape[1], weight.shape[0])
    _gemm(y, x, weight, shrunk, _expander(lora_B, 2, scaling, x.dtype), bias, w_depth_first=False)
    return y, shrunk[..., :rank].contiguous()


def lora_linear_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    shrunk: Tensor,
    scaling: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """grad (K, T, d_out) -> dx (as x), dA (K, r, d_in), dB (K, d_out, r), or empty."""
    needs_x, needs_A, needs_B = needs
    if not (needs_x and weight is not None and _is_ours(x, weight, lora_A)):
        return reference.lora_linear_backward(
            grad, x, weight, lora_A, lora_B, shrunk, scaling, needs
        )
    x, grad = _aligned(x), _aligned(grad)
    thin = _pytorchs if passes_of(x.device.type) is None else _passes
    d_shrunk, dA, dB = thin(grad, x, lora_A, lora_B, shrunk, scaling, needs_A, needs_B)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    _gemm(dx, grad, weight, d_shrunk, _expander(lora_A, 1, 1.0, x.dtype), None, w_depth_first=True)
    return dx, dA, dB


def passes_of(device: str) -> ModuleType | None:
    """The Triton backend's linear, which has the thin passes, where Triton runs on this kind of
    device; else None."""
    from multilora.ops import dispatch

    if dispatch.missing_reason("triton") is not None or not dispatch._runs_on("triton", device):
        return None
    return importlib.import_module("multilora.ops.triton.linear")


def _shrink(x: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
    """S = x Aᵀ (K, T, filled r)."""
    lora_A = _filled(lora_A, 1)
    passes = passes_of(x.device.type)
    if passes is None:
        return torch.bmm(x, lora_A.to(x.dtype).mT)
    return passes.shrink(x, lora_A, _filled(lora_B, 2))


def _pytorchs(
    grad: Tensor,
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    shrunk: Tensor,
    scaling: float,
    needs_A: bool,
    needs_B: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> dS (K, T, filled r), dA (K, r, d_in), dB (K, d_out, r), each by a product of its own."""
    dA, dB = lora_A.new_empty(0), lora_B.new_empty(0)
    d_shrunk = torch.bmm(grad, _expander(lora_B, 2, scaling, x.dtype))
    if needs_A:
        dA = torch.bmm(d_shrunk[..., : lora_A.shape[1]].mT, x).to(lora_A.dtype)
    if needs_B:
        dB = torch.bmm(grad.mT, shrunk).mul_(scaling).to(lora_B.dtype)
    return d_shrunk, dA, dB


def _passes(
    grad: Tensor,
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    shrunk: Tensor,
    scaling: float,
    needs_A: bool,
    needs_B: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same by the Triton backend's passes: one over dY and one over x."""
    rank = lora_A.shape[1]
    factors = (_filled(lora_A, 1), _filled(lora_B, 2), _filled(shrunk, 2))
    d_shrunk, dA, dB = passes_of(x.device.type).thin_gradients(
        grad, x, *factors, scaling, [True, needs_A, needs_B]
    )
    if needs_A:
        dA = dA[:, :rank].contiguous()
    if needs_B:
        dB = dB[..., :rank].contiguous()
    return d_shrunk, dA, dB


def _is_ours(x: Tensor, weight: Tensor, lora_A: Tensor) -> bool:
    """Whether the kernel computes this."""
    return (
        x.dtype in (torch.float16, torch.bfloat16)
        and x.shape[0] == lora_A.shape[0]
        and weight.shape[0] % 8 == weight.shape[1] % 8 == 0
        and 0 not in (*x.shape, *weight.shape)
        and _processors(x.device) > 0
    )


@functools.cache
def _processors(device: torch.device) -> int:
    """How many blocks of the kernel run at a time; none on chips that are not its own."""
    if device.type != "cuda":
        # The tests: two blocks are enough to have tiles divided, and more than one for each.
        return 2
    if torch.cuda.get_device_capability(device) != (9, 0):
        return 0
    return torch.cuda.get_device_properties(device).multi_processor_count


def _filled(factor: Tensor, axis: int) -> Tensor:
    """factor, its rank, at `axis`, filled with zeros to a multiple of 8.

    The kernel's copies need rows of a multiple of 16 bytes. What is computed from a filled factor
    (S, dS) is filled likewise.
    """
    left = -factor.shape[axis] % 8
    if left == 0:
        return factor
    # From the last axis on: before and behind.
    return F.pad(factor, (0, 0) * (factor.ndim - 1 - axis) + (0, left))


def _expander(factor: Tensor, axis: int, scale: float, dtype: torch.dtype) -> Tensor:
    """scale · factor, rounded once, to `dtype`, filled and contiguous."""
    factor = _filled(factor, axis)
    if scale == 1.0:
        return factor.to(dtype).contiguous()
    return torch.mul(
        factor, scale, out=torch.empty(factor.shape, dtype=dtype, device=factor.device)
    )


def _gemm(
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    shrunk: Tensor,
    expander: Tensor,
    bias: Tensor | None,
    w_depth_first: bool,
) -> None:
    """y (K, T, cols) from x (K, T, depth), weight, S (K, T, r) and the expander."""
    particles, rows, depth = x.shape
    cols, rank = y.shape[2], shrunk.shape[2]
    processors = _processors(x.device)
    x, weight = _aligned(x), _aligned(weight)
    shrunk, expander = _aligned(shrunk), _aligned(expander)
    bias = None if bias is None else _aligned(bias)
    _C_cuda.lora_gemm(
        DTYPES[x.dtype],
        w_depth_first,
        _tile_cols(particles, rows, cols, processors),
        processors,
        x.data_ptr(),
        weight.data_ptr(),
        shrunk.data_ptr(),
        expander.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        y.data_ptr(),
        particles,
        rows,
        depth,
        cols,
        rank,
        *stream(x),
    )


def _aligned(t: Tensor) -> Tensor:
    """t, contiguous and at a multiple of 16 bytes, as the kernel's copies need it."""
    t = t.contiguous()
    return t if t.data_ptr() % 16 == 0 else t.clone()


def _tile_cols(particles: int, rows: int, cols: int, processors: int) -> int:
    """The width of the kernel's tiles: 256, or 128 where that leaves fewer processors idle.

    A narrow tile reads more of x for each product: taken as a quarter slower, unmeasured.
    """

    def time(width: int) -> int:
        tiles = particles * -(-rows // 128) * -(-cols // width)
        return -(-tiles // processors) * width

    return 128 if 1.25 * time(128) < time(256) else 256
