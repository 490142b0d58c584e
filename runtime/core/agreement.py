"""Compare the moments of two models for the same queries, query by query."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from runtime.core.decoding import Protocol
from runtime.core.metrics import best_iou, is_hit
from runtime.core.moments import temporal_iou

FLIP_THRESHOLDS = (0.5, 0.7)
VISIBLE_S = 0.05
"""Shift of a boundary in seconds that changes a time printed with one decimal."""


@dataclasses.dataclass(frozen=True)
class PairedAnswers:
    """The differences between the moments of a reference and another model for N queries.

    Attributes:
        hits: IoU threshold to (2, N) bool: whether the best moment of the reference, and of the other model, is a hit.
        ious: (2, N) temporal IoU of the best moments with the ground truth.
        overlaps: (N,) temporal IoU of the two best moments.
        shifts: (N, 2) shifts of start and end in seconds; the duration of the video if a model has no moment.
    """

    hits: Mapping[float, np.ndarray]
    ious: np.ndarray
    overlaps: np.ndarray
    shifts: np.ndarray

    def gained(self, threshold: float) -> np.ndarray:
        """Return which queries only the other model answers correctly, (N,) bool."""
        before, after = self.hits[threshold]
        return ~before & after

    def lost(self, threshold: float) -> np.ndarray:
        """Return which queries only the reference answers correctly, (N,) bool."""
        before, after = self.hits[threshold]
        return before & ~after


def compare_answers(
    reference: Mapping[float, np.ndarray],
    other: Mapping[float, np.ndarray],
    truth: np.ndarray,
    durations: np.ndarray,
    protocol: Protocol,
) -> PairedAnswers:
    """Compare the moments of two models for N queries.

    Args:
        reference, other: IoU threshold of the NMS to (N, K, 3) starts, ends and scores: best first, as fractions of the
            video, NaN after the last.
        truth: (N, 2) ground truth as fractions of the video; or (N, W, 2) for queries with up to W moments, NaN after
            the last.
        durations: (N,) durations of the videos in seconds.
    """
    both = (reference, other)
    first = next(iter(reference))
    overlaps, shifts = moment_deviation(reference[0.5][:, 0, :2], other[0.5][:, 0, :2], durations)
    return PairedAnswers(
        {t: np.stack([is_hit(side[t], truth, 1, t, protocol) for side in both]) for t in FLIP_THRESHOLDS},
        np.stack([best_iou(side[first].astype(np.float64), truth, 1) for side in both]),
        overlaps,
        shifts,
    )


def moment_deviation(
    reference: np.ndarray, other: np.ndarray, durations: np.ndarray | float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """Return the temporal IoU of pairs of moments, (N,), and the shift of their starts and ends in seconds, (N, 2).

    Args:
        reference, other: (N, 2) starts and ends, NaN for no moment.
        durations: (N,) seconds for moments that are fractions of their videos, 1 for moments in seconds.
    """
    overlaps = temporal_iou(reference[:, None], other[:, None])[:, 0, 0]
    return overlaps, boundary_shifts(reference, other, durations)


def boundary_shifts(reference: np.ndarray, other: np.ndarray, durations: np.ndarray | float) -> np.ndarray:
    """Return the absolute shifts of starts and ends, in seconds.

    Args:
        reference, other: (..., 2) starts and ends as fractions of their videos, NaN for no moment.
        durations: (...) durations of the videos in seconds; 1 for moments in seconds.

    Returns:
        (..., 2) float64 shifts; the duration of the video where a start or end is NaN.
    """
    shifts = np.abs(other.astype(np.float64) - reference)
    return np.where(np.isfinite(shifts), shifts, 1.0) * np.asarray(durations)[..., None]
