"""Blocks of contiguous tensors (K, rows, cols): by Hopper's copy engine, or by masked pointers.

A block never straddles particles: the particle axis is apart, so rows past the end are zeros when
read and are dropped when written.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from multilora.ops.triton.common import chip


@triton.jit
def load_block(
    desc, ptr, k, row, col, rows, cols,
    DESCRIBED: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The block (HEIGHT, WIDTH) of a contiguous tensor (K, rows, cols); zeros outside."""
    if DESCRIBED:
        return desc.load([k, row, col]).reshape(HEIGHT, WIDTH)
    # 64-bit arithmetic for the block's corner only.
    ptr += (tl.cast(k, tl.int64) * rows + row) * cols + col
    i, j = tl.arange(0, HEIGHT)[:, None], tl.arange(0, WIDTH)[None, :]
    return tl.load(ptr + i * cols + j, mask=(i < rows - row) & (j < cols - col), other=0.0)


@triton.jit
def store_block(
    desc, ptr, block, k, row, col, rows, cols,
    DESCRIBED: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Its inverse; what lies outside is dropped."""
    block = block.to(ptr.dtype.element_ty)
    if DESCRIBED:
        desc.store([k, row, col], block.reshape(1, HEIGHT, WIDTH))
    else:
        ptr += (tl.cast(k, tl.int64) * rows + row) * cols + col
        i, j = tl.arange(0, HEIGHT)[:, None], tl.arange(0, WIDTH)[None, :]
        tl.store(ptr + i * cols + j, block, mask=(i < rows - row) & (j < cols - col))


def describable(*tensors: Tensor | None) -> bool:
    """Whether Hopper's copy engine can move blocks of these: all rows on 16-byte boundaries."""
    present = [t for t in tensors if t is not None]
    return chip(present[0].device).capability >= 90 and all(
        t.data_ptr() % 16 == 0 and t.shape[-1] * t.element_size() % 16 == 0 for t in present
    )


def descriptor(described: bool, t: Tensor | None, height: int, width: int) -> Any:
    """A contiguous (K, rows, cols) in blocks (height, width) of one k at a time."""
    if t is None or not described:
        return None
    # Not t.stride(): an axis of length one may have any.
    _, rows, cols = t.shape
    return TensorDescriptor(t, list(t.shape), [rows * cols, cols, 1], [1, height, width])
