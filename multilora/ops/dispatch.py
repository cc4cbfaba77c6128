"""Which backend computes an operator: one switch, one point of decision."""

import contextlib
import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

#: Every backend that multilora knows by name, and the module that holds its kernels.
#: None: this version has no such kernels.
BACKENDS: dict[str, str | None] = {
    "reference": "multilora.ops.reference",
    "cpu": None,
    "triton": "multilora.ops.triton",
    "cuda": None,
}

# A plain global, not a context variable: CUDA's backward runs on autograd's own thread.
_requested: str | None = os.environ.get("MULTILORA_BACKEND") or None


class BackendUnavailableError(RuntimeError):
    """A backend was asked for by name and cannot run here; the message says why."""


def missing_reason(name: str) -> str | None:
    """Why backend `name` cannot be used, or None where it can."""
    if name not in BACKENDS:
        return f"there is no backend of that name; the names are {', '.join(BACKENDS)}"
    if BACKENDS[name] is None:
        return "this version of multilora has no kernels for it"
    if name == "triton":
        return _missing_triton()
    return None


@functools.cache
def _missing_triton() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if _interpreting():
        return None
    if not torch.cuda.is_available():
        return (
            "PyTorch sees no GPU (with TRITON_INTERPRET=1 in the environment from the start, the "
            "kernels run on the CPU, slowly, for tests)"
        )
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        return f"the kernels need compute capability 8.0 or newer; this GPU has {major}.{minor}"
    return None


@functools.cache
def _interpreting() -> bool:
    import triton

    return bool(triton.knobs.runtime.interpret)


def available_backends() -> list[str]:
    """The backends that can be asked for here, by name."""
    return [name for name in BACKENDS if missing_reason(name) is None]


def _require(name: str) -> None:
    reason = missing_reason(name)
    if reason is not None:
        raise BackendUnavailableError(
            f"backend {name!r} was asked for (use_backend or MULTILORA_BACKEND), but {reason}; "
            f"available here: {', '.join(available_backends())}"
        )


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every multilora operator inside the `with` block on one backend.

    name: "reference" | "cpu" | "triton" | "cuda". The environment variable MULTILORA_BACKEND
    does the same for a whole process. The choice is process-wide, threads included.

    Raises BackendUnavailableError, with the reason, where that backend cannot run here: an
    explicit request never falls back to another backend.
    """
    global _requested
    _require(name)
    previous, _requested = _requested, name
    try:
        yield
    finally:
        _requested = previous


def current_backend() -> str:
    """The backend that was asked for, or the one of operators without a faster proven kernel."""
    if _requested is not None:
        _require(_requested)
        return _requested
    return "reference"


def backend_of(op: str, args: tuple[Any, ...]) -> str:
    """The name of the backend that computes operator `op` for these arguments now."""
    name, device = current_backend(), first_tensor(args).device.type
    if name == "triton" and device == "cpu" and not _interpreting():
        raise BackendUnavailableError(
            f"backend 'triton' was asked for (use_backend or MULTILORA_BACKEND), but {op} got "
            "tensors on the CPU: move them to a GPU"
        )
    # Without a request, a kernel runs only where a record on this kind of chip says that it is
    # right, and ahead.
    if (
        _requested is None
        and device == "cuda"
        and missing_reason("triton") is None
        and importlib.import_module(BACKENDS["triton"]).is_proven(op, args)
    ):
        return "triton"
    return name


def kernel(op: str, args: tuple[Any, ...]) -> Callable:
    """The function that computes operator `op` for these arguments."""
    module = importlib.import_module(BACKENDS[backend_of(op, args)])
    return getattr(module, op)


def first_tensor(args: tuple[Any, ...]) -> Tensor:
    """The tensor that decides the device."""
    for arg in args:
        if isinstance(arg, Tensor):
            return arg
        if isinstance(arg, list) and arg and isinstance(arg[0], Tensor):
            return arg[0]
    raise AssertionError("an operator without a tensor argument")
