"""Score the moments of a prediction file against ground truth, as the public evaluator of QVHighlights does."""

from __future__ import annotations

import collections
import dataclasses
import logging
import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np

from runtime.core.average_precision import IOU_THRESHOLDS, average_precision, best_overlaps
from runtime.core.errors import AnnotationError, excerpt
from runtime.core.metrics import RANKS, Report, recall_name
from runtime.core.multi_moments import multi_moment_metrics
from runtime.datasets.dataset import DataSet, Invalid
from runtime.datasets.prediction_files import Prediction, Truth

log = logging.getLogger("drn")

# Windows of a row that count in mAP, in the order of the file.
MAX_WINDOWS = 10
# Length ranges in seconds: above the first, at most the second.
LENGTH_RANGES: Mapping[str, tuple[float, float]] = {"short": (0, 10), "middle": (10, 30), "long": (30, 150)}
HEADLINE = (
    *(recall_name(1, threshold) for threshold in (0.5, 0.7)),
    *("mIoU", "mAP", "mAP@0.5", "mAP@0.75"),
    *(recall_name(5, threshold) for threshold in (0.5, 0.7)),
)
MAX_NAMED_QUERIES = 5
# Existence score that separates matching queries from others, and IoU thresholds, of "Moment of Untruth".
EXIST_THRESHOLD = 0.5
STRICT_THRESHOLDS = (0.3, 0.5, 0.7)


@dataclasses.dataclass(frozen=True)
class ScoredQuery:
    """A query with its ground truth and predictions, in seconds.

    Attributes:
        truth: (W, 2) starts and ends, W at least 1.
        listed: (K, 3) windows of its last row, in the order of the file.
        ranked: (K, 3) first `MAX_WINDOWS` windows of each of its rows, best first.
    """

    truth: np.ndarray
    listed: np.ndarray
    ranked: np.ndarray


@dataclasses.dataclass(frozen=True)
class Rejection:
    """The accuracy of rejecting queries without a matching moment, as "Moment of Untruth" measures it.

    A query is rejected if its `pred_exist_score` is below the threshold, or if it has no window. A row without
    `pred_exist_score` is rejected only without a window. Source: arXiv 2502.08544, and `negative_aware_results.py` of
    https://github.com/keflanagan/MomentofUntruth, whose hits have an IoU above the threshold.

    Attributes:
        threshold: minimum `pred_exist_score` of an answer.
        accuracy: share of the queries without a moment that are rejected; NaN if there are none.
        wrongly_rejected: share of the queries with a moment that are rejected.
        recall, recall_of_all: share of the queries with a moment whose first window is a hit, by the IoU threshold.
            Rejected queries are misses in `recall`.
    """

    threshold: float
    without_moment: int
    with_moment: int
    accuracy: float
    wrongly_rejected: float
    recall: Mapping[float, float]
    recall_of_all: Mapping[float, float]

    def to_dict(self) -> dict[str, Any]:
        return {
            "threshold": self.threshold,
            "queries_without_moment": self.without_moment,
            "rejection_accuracy": None if math.isnan(self.accuracy) else self.accuracy,
            "wrongly_rejected": self.wrongly_rejected,
            "with_rejection": {f"R@1 IoU>{limit:g}": value for limit, value in self.recall.items()},
            "without_rejection": {f"R@1 IoU>{limit:g}": value for limit, value in self.recall_of_all.items()},
        }

    def sentence(self) -> str:
        """Return the result as one sentence, in percent."""
        accuracy = "" if math.isnan(self.accuracy) else f"{100 * self.accuracy:.2f} % of "
        return (
            f"Rejected below a pred_exist_score of {self.threshold:g}: {accuracy}{self.without_moment} queries without "
            f"a moment and {100 * self.wrongly_rejected:.2f} % of {self.with_moment} with one; R@1 IoU>0.5 "
            f"{100 * self.recall[0.5]:.2f} instead of {100 * self.recall_of_all[0.5]:.2f}."
        )


@dataclasses.dataclass(frozen=True)
class PredictionScores:
    """The metrics of a prediction file.

    Attributes:
        report: metrics of all queries with ground truth.
        ranges: by the names in `LENGTH_RANGES`, of the queries with a moment of this length, against these moments.
            Without such a query, the values are NaN.
        multi_moment: metrics of `multi_moment_metrics`, of all queries with ground truth.
        rejection: metrics of all queries; None if all have ground truth and no prediction has a `pred_exist_score`.
    """

    report: Report
    ranges: Mapping[str, Report]
    multi_moment: Report
    rejection: Rejection | None

    def to_dict(self) -> dict[str, Any]:
        """Return all metrics as JSON values: fractions, and null for a metric without queries."""
        parts = {**self.ranges, "multi_moment": self.multi_moment}
        rejection = None if self.rejection is None else self.rejection.to_dict()
        values = {name: _json_values(report) for name, report in parts.items()}
        return {**_json_values(self.report), **values, "rejection": rejection}


def truths_of(data_set: DataSet, split: str, invalid: Invalid) -> list[Truth]:
    """Return the ground truth of a split by query id; moments end with their video at the latest."""
    return [
        Truth(
            annotation.name,
            annotation.video,
            np.array([(start, min(end, data_set.durations[annotation.video])) for start, end in annotation.moments]),
        )
        for annotation in data_set.annotations(split, invalid)
    ]


def score_predictions(
    predictions: Sequence[Prediction],
    truths: Sequence[Truth],
    *,
    limit: int | None = None,
    shared_only: bool = False,
    exist_threshold: float = EXIST_THRESHOLD,
) -> PredictionScores:
    """Return the metrics of predictions, matched to their ground truth by query id.

    Args:
        predictions: rows of a prediction file. Rows of one query are one list in mAP, and the last of them counts in
            recall and mIoU.
        truths: ground truth of the queries. If a query id occurs several times, the video distinguishes the queries.
        shared_only: ignore queries that only one of the two has.

    Raises:
        AnnotationError: the queries differ, two are equal, or none has a matching moment.
    """
    by_key, by_video = _by_query(truths)
    rows: dict[Hashable, list[Prediction]] = collections.defaultdict(list)
    for prediction in predictions:
        rows[(prediction.qid, prediction.video) if by_video else prediction.qid].append(prediction)
    chosen = dict(list(by_key.items())[:limit])
    if not shared_only:
        _check_same_queries([key for key in chosen if key not in rows], [key for key in rows if key not in by_key])
    shared = {key: truth for key, truth in chosen.items() if key in rows}
    _warn(shared, rows)
    queries = [_scored(truth, rows[key]) for key, truth in shared.items() if len(truth.windows)]
    if not queries:
        raise AnnotationError(
            f"Expected queries with a moment in both files, got none of {len(rows)} predicted and {len(chosen)} "
            "annotated ones. Pass predictions and ground truth of one split.",
            code="query_mismatch",
        )
    precision = _precision(queries)
    in_ranges = {name: _in_range(queries, *bounds) for name, bounds in LENGTH_RANGES.items()}
    listed, windows = [query.listed for query in queries], [query.truth for query in queries]
    return PredictionScores(
        _report(queries, precision),
        {name: _report(selected, _precision(selected)) for name, selected in in_ranges.items()},
        Report(multi_moment_metrics(listed, windows, precision), len(queries), "drn"),
        _rejection([(truth, rows[key][-1]) for key, truth in shared.items()], exist_threshold),
    )


def _by_query(truths: Sequence[Truth]) -> tuple[dict[Hashable, Truth], bool]:
    """Return the ground truth by query id, or by (id, video) if ids repeat, and whether keys contain the video."""
    by_video = len({truth.qid for truth in truths}) < len(truths)
    by_key: dict[Hashable, Truth] = {}
    for truth in truths:
        key = (truth.qid, truth.video) if by_video else truth.qid
        if key in by_key:
            raise AnnotationError(
                f"The ground truth has the qid {excerpt(truth.qid)} twice for one video. Use a different qid for each "
                "query.",
                code="duplicate_query",
            )
        by_key[key] = truth
    return by_key, by_video


def _check_same_queries(missing: Sequence[Hashable], unknown: Sequence[Hashable]) -> None:
    """Raise AnnotationError if queries have no prediction, or predictions no ground truth."""
    if missing or unknown:
        named = [f"no prediction for {_named(missing)}"] if missing else []
        named += [f"no ground truth for {_named(unknown)}"] if unknown else []
        raise AnnotationError(
            f"There is {' and '.join(named)}. Pass predictions and ground truth of one split, or --shared-only to "
            "score the queries that both have.",
            code="query_mismatch",
        )


def _named(keys: Sequence[Hashable]) -> str:
    others = f" and {len(keys) - MAX_NAMED_QUERIES} others" if len(keys) > MAX_NAMED_QUERIES else ""
    return f"{len(keys)} queries (qid {', '.join(map(excerpt, keys[:MAX_NAMED_QUERIES]))}{others})"


def _warn(truths: Mapping[Hashable, Truth], rows: Mapping[Hashable, Sequence[Prediction]]) -> None:
    """Warn about rows that the public evaluator scores without a message, though they are probably mistakes."""
    repeated = [key for key in truths if len(rows[key]) > 1]
    used = [(truth, row) for key, truth in truths.items() for row in rows[key]]
    problems: dict[str, list[Hashable]] = {
        "occur several times; the last row counts in recall, all rows in mAP": repeated,
        "have windows that are not sorted by score; the first one in the file counts in R@1": [
            row.qid for _, row in used if not (row.windows[1:, 2] <= row.windows[:-1, 2]).all()
        ],
        "have windows that do not end after their start": [
            row.qid for _, row in used if not (row.windows[:, 1] > row.windows[:, 0]).all()
        ],
        "name another video than the ground truth": [
            row.qid for truth, row in used if None not in (truth.video, row.video) and truth.video != row.video
        ],
        "have no windows and count as misses": [row.qid for _, row in used if not len(row.windows)],
    }
    for problem, keys in problems.items():
        if keys:
            log.warning("Of the predictions, %s %s.", _named(keys), problem)
    impossible = [key for key, truth in truths.items() if not (truth.windows[:, 1] > truth.windows[:, 0]).all()]
    if impossible:
        log.warning(
            "Of the ground truth, %s have moments that do not end after their start; no prediction has an IoU above 0 "
            "with them.",
            _named(impossible),
            extra={"code": "impossible_moment"},
        )


def _scored(truth: Truth, rows: Sequence[Prediction]) -> ScoredQuery:
    windows = [window for row in rows for window in row.windows[:MAX_WINDOWS].tolist()]
    # The order of scores that are not numbers depends on Python's algorithm.
    windows.sort(key=lambda window: -window[2])
    return ScoredQuery(truth.windows, rows[-1].windows, np.array(windows).reshape(-1, 3))


def _in_range(queries: Sequence[ScoredQuery], above: float, at_most: float) -> list[ScoredQuery]:
    """Return the queries that have ground truth of a length in this range, with this ground truth only."""
    selected = []
    for query in queries:
        length = query.truth[:, 1] - query.truth[:, 0]
        truth = query.truth[(above < length) & (length <= at_most)]
        if len(truth):
            selected.append(dataclasses.replace(query, truth=truth))
    return selected


def _precision(queries: Sequence[ScoredQuery]) -> np.ndarray:
    return average_precision([query.ranked for query in queries], [query.truth for query in queries])


def _report(queries: Sequence[ScoredQuery], precision: np.ndarray) -> Report:
    overlaps = best_overlaps([query.listed for query in queries], [query.truth for query in queries], max(RANKS))
    values = dict.fromkeys(HEADLINE, math.nan)
    if queries:
        means = precision.mean(axis=0)
        values.update({"mIoU": float(overlaps[:, 0].mean()), "mAP": float(means.mean())})
        values.update({f"mAP@{threshold:g}": float(mean) for threshold, mean in zip(IOU_THRESHOLDS, means)})
        for rank in RANKS:
            best = overlaps[:, :rank].max(axis=1)
            values.update({recall_name(rank, limit): float((best >= limit).mean()) for limit in (0.3, *IOU_THRESHOLDS)})
    return Report(values, len(queries), "drn")


def _rejection(last: Sequence[tuple[Truth, Prediction]], threshold: float) -> Rejection | None:
    """Return the rejection metrics; None if all queries have a moment and no prediction has a score.

    Args:
        last: each query with its last prediction.
        threshold: minimum `pred_exist_score` of an answer.
    """
    with_moment = np.array([len(truth.windows) > 0 for truth, _ in last])
    if with_moment.all() and all(row.exist_score is None for _, row in last):
        return None
    rejected = np.array(
        [not len(row.windows) or (row.exist_score is not None and row.exist_score < threshold) for _, row in last]
    )
    matching = [(truth.windows, row.windows) for truth, row in last if len(truth.windows)]
    overlaps = best_overlaps([windows for _, windows in matching], [truth for truth, _ in matching], 1)[:, 0]
    hits = {limit: overlaps > limit for limit in STRICT_THRESHOLDS}
    answered = ~rejected[with_moment]
    return Rejection(
        threshold,
        int((~with_moment).sum()),
        int(with_moment.sum()),
        float(rejected[~with_moment].mean()) if not with_moment.all() else math.nan,
        float(rejected[with_moment].mean()),
        {limit: float((hit & answered).mean()) for limit, hit in hits.items()},
        {limit: float(hit.mean()) for limit, hit in hits.items()},
    )


def _json_values(report: Report) -> dict[str, Any]:
    values = {name: None if math.isnan(value) else value for name, value in report.values.items()}
    return {**values, "queries": report.queries}
