"""Test `runtime.core.average_precision` against values computed by hand and against plain loops."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.core.average_precision import IOU_THRESHOLDS, average_precision, best_overlaps
from tests import public_evaluator

# Few distinct times, so that ties, equal, reversed and empty windows are frequent.
TIMES = st.integers(0, 8)
WINDOWS = st.lists(st.tuples(TIMES, TIMES), min_size=1, max_size=4)
QUERIES = st.lists(st.tuples(WINDOWS, WINDOWS), min_size=1, max_size=4)


def spans(*windows: tuple[float, float]) -> np.ndarray:
    return np.array(windows, np.float64).reshape(-1, 2)


def at(precision: np.ndarray, threshold: float) -> float:
    return float(precision[0, IOU_THRESHOLDS.index(threshold)])


# True, false, true, where the second window is elsewhere or matches the first moment again: recall 1/2, 1/2, 1 at
# precision 1, 1/2, 2/3.
@pytest.mark.parametrize("second", [(40, 50), (0, 9)])
def test_average_precision_matches_hand_computed_value(second: tuple[float, float]) -> None:
    actual = average_precision([spans((0, 10), second, (20, 30))], [spans((0, 10), (20, 30))])
    assert at(actual, 0.5) == pytest.approx(1 / 2 + 1 / 2 * 2 / 3)


def test_average_precision_accepts_iou_equal_to_threshold() -> None:
    actual = average_precision([spans((0, 7))], [spans((0, 10))])
    assert [at(actual, threshold) for threshold in (0.65, 0.7, 0.75)] == [1, 1, 0]


@given(QUERIES)
def test_average_precision_equals_plain_loops(queries: list[tuple[list, list]]) -> None:
    predictions = [
        {"qid": qid, "pred_relevant_windows": [[*window, -rank] for rank, window in enumerate(windows)]}
        for qid, (windows, _) in enumerate(queries)
    ]
    truths = [{"qid": qid, "relevant_windows": moments} for qid, (_, moments) in enumerate(queries)]
    expected = public_evaluator.scores(predictions, truths)
    listed, moments = ([spans(*query[index]) for query in queries] for index in (0, 1))
    actual = average_precision(listed, moments).mean(axis=0)
    overlaps = best_overlaps(listed, moments, 1)[:, 0]
    for index, threshold in enumerate(IOU_THRESHOLDS):
        assert actual[index] == pytest.approx(expected[f"mAP@{threshold:g}"], abs=1e-12)
        assert (overlaps >= threshold).mean() == expected[f"R@1 IoU={threshold:g}"]


def test_missing_predictions_have_no_overlap_and_precision() -> None:
    actual = best_overlaps([spans((0, 10)), spans()], [spans((0, 5), (0, 10)), spans((0, 5))], 3)
    assert actual.tolist() == [[1, 0, 0], [0, 0, 0]]
    assert not average_precision([spans(), spans((0, 1))], [spans((0, 1)), spans((0, 1))])[0].any()
