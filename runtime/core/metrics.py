"""Compute recall at n for temporal IoU above m, mean IoU, and the scores of the best constant moments."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from runtime.core.decoding import Protocol
from runtime.core.moments import temporal_iou

RANKS = (1, 5)
IOU_THRESHOLDS = (0.3, 0.5, 0.7)
# Step of starts and ends of constant moments, as a fraction of the video.
GRID_STEP = 0.02


def recall_name(rank: int, iou_threshold: float) -> str:
    """Return the name of a metric as papers spell it: R@1 IoU=0.5."""
    return f"R@{rank} IoU={iou_threshold:g}"


def metric_names(iou_thresholds: Sequence[float]) -> tuple[str, ...]:
    """Return the metrics of a report in its order, most informative first.

    R@5 is last, because constant moments reach 85 % R@5 IoU=0.5 on Charades-STA.
    """
    rising = sorted(iou_thresholds)
    return (
        *(recall_name(1, threshold) for threshold in rising if threshold >= 0.5),
        "mIoU",
        *(recall_name(1, threshold) for threshold in reversed(rising) if threshold < 0.5),
        *(recall_name(rank, threshold) for rank in RANKS[1:] for threshold in rising),
    )


@dataclasses.dataclass(frozen=True)
class Report:
    """Metrics over N queries.

    Attributes:
        values: metric name to its value as a fraction in [0, 1].
        protocol: rule for hits, `mmaction2` or `drn`; see `is_hit`.
    """

    values: Mapping[str, float]
    queries: int
    protocol: Protocol

    def to_dict(self) -> dict[str, Any]:
        return {**self.values, "queries": self.queries, "protocol": self.protocol}


def best_iou(picks: np.ndarray, truth: np.ndarray, rank: int) -> np.ndarray:
    """Return the best temporal IoU among the first `rank` moments of every query, (N,).

    Args:
        picks: (N, K, 2 or more) starts and ends, best first, NaN after the last.
        truth: (N, 2) ground truth in the same unit; or (N, W, 2) for queries with up to W moments, NaN after the last.
            The moment of the highest IoU counts, as in the QVHighlights evaluator.
    """
    if picks.shape[1] == 0:
        return np.zeros(len(truth), np.result_type(picks, truth))
    moments = truth[:, None] if truth.ndim == 2 else truth
    return temporal_iou(picks[:, :rank, :2], moments).max(axis=(1, 2))


def is_hit(picks: np.ndarray, truth: np.ndarray, rank: int, iou_threshold: float, protocol: Protocol) -> np.ndarray:
    """Return whether one of the first `rank` moments of each query is a hit, (N,) bool; see `best_iou` for the arrays.

    Args:
        protocol: `mmaction2` computes in float32 and requires an IoU above the threshold; `drn` computes in float64 and
            accepts the threshold itself.
    """
    if protocol == "mmaction2":
        overlap = best_iou(picks.astype(np.float32), truth.astype(np.float32), rank)
        return overlap > np.float32(iou_threshold)
    return best_iou(picks.astype(np.float64), truth.astype(np.float64), rank) >= iou_threshold


def report(picks: Mapping[float, np.ndarray], truth: np.ndarray, protocol: Protocol) -> Report:
    """Return the metrics of N queries.

    Args:
        picks: IoU threshold to (N, K, 3) starts, ends and scores, best first, K at least 5 for R@5. The NMS of the
            protocol `drn` depends on the threshold.
        truth: (N, 2) or (N, W, 2) ground truth in the unit of the moments; see `best_iou`.
    """
    values = {
        recall_name(rank, threshold): float(is_hit(picks[threshold], truth, rank, threshold, protocol).mean())
        for threshold in picks
        for rank in RANKS
    }
    values["mIoU"] = float(best_iou(next(iter(picks.values())).astype(np.float64), truth, 1).mean())
    return Report({name: values[name] for name in metric_names(list(picks))}, len(truth), protocol)


def prior_report(
    training_truth: np.ndarray,
    truth: np.ndarray,
    protocol: Protocol,
    iou_thresholds: Sequence[float] = IOU_THRESHOLDS,
) -> Report:
    """Return the metrics of the best constant moments, which are fitted on the training split for each metric.

    Args:
        training_truth: (M, 2) moments of the training split as fractions of their videos.
        truth: (N, 2) or (N, W, 2) ground truth as fractions of the video; see `best_iou`.
    """
    picks = {
        threshold: np.broadcast_to(
            best_constant_moments(training_truth, max(RANKS), threshold), (len(truth), max(RANKS), 2)
        )
        for threshold in iou_thresholds
    }
    scored = report(picks, truth, protocol)
    mean = np.broadcast_to(best_constant_moments(training_truth, 1, None), (len(truth), 1, 2))
    return Report({**scored.values, "mIoU": float(best_iou(mean, truth, 1).mean())}, len(truth), protocol)


def best_constant_moments(truth: np.ndarray, count: int, iou_threshold: float | None) -> np.ndarray:
    """Return `count` constant spans that are hits for most queries, (count, 2), best first.

    The search is greedy: each span maximizes the number of hits together with the spans before.

    Args:
        truth: (N, 2) fractions of the video.
        iou_threshold: temporal IoU above which a span is a hit; with None the mean of the best IoU is maximized.
    """
    ticks = np.arange(0, 1 + GRID_STEP / 2, GRID_STEP, dtype=np.float32)
    start, end = np.triu_indices(len(ticks), 1)
    candidates = np.stack((ticks[start], ticks[end]), 1)
    overlap = temporal_iou(candidates, truth.astype(np.float32))
    gain = overlap if iou_threshold is None else (overlap > np.float32(iou_threshold)).astype(np.float32)
    reached = np.zeros(len(truth), np.float32)
    indices: list[int] = []
    for _ in range(count):
        best = int(np.maximum(gain, reached).mean(axis=1).argmax())
        indices.append(best)
        reached = np.maximum(reached, gain[best])
    return candidates[indices]


def format_table(rows: Sequence[tuple[str, Report]], names: Sequence[str] = ()) -> str:
    """Return labeled reports as a text table in percent, one row each.

    Args:
        rows: labels and reports. A value that is NaN is shown as "-".
        names: metrics to show; default: all of the first report.
    """
    names = names or list(rows[0][1].values)
    width = max(len(label) for label, _ in rows)
    columns = [max(len(name), 6) for name in names]
    lines = [" " * width + "".join(f"  {name:>{column}}" for name, column in zip(names, columns))]
    for label, scored in rows:
        values = [scored.values[name] for name in names]
        cells = ["-" if math.isnan(value) else f"{100 * value:.2f}" for value in values]
        lines.append(f"{label:<{width}}" + "".join(f"  {cell:>{column}}" for cell, column in zip(cells, columns)))
    return "\n".join(lines)
