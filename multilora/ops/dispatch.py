"""Which backend computes an operator: one switch, one point of decision."""

import contextlib
import contextvars
import ctypes
import functools
import importlib
import importlib.util
import os
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

#: Every backend that multilora knows by name, and the module that holds its kernels.
BACKENDS = {
    "reference": "multilora.ops.reference",
    "cpu": "multilora.ops.cpu",
    "triton": "multilora.ops.triton",
    "cuda": "multilora.ops.cuda",
}

#: The environment variable that names the CPU kernels' instruction set: scalar, avx2 or avx512.
#: Where it is not set, they take the best that the CPU has.
CPU_LEVEL = "MULTILORA_CPU_LEVEL"

# What holds where no `use_backend` does.
_by_environment: str | None = os.environ.get("MULTILORA_BACKEND") or None


class _Request:
    """An open `use_backend`; of name None, that nothing is asked for."""

    __slots__ = ("is_open", "name")

    def __init__(self, name: str | None):
        self.name, self.is_open = name, True


# Those of this thread (or asyncio task), the innermost last, and those of all threads. Blocks may
# be left in any order and by any thread, so each closes its own request, and restores nothing.
_here: contextvars.ContextVar[tuple[_Request, ...]] = contextvars.ContextVar("here", default=())
_everywhere: list[_Request] = []


class BackendUnavailableError(RuntimeError):
    """A backend was asked for by name and cannot run here; the message says why."""


def missing_reason(name: str) -> str | None:
    """Why backend `name` cannot be used, or None where it can."""
    if name not in BACKENDS:
        return f"there is no backend of that name; the names are {', '.join(BACKENDS)}"
    check = {"cpu": _missing_cpu, "triton": _missing_triton, "cuda": _missing_cuda}.get(name)
    return check() if check else None


@functools.cache
def _missing_cpu() -> str | None:
    reason = _missing_module("multilora._C", "a C++ compiler", "cpu")
    if reason is not None:
        return reason
    native = importlib.import_module("multilora._C")
    level, levels = os.environ.get(CPU_LEVEL), native.supported_levels()
    if level:
        if level not in levels:
            return f"{CPU_LEVEL} asks for {level!r}, and this CPU has {', '.join(levels)}"
        native.set_level(level)
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
    return _too_old()


@functools.cache
def _missing_cuda() -> str | None:
    reason = _missing_module("multilora._C_cuda", "nvcc (12.5 or newer)", "cuda")
    if reason is not None or _emulated():
        return reason
    if not torch.cuda.is_available():
        return "PyTorch sees no GPU"
    nvcc = importlib.import_module("multilora._C_cuda").build_info()["compiler"]
    return _old_driver(nvcc, _driver_version()) or _too_old()


def _driver_version() -> int:
    """The newest CUDA that the NVIDIA driver, which PyTorch has loaded, is for: 12040 is 12.4."""
    version = ctypes.c_int()
    error = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    if error:
        raise RuntimeError(f"cuDriverGetVersion returned the error {error}")
    return version.value


def _old_driver(nvcc: str, driver: int) -> str | None:
    """Why what this compiler ("nvcc 13.0.88") built does not start with a driver for this CUDA
    (12040 is 12.4), or None: a program needs a driver of its own major version, or a later one."""
    if driver // 1000 >= int(nvcc.split()[-1].split(".")[0]):
        return None
    return (
        f"it was built by {nvcc}, and the NVIDIA driver is one for CUDA {driver // 1000}."
        f"{driver % 1000 // 10}: install a newer driver, or build with an nvcc that is no newer"
    )


def _missing_module(module: str, tool: str, build: str) -> str | None:
    try:
        importlib.import_module(module)
    except ModuleNotFoundError:
        return (
            f"the module {module} is not there: multilora was installed without {tool}, or with "
            f"MULTILORA_BUILD set against it (MULTILORA_BUILD={build} pip install says what is "
            "missing)"
        )
    except ImportError as error:
        return f"the module {module} does not load: {error}"
    return None


def _too_old() -> str | None:
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        return f"the kernels need compute capability 8.0 or newer; this GPU has {major}.{minor}"
    return None


def _emulated() -> bool:
    """Whether the tests have marked the CUDA module as one that they execute on the CPU."""
    return getattr(importlib.import_module("multilora._C_cuda"), "emulated", False)


@functools.cache
def _interpreting() -> bool:
    import triton

    return bool(triton.knobs.runtime.interpret)


def available_backends(device: str | None = None) -> list[str]:
    """The backends that can be asked for here, by name; for tensors on `device` ("cpu", "cuda")."""
    names = [name for name in BACKENDS if missing_reason(name) is None]
    return [name for name in names if device is None or _runs_on(name, device)]


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
    does the same for a whole process.

    The choice holds in the thread (the asyncio task) that enters the block, whatever others choose,
    and in threads that choose nothing themselves. The backward of an operator runs on the backend
    of its forward, on any thread and after the block too; that of a compiled function runs on what
    is asked for at that time.

    Raises BackendUnavailableError, with the reason, where that backend cannot run here: an
    explicit request never falls back to another backend. An operator raises it in a thread that
    chooses nothing while others choose different backends.
    """
    _require(name)
    request = _Request(name)
    _here.set((*_still_open(), request))
    _everywhere.append(request)
    try:
        yield
    finally:
        request.is_open = False
        _everywhere.remove(request)
        _here.set(_still_open())


def _still_open() -> tuple[_Request, ...]:
    return tuple(request for request in _here.get() if request.is_open)


def requested() -> str | None:
    """The backend that is asked for here and now, or None."""
    for request in reversed(_here.get()):
        if request.is_open:
            return request.name
    if not _everywhere:
        return _by_environment
    names = {request.name for request in tuple(_everywhere)}
    if len(names) > 1:
        raise BackendUnavailableError(
            f"threads ask for the backends {', '.join(sorted(names))} at the same time, and this "
            "one for none: put its work into a use_backend block of its own"
        )
    return names.pop() if names else _by_environment


def is_requested(name: str | None) -> bool:
    """Whether `as_requested(name)` would change nothing in this thread."""
    for request in reversed(_here.get()):
        if request.is_open:
            return request.name == name
    return not _everywhere and name == _by_environment


@contextlib.contextmanager
def as_requested(name: str | None) -> Iterator[None]:
    """Run the block as if `requested()` were `name` in this thread; others notice nothing."""
    token = _here.set((_Request(name),))
    try:
        yield
    finally:
        _here.reset(token)


def current_backend(device: str = "meta") -> str:
    """The backend that was asked for; else the default for tensors on `device` ("cpu", "cuda"),
    where no record of a GPU's kernel says otherwise."""
    name = requested()
    if name is not None:
        _require(name)
        return name
    if device != "cpu":
        return "reference"
    reason = _missing_cpu()
    if reason is not None and os.environ.get(CPU_LEVEL) and CPU_LEVEL in reason:
        raise BackendUnavailableError(reason)
    return "reference" if reason else "cpu"


def backend_of(op: str, args: tuple[Any, ...]) -> str:
    """The name of the backend that computes operator `op` for these arguments now."""
    device = first_tensor(args).device.type
    name = current_backend(device)
    if not _runs_on(name, device):
        here, there = ("the CPU", "a GPU") if device == "cpu" else ("a GPU", "the CPU")
        raise BackendUnavailableError(
            f"backend {name!r} was asked for (use_backend or MULTILORA_BACKEND), but {op} got "
            f"tensors on {here}: move them to {there}"
        )
    # Without a request, a GPU's kernel runs only where a record on this kind of chip says that it
    # is right, and ahead. The CPU's are, at every size that was measured.
    if device == "cuda" and requested() is None and missing_reason("triton") is None:
        for proven in importlib.import_module("multilora.ops.records").proven_backends(op, args):
            if missing_reason(proven) is None:
                return proven
    return name


def _runs_on(name: str, device: str) -> bool:
    if device == "cpu" and name in ("triton", "cuda"):
        # In their tests only.
        return _interpreting() if name == "triton" else _emulated()
    return name != "cpu" or device != "cuda"


def module_of(op: str, args: tuple[Any, ...]) -> ModuleType:
    """The backend that computes operator `op` for these arguments, as the module of its kernels."""
    first = args[0]
    if (
        # What a small layer asks, in the fewest steps: nothing is requested, on a CPU.
        not (_everywhere or _by_environment or _here.get())
        and type(first) is not list
        and first.is_cpu
        and _missing_cpu() is None
    ):
        name = "cpu"
    else:
        name = backend_of(op, args)
    return _modules.get(name) or _load(name)


def _load(name: str) -> ModuleType:
    """The module of a backend."""
    # Not sys.modules, where another thread's module is before it is complete.
    _modules[name] = importlib.import_module(BACKENDS[name])
    return _modules[name]


_modules: dict[str, ModuleType] = {}


def first_tensor(args: tuple[Any, ...]) -> Tensor:
    """The tensor that decides the device."""
    for arg in args:
        if isinstance(arg, Tensor):
            return arg
        if isinstance(arg, list) and arg and isinstance(arg[0], Tensor):
            return arg[0]
    raise AssertionError("an operator without a tensor argument")
