"""The K-particle LoRA linear: on Hopper one kernel for each of its large products.

y = [x | S]·[W | sB]ᵀ and dX = [dY | dS]·[W ; A] are single products with the adapters' part as a
last step (csrc/cuda/lora_gemm.cu). The thin ones, S = x Aᵀ, dS = s·dY·B, dA = dSᵀ·x and
dB = s·dYᵀ·S, are the passes of the Triton backend where that can run on the device
(`passes_of`): a pass reads x or dY once for all that it gives. Elsewhere they are PyTorch's, which
read x twice more and dY twice more. Where x needs no gradient they are all of the backward.
`multilora info` says which runs.

`refuses` says what the kernel does not take.

Dims: K particles, T rows, r rank, and r filled to a multiple of 8 in what the kernel copies.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

import multilora._C_cuda as _C_cuda
from multilora.ops import dispatch
from multilora.ops.common import empty_gradients, empty_linear
from multilora.ops.native import stream, view


def lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """x (K or 1, T, d_in) -> y (K, T, d_out) and S = x Aᵀ (K, T, r)."""
    if 0 in (x.shape[1], *weight.shape):
        return empty_linear(x, weight, lora_A, bias)
    rank = lora_A.shape[1]
    x = _aligned(x)
    shrunk = _shrink(x, lora_A, lora_B)
    y = x.new_empty(x.shape[0], x.shape[1], weight.shape[0])
    _gemm(y, x, weight, shrunk, _expander(lora_B, 2, scaling, x.dtype), bias, w_depth_first=False)
    return y, shrunk[..., :rank].contiguous()


def lora_linear_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    shrunk: Tensor,
    scaling: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """grad (K, T, d_out) -> dx (as x), dA (K, r, d_in), dB (K, d_out, r), or empty."""
    if 0 in (x.shape[1], *weight.shape):
        return empty_gradients(x, lora_A, lora_B, needs)
    x, grad = _aligned(x), _aligned(grad)
    thin = _by_pytorch if passes_of(x.device.type) is None else _by_passes
    d_shrunk, dA, dB = thin(grad, x, lora_A, lora_B, shrunk, scaling, needs)
    if not needs[0]:
        return x.new_empty(0), dA, dB
    assert d_shrunk is not None
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    _gemm(dx, grad, weight, d_shrunk, _expander(lora_A, 1, 1.0, x.dtype), None, w_depth_first=True)
    return dx, dA, dB


def refuses(x: Tensor, weight: Tensor, lora_A: Tensor) -> str | None:
    """Why the kernel does not take this problem, or None."""
    if x.dtype not in (torch.float16, torch.bfloat16):
        return "the GEMM is one for float16 and bfloat16"
    if x.shape[0] != lora_A.shape[0]:
        return "the GEMM needs separate rows for each particle, and here all share one input"
    if weight.shape[0] % 8 or weight.shape[1] % 8:
        return (
            "the GEMM copies rows of a multiple of 16 bytes: d_in and d_out must be multiples of 8"
        )
    if _processors(x.device) == 0:
        return "the GEMM is one for compute capability 9.0 (Hopper)"
    return None


@functools.cache
def passes_of(device: str) -> ModuleType | None:
    """The Triton backend's linear, which has the thin passes, where Triton runs on this kind of
    device; else None."""
    if "triton" not in dispatch.available_backends(device):
        return None
    return importlib.import_module("multilora.ops.triton.linear")


def _shrink(x: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
    """S = x Aᵀ (K, T, filled r)."""
    lora_A = _filled(lora_A, 1)
    passes = passes_of(x.device.type)
    if passes is None:
        return torch.bmm(x, lora_A.to(x.dtype).mT)
    return passes.shrink(x, lora_A, _filled(lora_B, 2))


def _by_pytorch(
    grad: Tensor,
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    shrunk: Tensor,
    scaling: float,
    needs: list[bool],
) -> tuple[Tensor | None, Tensor, Tensor]:
    """-> dS (K, T, filled r), dA (K, r, d_in), dB (K, d_out, r), each by one product.

    dS is None where neither dx nor dA is needed.
    """
    needs_x, needs_A, needs_B = needs
    d_shrunk, dA, dB = None, lora_A.new_empty(0), lora_B.new_empty(0)
    if needs_x or needs_A:
        d_shrunk = torch.bmm(grad, _expander(lora_B, 2, scaling, x.dtype))
    if d_shrunk is not None and needs_A:
        dA = torch.bmm(d_shrunk[..., : lora_A.shape[1]].mT, x).to(lora_A.dtype)
    if needs_B:
        dB = torch.bmm(grad.mT, shrunk).mul_(scaling).to(lora_B.dtype)
    return d_shrunk, dA, dB


def _by_passes(
    grad: Tensor,
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    shrunk: Tensor,
    scaling: float,
    needs: list[bool],
) -> tuple[Tensor | None, Tensor, Tensor]:
    """The same by the Triton backend's passes: one over dY and one over x."""
    rank, passes = lora_A.shape[1], passes_of(x.device.type)
    assert passes is not None
    factors = (_filled(lora_A, 1), _filled(lora_B, 2), _filled(shrunk, 2))
    d_shrunk, dA, dB = passes.thin_gradients(grad, x, *factors, scaling, needs)
    if needs[1]:
        dA = dA[:, :rank].contiguous()
    if needs[2]:
        dB = dB[..., :rank].contiguous()
    return d_shrunk, dA, dB


@functools.cache
def _processors(device: torch.device) -> int:
    """How many blocks of the kernel run at a time: none on chips other than Hopper."""
    if device.type != "cuda":
        # In the tests, two blocks are enough to have tiles divided, and more than one for each.
        return 2
    if torch.cuda.get_device_capability(device) != (9, 0):
        return 0
    return torch.cuda.get_device_properties(device).multi_processor_count


def _filled(factor: Tensor, axis: int) -> Tensor:
    """factor, its rank, at `axis`, filled with zeros to a multiple of 8.

    The kernel's copies need rows of a multiple of 16 bytes. S and dS, computed from filled
    factors, are filled likewise.
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
    particles, rows, _ = x.shape
    processors = _processors(x.device)
    x, weight = _aligned(x), _aligned(weight)
    shrunk, expander = _aligned(shrunk), _aligned(expander)
    bias = None if bias is None else _aligned(bias)
    _C_cuda.lora_gemm(
        view(y),
        view(x),
        view(weight),
        (view(shrunk), view(expander)),
        view(bias),
        w_depth_first=w_depth_first,
        tiling=(_tile_cols(particles, rows, y.shape[2], processors), processors),
        where=stream(x),
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
