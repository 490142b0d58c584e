"""Compute the metrics of queries with several moments that FlashMMR defines, as its evaluator does.

Sources: arXiv 2510.17218, and `standalone_eval` of https://github.com/Zhuo-Cao/QV-M2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from runtime.core.average_precision import detection_iou, groups

MAX_RANK = 3
# Of mR@k.
IOU_THRESHOLDS = (0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)


def multi_moment_metrics(
    listed: Sequence[np.ndarray], truths: Sequence[np.ndarray], precision: np.ndarray
) -> dict[str, float]:
    """Return the metrics of N queries as fractions; NaN for those without a query that they include.

    G-mAP is the mean of the average precision of the groups of queries with 1, 2, ... moments, weighted by their sizes.
    mAP@3+tgt is the unweighted mean of the groups with at least three moments. mR@k and mIoU@k include the queries with
    at least k moments and k predictions: mR@k is the share of the k predictions that match a moment each, averaged over
    `IOU_THRESHOLDS`, and mIoU@k the mean IoU of the k predictions, each with another moment.

    Args:
        listed: (K, 2 or more) starts and ends for each query, in the order of the file.
        truths: (W, 2) ground truth for each query in the same unit, W at least 1.
        precision: (N, T) average precision; see `runtime.core.average_precision.average_precision`.
    """
    counts = np.array([len(truth) for truth in truths], np.int64)
    average = precision.mean(axis=1)
    by_count = {count: float(average[counts == count].mean()) for count in np.unique(counts).tolist()}
    several = [value for count, value in by_count.items() if count >= 3]
    metrics = {
        "G-mAP": float(average.mean()) if len(average) else math.nan,
        "mAP@1_tgt": by_count.get(1, math.nan),
        "mAP@2_tgt": by_count.get(2, math.nan),
        "mAP@3+tgt": sum(several) / len(several) if several else math.nan,
    }
    available = np.minimum([len(windows) for windows in listed], counts)
    overlaps = _matched_overlaps(listed, truths, (-1.0, *IOU_THRESHOLDS))
    for rank in range(1, MAX_RANK + 1):
        # (n, 1 + T, k) of the queries that count.
        counted = overlaps[available >= rank, :, :rank]
        recalls = (~np.isnan(counted[:, 1:])).mean(axis=(0, 2)) if len(counted) else [math.nan]
        # The evaluator rounds each recall, and their mean, to 0.01 percent.
        percent = [float(f"{100 * recall:.2f}") for recall in recalls]
        metrics[f"mR@{rank}"] = float(np.round(np.mean(percent), 2)) / 100
        forced = counted[:, 0]
        forced = forced[~np.isnan(forced)]
        metrics[f"mIoU@{rank}"] = float(forced.mean()) if len(forced) else math.nan
    return metrics


def _matched_overlaps(
    listed: Sequence[np.ndarray], truths: Sequence[np.ndarray], iou_thresholds: Sequence[float]
) -> np.ndarray:
    """Return the IoU of the first predictions with their moments, (N, T, `MAX_RANK`) float64, NaN without a match.

    Each prediction in turn is matched with the moment of the highest IoU that is not matched yet, and with none if the
    IoU is below the threshold.

    Args:
        listed: (P, 2) predicted start and end of each of N queries, best first.
        truths: (M, 2) true start and end of each query.
        iou_thresholds: T minimum values of the IoU.
    """
    limits = np.array(iou_thresholds)
    result = np.full((len(truths), len(limits), MAX_RANK), math.nan)
    for rows, spans, truth in groups([windows[:MAX_RANK] for windows in listed], truths):
        overlaps = detection_iou(spans, truth)
        overlaps[np.isnan(overlaps)] = -np.inf
        matched = np.zeros((len(rows), len(limits), truth.shape[1]), bool)
        for rank in range(spans.shape[1]):
            free = np.where(matched, -np.inf, overlaps[:, None, rank])
            chosen = free.argmax(axis=-1)[..., None]
            best = np.take_along_axis(free, chosen, axis=-1)
            hit = best >= limits[:, None]
            result[rows, :, rank] = np.where(hit, best, math.nan)[..., 0]
            np.put_along_axis(matched, chosen, np.take_along_axis(matched, chosen, axis=-1) | hit, axis=-1)
    return result
