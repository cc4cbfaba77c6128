"""A plan with planted faults, which bench/test_gpu.py runs in place of bench.plan on the CPU."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench import compare
from bench.case import Case, Unavailable
from bench.jobs import Context, Group, Job, Stage


def stages(device: str, tiny: bool, slow: float = 0.0) -> list[Stage]:
    # An illegal access ends the process without a word.
    aborts = _case("aborts", "one", os.abort)
    hangs = _case("hangs", "two", lambda: time.sleep(1000))
    raising = {
        "out of memory": lambda: _raise(torch.OutOfMemoryError("CUDA out of memory.")),
        "missing package": lambda: _raise(Unavailable("nothing is not installed")),
        "compile error": lambda: _raise(RuntimeError("ptxas: error\nand more")),
        "wrong": lambda: 1.5,
    }
    sound = [_job(_case(f"sound {i}", "four")) for i in range(4)]
    return [
        # Stands for the stage that looks at the machine.
        Stage("nothing", "", []),
        Stage(
            "faults",
            "",
            [
                Group("ends", [_job(aborts), _job(_case("beside it", "five"))]),
                Group("hangs", [_job(hangs, silence=10.0), _job(_case("behind it", "six"))]),
                Group("raises", [_job(_case(n, "seven", f)) for n, f in raising.items()]),
            ],
            at_once=3,
        ),
        Stage("sound", "", [Group("sound", [_slow(job, slow) for job in sound])]),
    ]


def _job(case: Case, silence: float = 45.0) -> Job:
    def run(context: Context) -> dict[str, Any]:
        arguments = (context.without, None, context.device, 0.0, context.note, context.beat)
        return compare.measure_case(case, *arguments)

    return Job(str(case), run, case.group, case.group.split()[0], 0.0, silence, case=case)


def _slow(job: Job, seconds: float) -> Job:
    def run(context: Context) -> dict[str, Any]:
        time.sleep(seconds)
        # Each run of a job leaves a line.
        with (Path(context.folder) / "ran").open("a") as file:
            file.write(f"{job.name}\n")
        return job.run(context)

    return Job(job.name, run, job.group, job.operator, 0.0, case=job.case)


def _case(name: str, operator: str, fault: Callable[[], Any] = lambda: 1.0) -> Case:
    """y = 2x, by one plain peer, by ours, and by a peer of ours with the fault."""

    def double(x: torch.Tensor, act: Callable[[], Any] = lambda: 1.0) -> Any:
        return lambda: {"y": 2.0 * x * act()}

    peers = {"plain": double, "multilora (sound)": double}
    peers["multilora (faulty)"] = partial(double, act=fault)
    return Case(f"{operator} forward", name, lambda dtype, _: torch.ones(3, dtype=dtype), peers)


def _raise(error: Exception) -> None:
    raise error
