"""The least time that an operator can take: its operations, its bytes, and the rates of a card.

Each product runs at the full rate of its units and each byte at the full rate of the memory, both
at once, so the least time is the larger of the two. Launches cost nothing. Every tensor is read or
written once; what one kernel hands to the next counts only if the backward reads it again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bench.case import Work


@dataclass(frozen=True)
class Ceilings:
    """Operations and bytes per second."""

    flops: float
    bytes: float
    flops64: float
    flops32: float = 67e12


#: bfloat16 and memory were once measured on one H200; float64 tensor cores and float32 are from
#: its data sheet.
H200 = Ceilings(790e12, 4.3e12, 60e12)
#: The operations that other units do while an exponential's does one.
EXP = 16


def floor(work: Work, ceilings: Ceilings = H200) -> float:
    """The least seconds: products and memory overlap perfectly, launches are free."""
    return max(_products(work, ceilings), work.bytes / ceilings.bytes)


def _products(work: Work, ceilings: Ceilings) -> float:
    return (
        work.flops / ceilings.flops
        + work.flops64 / ceilings.flops64
        + work.flops32 / ceilings.flops32
    )


def lora_linear(
    d_in: int, d_out: int, rows: int, particles: int, rank: int, shared: bool, passes: str
) -> Work:
    """bfloat16 activations and weight, float32 factors; every tensor read or written once.

    shared: one x for all particles; its base product is computed once, and dY is summed before
    the product that gives dX.
    """
    base_rows = rows * (1 if shared else particles)
    base = 2.0 * base_rows * d_in * d_out
    low_rank = 2.0 * particles * rows * rank * (d_in + d_out)
    x, y, s = base_rows * d_in, particles * rows * d_out, particles * rows * rank
    factors = particles * rank * (d_in + d_out)
    weight = d_in * d_out
    forward = Work(base + low_rank, 2.0 * (x + y + s + weight + d_out) + 4.0 * factors)
    # dY with B and S gives dS and dB; dX; dA. Read: dY, W, x, S, factors. Written: dX, dA, dB.
    backward = Work(
        base + 2 * low_rank, 2.0 * (2 * x + y + s + weight) + 4.0 * 2 * factors, launches=3
    )
    return _passes(forward, backward, passes)


def pairwise_frobenius(
    layers: Sequence[tuple[int, int]], particles: int, rank: int, passes: str
) -> Work:
    """float32 factors of layers (d_in, d_out); float64 products, each pair of particles once."""
    widths = sum(d_in + d_out for d_in, d_out in layers)
    factors = 4.0 * particles * rank * widths
    pairs = particles * (particles + 1) / 2
    forward = Work(bytes=factors, flops64=2.0 * pairs * rank**2 * widths, launches=2)
    # The Gram matrices may be kept from the forward; dA and dB mix all particles.
    backward = Work(bytes=2 * factors, flops64=2.0 * (particles * rank) ** 2 * widths)
    return _passes(forward, backward, passes)


def particle_loss(particles: int, rows: int, classes: int, passes: str) -> Work:
    """bfloat16 logits, read once in each pass; their gradient written once."""
    entries = particles * rows * classes
    # Both passes take one exponential per entry; the forward multiplies each pair of particles
    # once, the backward multiplies by a K×K matrix.
    forward = Work(bytes=2.0 * entries, flops32=float(entries * (EXP + particles + 1)))
    backward = Work(bytes=4.0 * entries, flops32=float(entries * (EXP + 2 * particles)))
    return _passes(forward, backward, passes)


def svgd_update(layers: Sequence[tuple[int, int]], particles: int, rank: int) -> Work:
    """The distances, then one pass that reads factors and gradients and writes directions."""
    distances = pairwise_frobenius(layers, particles, rank, "forward")
    widths = sum(d_in + d_out for d_in, d_out in layers)
    factors = 4.0 * particles * rank * widths
    mixing = Work(bytes=3 * factors, flops64=2.0 * (particles * rank) ** 2 * widths)
    return distances + mixing


def _passes(forward: Work, backward: Work, passes: str) -> Work:
    return {"forward": forward, "backward": backward, "fwd + bwd": forward + backward}[passes]
