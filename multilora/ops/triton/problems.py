"""The sizes that the kernels are compiled and tuned for, as calls of the operators."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from multilora.ops import triton as backend


@dataclass(frozen=True)
class Problem:
    """An operator and its backward, on meta tensors: `run` computes nothing."""

    name: str
    dtype: torch.dtype
    run: Callable[[], None]

    def __str__(self) -> str:
        return f"{self.name} {str(self.dtype).removeprefix('torch.')}"


#: (d_in, d_out) of a ViT-B/16, whose blocks have query, key, value and output apart, and of a 7B
#: decoder; rows a particle: 64 images of 197 tokens, 4096 tokens.
VIT_B = [(768, 768), (768, 2304), (768, 3072), (3072, 768)]
VIT_B_BLOCK = [(768, 768)] * 4 + [(768, 3072), (3072, 768)]
VIT_ROWS = 64 * 197
DECODER = [(4096, 4096), (4096, 11008), (11008, 4096)]
DECODER_BLOCK = [(4096, 4096)] * 4 + [(4096, 11008)] * 2 + [(11008, 4096)]
DECODER_ROWS = 4096
#: K, N, C
LOGITS = [(4, 1024, 100), (8, 256, 10), (4, 64, 32000), (4, 1024, 32000), (4, 64, 152000)]


def problems() -> Iterator[Problem]:
    """Every problem that `multilora kernels` compiles, in its dtypes."""
    for d_in, d_out in VIT_B:
        for particles, rank in ((4, 8), (4, 16), (8, 16)):
            yield _linear(particles, VIT_ROWS, d_in, d_out, rank, torch.bfloat16)
        yield _linear(4, VIT_ROWS, d_in, d_out, 16, torch.bfloat16, shared=True)
    for d_in, d_out in DECODER:
        yield _linear(4, DECODER_ROWS, d_in, d_out, 16, torch.bfloat16)
    for rank in (4, 32, 64):
        yield _linear(4, VIT_ROWS, 768, 768, rank, torch.bfloat16)
    # Rows that the copy engine cannot take, and more than one low-rank step.
    yield _linear(3, 250, 588, 767, 80, torch.bfloat16)
    # Triton compiles arguments that are 1 in.
    yield _linear(1, 1, 16, 16, 1, torch.bfloat16)
    yield _linear(2, 1, 1, 1, 1, torch.bfloat16, shared=True)
    for dtype in (torch.float16, torch.float32, torch.float64):
        for shared in (False, True):
            yield _linear(4, VIT_ROWS, 768, 768, 16, dtype, shared)

    for dtype in (torch.bfloat16, torch.float32):
        yield _geometry("ViT-B", 12 * VIT_B_BLOCK, 8, 8, dtype)
    yield _geometry("7B decoder", 32 * DECODER_BLOCK, 8, 16, torch.float32)
    yield _geometry("odd sizes", [(77, 130), (1, 3)], 5, 3, torch.float32)
    yield _geometry("many particles", [(512, 2048)], 20, 4, torch.float32)
    yield _geometry("small", [(48, 144)], 2, 2, torch.float64)
    yield _geometry("smallest", [(1, 1)], 1, 1, torch.float32)

    for sizes in LOGITS:
        for dtype in (torch.bfloat16, torch.float32):
            yield _loss(*sizes, dtype)
    yield _loss(4, 1024, 100, torch.float16)
    yield _loss(3, 20, 30, torch.float64)
    for sizes in ((4, 1024, 100), (32, 512, 100), (2, 100, 1000), (5, 7, 3), (1, 1, 2)):
        yield _loss(*sizes, torch.float32, "det")


def _linear(
    particles: int,
    rows: int,
    d_in: int,
    d_out: int,
    rank: int,
    dtype: torch.dtype,
    shared: bool = False,
) -> Problem:
    name = f"lora_linear {d_in}→{d_out} K{particles} T{rows} r{rank}{' shared' if shared else ''}"
    sizes = (particles, rows, d_in, d_out, rank, dtype, shared)
    return Problem(name, dtype, partial(_run_linear, *sizes))


def _run_linear(
    particles: int, rows: int, d_in: int, d_out: int, rank: int, dtype: torch.dtype, shared: bool
) -> None:
    # Half-precision layers have float32 masters.
    master = torch.promote_types(dtype, torch.float32)
    x = _meta(dtype, 1 if shared else particles, rows, d_in)
    weight, bias = _meta(dtype, d_out, d_in), _meta(dtype, d_out)
    lora_A, lora_B = _meta(master, particles, rank, d_in), _meta(master, particles, d_out, rank)
    y, shrunk = backend.lora_linear(x, weight, lora_A, lora_B, bias, 2.0)
    needs = [True, True, True]
    backend.lora_linear_backward(y, x, weight, lora_A, lora_B, shrunk, 2.0, needs)
    # Over a base layer whose product is its own.
    shrunk = backend.lora_add_(y, x, lora_A, lora_B, 2.0)
    backend.lora_linear_backward(y, x, None, lora_A, lora_B, shrunk, 2.0, needs)


def _geometry(
    name: str, layers: list[tuple[int, int]], particles: int, rank: int, dtype: torch.dtype
) -> Problem:
    name = f"geometry {name}, {len(layers)} layers K{particles} r{rank}"
    return Problem(name, dtype, partial(_run_geometry, layers, particles, rank, dtype))


def _run_geometry(
    layers: list[tuple[int, int]], particles: int, rank: int, dtype: torch.dtype
) -> None:
    lora_A = [_meta(dtype, particles, rank, d_in) for d_in, _ in layers]
    lora_B = [_meta(dtype, particles, d_out, rank) for _, d_out in layers]
    scaling = [2.0] * len(layers)
    backend.lora_gram(lora_A, lora_B, scaling)
    D = backend.pairwise_frobenius(lora_A, lora_B, scaling)
    backend.lora_gram_backward(D, lora_A, lora_B, scaling)
    for mix in (D, D[:, 0]):
        backend.svgd_update(lora_A, lora_B, mix, D, lora_A, lora_B, scaling)


def _loss(
    particles: int, examples: int, classes: int, dtype: torch.dtype, kind: str = "logdet"
) -> Problem:
    name = f"particle_loss K{particles} N{examples} C{classes} {kind}"
    return Problem(name, dtype, partial(_run_loss, particles, examples, classes, dtype, kind))


def _run_loss(particles: int, examples: int, classes: int, dtype: torch.dtype, kind: str) -> None:
    logits = _meta(dtype, particles, examples, classes)
    targets = _meta(torch.int64, examples)
    nll, divergence, *saved = backend.particle_loss(logits, targets, 1e-4, kind)
    backend.particle_loss_backward(nll, divergence, logits, targets, *saved)
    value, stats, core = backend.gram_volume(logits, targets, 1e-4, kind)
    backend.gram_volume_backward(value, logits, targets, stats, core)


def _meta(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
