"""Convert between float32 and bfloat16, which NumPy lacks: values are uint16, the upper halves of float32."""

from __future__ import annotations

import numpy as np


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Return floats of any shape rounded to bfloat16, ties to even, as uint16 bits of the same shape."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    """Return bfloat16 values, given as uint16 bits of any shape, as float32, which is exact."""
    return (bits.astype(np.uint32) << 16).view(np.float32)
