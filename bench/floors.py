"""The least that each kernel can take: operations, bytes and launches, and the time that they need.

`python -m bench.floors` prints the table of FLOORS.md.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Work:
    """What one repetition needs at least; flops of float64 products are counted apart."""

    flops: float = 0.0
    bytes: float = 0.0
    launches: int = 1
    flops64: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.flops + other.flops,
            self.bytes + other.bytes,
            self.launches + other.launches,
            self.flops64 + other.flops64,
        )


@dataclass(frozen=True)
class Ceilings:
    """Operations and bytes a second."""

    flops: float
    bytes: float
    flops64: float


#: bfloat16 and memory as once measured on one H200; float64 tensor cores from its data sheet.
H200 = Ceilings(790e12, 4.3e12, 60e12)


def floor(work: Work, ceilings: Ceilings = H200) -> float:
    """Seconds: products and memory overlap perfectly, launches are free."""
    products = work.flops / ceilings.flops + work.flops64 / ceilings.flops64
    return max(products, work.bytes / ceilings.bytes)


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
    logits = 2.0 * particles * rows * classes
    return _passes(Work(bytes=logits), Work(bytes=2 * logits), passes)


def svgd_update(layers: Sequence[tuple[int, int]], particles: int, rank: int) -> Work:
    """The distances, then one pass that reads factors and gradients and writes directions."""
    distances = pairwise_frobenius(layers, particles, rank, "forward")
    widths = sum(d_in + d_out for d_in, d_out in layers)
    factors = 4.0 * particles * rank * widths
    mixing = Work(bytes=3 * factors, flops64=2.0 * (particles * rank) ** 2 * widths)
    return distances + mixing


def _passes(forward: Work, backward: Work, passes: str) -> Work:
    return {"forward": forward, "backward": backward, "fwd + bwd": forward + backward}[passes]


# --- the table -----------------------------------------------------------------------------------


def newest_record(folder: Path = RESULTS) -> tuple[str, dict[str, Any]] | None:
    """Name and content of the newest record that `python -m bench.gpu` wrote on a GPU."""
    records = [(file.stem, json.loads(file.read_text())) for file in folder.glob("*.json")]
    records = [(name, r) for name, r in records if r.get("kind") == "gpu"]
    return max(records, key=lambda named: named[1]["machine"]["date"], default=None)


def table() -> str:
    """Markdown: a line a case, with what the newest record measured."""
    from bench.gpu_cases import gpu_cases

    newest = newest_record()
    measured = {} if newest is None else {(c["group"], c["name"]): c for c in newest[1]["cases"]}
    lines = [
        "| kernel | sizes | GFLOP | MB | launches | predicted floor µs | of | goal | measured µs |",
        "|---|---|--:|--:|--:|--:|---|---|---|",
    ]
    shown = set()
    for case in sorted(gpu_cases(backends=()), key=lambda case: case.group):
        work = case.work
        # Some problems are measured again, with further peers.
        if work is None or (case.group, work) in shown:
            continue
        shown.add((case.group, work))
        goal = f"≤ {case.goal:g} × {case.yardstick[0]}" if case.goal else "–"
        memory_bound = floor(work) == work.bytes / H200.bytes
        cells = (
            case.group,
            case.name,
            _number((work.flops + work.flops64) / 1e9),
            _number(work.bytes / 1e6),
            str(work.launches),
            _number(floor(work) * 1e6),
            "memory" if memory_bound else "products",
            goal,
            _measured(measured.get((case.group, case.name)), newest),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _measured(record: dict[str, Any] | None, newest: Any) -> str:
    if newest is None:
        return "not measured: no GPU yet"
    times = {} if record is None else record.get("kernel", {})
    ours = {name: t[1] for name, t in times.items() if name.startswith("multilora")}
    if not ours:
        return "not measured"
    name = min(ours, key=ours.get)
    return f"{_number(ours[name] * 1e6)}, {name} ({newest[0]})"


if __name__ == "__main__":
    print(table())
