"""Time calls: warm up until times are stable, interleave the calls that are compared, and record every sample."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

Clock = Callable[[], float]

# The warm-up ends when the medians of the last `WINDOWS` windows differ by at most this fraction.
TOLERANCE = 0.03
WINDOWS = 3
# Duration of a window, and limits of its number of calls.
WINDOW_SECONDS = 0.2
MIN_CALLS, MAX_CALLS = 3, 100
# Limits for times that never become stable, because of other processes or a varying clock.
MAX_WINDOWS = 20
MAX_WARM_UP_SECONDS = 5.0
# Rounds that `time_interleaved` runs in spite of its time limit.
MIN_ROUNDS = 3
# Of the bootstrap interval of a ratio.
CONFIDENCE = 0.95
RESAMPLES = 1000


@dataclasses.dataclass(frozen=True)
class Call:
    """A function that is timed repeatedly.

    Attributes:
        run: the timed function; its argument is the result of `prepare`.
        prepare: returns the input for the number of a call; not timed.
        device_seconds: returns the seconds of the last run as the device measured them; the clock is used when None.
    """

    run: Callable[[Any], Any]
    prepare: Callable[[int], Any] = lambda number: number
    device_seconds: Callable[[], float] | None = None

    def seconds(self, number: int, clock: Clock = time.perf_counter) -> float:
        """Run the call once, and return its time in seconds."""
        prepared = self.prepare(number)
        start = clock()
        self.run(prepared)
        end = clock()
        return end - start if self.device_seconds is None else self.device_seconds()


@dataclasses.dataclass(frozen=True)
class Latency:
    """The latency of calls in milliseconds, outliers included.

    A percentile is None if there are so few samples that it would be the maximum.
    """

    samples: int
    mean_ms: float
    p50_ms: float
    p90_ms: float | None
    p95_ms: float | None
    p99_ms: float | None
    max_ms: float

    @classmethod
    def from_samples(cls, seconds: Sequence[float]) -> Latency:
        """Return the latency of at least one sample."""
        values = np.asarray(seconds, np.float64) * 1e3
        median = percentile(values, 50)
        # `percentile` has no median of a single sample.
        p50 = float(values[0]) if median is None else median
        p90, p95, p99 = (percentile(values, q) for q in (90, 95, 99))
        return cls(len(values), float(values.mean()), p50, p90, p95, p99, float(values.max()))


@dataclasses.dataclass(frozen=True)
class WarmUp:
    """The calls before the samples.

    Attributes:
        windows_ms: median of each window, in milliseconds.
    """

    calls: int
    windows_ms: tuple[float, ...]
    settled: bool


@dataclasses.dataclass(frozen=True)
class Ratio:
    """The speed relative to another model: median over rounds, and 95 % confidence interval."""

    median: float
    low: float
    high: float
    rounds: int


def percentile(values: Sequence[float] | np.ndarray, q: float) -> float | None:
    """Return the smallest sample that `q` percent of the samples do not exceed.

    None if there are fewer than 100 / (100 - q) samples, so that none would exceed it.
    """
    # In integers, because 100 * 0.9 is not exactly 90 in floating point.
    if len(values) * (100 - q) < 100:
        return None
    rank = math.ceil(len(values) * q / 100)
    return float(np.sort(np.asarray(values, np.float64))[rank - 1])


def is_stable(medians: Sequence[float]) -> bool:
    """Return whether the last `WINDOWS` medians exceed the smallest of them by at most `TOLERANCE`."""
    last = medians[-WINDOWS:]
    return len(last) == WINDOWS and max(last) <= min(last) * (1 + TOLERANCE)


def window_size(seconds_per_call: float) -> int:
    """Return the number of calls of a window."""
    if seconds_per_call <= 0:
        return MAX_CALLS
    return max(MIN_CALLS, min(MAX_CALLS, math.ceil(WINDOW_SECONDS / seconds_per_call)))


def speed_ratio(seconds: Sequence[float], baseline: Sequence[float]) -> Ratio:
    """Return the median over rounds of `baseline` / `seconds`, with a bootstrap interval of fixed seed.

    A disturbance of the machine affects both calls of a round, so ratios are steadier than times.

    Args:
        seconds, baseline: samples of two interleaved calls, in order of rounds; surplus rounds are ignored.
    """
    rounds = min(len(seconds), len(baseline))
    ratios = np.asarray(baseline[:rounds], np.float64) / np.maximum(np.asarray(seconds[:rounds], np.float64), 1e-12)
    resampled = np.random.default_rng(0).integers(0, rounds, (RESAMPLES, rounds))
    medians = np.median(ratios[resampled], axis=1)
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(medians, (tail, 100 - tail))
    return Ratio(float(np.median(ratios)), float(low), float(high), rounds)


def rotation(number: int, count: int) -> Iterator[int]:
    """Yield the indices of `count` calls in the order of a round, which starts with another call in every round.

    The first call of a round runs with the caches that the last call of the previous round has filled.
    """
    for step in range(count):
        yield (number + step) % count


def warm_up(
    calls: Sequence[Call],
    clock: Clock = time.perf_counter,
    max_seconds: float = MAX_WARM_UP_SECONDS,
) -> list[WarmUp]:
    """Run interleaved calls until the times of each are stable, or a limit is reached.

    Args:
        max_seconds: time limit for each call, after the minimum number of windows.
    """
    start = clock()
    size = window_size(sum(call.seconds(0, clock) for call in calls) / len(calls))
    number = 1
    medians: list[list[float]] = [[] for _ in calls]
    while True:
        seconds: list[list[float]] = [[] for _ in calls]
        for _ in range(size):
            for index in rotation(number, len(calls)):
                seconds[index].append(calls[index].seconds(number, clock))
            number += 1
        for index, values in enumerate(seconds):
            medians[index].append(float(np.median(values)))
        settled = [is_stable(values) for values in medians]
        windows = len(medians[0])
        timed_out = windows >= WINDOWS and clock() - start > max_seconds * len(calls)
        if all(settled) or timed_out or windows >= MAX_WINDOWS:
            break
    return [WarmUp(number, tuple(1e3 * value for value in values), stable) for values, stable in zip(medians, settled)]


def run_interleaved(
    calls: Sequence[Call],
    rounds: int,
    samples: Sequence[list[float]],
    *,
    max_seconds: float | None = None,
    min_rounds: int = 1,
    clock: Clock = time.perf_counter,
    on_round: Callable[[], object] = lambda: None,
) -> None:
    """Time each call once per round.

    Args:
        samples: a list for each call, to which its seconds are appended at once, so that an interruption loses none.
        min_rounds: number of rounds that ignore the time limit.
    """
    start = clock()
    for number in range(rounds):
        if max_seconds is not None and number >= min_rounds and clock() - start > max_seconds:
            return
        for index in rotation(number, len(calls)):
            samples[index].append(calls[index].seconds(number, clock))
        on_round()


def time_interleaved(
    calls: Sequence[Call], rounds: int, max_seconds: float | None = None, max_warm_up: float = MAX_WARM_UP_SECONDS
) -> list[list[float]]:
    """Warm up, then time each call once per round.

    Args:
        max_seconds: time limit after the first `MIN_ROUNDS` rounds; None for no limit.
        max_warm_up: time limit of the warm-up in seconds, for each call.

    Returns:
        For each call its seconds in each round.
    """
    warm_up(calls, max_seconds=max_warm_up)
    seconds: list[list[float]] = [[] for _ in calls]
    run_interleaved(calls, rounds, seconds, max_seconds=max_seconds, min_rounds=MIN_ROUNDS)
    return seconds
