"""Test `runtime.benchmarking.timing`: percentiles, warm-up, interleaved rounds and ratios, on a fake clock."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.benchmarking import timing
from runtime.benchmarking.timing import (
    Call,
    Latency,
    is_stable,
    percentile,
    run_interleaved,
    speed_ratio,
    warm_up,
    window_size,
)


@dataclasses.dataclass
class FakeClock:
    now: float = 0.0
    log: list[str] = dataclasses.field(default_factory=list)

    def __call__(self) -> float:
        return self.now

    def call(self, name: str, seconds: Callable[[int], float], **options: Any) -> Call:
        """A call whose n-th run takes `seconds(n)`."""

        def run(number: int) -> None:
            self.log.append(f"{name}{number}")
            self.now += seconds(number)

        return Call(run, **options)


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


def test_latency_matches_hand_computed_values() -> None:
    actual = Latency.from_samples([ms / 1e3 for ms in range(1, 101)])
    assert actual.samples == 100
    values = (actual.p50_ms, actual.p90_ms, actual.p95_ms, actual.p99_ms, actual.max_ms, actual.mean_ms)
    assert values == pytest.approx((50, 90, 95, 99, 100, 50.5))
    outlier = Latency.from_samples([0.001] * 999 + [5.0])
    assert (outlier.max_ms, outlier.mean_ms, outlier.p99_ms) == (5000, pytest.approx(5.999), 1)
    single = Latency.from_samples([0.002])
    assert (single.p50_ms, single.p90_ms, single.p99_ms, single.max_ms) == (2, None, None, 2)


@pytest.mark.parametrize(("q", "minimum"), [(50, 2), (90, 10), (95, 20), (99, 100)])
def test_percentile_needs_enough_samples(q: int, minimum: int) -> None:
    assert percentile(range(minimum - 1), q) is None
    assert percentile(range(minimum), q) == minimum - 1 - minimum * (100 - q) // 100


@given(st.lists(st.floats(0, 1e3), min_size=100, max_size=130), st.sampled_from([50, 90, 95, 99]))
def test_percentile_is_a_sample_of_the_right_rank(values: list[float], q: int) -> None:
    actual = percentile(values, q)
    assert actual in values
    assert sum(value <= actual for value in values) * 100 >= q * len(values)
    assert sum(value < actual for value in values) * 100 < q * len(values)


@pytest.mark.parametrize(
    ("medians", "expected"),
    [
        ([1.0, 1.0], False),
        ([1.0, 1.03, 1.0], True),
        ([1.0, 1.031, 1.0], False),
        # Each within 3 % of the one before, and yet still falling.
        ([1.05, 1.025, 1.0], False),
        ([9.0, 5.0, 1.0, 1.01, 1.02], True),
        ([1.0, 1.0, 1.0, 2.0], False),
    ],
)
def test_windows_agree_within_three_percent(medians: list[float], expected: bool) -> None:
    assert is_stable(medians) is expected


def test_window_size_stays_within_bounds() -> None:
    assert [window_size(seconds) for seconds in (0.0, 1e-6, 0.02, 10.0)] == [100, 100, 10, 3]


def test_warm_up_ends_after_the_slow_start(clock: FakeClock) -> None:
    call = clock.call("a", lambda number: 0.02 if number > 25 else 0.05 - 0.001 * number)
    (actual,) = warm_up([call], clock)
    assert actual.settled
    # The first call, then windows of 4 (0.2 s of 0.05 s): three of them must lie past call 25.
    assert actual.calls == 1 + 4 * len(actual.windows_ms)
    assert actual.windows_ms[-3:] == pytest.approx((20, 20, 20))
    assert actual.windows_ms[-4] > 20.6


def test_unsettled_warm_up_stops_and_is_reported(clock: FakeClock) -> None:
    (actual,) = warm_up([clock.call("a", lambda number: 0.001 * (1 + number // 100 % 2))], clock, max_seconds=1e9)
    assert not actual.settled
    assert len(actual.windows_ms) == timing.MAX_WINDOWS
    clock.now = 0.0
    (actual,) = warm_up([clock.call("a", lambda number: 1.0 + number)], clock, max_seconds=5)
    assert not actual.settled
    assert len(actual.windows_ms) == timing.WINDOWS


def test_warm_up_continues_until_all_models_settle(clock: FakeClock) -> None:
    steady = clock.call("a", lambda number: 0.02)
    late = clock.call("b", lambda number: 0.02 if number > 60 else 0.1 / (1 + number))
    first, second = warm_up([steady, late], clock)
    assert first.settled
    assert second.settled
    assert first.calls == second.calls > 60


def test_models_are_interleaved_per_call(clock: FakeClock) -> None:
    samples: list[list[float]] = [[], [], []]
    rounds: list[int] = []
    calls = [clock.call("a", lambda number: 1 + number), clock.call("b", lambda number: 10 + number)]
    calls.append(clock.call("c", lambda number: 100 + number))
    run_interleaved(calls, 4, samples, clock=clock, on_round=lambda: rounds.append(len(samples[0])))
    # The first model changes each round.
    assert " ".join(clock.log) == "a0 b0 c0 b1 c1 a1 c2 a2 b2 a3 b3 c3"
    assert samples == [[1, 2, 3, 4], [10, 11, 12, 13], [100, 101, 102, 103]]
    assert rounds == [1, 2, 3, 4]


def test_setup_is_not_timed_and_device_time_is_used(clock: FakeClock) -> None:
    def prepare(number: int) -> int:
        clock.now += 100
        return number

    assert clock.call("a", lambda number: 2.0, prepare=prepare).seconds(0, clock) == 2
    assert clock.call("a", lambda number: 2.0, device_seconds=lambda: 0.5).seconds(0, clock) == 0.5


def test_time_limit_keeps_the_minimum_rounds(clock: FakeClock) -> None:
    for max_seconds, min_rounds, expected in ((3.5, 1, 4), (0.5, 3, 3), (1e9, 1, 50)):
        samples: list[list[float]] = [[]]
        limits: dict[str, Any] = {"max_seconds": max_seconds, "min_rounds": min_rounds}
        run_interleaved([clock.call("a", lambda _: 1.0)], 50, samples, clock=clock, **limits)
        assert len(samples[0]) == expected


def test_interruption_keeps_all_samples(clock: FakeClock) -> None:
    def seconds(number: int) -> float:
        if number == 3:
            raise KeyboardInterrupt
        return 1.0

    samples: list[list[float]] = [[], []]
    calls = [clock.call("a", lambda _: 2.0), clock.call("b", seconds)]
    with pytest.raises(KeyboardInterrupt):
        run_interleaved(calls, 10, samples, clock=clock)
    assert samples == [[2, 2, 2], [1, 1, 1]]


def test_speed_ratio_compares_samples_of_one_round() -> None:
    # The machine slows down tenfold half-way; the ratio of every round is 2 all the same.
    ours, theirs = [1.0] * 50 + [10.0] * 50, [2.0] * 50 + [20.0] * 50
    actual = speed_ratio(ours, theirs)
    assert (actual.median, actual.low, actual.high, actual.rounds) == (2, 2, 2, 100)
    assert speed_ratio([0.001, 0.002, 0.003], [0.001, 0.002, 0.003]) == timing.Ratio(1, 1, 1, 3)
    # Rounds that are incomplete do not count.
    assert speed_ratio([1.0, 1.0, 1.0], [3.0, 3.0]).rounds == 2


def test_ratio_interval_shrinks_with_more_rounds() -> None:
    def spread(rounds: int) -> float:
        ours = [1 + 0.1 * ((7 * index) % 11) for index in range(rounds)]
        actual = speed_ratio(ours, [1.0] * rounds)
        assert actual.low <= actual.median <= actual.high
        assert actual.median == pytest.approx(statistics.median(1 / value for value in ours))
        return actual.high - actual.low

    assert spread(600) < spread(20)
