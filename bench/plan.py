"""The order of the first GPU hour: what teaches most comes first.

`python -m bench.gpu --plan` prints it; docs/gpu.md explains it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from bench import compare, many_runs, outside, probes, profiles, smoke
from bench.case import Case, Unavailable, is_ours
from bench.cases import families
from bench.jobs import Context, Group, Job, Stage
from bench.operators import linear_sizes, llm_sizes
from bench.record import machine
from multilora.ops.dispatch import BACKENDS, available_backends, missing_reason

#: Groups of the correctness stage that run at the same time.
AT_ONCE = 8
#: Processes that fill Triton's cache for the sizes that follow.
COMPILERS = 4
#: The Bella paper's Table 2 has their memory: 4.48, 5.19, 4.50 and 4.63 GB.
CLIP_PARTICLES = (3, 100, 5, 20)
#: The files of tests/gpu. Determinism, and graphs captured by hand, are checked with every case.
GPU_TESTS = {
    "torch.compile": "test_compiled_graphs.py",
    "large offsets": "test_large_offsets.py",
}


def stages(device: str, tiny: bool, tests: bool = True) -> list[Stage]:
    """The plan for a device, "cuda" or "cpu". On a GPU all GPU backends take part: a missing one is
    recorded with the reason, not left out."""
    backends = ["reference", "triton", "cuda"] if device == "cuda" else available_backends("cpu")
    cases = families(backends, tiny)
    timed = partial(Group, ceilings=True)

    def group(name: str) -> Group:
        return timed(name, [case_job(case) for case in cases[name]])

    found = [
        machine_stage(),
        Stage(
            "ceilings",
            "what the card reaches, and what users get today",
            [
                Group("ceilings", [Job("ceilings", partial(_ceilings, tiny), seconds=12.0)]),
                timed("plain peers", _plain_jobs(tiny)),
            ],
            background=_build(device),
        ),
        Stage(
            "correctness",
            "which kernels launch, are right, repeat, do not hang",
            [*smoke.groups(backends, tiny), *_probe_groups(backends)],
            at_once=AT_ONCE,
            background=_compile_ahead(device),
        ),
        Stage("ViT-B", "ratios to the base GEMM; host or device", [group("ViT-B linears")]),
        Stage("LLM", "the same at 7B widths", [group("LLM linears")]),
        Stage(
            "geometry, volume",
            "the other operators",
            [group("geometry"), group("particle loss"), group("more linears")],
        ),
        Stage(
            "whole steps",
            "what a training gains; memory of many particles",
            [
                group("ViT-B steps"),
                group("Llama steps"),
                group("compiled steps"),
                Group("programs", _program_jobs(tiny)),
            ],
        ),
    ]
    on_gpu = backends[1:] if device == "cuda" else []
    if on_gpu:
        found.append(Stage("profiles", "what holds a kernel back", [_profiles(on_gpu)]))
    rest = [group("torch.compile"), Group("large offsets", _gpu_test_jobs(backends))]
    if tests:
        rest.insert(0, Group("tests", [Job("tests", outside.tests, seconds=150.0)]))
    found.append(
        Stage("tests", "every operator test on the device", [*rest, group("other libraries")])
    )
    if on_gpu:
        found.append(Stage("sanitizer", "what memcheck says", [_sanitizer(on_gpu)]))
    unrelated = [Group("unrelated runs", _unrelated_jobs(tiny))]
    found.append(Stage("unrelated runs", "what many adapters of one's own gain", unrelated))
    return found


def _profiles(backends: Sequence[str]) -> Group:
    jobs = [
        Job(
            f"profile ({backend})",
            partial(profiles.profile, backend=backend),
            seconds=35.0,
            memory=20e9,
        )
        for backend in backends
    ]
    return Group("profiles", jobs)


def _sanitizer(backends: Sequence[str]) -> Group:
    jobs = [
        Job(
            f"{tool} ({backend})",
            partial(outside.sanitizer, tool=tool, backend=backend),
            seconds=30.0,
        )
        for backend in backends
        for tool in ("memcheck", "synccheck")
    ]
    return Group("sanitizer", jobs)


def case_job(case: Case) -> Job:
    compiles = case.name.endswith("torch.compile")
    return Job(
        str(case),
        partial(_case, case),
        group=case.group,
        operator=case.group.split()[0],
        seconds=case.cost,
        # The compiler reports nothing for a long time.
        silence=150.0 if compiles else 60.0 if case.stand_in is not None else 45.0,
        memory=case.memory,
        case=case,
    )


def _case(case: Case, context: Context) -> dict[str, Any]:
    seconds = 0.0 if context.tiny else case.cost / 2
    return compare.measure_case(
        case,
        context.without,
        context.ceilings,
        context.device,
        seconds,
        context.note,
        context.beat,
    )


def machine_stage() -> Stage:
    job = Job("machine", about, always=True)
    return Stage("machine", "which card, driver and versions", [Group("machine", [job])])


def about(context: Context) -> dict[str, Any]:
    """The machine, and which backends are available on it."""
    device = context.device
    result = {"failures": {}, "machine": machine(device), "backends": {}}
    for name in BACKENDS:
        result["backends"][name] = missing_reason(name) or "available"
    if device.type == "cuda":
        p = torch.cuda.get_device_properties()
        result["machine"] |= {
            "capability": 10 * p.major + p.minor,
            "processors": p.multi_processor_count,
            "memory_bytes": p.total_memory,
            "l2_bytes": p.L2_cache_size,
            "shared_bytes_opt_in": getattr(p, "shared_memory_per_block_optin", None),
            "devices": torch.cuda.device_count(),
            "cuda": torch.version.cuda,
        }
    return result


def _base_shapes(tiny: bool) -> list[tuple[int, int, int]]:
    """(rows, d_in, d_out) of every linear that is measured."""
    sizes = [*linear_sizes(4, 16, tiny), *llm_sizes(tiny)]
    return [(size.particles * size.rows, size.d_in, size.d_out) for size in sizes]


def _ceilings(tiny: bool, context: Context) -> dict[str, Any]:
    return {"failures": {}} | compare.measure_ceilings(context.device, tiny, _base_shapes(tiny))


def _plain_jobs(tiny: bool) -> list[Job]:
    """The reference backend and the best plain peers, before any kernel of ours has run."""
    found = families(["reference"], tiny)
    chosen: Sequence[Case] = [
        *(c for c in found["ViT-B linears"] if not c.group.endswith("backward")),
        *(c for c in found["LLM linears"] if c.group.endswith("fwd + bwd")),
        *(c for c in found["particle loss"] if c.group.endswith("fwd + bwd")),
        *found["geometry"][:3],
    ]
    jobs = []
    for case in chosen:
        plain = [name for name in case.peers if not is_ours(name)][:2]
        names = [*plain, "multilora (reference)"]
        few = replace(case, peers={n: case.peers[n] for n in names}, cost=case.cost / 2)
        jobs.append(replace(case_job(few), name=f"plain: {case}"))
    return jobs


def _build(device: str) -> list[Group]:
    """The build runs beside the ceilings, which need no processor; the correctness waits for it."""
    build = Job("build", outside.build, seconds=45.0, silence=30.0, always=True)
    return [Group("build", [build])] if device == "cuda" else []


def _compile_ahead(device: str) -> list[Group]:
    """Beside the correctness, and in every call, since another machine has an empty cache."""
    if device != "cuda":
        return []

    names = [f"compile ahead, {i + 1} of {COMPILERS}" for i in range(COMPILERS)]
    return [
        Group(
            name, [Job(name, partial(_compile_share, i), seconds=40.0, silence=90.0, always=True)]
        )
        for i, name in enumerate(names)
    ]


def _compile_share(share: int, context: Context) -> dict[str, Any]:
    """Compile a share of the launches. One that does not compile is recorded; the others go on."""
    missing = missing_reason("triton")
    if missing is not None:
        return {"failures": {}, "skipped": {"triton": missing}}
    # It imports Triton, which is optional.
    from multilora.ops.triton import common
    from multilora.tools.kernels.precompile import fill_here

    if common.INTERPRETED.value:
        raise Unavailable("Triton's interpreter compiles nothing")
    found = families(["triton"], context.tiny).values()
    makers = [case.problem for cases in found for case in cases if case.problem is not None]
    begun = time.time()
    filled = fill_here([make() for make in makers[share::COMPILERS]], context.beat)
    failures: dict[str, str] = {}
    for name, why in filled.failures.items():
        failures.setdefault(name.partition(",")[0], why.splitlines()[0][:300])
    return {
        "failures": failures,
        "launches": filled.launches,
        "codes": filled.compiled + filled.present,
        "seconds": time.time() - begun,
    }


def _ask(question: Any, backend: str, context: Context) -> dict[str, Any]:
    """A probe's answer for one backend, unless the probe ended its process before."""
    peer = f"multilora ({backend})"
    if peer in context.without:
        return {"failures": {peer: context.without[peer]}}
    context.note(peer)
    return question(backend, context.device, context.tiny)


def _probe_groups(backends: Sequence[str]) -> list[Group]:
    return [
        Group(
            f"probes ({backend})",
            [
                Job(f"probe: {name} ({backend})", partial(_ask, probe, backend), seconds=2.0)
                for name, probe in probes.PROBES.items()
            ],
        )
        for backend in sorted(backends, key=lambda name: name != "triton")
    ]


def _gpu_test_jobs(backends: Sequence[str]) -> list[Job]:
    return [
        Job(
            f"check: {name} ({backend})",
            partial(outside.gpu_tests, file=file, backend=backend),
            seconds=16.0,
            memory=40e9 if name == "large offsets" else 4e9,
        )
        for name, file in GPU_TESTS.items()
        for backend in backends
    ]


def _unrelated_jobs(tiny: bool) -> list[Job]:
    """Steps of unrelated runs against PEFT; `bench.many_runs` has more cases."""
    unequal = (1, 2) if tiny else many_runs.UNEQUAL
    equal = (1,) * 2 if tiny else (16,) * 8
    sizes = [("vit", equal), ("decoder", equal), ("decoder", unequal), ("experts", unequal)]
    cases = [many_runs.Training(name, rows, 1, 2 if tiny else 30) for name, rows in sizes]
    return [
        Job(str(case), partial(_unrelated, case), seconds=20.0, memory=8e9, silence=120.0)
        for case in cases
    ]


def _unrelated(case: many_runs.Training, context: Context) -> dict[str, Any]:
    dtype = torch.bfloat16 if context.device.type == "cuda" else torch.float32
    return many_runs.measure_training(case, dtype, context.device, context.tiny, "wall")


def _program_jobs(tiny: bool) -> list[Job]:
    jobs = [Job("multilora train", outside.train, seconds=25.0)]
    for k in () if tiny else CLIP_PARTICLES:
        name = f"CLIP ViT-B/32, K = {k}"
        jobs.append(Job(name, partial(outside.particles, count=k), seconds=15.0))
    return jobs
