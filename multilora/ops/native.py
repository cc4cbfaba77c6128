"""The host side of csrc, once for the CPU module and the CUDA module: it allocates the outputs,
describes the tensors and calls the kernels. csrc knows nothing of torch."""

import abc
from typing import Any, TypeAlias

import torch
from torch import Tensor

from multilora.ops.common import accumulator

#: DType in csrc/common.h.
DTYPES = {
    torch.float32: 0,
    torch.float64: 1,
    torch.float16: 2,
    torch.bfloat16: 3,
    torch.int64: 4,
}

#: A tensor for csrc: address, dtype, sizes and strides; None where it is left out.
View: TypeAlias = "tuple[int, int, tuple[int, ...], tuple[int, ...]] | None"
#: The factors of all layers for csrc: dtype, K, (r, d_in, d_out of every layer) and addresses.
FactorLists: TypeAlias = "tuple[int, int, list[int], list[int]]"


class NativeKernels(abc.ABC):
    """The functions of a backend that both native modules have, with the names of a backend's."""

    def __init__(self, module: Any):
        self.module = module

    @abc.abstractmethod
    def where(self, t: Tensor) -> Any:
        """On what device and stream, or on how many threads, a call for `t` runs."""

    def workspace(self, first: Tensor, described: FactorLists) -> Tensor | None:
        """The memory that the geometry needs beside its outputs, for factors like the first."""
        return None

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
        tensors = [t.contiguous() for t in (*lora_A, *lora_B)]
        first, described = tensors[0], factors(tensors)
        particles = first.shape[0]
        out = first.new_empty(len(scaling), particles, particles, dtype=accumulator(first.dtype))
        # A name keeps the memory alive until the call is over.
        work = self.workspace(first, described)
        self.module.traces(
            view(out),
            described,
            scaling,
            view(work),
            distance=distance,
            where=self.where(first),
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
        tensors = [t.contiguous() for t in (*lora_A, *lora_B)]
        described = factors(tensors)
        outs = [torch.empty_like(t) for t in tensors]
        upstream = upstream.double().contiguous()
        mix = None if mix is None else mix.double().contiguous()
        grads = [t.contiguous() for t in grads or []]
        work = self.workspace(tensors[0], described)
        self.module.factor_gradients(
            addresses(outs),
            view(upstream),
            described,
            scaling,
            view(mix),
            addresses(grads),
            view(work),
            where=self.where(upstream),
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
        out = torch.empty_like(logits, memory_format=torch.contiguous_format)
        # Names keep the copies alive until the call is over.
        stats, core = stats.contiguous(), core.contiguous()
        self.module.volume_backward(
            view(logits),
            view(targets),
            (view(stats), view(core)),
            view(grad),
            view(grad_nll),
            view(count),
            view(out),
            where=self.where(logits),
        )
        return out


def dense_classes(logits: Tensor) -> Tensor:
    """logits with adjacent classes: one copy costs less than a line of memory for every class."""
    return logits if logits.stride(-1) == 1 else logits.contiguous()


def stream(t: Tensor) -> tuple[int, int]:
    """The device and the current stream that a kernel on `t` runs on; in the tests, zeros."""
    if not t.is_cuda:
        return 0, 0
    return t.device.index, torch.cuda.current_stream(t.device).cuda_stream


def view(t: Tensor | None) -> View:
    """The tensor as csrc/view.h takes it. It must stay alive until the call is over."""
    return None if t is None else (t.data_ptr(), DTYPES[t.dtype], t.shape, t.stride())


def factors(tensors: list[Tensor]) -> FactorLists:
    """All lora_A, then all lora_B, contiguous, as csrc/adapters.h takes them.

    Views of all of them would take longer to make than a small problem takes to solve.
    """
    count, particles = len(tensors) // 2, 0
    sizes: list[int] = []
    for A, B in zip(tensors, tensors[count:]):
        particles, rank, d_in = A.shape
        sizes += (rank, d_in, B.shape[1])
    return DTYPES[tensors[0].dtype], particles, sizes, addresses(tensors)


def addresses(tensors: list[Tensor]) -> list[int]:
    return [t.data_ptr() for t in tensors]
