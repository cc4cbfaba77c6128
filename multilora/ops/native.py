"""The host side of csrc, once for the CPU module and the CUDA module: it allocates the outputs,
describes the tensors and calls the kernels. csrc knows nothing of torch."""

import abc
from typing import Any

import torch
from torch import Tensor

from multilora.ops.common import accumulator

#: DType in csrc/common.h.
DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}

#: VolumeKind in csrc/volume.h.
_VOLUME_KINDS = {"zero": 0, "logdet": 1, "det": 2}


class NativeKernels(abc.ABC):
    """The functions of a backend that both native modules have, with the names of a backend's."""

    def __init__(self, module: Any):
        self.module = module

    @abc.abstractmethod
    def where(self, t: Tensor) -> tuple[int, ...]:
        """The last arguments of every call: where, or with what, it runs."""

    def workspace(self, factors: list[Tensor], sizes: list[int]) -> list[Tensor]:
        """The memory that the geometry needs beside its outputs."""
        return []

    @abc.abstractmethod
    def volume(
        self, logits: Tensor, targets: Tensor, eps: float, kind: str, means: bool
    ) -> tuple[Tensor, ...]:
        """-> value (N,), stats (3, K, N), core (N, m, m); or, with means, nll (K,) and
        divergence (), stats, core, count ()."""

    def traces(
        self, lora_A: list[Tensor], lora_B: list[Tensor], scaling: list[float], distance: bool
    ) -> Tensor:
        """The traces T (L, K, K), or the distances D made of them."""
        factors = [t.contiguous() for t in (*lora_A, *lora_B)]
        first = factors[0]
        particles = first.shape[0]
        out = first.new_empty(len(scaling), particles, particles, dtype=accumulator(first.dtype))
        sizes = _adapter_sizes(lora_A, lora_B)
        work = self.workspace(factors, sizes)
        self.module.lora_gram(
            out.data_ptr(),
            distance,
            DTYPES[first.dtype],
            particles,
            sizes,
            scaling,
            _pointers(factors),
            *_pointers(work),
            *self.where(first),
        )
        return out

    def factor_gradients(
        self,
        upstream: Tensor,
        lora_A: list[Tensor],
        lora_B: list[Tensor],
        scaling: list[float],
        mix: Tensor | None = None,
        grads: list[Tensor] | None = None,
    ) -> list[Tensor]:
        """The gradients for dL/dT = upstream, plus grads mixed."""
        factors = [t.contiguous() for t in (*lora_A, *lora_B)]
        outs = [torch.empty_like(t) for t in factors]
        upstream = upstream.double().contiguous()
        mix = None if mix is None else mix.double().contiguous()
        grads = [t.contiguous() for t in grads or []]
        sizes = _adapter_sizes(lora_A, lora_B)
        work = self.workspace(factors, sizes)
        self.module.lora_gram_backward(
            _pointers(outs),
            upstream.data_ptr(),
            DTYPES[factors[0].dtype],
            upstream.shape[-1],
            sizes,
            scaling,
            _pointers(factors),
            _pointers(grads),
            0 if mix is None else mix.data_ptr(),
            mix is not None and mix.ndim == 3,
            *_pointers(work),
            *self.where(upstream),
        )
        return outs

    def volume_backward(
        self,
        grad: Tensor,
        logits: Tensor,
        targets: Tensor,
        stats: Tensor,
        core: Tensor,
        grad_nll: Tensor | None = None,
        count: Tensor | None = None,
    ) -> Tensor:
        """grad (N,) of the values; or grad () of their mean, and grad_nll (K,) -> dlogits."""
        logits = dense_classes(logits)
        out = logits.new_empty(logits.shape)
        # Names keep the copies alive until the call is over.
        stats, core = stats.contiguous(), core.contiguous()
        self.module.volume_backward(
            grad.data_ptr(),
            0 if grad_nll is None else grad_nll.data_ptr(),
            0 if count is None else count.data_ptr(),
            logits.data_ptr(),
            targets.data_ptr(),
            stats.data_ptr(),
            core.data_ptr(),
            out.data_ptr(),
            DTYPES[logits.dtype],
            grad.stride(0) if grad_nll is None else 0,
            0 if grad_nll is None else grad_nll.stride(0),
            *logits.stride()[:2],
            targets.stride(0),
            *logits.shape,
            *self.where(logits),
        )
        return out


def volume_kind(logits: Tensor, kind: str) -> int:
    """The kind as csrc names it: "zero" where the value cannot move."""
    particles, _, classes = logits.shape
    constant = classes == 2 or (kind == "det" and particles > classes - 1)
    return _VOLUME_KINDS["zero" if constant else kind]


def dense_classes(logits: Tensor) -> Tensor:
    """logits with adjacent classes: one copy costs less than a line of memory for every class."""
    return logits if logits.stride(-1) == 1 else logits.contiguous()


def stream(t: Tensor) -> tuple[int, int]:
    """The device and the current stream that a kernel on `t` runs on; in the tests, zeros."""
    if not t.is_cuda:
        return 0, 0
    return t.device.index, torch.cuda.current_stream(t.device).cuda_stream


def _adapter_sizes(lora_A: list[Tensor], lora_B: list[Tensor]) -> list[int]:
    """rank, d_in and d_out of every layer."""
    sizes: list[int] = []
    for A, B in zip(lora_A, lora_B):
        _, rank, d_in = A.shape
        sizes += (rank, d_in, B.shape[1])
    return sizes


def _pointers(tensors: list[Tensor]) -> list[int]:
    return [t.data_ptr() for t in tensors]
