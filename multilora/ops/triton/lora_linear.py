"""The K-particle LoRA linear: which kernels give y and the gradients, in which order.

Dims: K particles, T rows, r rank.
"""

from __future__ import annotations

from torch import Tensor

from multilora.ops import reference
from multilora.ops.triton import configs
from multilora.ops.triton.common import chip
from multilora.ops.triton.lora_gemm import accumulate, gemm
from multilora.ops.triton.lora_pass import reduce, thin_pass


def lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """x (K or 1, T, d_in) -> y (K, T, d_out) and S = x Aᵀ (K, T, r)."""
    particles, rank, d_in = lora_A.shape
    rows, d_out = x.shape[1], weight.shape[0]
    if 0 in (rows, d_in, d_out):
        return reference.lora_linear(x, weight, lora_A, lora_B, bias, scaling)
    shared = x.shape[0] != particles
    config = configs.lora_gemm(
        particles, rows, d_in, d_out, rank, x.dtype, chip(x.device), "out" if shared else ""
    )
    x = x.contiguous()
    y = x.new_empty(particles, rows, d_out)
    shrunk = x.new_empty(particles, rows, rank)
    if config.path != "shrink inside":
        thin_pass(x, lora_A.mT, shrunk, None, particles, rank, 1.0)
    if config.path == "accumulate":
        accumulate(y, x, weight.mT, shrunk, lora_B, bias, scaling)
    else:
        gemm(y, x, weight, lora_A, shrunk, lora_B, bias, scaling, config, False)
    return y, shrunk


def lora_add_(y: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """y (K·T rows of d_out) += scaling·(x Aᵀ) Bᵀ for x (K or 1, T, d_in) -> S = x Aᵀ (K, T, r)."""
    particles, rank, d_in = lora_A.shape
    rows, d_out = x.shape[1], lora_B.shape[1]
    if 0 in (rows, d_in, d_out):
        return reference.lora_add_(y, x, lora_A, lora_B, scaling)
    shrunk = x.new_empty(particles, rows, rank)
    thin_pass(x.contiguous(), lora_A.mT, shrunk, None, particles, rank, 1.0)
    # A product as thin as this is y's one read and one write: the vendor's does no more.
    y = y.view(particles, rows, d_out)
    y.baddbmm_(shrunk, lora_B.to(y.dtype).mT, alpha=scaling)
    return shrunk


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
    particles, rank, d_in = lora_A.shape
    rows, d_out = x.shape[1], lora_B.shape[1]
    if 0 in (rows, d_in, d_out):
        return reference.lora_linear_backward(
            grad, x, weight, lora_A, lora_B, shrunk, scaling, needs
        )
    shared = x.shape[0] != particles
    dx, dA, dB = x.new_empty(0), lora_A.new_empty(0), lora_B.new_empty(0)
    if not any(needs):
        return dx, dA, dB
    x, grad = x.contiguous(), grad.contiguous()
    # dS = s·dY·B and dB = s·dYᵀ·S: one pass over dY, where the partial sums do not cost another.
    d_shrunk = x.new_empty(shrunk.shape) if needs_x or needs_A else None
    wanted = shrunk if needs_B else None
    together = configs.lora_pass_together(particles, rows, d_out, rank, x.dtype, chip(x.device))
    if d_shrunk is not None and needs_B and not together:
        thin_pass(grad, lora_B, d_shrunk, None, particles, rank, scaling)
        partial = thin_pass(grad, None, None, wanted, particles, rank, scaling)
    else:
        partial = thin_pass(grad, lora_B, d_shrunk, wanted, particles, rank, scaling)
    if needs_B:
        dB = lora_B.new_empty(lora_B.shape)
        reduce(partial, dB, scaling)
    if needs_A:
        dA = lora_A.new_empty(lora_A.shape)
        reduce(thin_pass(x, None, None, d_shrunk, particles, rank, 1.0), dA.mT, 1.0)
    if needs_x and weight is None:
        dx = reference.expand_gradient(d_shrunk, lora_A.to(x.dtype), shared)
    elif needs_x:
        # The rows are the same for all particles, so dY is summed before the large product.
        rest = grad.sum(0, keepdim=True) if shared else grad
        config = configs.lora_gemm(
            particles,
            rows,
            d_out,
            d_in,
            rank,
            x.dtype,
            chip(x.device),
            "in" if shared else "",
            True,
        )
        dx = x.new_empty(x.shape)
        if config.path == "accumulate":
            accumulate(dx, rest, weight, d_shrunk, lora_A.mT, None, 1.0)
        else:
            gemm(dx, rest, weight, None, d_shrunk, lora_A.mT, None, 1.0, config, True)
    return dx, dA, dB
