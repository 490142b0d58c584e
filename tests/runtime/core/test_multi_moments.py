"""Test `runtime.core.multi_moments` against values computed by hand and against plain loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.core.average_precision import average_precision
from runtime.core.multi_moments import multi_moment_metrics
from tests import public_evaluator

TIMES = st.integers(0, 8)
WINDOWS = st.lists(st.tuples(TIMES, TIMES), min_size=1, max_size=5)


def metrics(listed: list[list[tuple[float, float]]], truths: list[list[tuple[float, float]]]) -> dict[str, float]:
    windows, moments = ([np.array(one, np.float64).reshape(-1, 2) for one in several] for several in (listed, truths))
    return multi_moment_metrics(windows, moments, average_precision(windows, moments))


def test_mean_recall_and_iou_match_hand_computed_values() -> None:
    # The first query has IoUs 1 and 0.5 with its two moments; the second has one moment and is missed.
    values = metrics([[(0, 10), (20, 25)], [(50, 60), (0, 10)]], [[(0, 10), (20, 30)], [(0, 10)]])
    assert (values["mIoU@1"], values["mIoU@2"]) == (0.5, 0.75)
    assert values["mR@1"] == 0.5
    # The second window matches at 5 of 14 thresholds: recalls of 100 % five times, and of 50 % nine times.
    assert values["mR@2"] == round((5 * 100 + 9 * 50) / 14, 2) / 100
    assert math.isnan(values["mR@3"])
    assert math.isnan(values["mIoU@3"])


def test_average_precision_is_grouped_by_number_of_moments() -> None:
    moments = [(0, 10), (20, 30), (40, 50), (60, 70)]
    hit, miss = moments[:1], [(90, 99)]
    values = metrics([hit, miss, miss, hit, hit], [moments[:1], moments[:1], moments[:2], moments[:3], moments])
    assert [values[name] for name in ("mAP@1_tgt", "mAP@2_tgt", "mAP@3+tgt")] == [
        *(0.5, 0),
        pytest.approx((1 / 3 + 1 / 4) / 2),
    ]
    assert values["G-mAP"] == pytest.approx((1 + 1 / 3 + 1 / 4) / 5)


def test_groups_without_queries_are_nan() -> None:
    values = metrics([[(0, 10)]], [[(0, 10)]])
    assert {name for name, value in values.items() if math.isnan(value)} == {
        *("mAP@2_tgt", "mAP@3+tgt"),
        *(f"{name}@{rank}" for name in ("mR", "mIoU") for rank in (2, 3)),
    }


@given(st.lists(st.tuples(WINDOWS, WINDOWS), min_size=1, max_size=4), st.integers(1, 3))
def test_metrics_equal_plain_loops(queries: list[tuple[list, list]], rank: int) -> None:
    listed, truths = ([query[index] for query in queries] for index in (0, 1))
    values = metrics(listed, truths)
    if any(min(len(windows), len(moments)) >= rank for windows, moments in queries):
        assert f"{100 * values[f'mR@{rank}']:.2f}" == f"{public_evaluator.mean_recall(listed, truths, rank):.2f}"
        expected = public_evaluator.mean_iou(listed, truths, rank)
        assert values[f"mIoU@{rank}"] == pytest.approx(expected, abs=1e-12, nan_ok=True)
    else:
        assert math.isnan(values[f"mR@{rank}"])
