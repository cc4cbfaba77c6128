"""A process in which Triton compiles: tests/conftest.py has its interpreter in this one."""

from __future__ import annotations

import importlib
import multiprocessing
import os
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

MODES = ("late", "random")


class Child:
    """Calls functions of tests/compiled in one other process; what they raise is raised here."""

    def __init__(self):
        spawn = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(1, mp_context=spawn, initializer=_start)
        self._answers: dict[tuple, Any] = {}

    def ask(self, name: str, *args: Any) -> Any:
        """module.function(*args) there."""
        return self._pool.submit(_call, name, args).result()

    def call(self, name: str, *args: Any) -> Any:
        """The same, but a call with the same arguments (hashable) is made once."""
        question = (name, args)
        if question not in self._answers:
            self._answers[question] = self.ask(name, *args)
        return self._answers[question]

    def close(self) -> None:
        self._pool.shutdown()


def _start() -> None:
    # Before Triton is imported.
    os.environ["TRITON_INTERPRET"] = "0"
    import torch

    torch.set_num_threads(1)


def _call(name: str, args: tuple) -> Any:
    module, function = name.split(".")
    return getattr(importlib.import_module(f"compiled.{module}"), function)(*args)


def check(errors: dict[str, float], most: float) -> None:
    """No error is NaN or larger than `most`."""
    assert all(error <= most for error in errors.values()), errors


def cross(cases: Iterable[str], on_hopper_only: set[str]) -> list[tuple[str, int, str]]:
    """(case, capability, mode) of every test."""
    chips = {case: (90,) if case in on_hopper_only else (80, 90) for case in cases}
    return [(case, chip, mode) for case in cases for chip in chips[case] for mode in MODES]


def cover(child: Child, modules: list[str], expected: dict[str, dict[str, set]]) -> None:
    """`expected` names all kernels of the modules, and each was executed with all these values."""
    launched = set().union(*(child.call("problems.kernels_of", module) for module in modules))
    assert launched == set(expected)
    executed = child.ask("problems.executed_with")
    for kernel, constants in expected.items():
        assert kernel in executed
        for name, values in constants.items():
            assert values <= executed[kernel][name], (kernel, name, executed[kernel][name])
