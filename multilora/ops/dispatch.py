"""Which backend computes an operator: one switch, one point of decision.

A backend is a module with nine functions (those of reference.py), and with

- `LEAVES`, a dict from an operator to the reason why this backend has no kernel for it: the
  reference computes it, also where the backend was requested by name;
- `refuses(op, args)`, the reason why its kernels do not take these arguments, or None.

Nothing falls back silently: under a request, what a backend refuses raises, except where the user
has named another backend for it.
"""

import contextlib
import contextvars
import ctypes
import functools
import importlib
import importlib.util
import os
from collections.abc import Iterator
from types import ModuleType
from typing import Any, NamedTuple

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

#: Every operator that asks for a backend; `_library.define` adds them.
OPERATORS: list[str] = []


class Request(NamedTuple):
    """The requested backend, and the one that may compute what it refuses."""

    name: str
    otherwise: str | None = None

    def __str__(self) -> str:
        return ",".join(name for name in self if name)


def _from_environment() -> Request | None:
    """MULTILORA_BACKEND: "cuda", or "cuda,reference" for cuda and otherwise the reference."""
    name, _, otherwise = os.environ.get("MULTILORA_BACKEND", "").partition(",")
    return Request(name.strip(), otherwise.strip() or None) if name.strip() else None


# The request outside of all `use_backend` blocks.
_by_environment = _from_environment()


class _Block:
    """An open `use_backend`, or, with the request None, an order to use the defaults."""

    __slots__ = ("is_open", "request")

    def __init__(self, request: Request | None):
        self.request, self.is_open = request, True


# The blocks of this thread (or asyncio task), the innermost last, and those of all threads. Blocks
# may be left in any order and by any thread, so each closes itself, and restores nothing.
_here: contextvars.ContextVar[tuple[_Block, ...]] = contextvars.ContextVar("here", default=())
_everywhere: list[_Block] = []

# The modules of the backends that have been used. (sys.modules has a module before another thread
# has completed it.)
_modules: dict[str, ModuleType] = {}


class BackendUnavailableError(RuntimeError):
    """A backend was requested by name, and cannot run here or does not take these arguments; the
    message says why."""


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
    reason = _missing_module("multilora._C_cuda", "nvcc (12.5 or newer) or a GPU", "cuda")
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
    """Why a module built by this compiler ("nvcc 13.0.88") does not start with a driver for this
    CUDA (12040 is 12.4), or None: the driver's major version must be the compiler's, or later."""
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
            f"MULTILORA_BUILD set against it (MULTILORA_BUILD={build} pip install builds it, or "
            "says what is missing)"
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
    """Whether the tests have replaced the CUDA module by one that they execute on the CPU."""
    return getattr(importlib.import_module("multilora._C_cuda"), "emulated", False)


@functools.cache
def _interpreting() -> bool:
    import triton

    return bool(triton.knobs.runtime.interpret)


def available_backends(device: str | None = None) -> list[str]:
    """The names of the backends that run here; for tensors on `device` ("cpu", "cuda")."""
    names = [name for name in BACKENDS if missing_reason(name) is None]
    return [name for name in names if device is None or _runs_on(name, device)]


def _require(name: str) -> None:
    reason = missing_reason(name)
    if reason is not None:
        raise BackendUnavailableError(
            f"backend {name!r} was requested (use_backend or MULTILORA_BACKEND), but {reason}; "
            f"available here: {', '.join(available_backends())}"
        )


@contextlib.contextmanager
def use_backend(name: str, otherwise: str | None = None) -> Iterator[None]:
    """Run every multilora operator inside the `with` block on one backend.

    The environment variable MULTILORA_BACKEND ("cuda", or "cuda,reference" with `otherwise`) does
    the same for a whole process.

    The choice holds in the thread (the asyncio task) that enters the block, whatever others choose,
    and in threads that choose nothing themselves. The backward of an operator runs on the backend
    of its forward, on any thread and after the block too; that of a compiled function runs on what
    is requested at that time.

    An explicit request never falls back silently. Some operators have no kernel in some backends,
    and run on the reference: `multilora info` lists them.

    Args:
        name: "reference", "cpu", "triton" or "cuda".
        otherwise: a backend that computes what the first one refuses, such as shapes and dtypes
            that its kernels do not take: "reference" takes everything. Both must run here.

    Raises:
        BackendUnavailableError: with the reason, where a backend cannot run here. An operator
            raises it, with the shapes, where its backend refuses the arguments and there is no
            `otherwise`, and in a thread that chooses nothing while others choose different ones.
    """
    request = Request(name, otherwise)
    for backend in filter(None, request):
        _require(backend)
    block = _Block(request)
    _here.set((*_still_open(), block))
    _everywhere.append(block)
    try:
        yield
    finally:
        block.is_open = False
        _everywhere.remove(block)
        _here.set(_still_open())


def _still_open() -> tuple[_Block, ...]:
    return tuple(block for block in _here.get() if block.is_open)


def requested() -> Request | None:
    """The request that holds here and now, or None."""
    for block in reversed(_here.get()):
        if block.is_open:
            return block.request
    if not _everywhere:
        return _by_environment
    requests = {block.request for block in tuple(_everywhere)}
    if len(requests) > 1:
        raise BackendUnavailableError(
            f"threads ask for the backends {', '.join(sorted(map(str, requests)))} at the same "
            "time, and this thread names none: put its work into its own use_backend block"
        )
    return requests.pop() if requests else _by_environment


def is_requested(request: Request | None) -> bool:
    """Whether `as_requested(request)` would change nothing in this thread."""
    for block in reversed(_here.get()):
        if block.is_open:
            return block.request == request
    return not _everywhere and request == _by_environment


@contextlib.contextmanager
def as_requested(request: Request | None) -> Iterator[None]:
    """Run the block as if `requested()` were `request` in this thread; others notice nothing."""
    token = _here.set((_Block(request),))
    try:
        yield
    finally:
        _here.reset(token)


def current_backend(device: str = "meta") -> str:
    """The requested backend; else the default for tensors on `device` ("cpu", "cuda"),
    where no record of a GPU's kernel says otherwise."""
    request = requested()
    if request is None:
        return _default(device)
    _require(request.name)
    return request.name


def _default(device: str) -> str:
    if device != "cpu":
        return "reference"
    reason = _missing_cpu()
    if reason is not None and os.environ.get(CPU_LEVEL) and CPU_LEVEL in reason:
        raise BackendUnavailableError(reason)
    return "reference" if reason else "cpu"


def backend_of(op: str, args: tuple[Any, ...]) -> str:
    """The name of the backend that computes operator `op` for these arguments now.

    Raises BackendUnavailableError where the requested one does not take them.
    """
    request = requested()
    if request is None:
        return _unasked(op, args)
    refusals = []
    for name in filter(None, request):
        _require(name)
        reason = _refusal(name, op, args)
        if reason is None:
            return "reference" if _leaves(name, op, args) else name
        refusals.append(f"{name!r} does not: {reason}")
    message = (
        f"backend {str(request)!r} was requested (use_backend or MULTILORA_BACKEND) to compute "
        f"{op} of {_described(op, args)}, but {', and '.join(refusals)}"
    )
    if request.otherwise is None:
        message += (
            f"; use_backend({request.name!r}, otherwise='reference') or MULTILORA_BACKEND="
            f"{request.name},reference lets the reference compute what {request.name!r} refuses"
        )
    raise BackendUnavailableError(message)


def _unasked(op: str, args: tuple[Any, ...]) -> str:
    """The default for these arguments."""
    device = first_tensor(args).device.type
    # A GPU's kernel runs by default only where a record on this kind of chip says that it is right,
    # and ahead. The CPU's kernels are, at every size that was measured.
    if device == "cuda" and missing_reason("triton") is None:
        for proven in importlib.import_module("multilora.ops.records").proven_backends(op, args):
            if missing_reason(proven) is None and _refusal(proven, op, args) is None:
                return proven
    name = _default(device)
    return "reference" if _leaves(name, op, args) else name


def _refusal(name: str, op: str, args: tuple[Any, ...]) -> str | None:
    """Why this backend does not take these arguments, or None, also for what it leaves."""
    device = first_tensor(args).device.type
    if not _runs_on(name, device):
        here, there = ("the CPU", "a GPU") if device == "cpu" else ("a GPU", "the CPU")
        return f"the tensors are on {here}, move them to {there}"
    return None if _leaves(name, op, args) else _module(name).refuses(op, args)


def _leaves(name: str, op: str, args: tuple[Any, ...]) -> bool:
    """Whether this backend has no kernel for the operator."""
    # Without a weight it is the gradient of lora_add_, and goes where that goes.
    if op == "lora_linear_backward" and args[2] is None:
        op = "lora_add_"
    return op in _module(name).LEAVES


def left_to_reference() -> dict[str, dict[str, str | None]]:
    """Operator -> backend -> why the reference computes it there, or None where the backend does.

    It has the backends that run here.
    """
    modules = {name: _module(name) for name in available_backends()}
    return {op: {name: m.LEAVES.get(op) for name, m in modules.items()} for op in OPERATORS}


def backends_of(op: str, device: str | None = None) -> list[str]:
    """The available backends, for tensors on `device`, that have kernels for `op`."""
    return [name for name in available_backends(device) if op not in _module(name).LEAVES]


def _described(op: str, args: tuple[Any, ...]) -> str:
    """The tensors among the arguments: names, shapes, dtypes."""
    tensors = []
    for argument, value in zip(getattr(torch.ops.multilora, op).default._schema.arguments, args):
        if isinstance(value, Tensor):
            tensors.append(f"{argument.name} {tuple(value.shape)} {value.dtype}")
        elif isinstance(value, list) and value and isinstance(value[0], Tensor):
            shapes = [str(tuple(t.shape)) for t in value[:3]] + ["..."] * (len(value) > 3)
            tensors.append(f"{argument.name} [{', '.join(shapes)}] {value[0].dtype}")
    return ", ".join(tensors)


def _runs_on(name: str, device: str) -> bool:
    if device == "cpu" and name in ("triton", "cuda"):
        # Only in their tests.
        return _interpreting() if name == "triton" else _emulated()
    return name != "cpu" or device != "cuda"


def module_of(op: str, args: tuple[Any, ...]) -> ModuleType:
    """The backend that computes operator `op` for these arguments, as the module of its kernels."""
    first = args[0][0] if type(args[0]) is list else args[0]
    # The shortest way to the default on a CPU, for small layers.
    if (
        not (_everywhere or _by_environment or _here.get())
        and first.is_cpu
        and _missing_cpu() is None
    ):
        return _module_on_cpu(op)
    return _module(backend_of(op, args))


@functools.cache
def _module_on_cpu(op: str) -> ModuleType:
    """The default on a CPU, where its kernels are there."""
    return _module("reference" if op in _module("cpu").LEAVES else "cpu")


def _module(name: str) -> ModuleType:
    """The module of a backend."""
    module = _modules.get(name)
    if module is None:
        module = _modules[name] = importlib.import_module(BACKENDS[name])
    return module


def first_tensor(args: tuple[Any, ...]) -> Tensor:
    """The tensor that decides the device."""
    for arg in args:
        if isinstance(arg, Tensor):
            return arg
        if isinstance(arg, list) and arg and isinstance(arg[0], Tensor):
            return arg[0]
    raise AssertionError("an operator without a tensor argument")
