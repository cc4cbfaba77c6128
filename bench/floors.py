"""The least that each kernel can take, and what multilora's kernels should take by the same model.

Operations, bytes and launches, and the time that they need. What the kernels do comes from their
launches, which the host functions make on meta tensors. `python -m bench.floors` prints the tables
of FLOORS.md.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Calls:
    """How multilora's Triton backend computes something: `run` calls its host functions on meta
    tensors. widths: the sum of all d_in and d_out, rank: of factors that kernels find by a table.
    """

    run: Callable[[], None]
    widths: int = 0
    rank: int = 0


@dataclass(frozen=True)
class Work:
    """What one repetition needs at least.

    Apart are flops of float64 products (flops64) and what runs outside the tensor cores (flops32).
    """

    flops: float = 0.0
    bytes: float = 0.0
    launches: int = 1
    flops64: float = 0.0
    flops32: float = 0.0
    calls: Calls | None = field(default=None, compare=False)

    def __add__(self, other: Work) -> Work:
        return Work(
            self.flops + other.flops,
            self.bytes + other.bytes,
            self.launches + other.launches,
            self.flops64 + other.flops64,
            self.flops32 + other.flops32,
        )


@dataclass(frozen=True)
class Ceilings:
    """Operations and bytes a second."""

    flops: float
    bytes: float
    flops64: float
    flops32: float = 67e12


#: bfloat16 and memory as once measured on one H200; float64 tensor cores and float32 from its data
#: sheet.
H200 = Ceilings(790e12, 4.3e12, 60e12)
#: What an exponential costs: its unit does one where the others do 16 operations.
EXP = 16


def floor(work: Work, ceilings: Ceilings = H200) -> float:
    """Seconds: products and memory overlap perfectly, launches are free."""
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
    run = partial(_run_linear, d_in, d_out, rows, particles, rank, shared, passes)
    return replace(_passes(forward, backward, passes), calls=Calls(run))


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
    calls = Calls(partial(_run_distances, layers, particles, rank, passes), widths, rank)
    return replace(_passes(forward, backward, passes), calls=calls)


def particle_loss(particles: int, rows: int, classes: int, passes: str) -> Work:
    """bfloat16 logits, read once in each pass; their gradient written once."""
    entries = particles * rows * classes
    # An exponential each, both ways; each pair of particles once, and a product with a K×K matrix.
    forward = Work(bytes=2.0 * entries, flops32=float(entries * (EXP + particles + 1)))
    backward = Work(bytes=4.0 * entries, flops32=float(entries * (EXP + 2 * particles)))
    calls = Calls(partial(_run_loss, particles, rows, classes, passes))
    return replace(_passes(forward, backward, passes), calls=calls)


def svgd_update(layers: Sequence[tuple[int, int]], particles: int, rank: int) -> Work:
    """The distances, then one pass that reads factors and gradients and writes directions."""
    distances = pairwise_frobenius(layers, particles, rank, "forward")
    widths = sum(d_in + d_out for d_in, d_out in layers)
    factors = 4.0 * particles * rank * widths
    mixing = Work(bytes=3 * factors, flops64=2.0 * (particles * rank) ** 2 * widths)
    calls = Calls(partial(_run_update, layers, particles, rank), widths, rank)
    return replace(distances + mixing, calls=calls)


def _passes(forward: Work, backward: Work, passes: str) -> Work:
    return {"forward": forward, "backward": backward, "fwd + bwd": forward + backward}[passes]


# --- what multilora launches ---------------------------------------------------------------------


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _run_linear(
    d_in: int, d_out: int, rows: int, particles: int, rank: int, shared: bool, passes: str
) -> None:
    from multilora.ops import triton as backend

    half = partial(_meta, dtype=torch.bfloat16)
    x, weight, bias = half(1 if shared else particles, rows, d_in), half(d_out, d_in), half(d_out)
    factors = _meta(particles, rank, d_in), _meta(particles, d_out, rank)
    y, shrunk = half(particles, rows, d_out), half(particles, rows, rank)
    if passes != "backward":
        backend.lora_linear(x, weight, *factors, bias, 2.0)
    if passes != "forward":
        backend.lora_linear_backward(y, x, weight, *factors, shrunk, 2.0, [True, True, True])


def _factors(
    layers: Sequence[tuple[int, int]], particles: int, rank: int
) -> tuple[list[Tensor], list[Tensor], list[float]]:
    lora_A = [_meta(particles, rank, d_in) for d_in, _ in layers]
    return lora_A, [_meta(particles, d_out, rank) for _, d_out in layers], [2.0] * len(layers)


def _run_distances(
    layers: Sequence[tuple[int, int]], particles: int, rank: int, passes: str
) -> None:
    from multilora.ops import triton as backend

    factors = _factors(layers, particles, rank)
    if passes != "backward":
        backend.traces(*factors, True)
    if passes != "forward":
        backend.factor_gradients(_meta(len(layers), particles, particles), *factors)


def _run_update(layers: Sequence[tuple[int, int]], particles: int, rank: int) -> None:
    """As SVGD does it by default: every particle moves by its own gradient."""
    from multilora.ops import triton as backend

    factors = _factors(layers, particles, rank)
    mix = _meta(len(layers), particles)
    upstream = _meta(len(layers), particles, particles, dtype=torch.float64)
    backend.traces(*factors, True)
    backend.factor_gradients(upstream, *factors, mix, factors[0] + factors[1])


def _run_loss(particles: int, rows: int, classes: int, passes: str) -> None:
    from multilora.ops import triton as backend

    logits = _meta(particles, rows, classes, dtype=torch.bfloat16)
    targets = _meta(rows, dtype=torch.int64)
    nll, divergence, count = _meta(particles), _meta(), _meta()
    side = min(particles, classes)
    saved = _meta(3, particles, rows), _meta(rows, side, side)
    if passes != "backward":
        backend.volume(logits, targets, 1e-4, "logdet", True)
    if passes != "forward":
        backend.volume_backward(divergence, logits, targets, *saved, nll, count)


@dataclass(frozen=True)
class Launch:
    """least: what this kernel has to do, with partial sums in one part; does: what it does.

    programs: equal shares of the work, or 0 where the library that launches decides.
    """

    name: str
    least: Work
    does: Work
    programs: int = 0


#: Seconds of a launch, in the predictions.
LAUNCH = 2e-6


def predict(launch: Launch, ceilings: Ceilings = H200, processors: int = 132) -> float:
    """Seconds: the floor's model for what the kernel does, on processors in whole rounds.

    The products take as long as the processor with the most programs; fewer programs than
    processors also have only their share of the memory's rate.
    """
    programs = launch.programs or processors
    rounds = -(-programs // processors) * processors / programs
    products = _products(launch.does, ceilings) * rounds
    memory = launch.does.bytes / ceilings.bytes * max(1.0, processors / programs)
    return max(products, memory) + LAUNCH


def launches(calls: Calls) -> list[Launch]:
    """The launches on an H200, Triton's and PyTorch's, in their order."""
    from multilora.ops.triton import common

    found: list[Launch] = []

    def record(kernel: Any, grid: tuple[int, ...], args: Any, meta: dict[str, Any]) -> None:
        signature = inspect.signature(kernel.fn)
        named = {name: value for name, value in meta.items() if name in signature.parameters}
        a = SimpleNamespace(**signature.bind(*args, **named).arguments)
        name = kernel.__name__
        # The switches that make it another computation.
        switches = {n: named.get(n) for n in ("SHRINK", "OUTER", "SHARED", "MIX", "SPLIT", "DOT")}
        on = [n if value is True else f"{n}={value}" for n, value in switches.items() if value]
        found.append(Launch(" ".join([name, *on]), *_COSTS[name](a, grid, calls)))

    common.compile_only(common.H200, record)
    try:
        with _TorchLaunches(found):
            calls.run()
    finally:
        common.compile_only(None, None)
    return found


class _TorchLaunches(TorchDispatchMode):
    """Adds what PyTorch itself launches: all but allocations, views and tables on the host."""

    def __init__(self, found: list[Launch]):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        read = [t for t in tree_leaves(args) if isinstance(t, Tensor)]
        written = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        on_host = any(t.device.type == "cpu" for t in (*read, *written))
        allocates = name.removeprefix("new_").startswith("empty")
        if not written or on_host or allocates or func.is_view:
            return out
        flops = 0.0
        if "mm" in name:
            flops = 2.0 * written[0].numel() * args[-2].shape[-1]
        work = Work(flops, float(_bytes(*read, *written)))
        self.found.append(Launch(f"PyTorch's {name}", work, work))
        return out


def _bytes(*tensors: Tensor | None) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def _up(value: int, block: int) -> int:
    """value in whole blocks."""
    return -(-value // block) * block


# A launch's arguments by name, its grid and what the tables hold -> least, does, programs. What a
# launch reads more than once comes from L2 and counts once.

_Cost = tuple[Work, Work, int]


def _gemm(a: Any, grid: tuple[int, ...], calls: Calls) -> _Cost:
    members = 1 if a.SHARED else a.particles
    tiles = members * _up(a.rows, a.BLOCK_M) * _up(a.cols, a.BLOCK_N) // (a.BLOCK_M * a.BLOCK_N)
    depth = _up(a.depth, a.BLOCK_K)
    expand = a.RANK_STEPS * a.BLOCK_R * (a.particles if a.SHARED else 1)
    shrink = depth * a.BLOCK_R if a.SHRINK else 0
    flops = 2.0 * tiles * a.BLOCK_M * ((depth + expand) * a.BLOCK_N + shrink)
    thin = a.cols + (a.depth if a.SHRINK else 0)
    least = 2.0 * a.rows * (members * a.depth * a.cols + a.particles * a.rank * thin)
    moved = _bytes(a.x_ptr, a.w_ptr, a.p_ptr, a.y_ptr, a.s_ptr, a.q_ptr, a.bias_ptr)
    return Work(least, moved), Work(flops, moved), tiles


def _expand(a: Any, grid: tuple[int, ...], calls: Calls) -> _Cost:
    # y is written once; what the vendor's product then reads of it is that launch's.
    particles = grid[1]
    padded = grid[0] * a.BLOCK_M * a.BLOCK_N * a.RANK_STEPS * a.BLOCK_R
    moved = _bytes(a.s_ptr, a.q_ptr, a.bias_ptr, a.y_ptr)
    least = Work(2.0 * particles * a.rows * a.cols * a.rank, moved)
    return least, Work(2.0 * particles * padded, moved), grid[0] * particles


def _pass(a: Any, grid: tuple[int, ...], calls: Calls) -> _Cost:
    products = a.SHRINK + a.OUTER
    columns, members = grid[1] * a.BLOCK_R, grid[2]
    padded = _up(a.rows, a.BLOCK_M) * _up(a.width, a.BLOCK_N) * columns * members
    least = 2.0 * products * a.particles * a.rows * a.width * a.rank
    moved = _bytes(a.g_ptr, a.f_ptr, a.shrunk_ptr, a.s_ptr)
    one = _bytes(a.partial_ptr[0]) if a.OUTER else 0
    does = Work(2.0 * products * padded, moved + _bytes(a.partial_ptr))
    return Work(least, moved + one), does, grid[0] * grid[1] * grid[2]


def _reduce(a: Any, grid: tuple[int, ...], calls: Calls) -> _Cost:
    least = Work(bytes=_bytes(a.partial_ptr[0], a.out_ptr))
    moved = _bytes(a.partial_ptr, a.out_ptr)
    return least, Work(bytes=moved, flops32=a.partial_ptr.numel()), grid[0]


def _grams(a: Any, calls: Calls) -> int:
    """Entries of all Gram matrices, in one part."""
    return 2 * a.layers * (a.particles * calls.rank) ** 2


def _gram_partial(a: Any, grid: tuple[int, ...], calls: Calls) -> _Cost:
    factors = 4 * a.particles * calls.rank * calls.widths
    pairs = a.tiles * (a.tiles + 1) // 2
    # Each pair of particles once; in tiles, each pair of tiles.
    least = a.particles * (a.particles + 1) * calls.rank**2 * calls.widths
    flops = 2 * pairs * a.BLOCK**2 * calls.widths
    return (
        Work(bytes=factors + 8 * _grams(a, calls), flops64=least),
        Work(bytes=factors + _bytes(a.work), flops64=flops),
        grid[0] // a.tiles**2 * pairs,
    )


def _gram_trace(a: Any, grid: tuple[int, ...], calls: Calls) -> _Cost:
    grams = _grams(a, calls)
    least = Work(bytes=8 * grams + _bytes(a.out), flops64=grams)
    does = Work(bytes=_bytes(a.work, a.out), flops64=grams + a.work.numel())
    return least, does, grid[0]


def _gram_weigh(a: Any, grid: tuple[int, ...], calls: Calls) -> _Cost:
    grams = _grams(a, calls)
    least = Work(bytes=16 * grams + _bytes(a.grad), flops64=grams)
    does = Work(bytes=_bytes(a.work, a.grad) + 8 * grams, flops64=grams + a.work.numel())
    return least, does, grid[0]


def _gram_apply(a: Any, grid: tuple[int, ...], calls: Calls) -> _Cost:
    n = a.particles * calls.rank
    mixed = {0: 0, 1: 1, 2: a.particles}[a.MIX]
    depth = _up(n, a.BLOCK_C) * (2 if a.MIX == 2 else 1)
    # Read and written; with MIX the gradients read as well.
    moved = 4 * n * calls.widths * (3 if a.MIX else 2) + 8 * _grams(a, calls)
    moved += _bytes(a.mix) if a.MIX else 0
    least = Work(bytes=moved, flops64=2 * n * (n + mixed) * calls.widths)
    flops = 2 * grid[0] * a.BLOCK_M * a.BLOCK_D * (depth + (a.MIX == 1))
    return least, Work(bytes=moved, flops64=flops), grid[0]


def _volume_forward(a: Any, grid: tuple[int, ...], calls: Calls) -> _Cost:
    k, entries = a.BLOCK_K, grid[0] * a.BLOCK_N * _up(a.C, a.LANES * a.V)
    moved = _bytes(a.logits_ptr, a.targets_ptr, a.value_ptr, a.stats_ptr, a.core_ptr)
    one = 0
    if a.SPLIT:
        moved, one = _bytes(a.logits_ptr, a.targets_ptr), _bytes(a.partial_ptr[0])
    # Beside the exponential: a maximum, a difference, a sum, and the target's mask. The running
    # maximum's rescaling comes once for V classes.
    scalar = entries * k * (EXP + 4 + EXP / a.V)
    gram = 2.0 * entries * k**2
    rescale = gram / a.V
    least = a.N * a.C * a.K * (EXP + a.K + 1.0)
    does = Work(bytes=moved + _bytes(a.partial_ptr), flops32=scalar + rescale)
    does += Work(launches=0, **{"flops64" if a.DOT else "flops32": gram})
    return Work(bytes=moved + one, flops32=least), does, grid[0] * grid[1]


def _volume_merge(a: Any, grid: tuple[int, ...], calls: Calls) -> _Cost:
    moved = _bytes(a.targets_ptr, a.value_ptr, a.stats_ptr, a.core_ptr)
    least = Work(bytes=moved + _bytes(a.partial_ptr[0]))
    return least, Work(bytes=moved + _bytes(a.partial_ptr)), grid[0]


def _loss_mean(a: Any, grid: tuple[int, ...], calls: Calls) -> _Cost:
    # Of the stats two of three, and one logit of every row: a sector of 32 bytes.
    moved = _bytes(a.targets_ptr, a.value_ptr, *a.stats_ptr[:2], a.nll_ptr)
    own = a.K * a.N
    least = Work(bytes=moved + own * a.logits_ptr.element_size())
    return least, Work(bytes=moved + 32 * own), grid[0]


def _volume_backward(a: Any, grid: tuple[int, ...], calls: Calls) -> _Cost:
    k, entries = a.BLOCK_K, grid[0] * a.BLOCK_N * _up(a.C, a.LANES * a.V)
    moved = _bytes(a.logits_ptr, a.targets_ptr, a.stats_ptr, a.core_ptr, a.out_ptr)
    # Beside the exponential: its argument, its norm, the offset, the product and the masks.
    scalar = Work(bytes=moved, flops32=float(entries * k * (EXP + 8)))
    core = Work(launches=0, **{"flops64" if a.DOT else "flops32": 2.0 * entries * k**2})
    least = a.N * a.C * a.K * (EXP + 2.0 * a.K)
    return Work(bytes=moved, flops32=least), scalar + core, grid[0] * grid[1]


def _pointer_table(a: Any, grid: tuple[int, ...], calls: Calls) -> _Cost:
    work = Work(0.0, 8.0 * len(a.pointers))
    return work, work, grid[0]


_COSTS: dict[str, Callable[[Any, tuple[int, ...], Calls], _Cost]] = {
    "_lora_linear_gemm_kernel": _gemm,
    "_lora_linear_expand_kernel": _expand,
    "_lora_linear_pass_kernel": _pass,
    "_lora_linear_reduce_kernel": _reduce,
    "_pointer_table_kernel": _pointer_table,
    "_lora_gram_partial_kernel": _gram_partial,
    "_lora_gram_trace_kernel": _gram_trace,
    "_lora_gram_weigh_kernel": _gram_weigh,
    "_lora_gram_apply_kernel": _gram_apply,
    "_volume_forward_kernel": _volume_forward,
    "_volume_merge_kernel": _volume_merge,
    "_particle_loss_mean_kernel": _loss_mean,
    "_volume_backward_kernel": _volume_backward,
}


# --- the tables ----------------------------------------------------------------------------------


def newest_record(folder: Path = RESULTS) -> tuple[str, dict[str, Any]] | None:
    """Name and content of the newest record that `python -m bench.gpu` wrote on a GPU."""
    records = [(file.stem, json.loads(file.read_text())) for file in folder.glob("*.json")]
    records = [(name, r) for name, r in records if r.get("kind") == "gpu"]
    return max(records, key=lambda named: named[1]["machine"]["date"], default=None)


def page() -> str:
    """What FLOORS.md ends with."""
    return f"## Operators\n\n{table()}\n\n## Kernels\n\n{kernel_table()}"


def table() -> str:
    """Markdown: a line an operator and size, with what the newest record measured."""
    from bench.gpu_cases import gpu_cases

    newest = newest_record()
    never = ", never run" if newest is None else ""
    measured = {} if newest is None else {(c["group"], c["name"]): c for c in newest[1]["cases"]}
    lines = [
        "| operator | sizes | GFLOP | MB | launches | predicted floor µs | of | our launches |"
        f" predicted µs{never} | goal | measured µs |",
        "|---|---|--:|--:|--:|--:|---|--:|--:|---|---|",
    ]
    shown = set()
    for case in sorted(gpu_cases(backends=()), key=lambda case: case.group):
        work = case.work
        # Some problems are measured again, with further peers.
        if work is None or (case.group, work) in shown:
            continue
        shown.add((case.group, work))
        goal = f"≤ {case.goal:g} × {case.yardstick[0]}" if case.goal else "–"
        ours = launches(work.calls)
        cells = (
            case.group,
            case.name,
            _number(_operations(work) / 1e9),
            _number(work.bytes / 1e6),
            str(work.launches),
            _number(floor(work) * 1e6),
            _bound(work),
            str(len(ours)),
            _number(sum(map(predict, ours)) * 1e6),
            goal,
            _measured(measured.get((case.group, case.name)), newest),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def kernel_table() -> str:
    """Markdown: a line for every kernel of a few problems, with all its launches there."""
    lines = [
        "| problem | kernel | launches | least GFLOP | GFLOP | least MB | MB | predicted floor µs |"
        " predicted µs, never timed alone | of |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|---|",
    ]
    for problem, work in problems():
        kernels: dict[str, list[Launch]] = {}
        for launch in launches(work.calls):
            kernels.setdefault(launch.name, []).append(launch)
        for name, group in kernels.items():
            least = sum((launch.least for launch in group), Work(launches=0))
            does = sum((launch.does for launch in group), Work(launches=0))
            seconds = sum(map(predict, group))
            overhead = LAUNCH * len(group)
            cells = (
                problem,
                f"`{name}`",
                str(len(group)),
                _number(_operations(least) / 1e9),
                _number(_operations(does) / 1e9),
                _number(least.bytes / 1e6),
                _number(does.bytes / 1e6),
                _number(sum(floor(launch.least) for launch in group) * 1e6),
                _number(seconds * 1e6),
                "launches" if 2 * overhead > seconds else _bound(does),
            )
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def problems() -> Iterator[tuple[str, Work]]:
    """One or two sizes of every operator, such that every kernel runs."""
    from multilora.tools.kernels.sizes import DECODER_BLOCK, VIT_B_BLOCK, VIT_ROWS

    linears = ((768, 2304, VIT_ROWS), (4096, 4096, 4096))
    for d_in, d_out, rows in linears:
        for passes in ("forward", "backward"):
            work = lora_linear(d_in, d_out, rows, 4, 16, False, passes)
            yield f"lora_linear {passes} {d_in}→{d_out} K4 T{rows} r16", work
    shared = lora_linear(*linears[0], 4, 16, True, "fwd + bwd")
    yield f"lora_linear fwd + bwd 768→2304 K4 T{VIT_ROWS} r16 shared x", shared
    models = (
        ("ViT-B, 72 linears", 12 * VIT_B_BLOCK, 8),
        ("7B, 224 linears", 32 * DECODER_BLOCK, 16),
    )
    for name, layers, rank in models:
        both = pairwise_frobenius(layers, 8, rank, "fwd + bwd")
        yield f"pairwise_frobenius fwd + bwd {name} K8 r{rank}", both
        yield f"SVGD update {name} K8 r{rank}", svgd_update(layers, 8, rank)
    for sizes in ((4, 1024, 100), (4, 64, 32000), (4, 1024, 32000)):
        yield (
            "particle_loss fwd + bwd K{} N{} C{}".format(*sizes),
            particle_loss(*sizes, "fwd + bwd"),
        )


def _operations(work: Work) -> float:
    return work.flops + work.flops64 + work.flops32


def _bound(work: Work) -> str:
    return "memory" if floor(work) == work.bytes / H200.bytes else "products"


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
    print(page())
