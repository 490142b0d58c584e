"""Pool rows of clip features by their maximum, exactly and fast in float16."""

from __future__ import annotations

import numpy as np


def max_over_rows(features: np.ndarray, first: np.ndarray, last: np.ndarray) -> np.ndarray:
    """Return (T, D) element-wise maxima over the rows first to last, inclusive, of (num_clips, D) features.

    Rows after the end are clipped to the last row, because some feature files are shorter than their frame count.
    """
    end = len(features) - 1
    # NumPy compares float16 in software, ten times slower than integers of the same order.
    ordered = _sortable_float16_bits(features.view(np.int16)) if features.dtype == np.float16 else features
    rows = np.stack(
        [ordered[start : stop + 1].max(axis=0) for start, stop in zip(np.minimum(first, end), np.minimum(last, end))]
    )
    return _sortable_float16_bits(rows).view(np.float16) if features.dtype == np.float16 else rows


def _sortable_float16_bits(bits: np.ndarray) -> np.ndarray:
    """Return the int16 bits of finite float16 as integers of the same order, and the reverse.

    All bits but the sign of negative numbers are inverted.
    """
    return bits ^ ((bits >> 15) & np.int16(0x7FFF))
