"""Compare the answers of two models to the same queries, query by query."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from runtime.core.decoding import Protocol
from runtime.core.metrics import best_iou, is_hit
from runtime.core.moments import temporal_iou

FLIP_THRESHOLDS = (0.5, 0.7)
VISIBLE_S = 0.05
"""Seconds by which a boundary must move before a reader of tenths of a second can see it."""


@dataclasses.dataclass(frozen=True)
class PairedAnswers:
    """The differences between the answers of a reference and another model to N queries.

    Attributes:
        hits: by IoU threshold, (2, N) bool: whether the best moment of the reference, and of the other, is right.
        ious: (2, N) temporal IoU of the best moments with the ground truth.
        overlaps: (N,) temporal IoU of the two best moments.
        shifts: (N, 2) seconds by which start and end move; the duration of the video where a model has no moment.
    """

    hits: Mapping[float, np.ndarray]
    ious: np.ndarray
    overlaps: np.ndarray
    shifts: np.ndarray

    def gained(self, threshold: float) -> np.ndarray:
        """Return which queries only the other model answers, (N,) bool."""
        before, after = self.hits[threshold]
        return ~before & after

    def lost(self, threshold: float) -> np.ndarray:
        """Return which queries only the reference answers, (N,) bool."""
        before, after = self.hits[threshold]
        return before & ~after


def compare_answers(
    reference: Mapping[float, np.ndarray],
    other: Mapping[float, np.ndarray],
    truth: np.ndarray,
    durations: np.ndarray,
    protocol: Protocol,
) -> PairedAnswers:
    """Compare answers to N queries.

    Args:
        reference, other: for each IoU threshold of the NMS (N, K, 3) starts, ends and scores, best first, as fractions
            of the video, NaN after the last.
        truth: ground truth; see `runtime.core.metrics.best_iou`.
        durations: (N,) seconds.
        protocol: whose rule decides what is a hit.
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
        reference, other: (N, 2) starts and ends, NaN where there is none.
        durations: seconds by which they are multiplied: (N,) if they are fractions, 1 if they are seconds.
    """
    overlaps = temporal_iou(reference[:, None], other[:, None])[:, 0, 0]
    return overlaps, boundary_shifts(reference, other, durations)


def boundary_shifts(reference: np.ndarray, other: np.ndarray, durations: np.ndarray | float) -> np.ndarray:
    """Return how far (..., 2) starts and ends lie apart, in seconds; `durations` where one is missing."""
    apart = np.abs(other.astype(np.float64) - reference)
    return np.where(np.isfinite(apart), apart, 1.0) * np.asarray(durations)[..., None]
