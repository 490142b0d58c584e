"""Test `runtime.core.agreement` with values computed by hand."""

from __future__ import annotations

import numpy as np
import pytest

from runtime.core.agreement import compare_answers, moment_deviation

NONE = (np.nan, np.nan)
TRUTH = np.array([(0.0, 0.5), (0.5, 1.0), (0.0, 1.0)])


def picks(*moments: tuple[float, float]) -> dict[float, np.ndarray]:
    rows = np.array([[(*moment, 1.0)] for moment in moments], np.float32)
    return dict.fromkeys((0.3, 0.5, 0.7), rows)


def test_compare_answers_counts_queries_that_one_model_answers() -> None:
    reference = picks((0.0, 0.5), (0.0, 0.4), (0.0, 1.0))
    other = picks((0.0, 0.3), (0.5, 1.0), (0.0, 1.0))
    paired = compare_answers(reference, other, TRUTH, np.array([10.0, 10.0, 30.0]), "drn")
    # 0.3 of 0.5 is an IoU of 0.6: a hit at 0.5, but not at 0.7.
    assert paired.lost(0.5).tolist() == [False, False, False]
    assert paired.lost(0.7).tolist() == [True, False, False]
    assert paired.gained(0.5).tolist() == paired.gained(0.7).tolist() == [False, True, False]
    np.testing.assert_allclose(paired.ious, [[1, 0, 1], [0.6, 1, 1]], atol=1e-6)
    np.testing.assert_allclose(paired.overlaps, [0.6, 0, 1], atol=1e-6)
    np.testing.assert_allclose(paired.shifts, [[0, 2], [5, 6], [0, 0]], atol=1e-5)


def test_moment_deviation_without_a_moment_is_the_duration() -> None:
    spans = np.array([(0.2, 0.4), NONE])
    overlaps, shifts = moment_deviation(spans, spans[::-1], np.array([10.0, 20.0]))
    assert overlaps.tolist() == [0, 0]
    assert shifts.tolist() == [[10, 10], [20, 20]]


def test_moment_deviation_of_seconds_is_in_seconds() -> None:
    overlaps, shifts = moment_deviation(np.array([(1.0, 3.0)]), np.array([(2.0, 3.5)]))
    assert overlaps.tolist() == pytest.approx([1 / 2.5])
    assert shifts.tolist() == [[1.0, 0.5]]
