"""Adapter geometry and SVGD's update on the CPU, all layers in one call."""

import torch
from torch import Tensor

from multilora import _C
from multilora.ops.common import accumulator
from multilora.ops.native import DTYPES, adapter_sizes, pointers


def lora_gram(lora_A: list[Tensor], lora_B: list[Tensor], scaling: list[float]) -> Tensor:
    return _traces(lora_A, lora_B, scaling, distance=False)


def pairwise_frobenius(lora_A: list[Tensor], lora_B: list[Tensor], scaling: list[float]) -> Tensor:
    return _traces(lora_A, lora_B, scaling, distance=True)


def lora_gram_backward(
    grad: Tensor, lora_A: list[Tensor], lora_B: list[Tensor], scaling: list[float]
) -> list[Tensor]:
    return _gradients(grad, lora_A, lora_B, scaling)


def svgd_update(
    grad_A: list[Tensor],
    grad_B: list[Tensor],
    mix: Tensor,
    upstream: Tensor,
    lora_A: list[Tensor],
    lora_B: list[Tensor],
    scaling: list[float],
) -> list[Tensor]:
    return _gradients(upstream, lora_A, lora_B, scaling, mix, [*grad_A, *grad_B])


def _traces(
    lora_A: list[Tensor], lora_B: list[Tensor], scaling: list[float], distance: bool
) -> Tensor:
    factors = [t.contiguous() for t in (*lora_A, *lora_B)]
    first = factors[0]
    particles = first.shape[0]
    out = first.new_empty(len(scaling), particles, particles, dtype=accumulator(first.dtype))
    _C.lora_gram(
        out.data_ptr(),
        distance,
        DTYPES[first.dtype],
        particles,
        adapter_sizes(lora_A, lora_B),
        scaling,
        pointers(factors),
        torch.get_num_threads(),
    )
    return out


def _gradients(
    grad: Tensor,
    lora_A: list[Tensor],
    lora_B: list[Tensor],
    scaling: list[float],
    mix: Tensor | None = None,
    grads: list[Tensor] | None = None,
) -> list[Tensor]:
    """The gradients for dL/dT = grad, plus the gradients mixed."""
    factors = [t.contiguous() for t in (*lora_A, *lora_B)]
    outs = [torch.empty_like(t) for t in factors]
    grad = grad.double().contiguous()
    if mix is not None:
        mix = mix.double().contiguous()
        grads = [t.contiguous() for t in grads]
    _C.lora_gram_backward(
        pointers(outs),
        grad.data_ptr(),
        DTYPES[factors[0].dtype],
        grad.shape[-1],
        adapter_sizes(lora_A, lora_B),
        scaling,
        pointers(factors),
        [] if mix is None else pointers(grads),
        0 if mix is None else mix.data_ptr(),
        mix is not None and mix.ndim == 3,
        torch.get_num_threads(),
    )
    return outs
