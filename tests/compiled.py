"""multilora's Triton kernels on CPU tensors: compiled as for a GPU, executed from their PTX.

    with compiled.for_chip(H200, mode="late"):
        triton.lora_linear(...)

For a process of its own, without TRITON_INTERPRET: Triton's driver is replaced.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ptx
import torch
from triton.runtime import driver

from multilora.ops.triton import common
from multilora.ops.triton.common import Chip
from multilora.ops.triton.inspect import TARGETS, _Driver

# What the compiler's record of a descriptor means, CUtensorMapSwizzle.
_SWIZZLES = {0: 0, 1: 32, 2: 64, 3: 128}

#: Every kernel that was executed, by name.
executed: set[str] = set()


@contextmanager
def for_chip(
    chip: Chip,
    mode: str,
    seed: int = 0,
    change: Callable[[str, str], str] | None = None,
) -> Iterator[None]:
    """Launches inside run from PTX made for `chip`, in one of the emulator's modes.

    change: the PTX to run instead, by the kernel's name and its PTX.
    """

    def launch(kernel: Any, grid: tuple[int, ...], args: Any, meta: dict[str, Any]) -> None:
        compiled = kernel.warmup(*args, grid=grid, **meta)
        text = compiled.asm["ptx"]
        if change is not None:
            text = change(kernel.__name__, text)
        parameters = _parameters(kernel, compiled, args, meta)
        program = _parsed(text)
        # Scratch memory and the like, which no kernel of ours uses.
        parameters += [0] * (len(program.parameters) - len(parameters))
        shared = compiled.metadata.shared
        limit = next(limit for known, limit in TARGETS.values() if known == chip)
        assert shared <= limit, f"{kernel.__name__} asks for {shared} bytes of shared memory"
        threads = 32 * compiled.metadata.num_warps
        ptx.execute(program, grid, threads, shared, parameters, mode, seed)
        executed.add(kernel.__name__)

    driver.set_active(_Driver(chip))
    common.compile_only(chip, launch)
    try:
        yield
    finally:
        common.compile_only(None, None)


@functools.lru_cache(maxsize=64)
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
        elif kind == "constexpr":
            pass
        elif kind.startswith("tensordesc"):
            parameters.append(_tensor_map(value, next(descriptors)))
            parameters.extend(int(size) for size in (*value.shape, *value.strides))
        elif value is None:
            parameters.append(0)
        else:
            parameters.append(value if isinstance(value, (float, torch.Tensor)) else int(value))

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
