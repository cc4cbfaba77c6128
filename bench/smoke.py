"""Whether every kernel is right: small and odd sizes against float64, repeats bit by bit.

One job per problem, dtype and backend. Outputs are poisoned before; what fails is not timed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from bench.case import OURS, Case, Unavailable
from bench.check import check, outputs_of, reason
from bench.device import check_device
from bench.jobs import Context, Group, Job
from bench.operators import LossSize, geometry_case, linear_case, loss_case, update_case
from bench.repetitions import Layers, LinearSize
from multilora import BackendUnavailableError
from multilora.tools.kernels.sizes import VIT_B

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
REPEATS = 20

#: The pass over dY with both thin products, as Hopper gets it: M 64, N 16 with transposed operands,
#: and its tall form. First, because a descriptor that starts inside a swizzle atom is unusual.
PASSES = [
    LinearSize(768, 768, 500, 4, 16, masters=True),
    LinearSize(768, 768, 500, 4, 8, masters=True),
    LinearSize(768, 2304, 12608, 4, 16, masters=True),
]
#: Odd and ragged, thin, high ranks, shared rows; one of ViT-B's; one for the vendor's GEMM.
LINEARS = [
    LinearSize(64, 96, 33, 4, 16, masters=True),
    LinearSize(40, 77, 72, 3, 3, masters=True),
    LinearSize(588, 767, 250, 3, 80, masters=True),
    LinearSize(1, 1, 1, 2, 1, masters=True),
    LinearSize(128, 128, 1, 1, 1, masters=True),
    LinearSize(768, 2304, 397, 4, 16, masters=True),
    LinearSize(3072, 768, 200, 8, 8, masters=True),
    LinearSize(256, 512, 300, 2, 8, True, masters=True),
    LinearSize(768, 768, 197, 4, 64, True, masters=True),
    LinearSize(4096, 4096, 65, 4, 16, masters=True),
]
LOSSES: list[LossSize] = [
    (2, 1, 3),
    (4, 16, 10),
    (3, 7, 5),
    (5, 9, 3),
    (8, 33, 1000),
    (16, 20, 130),
    (32, 12, 50),
    (4, 64, 32000),
    (8, 256, 10),
]
GEOMETRIES = [
    Layers("small", ((16, 24), (24, 16), (16, 24)), 4, 4),
    Layers("odd", ((77, 130), (1, 3)), 5, 3),
    Layers("smallest", ((1, 1),), 1, 1),
    Layers("many particles", ((512, 2048),), 20, 4),
    Layers("a block of a ViT-B", tuple(VIT_B), 8, 8),
]


def groups(backends: Sequence[str], tiny: bool) -> list[Group]:
    """A group for what shares kernels; those of the first group are the riskiest."""
    found = []
    for backend in sorted(backends, key=lambda name: name != "triton"):
        few = slice(None, 3) if tiny else slice(None)
        passes = [] if tiny else PASSES
        linear = partial(_linear_jobs, backend)
        found += [
            Group(
                f"smoke: lora_linear bf16 ({backend})", [*linear([*passes, *LINEARS[few]], BF16)]
            ),
            Group(
                f"smoke: lora_linear, other dtypes ({backend})",
                [job for dtype in (FP16, FP32, FP64) for job in linear(LINEARS[few][:8], dtype)],
            ),
            Group(
                f"smoke: particle_loss ({backend})",
                [
                    job
                    for dtype in (BF16, FP32)
                    for job in _jobs(
                        backend,
                        dtype,
                        [
                            (str(case), case)
                            for size in LOSSES[few]
                            for p in ("forward", "fwd + bwd")
                            for case in [_with(backend, partial(loss_case, size, p))]
                        ],
                    )
                ],
            ),
            Group(
                f"smoke: geometry ({backend})",
                [
                    job
                    for dtype in (FP32, FP64)
                    for job in _jobs(backend, dtype, _geometry(backend, GEOMETRIES[few]))
                ],
            ),
        ]
    return found


def _with(backend: str, make: Callable[[list[str]], Case]) -> Case:
    """The case with its oracle, one plain peer for the scale of errors, and this backend."""
    case = make([backend])
    plain = [name for name in case.peers if not name.startswith(OURS)][:2]
    return replace(case, peers={name: case.peers[name] for name in (*plain, f"{OURS} ({backend})")})


def _linear_jobs(backend: str, sizes: list[LinearSize], dtype: torch.dtype) -> Iterator[Job]:
    found = [
        (str(case), case)
        for size in sizes
        for passes in ("forward", "fwd + bwd")
        for case in [_with(backend, partial(linear_case, size, passes))]
    ]
    return _jobs(backend, dtype, found)


def _geometry(backend: str, layers: list[Layers]) -> list[tuple[str, Case]]:
    found = []
    for one in layers:
        for passes in ("forward", "fwd + bwd"):
            found.append(_with(backend, partial(geometry_case, one, passes)))
        if one.particles > 1:
            found.append(_with(backend, partial(update_case, one)))
    return [(str(case), case) for case in found]


def _jobs(backend: str, dtype: torch.dtype, found: list[tuple[str, Case]]) -> Iterator[Job]:
    word = str(dtype).removeprefix("torch.")
    for name, case in found:
        yield Job(
            f"smoke: {name}, {word} ({backend})",
            partial(right, case, backend, dtype),
            operator=f"smoke: {case.group.split()[0]}",
            seconds=1.0,
            memory=case.memory,
        )


def right(case: Case, backend: str, dtype: torch.dtype, context: Context) -> dict[str, Any]:
    """The record of one problem: the worst error of each peer, what failed, whether repeats of the
    backend give the same bits."""
    ours, device = f"{OURS} ({backend})", context.device
    record: dict[str, Any] = {
        "group": case.group,
        "backend": backend,
        "dtype": str(dtype).removeprefix("torch."),
        "failures": {},
        "skipped": {},
    }
    if ours in context.without:
        return record | {"failures": {ours: context.without[ours]}}
    inputs = case.inputs(dtype, device)
    runs = {}
    for name, make in case.peers.items():
        context.note(name)
        try:
            runs[name] = make(inputs)
        except Unavailable as error:
            record["skipped"][name] = str(error)
        except Exception as error:
            record["failures"][name] = reason(error)
            check_device(error, device)
    if ours not in runs:
        return record
    context.note(ours)
    try:
        checked = check(case, runs, dtype, device)
    except BackendUnavailableError as refusal:
        record["skipped"][ours] = str(refusal)
        return record
    record["errors"] = {name: max(errors.values()) for name, errors in checked.errors.items()}
    # A plain peer is only there for the scale: fp16 overflows in some, which is not our failure.
    if ours in checked.failures:
        record["failures"][ours] = checked.failures[ours]
        check_device(RuntimeError(checked.failures[ours]), device)
        return record
    first = outputs_of(runs[ours])
    changed = set()
    for _ in range(2 if context.tiny else REPEATS):
        again = outputs_of(runs[ours])
        changed |= {name for name in first if not torch.equal(first[name], again[name])}
        context.beat(ours)
    record["repeatable"] = {ours: not changed}
    if changed:
        record["failures"][ours] = f"other bits in a repeat: {', '.join(sorted(changed))}"
    return record
