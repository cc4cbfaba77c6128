"""The operators called at every size that `multilora kernels` compiles, without computing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from multilora.ops import triton as backend
from multilora.tools.kernels.sizes import (
    DECODER,
    DECODER_BLOCK,
    DECODER_BLOCKS,
    DECODER_ROWS,
    EXPERTS,
    LOGITS,
    VIT_B,
    VIT_B_BLOCK,
    VIT_B_BLOCKS,
    VIT_ROWS,
)


@dataclass(frozen=True)
class Problem:
    """An operator and its backward, on meta tensors: `run` computes nothing."""

    name: str
    dtype: torch.dtype
    run: Callable[[], None]

    def __str__(self) -> str:
        return f"{self.name} {str(self.dtype).removeprefix('torch.')}"


def problems() -> Iterator[Problem]:
    """Every problem that `multilora kernels` compiles, in its dtypes."""
    for d_in, d_out in VIT_B:
        for particles, rank in ((4, 8), (4, 16), (8, 16)):
            yield linear(particles, VIT_ROWS, d_in, d_out, rank, torch.bfloat16)
        yield linear(4, VIT_ROWS, d_in, d_out, 16, torch.bfloat16, shared=True)
    for d_in, d_out in DECODER:
        yield linear(4, DECODER_ROWS, d_in, d_out, 16, torch.bfloat16)
    for rank in (4, 32, 64):
        yield linear(4, VIT_ROWS, 768, 768, rank, torch.bfloat16)
    # Rows that the copy engine cannot take, and more than one low-rank step.
    yield linear(3, 250, 588, 767, 80, torch.bfloat16)
    # Triton specialises on arguments equal to 1.
    yield linear(1, 1, 16, 16, 1, torch.bfloat16)
    yield linear(2, 1, 1, 1, 1, torch.bfloat16, shared=True)
    for dtype in (torch.float16, torch.float32, torch.float64):
        for shared in (False, True):
            yield linear(4, VIT_ROWS, 768, 768, 16, dtype, shared)

    for experts, d_in, d_out, rows in EXPERTS:
        yield grouped(experts, rows, d_in, d_out, torch.bfloat16, torch.bfloat16)
        # The factors of 4 particles.
        yield grouped(4 * experts, 4 * rows, d_in, 16, torch.bfloat16)
        yield grouped(4 * experts, 4 * rows, 16, d_out, torch.bfloat16)
    for dtype in (torch.float16, torch.float32, torch.float64):
        yield grouped(4, 1000, 768, 8, dtype)
    yield grouped(1, 1, 1, 1, torch.bfloat16)

    for dtype in (torch.bfloat16, torch.float32):
        yield geometry("ViT-B", VIT_B_BLOCKS * VIT_B_BLOCK, 8, 8, dtype)
    yield geometry("7B decoder", DECODER_BLOCKS * DECODER_BLOCK, 8, 16, torch.float32)
    yield geometry("odd sizes", [(77, 130), (1, 3)], 5, 3, torch.float32)
    yield geometry("many particles", [(512, 2048)], 20, 4, torch.float32)
    yield geometry("small", [(48, 144)], 2, 2, torch.float64)
    yield geometry("smallest", [(1, 1)], 1, 1, torch.float32)

    for sizes in LOGITS:
        for dtype in (torch.bfloat16, torch.float32):
            yield loss(*sizes, dtype)
    yield loss(4, 1024, 100, torch.float16)
    yield loss(3, 20, 30, torch.float64)
    for sizes in ((4, 1024, 100), (32, 512, 100), (2, 100, 1000), (5, 7, 3), (1, 1, 2)):
        yield loss(*sizes, torch.float32, "det")


#: The calls that `multilora kernels` compiles for each kind of problem.
_LINEAR = ("forward", "backward", "added")
_GEOMETRY = ("gram", "distances", "backward", "mixtures")
_LOSS = ("forward", "backward", "volume")


def linear(
    particles: int,
    rows: int,
    d_in: int,
    d_out: int,
    rank: int,
    dtype: torch.dtype,
    shared: bool = False,
    calls: Sequence[str] = _LINEAR,
) -> Problem:
    """lora_linear with float32 factors beside half-precision rows.

    calls: any of "forward", "backward" and "added", the low-rank part over a base layer whose
    product is its own.
    """
    name = f"lora_linear {d_in}→{d_out} K{particles} T{rows} r{rank}{' shared' if shared else ''}"
    sizes = (particles, rows, d_in, d_out, rank, dtype, shared, tuple(calls))
    return Problem(name, dtype, partial(_run_linear, *sizes))


def _run_linear(
    particles: int,
    rows: int,
    d_in: int,
    d_out: int,
    rank: int,
    dtype: torch.dtype,
    shared: bool,
    calls: tuple[str, ...],
) -> None:
    master = torch.promote_types(dtype, torch.float32)
    x = _meta(dtype, 1 if shared else particles, rows, d_in)
    weight, bias = _meta(dtype, d_out, d_in), _meta(dtype, d_out)
    lora_A, lora_B = _meta(master, particles, rank, d_in), _meta(master, particles, d_out, rank)
    y, shrunk = _meta(dtype, particles, rows, d_out), _meta(dtype, particles, rows, rank)
    needs = [True, True, True]
    if "forward" in calls:
        y, shrunk = backend.lora_linear(x, weight, lora_A, lora_B, bias, 2.0)
    if "backward" in calls:
        backend.lora_linear_backward(y, x, weight, lora_A, lora_B, shrunk, 2.0, needs)
    if "added" in calls:
        shrunk = backend.lora_add_(y, x, lora_A, lora_B, 2.0)
        backend.lora_linear_backward(y, x, None, lora_A, lora_B, shrunk, 2.0, needs)


def grouped(
    groups: int,
    rows: int,
    d_in: int,
    d_out: int,
    dtype: torch.dtype,
    master: torch.dtype | None = None,
) -> Problem:
    """grouped_linear and its gradients, by default with a float32 master beside half-precision
    rows."""
    master = master or torch.promote_types(dtype, torch.float32)
    name = f"grouped_linear {d_in}→{d_out} G{groups} T{rows}"
    sizes = (groups, rows, d_in, d_out, dtype, master)
    return Problem(name, dtype, partial(_run_grouped, *sizes))


def _run_grouped(
    groups: int, rows: int, d_in: int, d_out: int, dtype: torch.dtype, master: torch.dtype
) -> None:
    x, weight = _meta(dtype, rows, d_in), _meta(master, groups, d_out, d_in)
    ends = _meta(torch.int32, groups)
    y = backend.grouped_linear(x, weight, ends)
    backend.grouped_linear_backward(y, x, weight, ends, [True, True])


def geometry(
    name: str,
    layers: Sequence[tuple[int, int]],
    particles: int,
    rank: int,
    dtype: torch.dtype,
    calls: Sequence[str] = _GEOMETRY,
) -> Problem:
    """The geometry of all layers (d_in, d_out) of a model.

    calls: any of "gram", "distances", "backward", "mixtures" (factor_gradients with mixtures per
    pair and per particle) and "update" (factor_gradients as SVGD calls it: each particle moves by
    its own gradient, and the distances' gradient is in float64).
    """
    name = f"geometry {name}, {len(layers)} layers K{particles} r{rank}"
    sizes = (tuple(layers), particles, rank, dtype, tuple(calls))
    return Problem(name, dtype, partial(_run_geometry, *sizes))


def _run_geometry(
    layers: tuple[tuple[int, int], ...],
    particles: int,
    rank: int,
    dtype: torch.dtype,
    calls: tuple[str, ...],
) -> None:
    lora_A = [_meta(dtype, particles, rank, d_in) for d_in, _ in layers]
    lora_B = [_meta(dtype, particles, d_out, rank) for _, d_out in layers]
    scaling = [2.0] * len(layers)
    D = _meta(dtype, len(layers), particles, particles)
    if "gram" in calls:
        backend.traces(lora_A, lora_B, scaling, False)
    if "distances" in calls:
        D = backend.traces(lora_A, lora_B, scaling, True)
    if "backward" in calls:
        backend.factor_gradients(D, lora_A, lora_B, scaling)
    for mix in (D, D[:, 0]) if "mixtures" in calls else ():
        backend.factor_gradients(D, lora_A, lora_B, scaling, mix, lora_A + lora_B)
    if "update" in calls:
        factors = lora_A + lora_B
        backend.factor_gradients(D.double(), lora_A, lora_B, scaling, D[:, 0], factors)


def loss(
    particles: int,
    examples: int,
    classes: int,
    dtype: torch.dtype,
    kind: str = "logdet",
    calls: Sequence[str] = _LOSS,
) -> Problem:
    """particle_loss of logits (K, N, C).

    calls: any of "forward", "backward" and "volume", the volume alone with its backward.
    """
    name = f"particle_loss K{particles} N{examples} C{classes} {kind}"
    sizes = (particles, examples, classes, dtype, kind, tuple(calls))
    return Problem(name, dtype, partial(_run_loss, *sizes))


def _run_loss(
    particles: int,
    examples: int,
    classes: int,
    dtype: torch.dtype,
    kind: str,
    calls: tuple[str, ...],
) -> None:
    logits = _meta(dtype, particles, examples, classes)
    targets = _meta(torch.int64, examples)
    if "forward" in calls or "backward" in calls:
        nll, divergence, stats, core, count = _loss_outputs(logits, min(particles, classes))
    if "forward" in calls:
        nll, divergence, stats, core, count = backend.volume(logits, targets, 1e-4, kind, True)
    if "backward" in calls:
        backend.volume_backward(divergence, logits, targets, stats, core, nll, count)
    if "volume" in calls:
        value, stats, core = backend.volume(logits, targets, 1e-4, kind, False)
        backend.volume_backward(value, logits, targets, stats, core)


def _loss_outputs(logits: Tensor, side: int) -> list[Tensor]:
    """Tensors like the outputs of particle_loss: nll, divergence, stats, core, count."""
    particles, examples, _ = logits.shape
    shapes = ((particles,), (), (3, particles, examples), (examples, side, side), ())
    accumulator = torch.promote_types(logits.dtype, torch.float32)
    return [_meta(accumulator, *shape) for shape in shapes]


def _meta(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
