"""Compute average precision and the best overlap of predicted moments as the public evaluator of QVHighlights does.

Source: `standalone_eval` of https://github.com/jayleicn/moment_detr. Results are equal to its results, also for moments
that end before they start and for ties.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from runtime.core.moments import temporal_iou

# Averaged in mAP.
IOU_THRESHOLDS = (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)


def average_precision(ranked: Sequence[np.ndarray], truths: Sequence[np.ndarray]) -> np.ndarray:
    """Return the interpolated average precision of N queries at each of `IOU_THRESHOLDS`, (N, 10) float64.

    Each prediction matches the ground truth of the highest IoU that no better prediction has matched.

    Args:
        ranked: (K, 2 or more) starts and ends for each query, best first; a query without predictions has 0.
        truths: (W, 2) ground truth for each query in the same unit, W at least 1.
    """
    result = np.zeros((len(truths), len(IOU_THRESHOLDS)))
    for rows, spans, truth in groups(ranked, truths):
        result[rows] = _interpolated(_hits(spans, truth), np.isfinite(spans[..., 0]), truth.shape[1])
    return result


def best_overlaps(listed: Sequence[np.ndarray], truths: Sequence[np.ndarray], rank: int) -> np.ndarray:
    """Return the IoU of each of the first `rank` predictions with its best ground truth, (N, rank) float64.

    The evaluator chooses the ground truth by `detection_iou` and reports the IoU over the hull.

    Args:
        listed: (K, 2 or more) starts and ends for each query, in the order of the file; a missing one has an IoU of 0.
        truths: see `average_precision`.
    """
    result = np.zeros((len(truths), rank))
    for rows, spans, truth in groups([spans[:rank] for spans in listed], truths):
        best = detection_iou(spans, truth).argmax(axis=-1)
        overlaps = np.take_along_axis(temporal_iou(spans, truth), best[..., None], axis=-1)[..., 0]
        result[rows, : overlaps.shape[1]] = overlaps
    return result


def groups(
    predictions: Sequence[np.ndarray], truths: Sequence[np.ndarray]
) -> Iterator[tuple[list[int], np.ndarray, np.ndarray]]:
    """Yield the queries in groups of an equal number of ground-truth moments.

    The order of ties depends on this number, so it is not padded.

    Yields:
        Row numbers; (n, K, 2) float64 predictions, NaN after the last; (n, W, 2) float64 ground truth.
    """
    counts = np.array([len(truth) for truth in truths], np.int64)
    for count in np.unique(counts).tolist():
        rows = np.flatnonzero(counts == count).tolist()
        spans = np.full((len(rows), max(len(predictions[row]) for row in rows), 2), np.nan)
        for index, row in enumerate(rows):
            spans[index, : len(predictions[row])] = predictions[row][:, :2]
        yield rows, spans, np.stack([truths[row] for row in rows]).astype(np.float64)


def detection_iou(spans: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Return the overlap of spans divided by the sum of their lengths less the overlap, (n, K, W).

    It is NaN for two empty spans, and for a span of negative length -x and one of length x.

    Args:
        spans: (n, K, 2) starts and ends.
        truth: (n, W, 2) starts and ends in the same unit.
    """
    with np.errstate(all="ignore"):
        start = np.maximum(spans[:, :, None, 0], truth[:, None, :, 0])
        end = np.minimum(spans[:, :, None, 1], truth[:, None, :, 1])
        overlap = np.clip(end - start, 0, None)
        lengths = (spans[..., 1] - spans[..., 0])[:, :, None] + (truth[..., 1] - truth[..., 0])[:, None]
        return overlap / (lengths - overlap)


def _hits(spans: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Return whether each of K predictions is a true positive at T IoU thresholds, (n, T, K) bool.

    An IoU that is not a number counts as a match, because the evaluator rejects only an IoU below the threshold.

    Args:
        spans, truth: see `detection_iou`; predictions best first.
    """
    thresholds = np.array(IOU_THRESHOLDS)[:, None]
    overlaps = detection_iou(spans, truth)
    # The evaluator calls argsort in the same way, so that ties are in the same order on the same machine.
    order = overlaps.argsort(axis=-1)[..., ::-1]
    overlaps = np.take_along_axis(overlaps, order, axis=-1)
    exists = np.isfinite(spans[..., 0])
    number, count, width = len(spans), spans.shape[1], truth.shape[1]
    matched = np.zeros((number, len(thresholds), width), bool)
    hits = np.zeros((number, len(thresholds), count), bool)
    for rank in range(count):
        candidates = np.broadcast_to(order[:, None, rank], matched.shape)
        free = ~np.take_along_axis(matched, candidates, axis=-1) & exists[:, rank, None, None]
        allowed = free & ~(overlaps[:, None, rank] < thresholds)
        hits[:, :, rank] = allowed.any(axis=-1)
        chosen = np.take_along_axis(candidates, allowed.argmax(axis=-1)[..., None], axis=-1)
        taken = np.take_along_axis(matched, chosen, axis=-1) | hits[:, :, rank, None]
        np.put_along_axis(matched, chosen, taken, axis=-1)
    return hits


def _interpolated(hits: np.ndarray, exists: np.ndarray, width: int) -> np.ndarray:
    """Return the area under the precision envelope over recall at T IoU thresholds, (n, T).

    Args:
        hits: (n, T, K) bool, best first.
        exists: (n, K) bool, false after the last prediction.
        width: number of ground-truth moments.
    """
    positives = hits.cumsum(axis=-1)
    precision = positives / np.maximum(exists.cumsum(axis=-1), 1)[:, None]
    envelope = np.maximum.accumulate(precision[..., ::-1], axis=-1)[..., ::-1]
    steps = np.diff(positives / width, axis=-1, prepend=0.0)
    return (steps * envelope).sum(axis=-1)
