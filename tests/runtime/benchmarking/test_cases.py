"""Test `runtime.benchmarking.cases`: the sizes of a sweep."""

from __future__ import annotations

from runtime.benchmarking.cases import doubling_sizes


def test_doubling_sizes_end_at_the_maximum() -> None:
    assert [doubling_sizes(maximum) for maximum in (1, 2, 3, 32, 33)] == [
        [1],
        [1, 2],
        [1, 2, 3],
        [1, 2, 4, 8, 16, 32],
        [1, 2, 4, 8, 16, 32, 33],
    ]
