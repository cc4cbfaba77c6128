"""A process in which Triton compiles: tests/conftest.py has its interpreter in this one."""

from __future__ import annotations

import importlib
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from typing import Any


class Child:
    """Calls functions of tests/compiled in one other process; what they raise is raised here."""

    def __init__(self):
        spawn = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(1, mp_context=spawn, initializer=_start)
        self._answers: dict[tuple, Any] = {}

    def call(self, name: str, *args: Any) -> Any:
        """module.function(*args) there; the same call is made once. args: hashable, picklable."""
        question = (name, args)
        if question not in self._answers:
            self._answers[question] = self._pool.submit(_call, name, args).result()
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
