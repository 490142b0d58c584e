"""Estimate the value range of each tensor by four methods, in one pass over the calibration set."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from calib.errors import CalibrationError
from calib.graph.onnx_session import observe
from runtime.core.batch import Batch

if TYPE_CHECKING:
    import onnx

Method = Literal["minmax", "percentile", "entropy", "mse"]
METHODS: tuple[Method, ...] = get_args(Method)

BINS = 16384
PERCENTILE = 99.99
LEVELS = 127
"""Steps of symmetric INT8 on either side of zero; -128 is not used, so that both sides are alike."""


@dataclasses.dataclass(frozen=True)
class ValueRange:
    """The range of a tensor to quantize; values outside are clipped."""

    low: float
    high: float

    @property
    def magnitude(self) -> float:
        """The larger distance from zero."""
        return max(-self.low, self.high, 0.0)


class Histogram:
    """The magnitudes of a tensor's values over many batches, in bins from 0 up; no value is kept.

    ONNX Runtime's calibrators compute the same statistics, but keep the activations of all that they are given until
    the end (15 GB for 512 samples of the full network), count one method a pass, and let zeros, most of what ReLU
    gives, decide the entropy. `tests/calib` holds this against them on a small network.

    When a value lies beyond the last bin, pairs of bins become one and the range doubles: nothing is counted twice
    or estimated, and at least half of the bins are in use.
    """

    def __init__(self, bins: int = BINS) -> None:
        self.counts = np.zeros(bins, np.int64)
        self.width = 0.0
        self.zeros = 0
        self.low = np.inf
        self.high = -np.inf

    def add(self, values: np.ndarray) -> None:
        """Count an array of any shape."""
        if not values.size:
            return
        self.low = min(self.low, float(values.min()))
        self.high = max(self.high, float(values.max()))
        if not np.isfinite(self.low + self.high):
            raise ValueError("values that are not finite")
        magnitudes = np.abs(values[values != 0])
        self.zeros += values.size - magnitudes.size
        if not magnitudes.size:
            return
        bins = len(self.counts)
        largest = float(magnitudes.max())
        if not self.width:
            self.width = largest / bins
        while largest > self.width * bins:
            self.counts = np.concatenate((self.counts.reshape(-1, 2).sum(axis=1), np.zeros(bins // 2, np.int64)))
            self.width *= 2
        index = np.minimum((magnitudes * np.float32(1 / self.width)).astype(np.int32), bins - 1)
        self.counts += np.bincount(index, minlength=bins)

    @property
    def magnitude(self) -> float:
        """The largest magnitude seen."""
        return max(-self.low, self.high, 0.0)

    @property
    def edges(self) -> np.ndarray:
        """(bins,) upper ends of the bins."""
        return self.width * np.arange(1, len(self.counts) + 1)

    def range(self, method: Method) -> ValueRange:
        """Return the range that a method finds, never wider than what was seen."""
        limit = min(LIMITS[method](self), self.magnitude)
        return ValueRange(max(self.low, -limit), min(self.high, limit))


def collect_histograms(
    model: onnx.ModelProto, tensors: Sequence[str], batches: Iterable[Batch], threads: int | None = None
) -> dict[str, Histogram]:
    """Run a graph over the batches and return what was seen of each tensor. Memory does not grow with the batches.

    Raises:
        CalibrationError: no batch was given, or a tensor held values that are not finite.
    """
    histograms = {name: Histogram() for name in tensors}
    num_batches = 0
    for values in observe(model, tensors, batches, threads):
        num_batches += 1
        for name, computed in values.items():
            try:
                histograms[name].add(computed)
            except ValueError as error:
                raise CalibrationError(
                    f"The tensor {name} holds {error} on the calibration set, so it has no range; check the "
                    "checkpoint with `python -m runtime.evaluate`.",
                    code="non_finite_activations",
                ) from error
    if not num_batches:
        raise CalibrationError(
            "Ranges were asked for without a single calibration sample; give some.", code="too_few_samples"
        )
    return histograms


def estimate_ranges(
    model: onnx.ModelProto,
    tensors: Sequence[str],
    batches: Iterable[Batch],
    method: Method,
    threads: int | None = None,
) -> dict[str, ValueRange]:
    """Return the range of each tensor over the batches; `ranges` of `collect_histograms` gives all methods at once."""
    return ranges(collect_histograms(model, tensors, batches, threads), method)


def ranges(histograms: Mapping[str, Histogram], method: Method) -> dict[str, ValueRange]:
    """Return the range that a method finds for each tensor."""
    return {name: histogram.range(method) for name, histogram in histograms.items()}


def _largest(histogram: Histogram) -> float:
    return histogram.magnitude


def _percentile(histogram: Histogram) -> float:
    """The smallest bin end that `PERCENTILE` of all values, zeros included, do not pass."""
    total = histogram.zeros + histogram.counts.sum()
    reached = histogram.zeros + np.cumsum(histogram.counts)
    expected = total * PERCENTILE / 100
    return 0.0 if histogram.zeros >= expected else float(histogram.edges[np.searchsorted(reached, expected)])


def _entropy(histogram: Histogram) -> float:
    """The limit at which the distribution of quantised values diverges least (Kullback-Leibler) from the original's.

    Zeros are left out: they are exact at any limit, and would outweigh all else after ReLU. Source: Migacz, 8-bit
    inference with TensorRT, GTC 2017.
    """
    counts = histogram.counts.astype(np.float64)
    used = int(np.flatnonzero(counts)[-1]) + 1 if counts.any() else 0
    total = counts.sum()
    best, best_divergence = used, np.inf
    # 1 % steps of the limit are finer than anything it does to recall.
    for size in np.unique(np.geomspace(min(2 * LEVELS, used), used, 200).astype(int)) if used else ():
        retained = counts[:size]
        reference = retained.copy()
        reference[-1] += total - retained.sum()
        # Each step of INT8 gets the mean of the bins in it that hold anything.
        step = np.arange(size) * LEVELS // size
        filled = retained > 0
        mass = np.bincount(step, retained, LEVELS)
        share = mass / np.maximum(np.bincount(step, filled, LEVELS), 1)
        quantised = np.where(filled, share[step], 0)
        present = reference > 0
        quantised = np.maximum(quantised[present] / max(quantised.sum(), 1), 1e-9)
        reference = reference[present] / total
        divergence = float((reference * np.log(reference / quantised)).sum())
        if divergence < best_divergence:
            best, best_divergence = int(size), divergence
    return histogram.width * best


def _mse(histogram: Histogram) -> float:
    """The limit at which rounding and clipping together cost least squared error."""
    counts = histogram.counts.astype(np.float64)
    if not counts.any():
        return 0.0
    centres = histogram.edges - histogram.width / 2
    limits = histogram.magnitude * np.linspace(0.02, 1, 197)
    errors = []
    for limit in limits:
        scale = limit / LEVELS
        error = centres - np.minimum(np.rint(centres / scale), LEVELS) * scale
        # A bin wider than a step of INT8 does not exist in practice; its spread adds alike to every limit.
        errors.append(float((counts * error * error).sum()))
    return float(limits[int(np.argmin(errors))])


LIMITS = {"minmax": _largest, "percentile": _percentile, "entropy": _entropy, "mse": _mse}
