"""The operators' cases at three scales: a CPU's, a GPU's, and tiny ones for a smoke test.

On a CPU, multilora's default is compared with plain PyTorch. On a GPU, every backend is a peer;
rows are in bfloat16 and factors in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

import multilora as ml
from bench import peers, roofline
from bench.case import OURS, Case, Repetition, Work
from bench.repetitions import (
    PASSES,
    Layers,
    LinearSize,
    base_gemm,
    compiled,
    copy_factors,
    copy_logits,
    distances_by_layer,
    distances_ours,
    linear_added,
    linear_loop,
    linear_merged,
    linear_ours,
    linear_peft,
    linear_quack,
    linear_stacked,
    linear_unsloth,
    logits_inputs,
    loss_of,
    on_backend,
    update_inputs,
    update_ours,
    update_plain,
)
from multilora.tools.kernels.sizes import (
    DECODER,
    DECODER_BLOCK,
    DECODER_BLOCKS,
    DECODER_ROWS,
    LOGITS,
    VIT_B,
    VIT_B_BLOCK,
    VIT_B_BLOCKS,
    VIT_ROWS,
)

if TYPE_CHECKING:
    from multilora.tools.kernels.calls import Problem


def by_default(make: Callable[[Any], Repetition]) -> dict[str, Callable[[Any], Repetition]]:
    """multilora with its default backend and with the reference, which is plain PyTorch."""
    return {"reference backend": partial(on_backend, "reference", make), OURS: make}


def on_each(
    backends: Sequence[str], make: Callable[[Any], Repetition]
) -> dict[str, Callable[[Any], Repetition]]:
    return {f"{OURS} ({backend})": partial(on_backend, backend, make) for backend in backends}


# --- a CPU's -------------------------------------------------------------------------------------


def cpu_cases() -> list[Case]:
    return [*_cpu_linears(), *_cpu_geometry(), *_cpu_losses()]


def _cpu_linears() -> list[Case]:
    # One 224×224 image per particle at ViT-B's widths; a batch of 16 at the digits ViT's.
    sizes = [LinearSize(*widths, 197) for widths in VIT_B]
    sizes += [LinearSize(48, 144, 16 * 5), LinearSize(48, 192, 16 * 5)]
    sizes += [LinearSize(*widths, 197, shared=True) for widths in VIT_B[:2]]
    makers = {
        "loop": linear_loop,
        "baddbmm": partial(linear_stacked, peers.lora_baddbmm),
        "vmap": partial(linear_stacked, peers.lora_vmap),
        OURS: partial(linear_stacked, linear_ours),
    }
    added = {**makers, OURS: partial(linear_stacked, linear_added)}
    groups = [("lora_linear", makers, sizes), ("lora_add", added, sizes[:4])]
    return [
        Case(
            f"{operator} {name}",
            str(size),
            size.inputs,
            {peer: wrap(make) for peer, make in makers.items()},
            ("base GEMM", partial(base_gemm, name)),
            work=_linear_work(size, name),
            half_precision=True,
        )
        for operator, makers, sizes in groups
        for name, wrap in PASSES.items()
        if name != "backward"
        for size in sizes
    ]


def _cpu_geometry() -> list[Case]:
    # The definition takes seconds for 12 layers, and the K² differences of its backward tens of GB.
    # For the linears of a ViT-B, the reference backend is the plain peer.
    few = [(768, 3072)] * VIT_B_BLOCKS
    many = [VIT_B[i] for i in (1, 0, 2, 3)] * VIT_B_BLOCKS
    found = []
    for passes, backward in (("forward", False), ("fwd + bwd", True)):
        ours = by_default(PASSES[passes](distances_ours))
        materialised = {
            "ΔW Gram GEMM": partial(distances_by_layer, peers.frobenius_by_gram, backward),
            "ΔW differences": partial(distances_by_layer, peers.frobenius_by_differences, backward),
        }
        goals = {}
        if not backward:
            broadcast = partial(distances_by_layer, peers.frobenius_by_broadcast, False)
            materialised["ΔW broadcast"] = broadcast
            goals = dict.fromkeys(("ΔW broadcast", "ΔW differences"), 100.0)
        found.append(_cpu_layers(passes, "768→3072", few, {**materialised, **ours}, goals))
        goals = {"reference backend": 2.0} if backward else {}
        found.append(_cpu_layers(passes, "of a ViT-B", many, ours, goals))
    return found


def _cpu_layers(
    passes: str,
    name: str,
    widths: list[tuple[int, int]],
    makers: dict[str, Callable[[Any], Repetition]],
    goals: dict[str, float],
) -> Case:
    layers = Layers(name, tuple(widths), 8, 8)
    return Case(
        f"pairwise_frobenius {passes}",
        f"{len(widths)} layers {name} K8 r8",
        layers.inputs,
        makers,
        ("copy of the factors", copy_factors),
        work=roofline.pairwise_frobenius(widths, 8, 8, passes),
        rate="bytes",
        goals=goals,
    )


def _cpu_losses() -> list[Case]:
    both = PASSES["fwd + bwd"]
    return [
        Case(
            "particle_loss fwd + bwd",
            f"K{k} N{rows} C{classes}",
            partial(logits_inputs, k, rows, classes),
            {
                "softmax, logdet": both(partial(loss_of, peers.particle_loss)),
                "mask, Cholesky": both(partial(loss_of, peers.particle_loss_masked)),
                **by_default(both(partial(loss_of, ml.particle_loss))),
            },
            ("copy of the logits", copy_logits),
            work=roofline.particle_loss(k, rows, classes, "fwd + bwd"),
            rate="bytes",
            half_precision=True,
            goals={"reference backend": goal},
        )
        for k, rows, classes, goal in (
            (4, 1024, 100, 5.0),
            (4, 64, 32000, 2.0),
            (8, 256, 10, 1.0),
        )
    ]


# --- lora_linear on a GPU ------------------------------------------------------------------------


def linear_sizes(particles: int, rank: int, tiny: bool) -> list[LinearSize]:
    """64 images of 224×224 per particle, at the widths of ViT-B."""
    if tiny:
        return [LinearSize(64, 96, 33, particles, rank, masters=True)]
    return [LinearSize(*w, VIT_ROWS, particles, rank, masters=True) for w in VIT_B]


def llm_sizes(tiny: bool) -> list[LinearSize]:
    if tiny:
        return [LinearSize(128, 64, 32, 4, 16, masters=True)]
    return [LinearSize(*w, DECODER_ROWS, 4, 16, masters=True) for w in DECODER]


def linear_case(size: LinearSize, passes: str, backends: Sequence[str]) -> Case:
    wrap = PASSES[passes]
    stacked = {"baddbmm": peers.lora_baddbmm, "vmap": peers.lora_vmap}
    if not size.shared:
        stacked["addmm"] = peers.lora_addmm
    makers = {"naive loop": wrap(linear_loop)}
    makers |= {name: wrap(partial(linear_stacked, function)) for name, function in stacked.items()}
    if passes != "backward":
        # PEFT can differentiate the active adapter only, so after a forward of all adapters there
        # is no backward.
        for autocast in (True, False):
            name = f"PEFT autocast_adapter_dtype={autocast}"
            makers[name] = partial(linear_peft, passes, autocast)
    if passes == "forward":
        makers["merged"] = linear_merged
    makers |= on_each(backends, wrap(partial(linear_stacked, linear_ours)))
    return Case(
        f"lora_linear {passes}",
        str(size),
        size.inputs,
        makers,
        ("base GEMM", partial(base_gemm, passes)),
        half_precision=True,
        work=_linear_work(size, passes),
        problem=partial(_linear_problem, size, passes),
        # Merging is for inference only: bfloat16 rounds a small ΔW away.
        asides=frozenset({"merged"}),
        cost=8.0 if size.d_in * size.d_out >= 4096**2 else 4.0,
        # The inputs, outputs and intermediate tensors in float64, and one peer's outputs.
        memory=48.0 * size.particles * size.rows * (size.d_in + size.d_out),
    )


def compiled_cases(sizes: Sequence[LinearSize], backends: Sequence[str], tiny: bool) -> list[Case]:
    """The best plain forms under torch.compile; they come late, because compiling takes long."""
    wrap = PASSES["fwd + bwd"]
    linear = partial(linear_stacked, compiled(peers.lora_baddbmm))
    loss = partial(loss_of, compiled(peers.particle_loss_masked))
    chosen = [
        (linear_case(sizes[1], "fwd + bwd", backends), linear),
        (loss_case(loss_sizes(tiny)[0], "fwd + bwd", backends), loss),
    ]
    return [
        replace(
            case,
            name=f"{case.name}, torch.compile",
            peers={**case.peers, "compiled": wrap(make)},
            cost=40.0,
        )
        for case, make in chosen
    ]


def third_party_cases(sizes: Sequence[LinearSize], backends: Sequence[str]) -> list[Case]:
    """Libraries that change PyTorch or transformers when imported; they come last."""
    others = {"unsloth matmul_lora": linear_unsloth, "quack gemm_add": linear_quack}
    found = []
    for size in sizes[1::3]:
        case = linear_case(size, "forward", backends)
        name = f"{case.name}, other libraries"
        found.append(replace(case, name=name, peers={**case.peers, **others}))
    return found


# --- particle loss on a GPU ----------------------------------------------------------------------

#: K, N, C
LossSize = tuple[int, int, int]


def loss_sizes(tiny: bool) -> list[LossSize]:
    if tiny:
        return [(4, 16, 10), (4, 4, 100)]
    return LOGITS


def loss_case(size: LossSize, passes: str, backends: Sequence[str]) -> Case:
    wrap = PASSES[passes]
    k, rows, classes = size
    functions = {
        "softmax, logdet": peers.particle_loss,
        "mask, Cholesky": peers.particle_loss_masked,
    }
    makers = {name: wrap(partial(loss_of, f)) for name, f in functions.items()}
    makers |= on_each(backends, wrap(partial(loss_of, ml.particle_loss)))
    return Case(
        f"particle_loss {passes}",
        f"K{k} N{rows} C{classes}",
        partial(logits_inputs, k, rows, classes),
        makers,
        ("copy of the logits", copy_logits),
        half_precision=True,
        work=roofline.particle_loss(k, rows, classes, passes),
        problem=partial(_loss_problem, size, passes),
        memory=64.0 * k * rows * classes,
    )


# --- geometry and SVGD's update on a GPU ---------------------------------------------------------


def _models(tiny: bool) -> list[Layers]:
    if tiny:
        return [Layers("tiny", ((16, 24), (24, 16), (16, 24)), 4, 4)]
    decoder = tuple(DECODER_BLOCK)
    return [
        Layers("ViT-B", VIT_B_BLOCKS * tuple(VIT_B_BLOCK), 8, 8),
        Layers("7B decoder", DECODER_BLOCKS * decoder, 8, 16),
        Layers("a block of a 7B decoder", decoder, 8, 16),
    ]


def geometry_cases(backends: Sequence[str], tiny: bool) -> list[Case]:
    found = []
    for layers in _models(tiny):
        found += [geometry_case(layers, passes, backends) for passes in ("forward", "fwd + bwd")]
        found.append(update_case(layers, backends))
    return found


def geometry_case(layers: Layers, passes: str, backends: Sequence[str]) -> Case:
    plain = {"factor products": peers.frobenius_by_factors}
    # The ΔW of a whole 7B decoder take seconds per call.
    if len(layers.widths) < 100:
        plain = {"ΔW Gram GEMM": peers.frobenius_by_gram, **plain}
    makers = {
        name: partial(distances_by_layer, function, passes != "forward")
        for name, function in plain.items()
    }
    makers |= on_each(backends, PASSES[passes](distances_ours))
    return Case(
        f"pairwise_frobenius {passes}",
        str(layers),
        layers.inputs,
        makers,
        ("copy of the factors", copy_factors),
        work=roofline.pairwise_frobenius(layers.widths, layers.particles, layers.rank, passes),
        problem=partial(
            _layers_problem, layers, tuple(_CALLS_OF_DISTANCES[p] for p in _halves(passes))
        ),
        cost=6.0,
        memory=layers.memory,
    )


def update_case(layers: Layers, backends: Sequence[str]) -> Case:
    return Case(
        "SVGD update",
        str(layers),
        partial(update_inputs, layers),
        {"factor products": update_plain, **on_each(backends, update_ours)},
        ("copy of the factors", lambda i: copy_factors(i.geometry)),
        work=roofline.svgd_update(layers.widths, layers.particles, layers.rank),
        problem=partial(_layers_problem, layers, ("distances", "update")),
        cost=6.0,
        memory=layers.memory,
    )


# --- what is to be compiled ----------------------------------------------------------------------

# Functions import calls: it imports Triton, which is optional.

#: What the passes of pairwise_frobenius call.
_CALLS_OF_DISTANCES = {"forward": "distances", "backward": "backward"}


def _halves(passes: str) -> tuple[str, ...]:
    return ("forward", "backward") if passes == "fwd + bwd" else (passes,)


def _linear_work(size: LinearSize, passes: str) -> Work:
    shape = (size.d_in, size.d_out, size.rows, size.particles, size.rank, size.shared)
    return roofline.lora_linear(*shape, passes)


def _linear_problem(size: LinearSize, passes: str) -> Problem:
    from multilora.tools.kernels import calls

    sizes = (size.particles, size.rows, size.d_in, size.d_out, size.rank)
    return calls.linear(*sizes, torch.bfloat16, size.shared, _halves(passes))


def _loss_problem(size: LossSize, passes: str) -> Problem:
    from multilora.tools.kernels import calls

    return calls.loss(*size, torch.bfloat16, calls=_halves(passes))


def _layers_problem(layers: Layers, called: tuple[str, ...]) -> Problem:
    from multilora.tools.kernels import calls

    sizes = (layers.widths, layers.particles, layers.rank)
    return calls.geometry(layers.name, *sizes, torch.float32, called)
