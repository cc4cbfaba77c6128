"""Parts that all Triton kernels share: the chip, the launch, products at full precision."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

#: Whether the kernels run in Triton's interpreter (TRITON_INTERPRET=1): on the CPU, for tests.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


class Chip(NamedTuple):
    """The chip that a launch is configured for: compute capability (10·major + minor) and SMs."""

    capability: int
    processors: int

    @property
    def is_hopper_sized(self) -> bool:
        """Whether a block can have more than 200 KB of shared memory: data-centre chips."""
        return 90 <= self.capability < 120


#: The chips that `multilora kernels` compiles for, and the one that the interpreter plays: with
#: two processors, so that small tests run persistent loops more than once.
A100, H200 = Chip(80, 108), Chip(90, 132)
_PLAYED = Chip(90, 2)

# The default of Triton 3.6; later versions ask for a decision.
_OPTIONS = {"enable_fp_fusion": True}

_launcher: Callable[..., Any] | None = None
_compiled_for: Chip | None = None


def compile_only(chip: Chip | None, launcher: Callable[..., Any] | None) -> None:
    """Hand every launch to `launcher(kernel, grid, args, meta)` instead of running it.

    The tensors may be meta tensors, and chip() answers `chip`. None and None: run again.
    """
    global _launcher, _compiled_for
    _launcher, _compiled_for = launcher, chip


def chip(device: torch.device) -> Chip:
    """The chip that tensors on `device` live on."""
    if _compiled_for is not None:
        return _compiled_for
    if INTERPRETED.value:
        return _PLAYED
    return _properties(device.index if device.index is not None else torch.cuda.current_device())


@functools.cache
def _properties(index: int) -> Chip:
    properties = torch.cuda.get_device_properties(index)
    return Chip(10 * properties.major + properties.minor, properties.multi_processor_count)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> Any:
    """kernel[grid](*args, **meta) on the device of the first tensor -> the compiled kernel.

    An empty grid does nothing.
    """
    if 0 in grid:
        return None
    meta |= _OPTIONS
    if _launcher is not None:
        return _launcher(kernel, grid, args, meta)
    return _on_device(_device(args), kernel[grid], *args, **meta)


def _on_device(device: torch.device, call: Callable[..., Any], *args: Any, **meta: Any) -> Any:
    """Triton launches on the current device, whatever device the tensors are on."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return call(*args, **meta)
    with torch.cuda.device(device):
        return call(*args, **meta)


def _device(args: tuple[Any, ...]) -> torch.device:
    for arg in args:
        if isinstance(arg, Tensor):
            return arg.device
        if isinstance(getattr(arg, "base", None), Tensor):
            return arg.base.device
    raise AssertionError("a launch without a tensor")


#: The shape (K, rows, cols) of a contiguous tensor, and the (height, width) of its blocks.
Blocks = tuple[tuple[int, int, int], tuple[int, int]]


class Launch:
    """A launch bound to all that the sizes of a problem decide: called with the tensors alone.

    The kernel's parameters are a descriptor for each of `blocks`, the tensors, numbers, constants.

    blocks: how Hopper's copy engine sees each of the first tensors, or None where it does not.
    The tensors' dtypes, and which of them are None, are the same in every call.
    """

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        blocks: Sequence[Blocks | None],
        numbers: Sequence[int],
        **meta: Any,
    ):
        self.kernel, self.numbers = kernel, tuple(numbers)
        self.meta = {**meta, **_OPTIONS}
        self.grid = (*grid, 1, 1)[:3]
        self._blocks = [(i, b) for i, b in enumerate(blocks) if b is not None]
        self._none = [None] * len(blocks)
        # Each descriptor's fields but the tensor, kept once Triton has checked them.
        self._fields: list[tuple[int, dict[str, Any]]] | None = None
        # The key is the device and which tensors start at multiples of 16 bytes: Triton compiles
        # for these and for the dtypes.
        self._compiled: dict[int, Callable[..., Any]] = {}

    def __call__(self, *tensors: Any) -> None:
        args = (*self._descriptors(tensors), *tensors, *self.numbers)
        if _launcher is not None:
            _launcher(self.kernel, self.grid, args, self.meta)
            return
        device = tensors[0].device
        key = -1 if device.index is None else device.index
        for t in tensors:
            if t is not None:
                key = 2 * key + (t.data_ptr() % 16 == 0)
        compiled = self._compiled.get(key)
        if compiled is not None:
            _on_device(device, compiled, *args)
            return
        # Triton looks at every argument, which takes longer than all the rest of a launch.
        compiled = _on_device(device, self.kernel[self.grid], *args, **self.meta)
        if compiled is not None:
            # The next time it is launched as it is.
            constants = [self.meta[p.name] for p in self.kernel.params[len(args) :]]
            run = compiled[self.grid]
            self._compiled[key] = lambda *args: run(*args, *constants)

    def _descriptors(self, tensors: tuple[Tensor | None, ...]) -> list[TensorDescriptor | None]:
        if not self._blocks:
            return self._none
        found = self._none.copy()
        if self._fields is None:
            known = []
            for i, ((particles, rows, cols), box) in self._blocks:
                # Not t.stride(): an axis of length one may have any.
                shape, strides = [particles, rows, cols], [rows * cols, cols, 1]
                found[i] = TensorDescriptor(tensors[i], shape, strides, [1, *box])
                known.append((i, {**vars(found[i]), "base": None}))
            self._fields = known
            return found
        for i, fields in self._fields:
            # Without the checks, which take longer than a launch.
            found[i] = descriptor = object.__new__(TensorDescriptor)
            descriptor.__dict__ = {**fields, "base": tensors[i]}
        return found


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def precision(dtype: torch.dtype) -> str:
    """The `PRECISION` of products of `dtype`: TF32 for float32 only where PyTorch takes it too."""
    if dtype != torch.float32:
        return "ieee"
    chosen = torch.backends.cuda.matmul.fp32_precision
    if chosen == "none":
        # PyTorch sets it when it is imported.
        chosen = torch.backends.fp32_precision  # type: ignore[attr-defined]
    return "tf32" if chosen == "tf32" else "ieee"


@triton.constexpr_function
def accumulator_of(dtype):
    """The Triton dtype that products of `dtype` are summed in."""
    return tl.float64 if dtype == tl.float64 else tl.float32


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a·b, accumulated in acc's dtype."""
    if INTERPRETED and a.dtype == tl.bfloat16:
        # The interpreter multiplies the bits of bfloat16 as integers. In float32 the products are
        # exact, as they are in a tensor core.
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)
