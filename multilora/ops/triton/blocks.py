"""Blocks of contiguous tensors (K, rows, cols): by Hopper's copy engine, or by masked pointers.

A block never straddles particles: the particle axis is apart, so rows past the end are zeros when
read and are dropped when written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from multilora.ops.triton.common import Chip


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
    """Store a block where load_block would read it; elements outside are dropped."""
    block = block.to(ptr.dtype.element_ty)
    if DESCRIBED:
        desc.store([k, row, col], block.reshape(1, HEIGHT, WIDTH))
    else:
        ptr += (tl.cast(k, tl.int64) * rows + row) * cols + col
        i, j = tl.arange(0, HEIGHT)[:, None], tl.arange(0, WIDTH)[None, :]
        tl.store(ptr + i * cols + j, block, mask=(i < rows - row) & (j < cols - col))


def aligned(t: Tensor) -> Tensor:
    """t, contiguous and from a multiple of 16 bytes on, as the copy engine and wide loads need it:
    a tensor that is not costs one copy."""
    t = t.contiguous()
    return t if t.data_ptr() % 16 == 0 else t.clone()


def describable(chip: Chip, dtype: torch.dtype, *widths: int) -> bool:
    """Whether Hopper's copy engine can move blocks of aligned tensors with rows of these widths:
    all rows on 16-byte boundaries."""
    return chip.capability >= 90 and all(w * dtype.itemsize % 16 == 0 for w in widths)
