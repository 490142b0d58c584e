"""Define moments, and compute their temporal IoU."""

from __future__ import annotations

import dataclasses

import numpy as np

from runtime.core.errors import GroundingError, excerpt


@dataclasses.dataclass(frozen=True)
class Moment:
    """A part of a video that matches a query.

    Attributes:
        start, end: seconds from the start of the video.
        score: square root of a product of probabilities, in [0, 1]; orders the moments of one query.
    """

    start: float
    end: float
    score: float


def temporal_iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the temporal IoU of every span in `a` with every span in `b`.

    The union is computed as the hull, which is equal for spans that overlap, because the published metrics round so.

    Args:
        a: (..., N, 2) starts and ends, in any unit of time.
        b: (..., M, 2) starts and ends in the same unit; leading dimensions broadcast.

    Returns:
        (..., N, M) ratios in [0, 1], in the dtype of the arguments; 0 for spans that only touch, are empty, end
        before they start or contain NaN.

    Raises:
        GroundingError: `a` or `b` is no such array (code `invalid_argument`).
    """
    # The arguments are not checked before, because metrics call this for each of many queries.
    try:
        start_a, end_a = a[..., :, None, 0], a[..., :, None, 1]
        start_b, end_b = b[..., None, :, 0], b[..., None, :, 1]
    except (IndexError, TypeError) as error:
        raise GroundingError(
            f"Expected arrays of shape (..., N, 2) for a and b, got {excerpt(a)} and {excerpt(b)}. Pass NumPy arrays "
            "of starts and ends.",
            code="invalid_argument",
        ) from error
    overlap = np.minimum(end_a, end_b)
    overlap -= np.maximum(start_a, start_b)
    hull = np.maximum(end_a, end_b)
    hull -= np.minimum(start_a, start_b)
    # Gaps, and empty, reversed and NaN spans, have the IoU 0 / 1.
    np.fmax(overlap, 0, out=overlap)
    hull[~(hull > 0)] = 1
    overlap /= hull
    return overlap


def to_moments(picks: np.ndarray, duration: float, offset: float = 0.0) -> list[Moment]:
    """Return the moments of a video in seconds.

    Args:
        picks: (K, 3) starts and ends as fractions of the video, and scores; NaN after the last.
        duration: length of the video in seconds.
        offset: seconds to add to all times; see `Video`.
    """
    seconds, offset = float(duration), float(offset)
    return [
        Moment(offset + start * seconds, offset + end * seconds, score)
        for start, end, score in picks.tolist()
        if score == score
    ]
