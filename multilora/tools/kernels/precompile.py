"""Triton's cache on disk, filled before the first step.

The host functions run on meta tensors, as in `compile`; each launch is compiled as the first step
would compile it, so that the step finds the code in the cache. Several processes can share the
work: each goes through all launches and compiles its share of those that Triton tells apart.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton import knobs

from multilora.attach import get_particle_model
from multilora.ops import triton as backend
from multilora.ops._library import compute_on
from multilora.ops.triton import common
from multilora.ops.triton.common import Chip
from multilora.tools.kernels import calls
from multilora.tools.kernels.calls import Problem
from multilora.tools.kernels.compile import as_on_a_gpu, playing


@dataclass
class Filled:
    """The codes that were compiled and those that the cache already had.

    launches: all launches, of which many need the same code. failures: "kernel, problem" -> what
    Triton said. launchers: why an older Triton makes its C launchers at the first launch only, or
    None if there is nothing left to make.
    """

    compiled: int = 0
    present: int = 0
    launches: int = 0
    failures: dict[str, str] = field(default_factory=dict)
    launchers: str | None = None

    def add(self, other: Filled) -> None:
        self.compiled += other.compiled
        self.present += other.present
        self.launches += other.launches
        self.failures |= other.failures
        self.launchers = self.launchers or other.launchers


def fill(chip: Chip, problems: list[Problem], jobs: int) -> Filled:
    """Compile every launch of the problems into Triton's cache (TRITON_CACHE_DIR), without a GPU.

    Raises:
        RuntimeError: in Triton's interpreter, which compiles nothing.
    """
    if common.INTERPRETED.value:
        raise RuntimeError("TRITON_INTERPRET is set: the interpreter does not compile; unset it")
    if jobs == 1:
        return _fill_share(chip, problems, 1, 0)
    total = Filled()
    # Spawned, not forked: a copy of a process that has threads, or a GPU, may hang.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=spawn) as pool:
        for part in pool.map(partial(_fill_share, chip, problems, jobs), range(jobs)):
            total.add(part)
    return total


def _fill_share(chip: Chip, problems: list[Problem], jobs: int, job: int) -> Filled:
    filling = Filling(jobs, job)
    with playing(chip, filling.compile):
        filling.run(problems)
    return filling.filled


def fill_here(
    problems: Iterable[Problem], beat: Callable[[str], None] = lambda kernel: None
) -> Filled:
    """Compile every launch of the problems for the current GPU, in this process.

    Args:
        beat: is called with a kernel's name before each compilation.

    Raises:
        RuntimeError: in Triton's interpreter, which compiles nothing.
    """
    if common.INTERPRETED.value:
        raise RuntimeError("Triton's interpreter compiles nothing")
    chip = common.chip(torch.device("cuda", torch.cuda.current_device()))
    filling = Filling(beat=beat)
    common.compile_only(chip, filling.compile)
    try:
        filling.run(problems)
    finally:
        common.compile_only(None, None)
    return filling.filled


class Filling:
    """Compiles launches, the `job`-th of `jobs` shares of those that Triton tells apart."""

    def __init__(
        self, jobs: int = 1, job: int = 0, beat: Callable[[str], None] = lambda kernel: None
    ):
        self.jobs, self.job, self.beat = jobs, job, beat
        self.filled = Filled()
        self._problem: Problem | None = None
        # Each specialisation and the process whose share it is.
        self._seen: dict[Any, int] = {}
        self._done: set[Any] = set()

    def run(self, problems: Iterable[Problem]) -> None:
        """Run the problems' host functions, whose launches must come to `compile`."""
        before = knobs.compilation.listener
        knobs.compilation.listener = self._count
        try:
            for self._problem in problems:
                self._problem.run()
        finally:
            knobs.compilation.listener = before

    def compile(self, kernel: Any, grid: tuple[int, ...], args: Any, meta: dict[str, Any]) -> None:
        self.filled.launches += 1
        args = as_on_a_gpu(args)
        key = (kernel.__name__, specialisation(args), tuple(meta.items()))
        if self._seen.setdefault(key, len(self._seen) % self.jobs) != self.job:
            return
        if key in self._done:
            return
        self._done.add(key)
        self.beat(kernel.__name__)
        try:
            compiled = kernel.warmup(*args, grid=grid, **meta)
            self.filled.launchers = self.filled.launchers or _make_launcher(compiled)
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
            self.filled.failures[f"{kernel.__name__}, {self._problem}"] = why

    def _count(self, cache_hit: bool, **_: Any) -> None:
        self.filled.present += cache_hit
        self.filled.compiled += not cache_hit


def specialisation(arg: Any) -> Any:
    """The properties by which Triton specialises on an argument; for some, a little more."""
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
    """Compile the function that calls the code: Triton 3.6 has one in C for each signature."""
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
    """The operators in a training step of a timm model: those that its layers call in a forward
    and a backward, the loss, and the geometry of all layers."""
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
    # Both take seconds to import, which the other problems can do without; timm is optional.
    import peft
    import timm

    with torch.device("meta"):
        try:
            base = timm.create_model(name, pretrained=False, num_classes=classes).eval().to(dtype)
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
            raise RuntimeError(f"timm could not create {name!r}: {why}") from error
        config = peft.LoraConfig(r=rank, target_modules=list(targets))
        model = get_particle_model(base, config, particles, check_isolation=False)
        about: Any = base.default_cfg
        x = torch.empty(batch, *about["input_size"], dtype=dtype)
    with _HostFunctions():
        model(x).sum().backward()
    adapters = model.adapters()
    layers = [(a.lora_A.shape[2], a.lora_B.shape[1]) for a in adapters]
    master = adapters[0].lora_A.dtype
    calls.geometry(name, layers, particles, rank, master, ("distances", "update")).run()
    calls.loss(particles, batch, classes, dtype, calls=("forward", "backward")).run()


class _HostFunctions(TorchDispatchMode):
    """Inside, operators on meta tensors also call the host functions of their kernels."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace == "multilora":
            compute_on(backend, func._opname, *args)
        return func(*args, **(kwargs or {}))
