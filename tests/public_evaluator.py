"""Restate the metrics of the public evaluators of QVHighlights and QV-M2 as plain loops, from reading their code.

Source: `standalone_eval` of https://github.com/jayleicn/moment_detr and https://github.com/Zhuo-Cao/QV-M2, 2026-11.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

THRESHOLDS = [0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95]
Row = dict[str, Any]


def scores(predictions: Sequence[Row], truths: Sequence[Row], length: tuple[float, float] | None = None) -> Row:
    """Return mAP and R@1 by name as fractions, of the queries with a moment of a length in (first, second]."""
    windows = {row["qid"]: row["relevant_windows"] for row in truths}
    if length is not None:
        windows = {
            qid: [window for window in moments if length[0] < window[1] - window[0] <= length[1]]
            for qid, moments in windows.items()
        }
    windows = {qid: moments for qid, moments in windows.items() if moments}
    pooled: dict[Any, list[Any]] = {qid: [] for qid in windows}
    first: dict[Any, Any] = {}
    for row in predictions:
        if row["qid"] in windows:
            pooled[row["qid"]] += row["pred_relevant_windows"][:10]
            first[row["qid"]] = (row["pred_relevant_windows"] or [None])[0]
    precision = {qid: [_average_precision(pooled[qid], windows[qid], limit) for limit in THRESHOLDS] for qid in windows}
    means = [sum(values) / len(windows) for values in zip(*precision.values(), strict=True)]
    result = {"mAP": sum(means) / len(means)}
    for limit, mean in zip(THRESHOLDS, means, strict=True):
        hits = [qid for qid in windows if first[qid] and _hull_iou(first[qid], windows[qid]) >= limit]
        result |= {f"mAP@{limit:g}": mean, f"R@1 IoU={limit:g}": len(hits) / len(windows)}
    return result


def detection_iou(window: Sequence[float], truth: Sequence[float]) -> float:
    """Return overlap / (sum of lengths - overlap) with NumPy's division by zero."""
    overlap = max(min(window[1], truth[1]) - max(window[0], truth[0]), 0)
    with np.errstate(all="ignore"):
        return float(np.float64(overlap) / np.float64((window[1] - window[0]) + (truth[1] - truth[0]) - overlap))


def _hull_iou(window: Sequence[float], truths: Sequence[Sequence[float]]) -> float:
    """Return overlap / hull with the ground truth that `detection_iou` prefers."""
    truth = truths[int(np.argmax([detection_iou(window, truth) for truth in truths]))]
    hull = max(window[1], truth[1]) - min(window[0], truth[0])
    return max(0, min(window[1], truth[1]) - max(window[0], truth[0])) / hull if hull else 0


def _average_precision(predictions: Sequence[Any], truths: Sequence[Any], limit: float) -> float:
    matched: set[int] = set()
    recall, precision = [0.0], [0.0]
    for number, window in enumerate(sorted(predictions, key=lambda one: -one[2]), 1):
        overlaps = np.array([detection_iou(window, truth) for truth in truths])
        for index in overlaps.argsort()[::-1].tolist():
            if overlaps[index] < limit:
                break
            if index not in matched:
                matched.add(index)
                break
        recall.append(len(matched) / len(truths))
        precision.append(len(matched) / number)
    area = 0.0
    for rank in range(1, len(recall)):
        area += (recall[rank] - recall[rank - 1]) * max(precision[rank:])
    assert not math.isnan(area)
    return area


def mean_recall(listed: Sequence[Any], truths: Sequence[Any], rank: int) -> float:
    """Return QV-M2's mR@k in percent, of queries with at least k windows and k moments."""
    counted = [
        (windows, moments) for windows, moments in zip(listed, truths, strict=True) if _has(windows, moments, rank)
    ]
    recalls = []
    for step in range(14):
        matches = sum(
            len(_matches(windows[:rank], moments, round(0.3 + 0.05 * step, 2))) for windows, moments in counted
        )
        recalls.append(float(f"{matches / (rank * len(counted)) * 100:.2f}"))
    return float(round(np.mean(recalls), 2))


def mean_iou(listed: Sequence[Any], truths: Sequence[Any], rank: int) -> float:
    """Return QV-M2's mIoU@k as a fraction, of the same queries."""
    pairs = [
        (windows, moments) for windows, moments in zip(listed, truths, strict=True) if _has(windows, moments, rank)
    ]
    matches = [overlap for windows, moments in pairs for overlap in _matches(windows[:rank], moments, -1.0)]
    return sum(matches) / len(matches) if matches else math.nan


def _has(windows: Sequence[Any], moments: Sequence[Any], rank: int) -> bool:
    return len(windows) >= rank and len(moments) >= rank


def _matches(windows: Sequence[Any], moments: Sequence[Any], limit: float) -> list[float]:
    taken: set[int] = set()
    overlaps = []
    for window in windows:
        best, chosen = -1.0, None
        for index, moment in enumerate(moments):
            overlap = detection_iou(window, moment)
            if index not in taken and overlap > best:
                best, chosen = overlap, index
        if chosen is not None and best >= limit:
            taken.add(chosen)
            overlaps.append(best)
    return overlaps
