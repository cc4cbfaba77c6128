"""multilora's Triton launches on CPU tensors: compiled as for a GPU, executed from their PTX.

with for_chip(90, mode="late"):
    triton.lora_linear(...)
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from triton.runtime import driver

import ptx
from multilora.ops.triton import common
from multilora.ops.triton.common import Chip
from multilora.tools.kernels.compile import TARGETS, AbsentGPU

# With two processors, so that small problems run persistent loops more than once.
_PROCESSORS = 2
_SHARED_LIMITS = {chip.capability: limit for chip, limit in TARGETS.values()}
# The meaning of the compiler's record of a descriptor: CUtensorMapSwizzle.
_SWIZZLES = {0: 0, 1: 32, 2: 64, 3: 128}

#: Kernel -> constant argument -> the values that it was executed with.
executed: dict[str, dict[str, set[Any]]] = defaultdict(lambda: defaultdict(set))


@contextmanager
def for_chip(
    capability: int,
    mode: str,
    seed: int = 0,
    change: Callable[[str, str], str] | None = None,
) -> Iterator[None]:
    """Launches inside run from PTX made for compute capability 80 or 90, in the emulator's `mode`.

    change: the PTX to run instead, from a kernel's name and its PTX.
    """
    assert not common.INTERPRETED.value, "Triton's interpreter compiles nothing"
    chip = Chip(capability, _PROCESSORS)

    def launch(kernel: Any, grid: tuple[int, ...], args: Any, meta: dict[str, Any]) -> None:
        compiled = kernel.warmup(*args, grid=grid, **meta)
        text = compiled.asm["ptx"]
        if change is not None:
            text = change(kernel.__name__, text)
        program = _parsed(text)
        parameters = _parameters(kernel, compiled, args, meta)
        # Scratch memory of the compiler's, which no kernel of ours uses.
        parameters += [0] * (len(program.parameters) - len(parameters))
        shared = compiled.metadata.shared
        assert shared <= _SHARED_LIMITS[capability], f"{kernel.__name__}: {shared} bytes"
        threads = 32 * compiled.metadata.num_warps
        ptx.execute(program, grid, threads, shared, parameters, mode, seed)
        for name, value in meta.items():
            executed[kernel.__name__][name].add(value)

    driver.set_active(AbsentGPU(chip))
    common.compile_only(chip, launch)
    try:
        yield
    finally:
        common.compile_only(None, None)


@functools.lru_cache(maxsize=256)
def _parsed(text: str) -> ptx.Kernel:
    return ptx.Kernel(text)


def _parameters(kernel: Any, compiled: Any, args: Any, meta: dict[str, Any]) -> list[Any]:
    """The launch's arguments as the compiled kernel takes them."""
    signature = compiled.src.signature
    values = dict(zip([p.name for p in kernel.params], args))
    values |= {name: value for name, value in meta.items() if name in signature}
    descriptors = iter(getattr(compiled.metadata, "tensordesc_meta", None) or [])
    parameters: list[Any] = []

    def add(kind: Any, value: Any) -> None:
        if isinstance(kind, tuple):
            for inner, part in zip(kind, value):
                add(inner, part)
        elif kind.startswith("tensordesc"):
            parameters.append(_tensor_map(value, next(descriptors)))
            parameters.extend(int(size) for size in (*value.shape, *value.strides))
        elif kind != "constexpr":
            is_number = not isinstance(value, (float, torch.Tensor))
            parameters.append(int(value or 0) if is_number else value)

    for name, kind in signature.items():
        add(kind, values.get(name))
    return parameters


def _tensor_map(descriptor: Any, made: dict[str, Any]) -> ptx.TensorMap:
    element = made["elem_size"]
    return ptx.TensorMap(
        base=descriptor.base.data_ptr(),
        dims=list(descriptor.shape)[::-1],
        strides=[stride * element for stride in descriptor.strides][::-1][1:],
        box=list(made["block_size"])[::-1],
        swizzle=_SWIZZLES[made["swizzle"]],
        element_bytes=element,
    )
