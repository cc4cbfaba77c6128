"""All cases: those of `python -m bench` on a CPU, and those of bench.gpu by what they belong to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from bench.case import Case
from bench.device import default_device
from bench.operators import (
    compiled_cases,
    cpu_cases,
    geometry_cases,
    linear_case,
    linear_sizes,
    llm_sizes,
    loss_case,
    loss_sizes,
    third_party_cases,
)
from bench.steps import compiled_steps, cpu_steps, gpu_steps
from multilora.ops.dispatch import available_backends

CASES = [*cpu_cases(), *cpu_steps()]


def gpu_cases(backends: Sequence[str] | None = None, tiny: bool = False) -> list[Case]:
    """The cases for a GPU, at its sizes or, with `tiny`, at sizes for a smoke test on a CPU.

    backends: those of multilora, each a peer; by default all that run here.
    """
    if backends is None:
        backends = available_backends(default_device().type)
    return [case for cases in families(backends, tiny).values() for case in cases]


def families(backends: Sequence[str], tiny: bool = False) -> dict[str, list[Case]]:
    """The cases by what they belong to, in the order of bench.plan."""
    vit, llm = linear_sizes(4, 16, tiny), llm_sizes(tiny)
    eight = linear_sizes(8, 8, tiny)
    shared = [replace(size, shared=True) for size in [*vit, *llm][:2]]
    both, forward, backward = "fwd + bwd", "forward", "backward"
    steps = gpu_steps(backends, tiny)
    return {
        "ViT-B linears": [
            linear_case(size, p, backends) for p in (both, forward, backward) for size in vit
        ],
        "LLM linears": [
            linear_case(size, p, backends) for p in (both, forward, backward) for size in llm
        ],
        "geometry": geometry_cases(backends, tiny),
        "particle loss": [
            loss_case(size, p, backends) for p in (both, forward) for size in loss_sizes(tiny)
        ],
        "more linears": [
            *(linear_case(size, p, backends) for size in eight for p in (both, forward)),
            *(linear_case(size, p, backends) for size in shared for p in (both, forward)),
            *(linear_case(size, backward, backends) for size in eight),
        ],
        "ViT-B steps": [case for case in steps if case.name.startswith("ViT")],
        "Llama steps": [case for case in steps if not case.name.startswith("ViT")],
        "compiled steps": compiled_steps(backends, tiny),
        "torch.compile": compiled_cases([*vit, *llm], backends, tiny),
        "other libraries": third_party_cases([*vit, *llm], backends),
    }
