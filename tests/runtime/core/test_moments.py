"""Test `runtime.core.moments`: temporal IoU."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.core.moments import temporal_iou

ANY_SPANS = st.lists(st.tuples(*[st.floats(width=32, min_value=-10, max_value=10) | st.just(np.nan)] * 2), max_size=5)


def iou(a: tuple[float, float], b: tuple[float, float]) -> float:
    return float(temporal_iou(np.array([a], np.float32), np.array([b], np.float32))[0, 0])


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ((0, 2), (1, 3), 1 / 3),
        ((0, 10), (0, 5), 0.5),
        ((0, 10), (4, 6), 0.2),
        ((3, 4), (3, 4), 1),
        # Touching, disjoint, reversed, empty and NaN.
        ((0, 1), (1, 2), 0),
        ((0, 1), (5, 6), 0),
        ((0.6, 0.2), (0.6, 0.2), 0),
        ((0.6, 0.2), (0, 1), 0),
        ((0.4, 0.4), (0.4, 0.4), 0),
        ((0.4, 0.4), (0, 1), 0),
        ((np.nan, 0.5), (0.2, 0.6), 0),
        ((0.2, 0.6), (0.2, np.nan), 0),
    ],
)
def test_iou_matches_hand_computed_values(a: tuple[float, float], b: tuple[float, float], expected: float) -> None:
    with np.errstate(all="raise"):
        assert iou(a, b) == np.float32(expected)


@given(ANY_SPANS, ANY_SPANS)
def test_temporal_iou_is_between_zero_and_one(a: list, b: list) -> None:
    left, right = (np.array(spans, np.float32).reshape(-1, 2) for spans in (a, b))
    with np.errstate(all="raise", under="ignore"):
        ratios = temporal_iou(left, right)
    assert ratios.shape == (len(a), len(b))
    assert ((ratios >= 0) & (ratios <= 1)).all()


def test_temporal_iou_broadcasts_leading_dimensions() -> None:
    a = np.random.default_rng(0).random((3, 4, 2))
    b = np.random.default_rng(1).random((3, 5, 2))
    together = temporal_iou(a, b)
    assert together.shape == (3, 4, 5)
    for row in range(3):
        np.testing.assert_array_equal(together[row], temporal_iou(a[row], b[row]))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_temporal_iou_keeps_the_argument_dtype(dtype: type) -> None:
    assert temporal_iou(np.zeros((1, 2), dtype), np.ones((1, 2), dtype)).dtype == dtype
