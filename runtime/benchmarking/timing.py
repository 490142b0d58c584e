"""Time calls: warm up until times are stable, interleave the calls that are compared, and keep every sample."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

Clock = Callable[[], float]

# Warm: the medians of so many successive windows lie within so much of each other.
TOLERANCE = 0.03
WINDOWS = 3
# A window is as many calls as fill so many seconds.
WINDOW_SECONDS = 0.2
MIN_CALLS, MAX_CALLS = 3, 100
# What is not warm by then never will be: others use the machine, or its clock wanders.
MAX_WINDOWS = 20
MAX_WARM_UP_SECONDS = 5.0
CONFIDENCE = 0.95
RESAMPLES = 1000


@dataclasses.dataclass(frozen=True)
class Call:
    """Something whose time is taken again and again.

    Attributes:
        run: what is timed; it is given what `prepare` made of the call's number.
        prepare: what is not timed.
        device_seconds: reads the seconds of the last run as the device measures them, in place of the clock's.
    """

    run: Callable[[Any], Any]
    prepare: Callable[[int], Any] = lambda number: number
    device_seconds: Callable[[], float] | None = None

    def seconds(self, number: int, clock: Clock = time.perf_counter) -> float:
        """Return how long the call of this number takes."""
        prepared = self.prepare(number)
        started = clock()
        self.run(prepared)
        ended = clock()
        return ended - started if self.device_seconds is None else self.device_seconds()


@dataclasses.dataclass(frozen=True)
class Latency:
    """The latencies of calls in milliseconds, outliers included.

    A percentile is None where there are too few samples for it to be another than the maximum.
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
        """Summarize at least one sample, in seconds."""
        values = np.asarray(seconds, np.float64) * 1e3
        median = percentile(values, 50)
        return cls(
            len(values),
            float(values.mean()),
            # One sample alone has no median but itself.
            float(values[0]) if median is None else median,
            percentile(values, 90),
            percentile(values, 95),
            percentile(values, 99),
            float(values.max()),
        )


@dataclasses.dataclass(frozen=True)
class WarmUp:
    """The calls before the samples.

    Attributes:
        calls: how many there were.
        windows_ms: the medians of the windows.
        settled: whether the last of them agree.
    """

    calls: int
    windows_ms: tuple[float, ...]
    settled: bool


@dataclasses.dataclass(frozen=True)
class Ratio:
    """The speed relative to another model: the median over rounds, with an interval."""

    median: float
    low: float
    high: float
    rounds: int


def percentile(values: Sequence[float] | np.ndarray, q: float) -> float | None:
    """Return the smallest sample that `q` percent of the samples do not exceed, or None.

    None where fewer samples than 100 / (100 - q) leave nothing beyond it.
    """
    # In hundredths of a sample, since 100 * 0.9 is not 90 in floating point.
    if len(values) * (100 - q) < 100:
        return None
    rank = math.ceil(len(values) * q / 100)
    return float(np.sort(np.asarray(values, np.float64))[rank - 1])


def is_stable(medians: Sequence[float], tolerance: float = TOLERANCE, windows: int = WINDOWS) -> bool:
    """Return whether the last windows lie within `tolerance` of the smallest of them."""
    last = medians[-windows:]
    return len(last) == windows and max(last) <= min(last) * (1 + tolerance)


def window_size(seconds_per_call: float) -> int:
    """Return how many calls make a window."""
    if seconds_per_call <= 0:
        return MAX_CALLS
    return max(MIN_CALLS, min(MAX_CALLS, math.ceil(WINDOW_SECONDS / seconds_per_call)))


def speed_ratio(seconds: Sequence[float], baseline: Sequence[float]) -> Ratio:
    """Return how many times faster `seconds` are than `baseline`: medians of ratios of the same round.

    What slows a machine for a while slows both of a round. The interval is a percentile bootstrap over rounds, with a
    fixed seed; rounds beyond the shorter of the two are left out.
    """
    rounds = min(len(seconds), len(baseline))
    ratios = np.asarray(baseline[:rounds], np.float64) / np.maximum(np.asarray(seconds[:rounds], np.float64), 1e-12)
    chosen = np.random.default_rng(0).integers(0, rounds, (RESAMPLES, rounds))
    medians = np.median(ratios[chosen], axis=1)
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(medians, (tail, 100 - tail))
    return Ratio(float(np.median(ratios)), float(low), float(high), rounds)


def rotation(number: int, count: int) -> Iterator[int]:
    """Yield who is called in a round, in order: each once, and another first in every round.

    Who comes first finds the caches as the last of the round before left them.
    """
    for step in range(count):
        yield (number + step) % count


def warm_up(
    calls: Sequence[Call],
    clock: Clock = time.perf_counter,
    max_seconds: float = MAX_WARM_UP_SECONDS,
) -> list[WarmUp]:
    """Call all in turns until the windows of each agree, or until it is too long.

    Args:
        calls: what is to be timed in turns afterwards.
        clock: in seconds.
        max_seconds: that may pass for each of the calls, once each has had as many windows as must agree.
    """
    began = clock()
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
        too_long = windows >= WINDOWS and clock() - began > max_seconds * len(calls)
        if all(settled) or too_long or windows >= MAX_WINDOWS:
            break
    return [
        WarmUp(number, tuple(1e3 * value for value in medians[index]), settled[index]) for index in range(len(calls))
    ]


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
    """Time all calls, one after the other, round by round.

    Args:
        calls: as many as are compared.
        rounds: how many times each is called.
        samples: a list for each, to which its seconds are added as they are known, so that an interruption loses
            none.
        max_seconds: after which no round begins once there were `min_rounds`; None for no limit.
        min_rounds: rounds that ignore the limit.
        clock: in seconds.
        on_round: called after every round.
    """
    began = clock()
    for number in range(rounds):
        if max_seconds is not None and number >= min_rounds and clock() - began > max_seconds:
            return
        for index in rotation(number, len(calls)):
            samples[index].append(calls[index].seconds(number, clock))
        on_round()
