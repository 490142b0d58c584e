"""Moments, and how much two of them overlap."""

from __future__ import annotations

import dataclasses

import numpy as np

from runtime.core.errors import (
    GroundingError,
    excerpt,
)


@dataclasses.dataclass(frozen=True)
class Moment:
    """A part of a video, in seconds from its start, and how well it fits the query.

    The score orders the moments of one query. It is the square root of a product of probabilities, in [0, 1].
    """

    start: float
    end: float
    score: float


def temporal_iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Overlap of every span in `a` with every span in `b`, over their union.

    The union is taken as the hull, which equals it whenever the two overlap; this is the order of operations
    whose rounding decides a hit exactly as the published metrics do.

    Args:
        a: (..., N, 2) starts and ends, in any one unit of time.
        b: (..., M, 2) the same, in the same unit; leading dimensions broadcast.

    Returns:
        (..., N, M) ratios in [0, 1], in the dtype of the arguments; 0 for spans that only touch, are empty, end
        before they start or hold NaN.

    Raises:
        GroundingError: `a` or `b` is no such array (code `invalid_argument`).
    """
    try:
        start_a, end_a = a[..., :, None, 0], a[..., :, None, 1]
        start_b, end_b = b[..., None, :, 0], b[..., None, :, 1]
    # Not looked at before: metrics call this for each of many queries.
    except (IndexError, TypeError) as error:
        raise GroundingError(
            f"Expected arrays of shape (..., N, 2) for a and b, got {excerpt(a)} and {excerpt(b)}. Give NumPy arrays "
            "of starts and ends.",
            code="invalid_argument",
        ) from error
    overlap = np.minimum(end_a, end_b)
    overlap -= np.maximum(start_a, start_b)
    hull = np.maximum(end_a, end_b)
    hull -= np.minimum(start_a, start_b)
    # A negative overlap is a gap, and spans without length, reversed or of NaN have none: 0, over anything but 0.
    np.fmax(overlap, 0, out=overlap)
    hull[~(hull > 0)] = 1
    overlap /= hull
    return overlap


def to_moments(picks: np.ndarray, duration: float, offset: float = 0.0) -> list[Moment]:
    """Return (K, 3) picks, NaN after the last, as moments of a video of `duration` seconds.

    Args:
        picks: starts and ends as fractions of the video, and scores.
        duration: in seconds.
        offset: seconds to add to all times; see `Video`.
    """
    seconds, offset = float(duration), float(offset)
    return [
        Moment(offset + start * seconds, offset + end * seconds, score)
        for start, end, score in picks.tolist()
        if score == score
    ]
