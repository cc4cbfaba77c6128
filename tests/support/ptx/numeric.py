"""PTX's number types as numpy's."""

from __future__ import annotations

import numpy as np

DTYPES = {
    "b8": np.dtype(np.uint8),
    "u8": np.dtype(np.uint8),
    "s8": np.dtype(np.int8),
    "b16": np.dtype(np.uint16),
    "u16": np.dtype(np.uint16),
    "s16": np.dtype(np.int16),
    "f16": np.dtype(np.float16),
    "bf16": np.dtype(np.uint16),  # numpy has none: its bits
    "b32": np.dtype(np.uint32),
    "u32": np.dtype(np.uint32),
    "s32": np.dtype(np.int32),
    "f32": np.dtype(np.float32),
    "f16x2": np.dtype(np.uint32),
    "bf16x2": np.dtype(np.uint32),
    "b64": np.dtype(np.uint64),
    "u64": np.dtype(np.uint64),
    "s64": np.dtype(np.int64),
    "f64": np.dtype(np.float64),
    "pred": np.dtype(np.bool_),
}

UNSIGNED = {size: np.dtype(f"u{size}") for size in (1, 2, 4, 8)}


def from_bf16(bits: np.ndarray) -> np.ndarray:
    """uint16 -> float32, exactly."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bf16(values: np.ndarray) -> np.ndarray:
    """float32 -> uint16, to the nearest, ties to even; the canonical NaN of PTX."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    nan = (bits & 0x7FFFFFFF) > 0x7F800000
    rounded = (bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(nan, np.uint16(0x7FFF), rounded.astype(np.uint16))


def from_half(bits: np.ndarray, kind: str) -> np.ndarray:
    """uint16 -> float32; kind: "bf16" or "f16"."""
    return from_bf16(bits) if kind == "bf16" else bits.view(np.float16).astype(np.float32)


def to_half(values: np.ndarray, kind: str) -> np.ndarray:
    """float32 -> uint16."""
    return to_bf16(values) if kind == "bf16" else values.astype(np.float16).view(np.uint16)


def unpack(words: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """uint32 -> its low and its high half, as float32."""
    low, high = (words & np.uint32(0xFFFF)).astype(np.uint16), (words >> np.uint32(16))
    return from_half(low, kind), from_half(high.astype(np.uint16), kind)


def pack(low: np.ndarray, high: np.ndarray, kind: str) -> np.ndarray:
    """Two float32 -> uint32."""
    word = to_half(high, kind).astype(np.uint32) << np.uint32(16)
    return word | to_half(low, kind).astype(np.uint32)


def resized(values: np.ndarray, size: int) -> np.ndarray:
    """The bits, cut to `size` bytes or filled up with zeros."""
    return values.view(UNSIGNED[values.itemsize]).astype(UNSIGNED[size])
