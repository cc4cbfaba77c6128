"""Which backend computes an operator: one switch, one point of decision."""

import contextlib
import importlib
import os
from collections.abc import Callable, Iterator

#: Every backend that multilora knows by name, and the module that holds its kernels.
#: None: this version has no such kernels.
BACKENDS: dict[str, str | None] = {
    "reference": "multilora.ops.reference",
    "cpu": None,
    "triton": None,
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
    return None


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


def current_backend(device: str) -> str:
    """The name of the backend that operators on `device` ("cpu", "cuda", ...) run on now."""
    if _requested is not None:
        _require(_requested)
        return _requested
    # The reference is the best path that has been checked on every device so far.
    return "reference"


def kernel(op: str, device: str) -> Callable:
    """The function that computes operator `op` for tensors on `device`."""
    module = importlib.import_module(BACKENDS[current_backend(device)])
    return getattr(module, op)
