"""Triton's cache on disk, filled before the first step, by several processes and without a GPU.

The host functions run on meta tensors, as in `compile`; each launch is then compiled as
it would be at a step's first call, so that this finds it. Every process goes through all launches
and compiles its share of those that Triton would tell apart.
"""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from multilora.ops import dispatch
from multilora.ops import triton as backend
from multilora.ops._library import compute_on
from multilora.ops.triton import common
from multilora.ops.triton.common import Chip
from multilora.tools.kernels.calls import Problem
from multilora.tools.kernels.compile import as_on_a_gpu, playing


@dataclass
class Filled:
    """How many codes were compiled, and were in the cache already; what Triton said where it could
    not; and why an older Triton's launchers are still to be made at the first launch, if they are.
    """

    compiled: int = 0
    present: int = 0
    failures: list[str] = field(default_factory=list)
    launchers: str | None = None


def fill(chip: Chip, problems: list[Problem], jobs: int) -> Filled:
    """Compile every launch of the problems into Triton's cache (TRITON_CACHE_DIR).

    Raises RuntimeError in Triton's interpreter, which compiles nothing.
    """
    if common.INTERPRETED.value:
        raise RuntimeError("TRITON_INTERPRET is set: the interpreter does not compile; unset it")
    if jobs == 1:
        return _share(chip, problems, 1, 0)
    total = Filled()
    # Not forked: a copy of a process that has threads, or a GPU, may hang.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=spawn) as pool:
        for part in pool.map(partial(_share, chip, problems, jobs), range(jobs)):
            total.compiled += part.compiled
            total.present += part.present
            total.failures += part.failures
            total.launchers = total.launchers or part.launchers
    return total


def _share(chip: Chip, problems: list[Problem], jobs: int, job: int) -> Filled:
    from triton import knobs

    filled, seen = Filled(), {}

    def count(cache_hit: bool, **_: Any) -> None:
        filled.present += cache_hit
        filled.compiled += not cache_hit

    def compile_launch(kernel: Any, grid: tuple[int, ...], args: Any, meta: dict[str, Any]) -> None:
        args = as_on_a_gpu(args)
        key = (kernel.__name__, specialisation(args), tuple(meta.items()))
        if seen.setdefault(key, len(seen) % jobs) != job or key in done:
            return
        done.add(key)
        try:
            compiled = kernel.warmup(*args, grid=grid, **meta)
            filled.launchers = filled.launchers or _make_launcher(compiled)
        except Exception as error:
            filled.failures.append(f"{kernel.__name__}, {problem}: {type(error).__name__}: {error}")

    done: set[Any] = set()
    before = knobs.compilation.listener
    knobs.compilation.listener = count
    try:
        with playing(chip, compile_launch):
            for problem in problems:
                problem.run()
    finally:
        knobs.compilation.listener = before
    return filled


def specialisation(arg: Any) -> Any:
    """What Triton tells arguments apart by; for some a little more than it."""
    if isinstance(arg, Tensor):
        return arg.dtype, arg.data_ptr() % 16 == 0
    if isinstance(arg, tuple):
        return tuple(map(specialisation, arg))
    if type(arg) is int:
        return "int", arg == 1, arg % 16 == 0, -(2**31) <= arg < 2**31
    if hasattr(arg, "block_shape"):
        return arg.base.dtype, tuple(arg.block_shape)
    return arg


def _make_launcher(compiled: Any) -> str | None:
    """Compile what calls the code, where Triton has a C function for each signature (3.6)."""
    from triton.backends.nvidia import driver

    if not hasattr(driver, "make_launcher"):
        return None
    try:
        driver.CudaLauncher(compiled.src, compiled.metadata)
    except Exception as error:
        return str(error)
    return None


def model_problem(
    name: str,
    targets: list[str],
    particles: int,
    rank: int,
    batch: int,
    dtype: torch.dtype,
    classes: int,
) -> Problem:
    """The operators of the steps of a timm model: those that its layers call in a forward and a
    backward, and the loss and the geometry of all of them."""
    sizes = (name, tuple(targets), particles, rank, batch, dtype, classes)
    return Problem(f"{name} K{particles} r{rank} B{batch}", dtype, partial(_run_model, *sizes))


def _run_model(
    name: str,
    targets: tuple[str, ...],
    particles: int,
    rank: int,
    batch: int,
    dtype: torch.dtype,
    classes: int,
) -> None:
    import peft

    from multilora.app.tasks.images import create_base
    from multilora.attach import get_particle_model

    with torch.device("meta"):
        base = create_base(name, classes, False).to(dtype)
        config = peft.LoraConfig(r=rank, target_modules=list(targets))
        model = get_particle_model(base, config, particles, check_isolation=False)
        x = torch.empty(batch, *base.default_cfg["input_size"], dtype=dtype)
        targets_of_rows = torch.empty(batch, dtype=torch.int64)
    with dispatch.use_backend("triton"), _HostFunctions():
        model(x).sum().backward()
    adapters = model.adapters()
    lora_A, lora_B = [a.lora_A.detach() for a in adapters], [a.lora_B.detach() for a in adapters]
    scaling = [a.scaling for a in adapters]
    D = backend.traces(lora_A, lora_B, scaling, True)
    factors = lora_A + lora_B
    backend.factor_gradients(D.double(), lora_A, lora_B, scaling, D[:, 0], factors)
    logits = torch.empty(particles, batch, classes, dtype=dtype, device="meta")
    nll, divergence, *saved, count = backend.volume(logits, targets_of_rows, 1e-4, "logdet", True)
    backend.volume_backward(divergence, logits, targets_of_rows, *saved, nll, count)


class _HostFunctions(TorchDispatchMode):
    """Inside, operators on meta tensors call their kernels' host functions too."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace == "multilora":
            compute_on(backend, func._opname, *args)
        return func(*args, **(kwargs or {}))
