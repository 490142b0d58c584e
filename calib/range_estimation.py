"""Estimate the value range of each tensor by five methods, in one pass over the calibration set."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from calib.errors import CalibrationError
from calib.graph.channel_equalization import ChannelScales, scale_factors
from calib.graph.gate_normalization import normalized, normalized_tensors
from calib.graph.onnx_session import observe

if TYPE_CHECKING:
    import onnx

Method = Literal["minmax", "percentile", "entropy", "mse", "output"]
METHODS: tuple[Method, ...] = get_args(Method)
MethodOption = Literal["auto", Method]

BINS = 16384
PERCENTILE = 99.99
# Steps from zero to the end of a range. Symmetric INT8 does not use -128, so both sides are equal.
LEVELS = 127
UNSIGNED_LEVELS = 255


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
    """The distribution of a tensor's magnitudes over many batches, in constant memory.

    If a value is beyond the last bin, pairs of bins are merged and the range doubles, so each value is counted once and
    at least half of the bins are in use. ONNX Runtime's calibrators store all activations (15 GB for 512 samples of the
    full network), compute one method per pass, and include zeros in the entropy.

    Attributes:
        counts: (bins,) number of values other than zero in each bin.
        energies: (bins,) the same with each value weighted by the energy of the weights that multiply it.
        width: width of a bin; 0 before the first value other than zero.
        zeros: number of zeros.
        low, high: smallest and largest value.
    """

    def __init__(self, bins: int = BINS) -> None:
        self.counts = np.zeros(bins, np.int64)
        self.energies = np.zeros(bins, np.float64)
        self.width = 0.0
        self.zeros = 0
        self.low = np.inf
        self.high = -np.inf

    def add(self, values: np.ndarray, energy: np.ndarray | None = None) -> None:
        """Count an array of any shape.

        Args:
            values: values of the tensor.
            energy: sum of the squared weights that multiply each value, broadcastable to `values`; 1 when None.

        Raises:
            ValueError: a value is NaN or infinite.
        """
        if not values.size:
            return
        self.low = min(self.low, float(values.min()))
        self.high = max(self.high, float(values.max()))
        if not np.isfinite(self.low + self.high):
            raise ValueError("values that are not finite")
        nonzero = values != 0
        magnitudes = np.abs(values[nonzero])
        self.zeros += values.size - magnitudes.size
        if not magnitudes.size:
            return
        bins = len(self.counts)
        largest = float(magnitudes.max())
        if not self.width:
            self.width = largest / bins
        while largest > self.width * bins:
            self.counts, self.energies = (
                np.concatenate((total.reshape(-1, 2).sum(axis=1), np.zeros(bins // 2, total.dtype)))
                for total in (self.counts, self.energies)
            )
            self.width *= 2
        index = np.minimum((magnitudes * np.float32(1 / self.width)).astype(np.int32), bins - 1)
        counts = np.bincount(index, minlength=bins)
        self.counts += counts
        if energy is None:
            self.energies += counts
        else:
            self.energies += np.bincount(index, np.broadcast_to(energy, values.shape)[nonzero], bins)

    @property
    def magnitude(self) -> float:
        """The largest magnitude."""
        return max(-self.low, self.high, 0.0)

    @property
    def edges(self) -> np.ndarray:
        """(bins,) upper ends of the bins."""
        return self.width * np.arange(1, len(self.counts) + 1)

    def range(self, method: Method, unsigned: bool = False) -> ValueRange:
        """Return the range that a method selects, within the range of the values.

        If `unsigned`, a tensor without negative values has 255 steps instead of 127.
        """
        levels = UNSIGNED_LEVELS if unsigned and self.low >= 0 else LEVELS
        limit = min(LIMITS[method](self, levels), self.magnitude)
        return ValueRange(max(self.low, -limit), min(self.high, limit))


@dataclasses.dataclass(frozen=True)
class ActivationStatistics:
    """The histograms of all tensors to quantize, without and with channel equalization.

    Attributes:
        plain: tensor name to its histogram in the FP32 graph.
        equalized: the same after the channels of the tensors in `gains` are scaled.
        gains: exponents of two per channel (`calib.graph.channel_equalization`).
    """

    plain: Mapping[str, Histogram]
    equalized: Mapping[str, Histogram]
    gains: ChannelScales

    def ranges(self, method: Method, equalize: bool = True, unsigned: bool = False) -> dict[str, ValueRange]:
        """Return the range that a method selects for each tensor.

        Args:
            method: how to select the limit.
            equalize: whether to use the statistics after channel equalization.
            unsigned: whether a tensor without negative values has 255 steps in place of 127.
        """
        histograms = self.equalized if equalize else self.plain
        return {name: histogram.range(method, unsigned) for name, histogram in histograms.items()}


def collect_statistics(
    model: onnx.ModelProto,
    energies: Mapping[str, np.ndarray],
    batches: Iterable[Any],
    threads: int | None = None,
    gains: ChannelScales | None = None,
) -> ActivationStatistics:
    """Run an FP32 graph over batches, and return the histograms of its tensors.

    Args:
        model: the graph, without channel equalization.
        energies: tensor name to the energy of the weights that read each channel (`Histogram.add`).
        batches: calibration inputs, objects with one attribute per input of the graph.
        gains: exponents of the channel equalization, of tensors in `energies`.

    Raises:
        CalibrationError: there is no batch, or a value is not finite.
    """
    gains = gains or {}
    factors = {name: scale_factors(row) for name, row in gains.items()}
    per_query = normalized_tensors(model)
    plain = {name: Histogram() for name in energies}
    scaled = {name: Histogram() for name in gains}
    num_batches = 0
    for values in observe(model, list(energies), batches, threads):
        num_batches += 1
        for name, computed in values.items():
            try:
                plain[name].add(computed, energies[name])
                if name in scaled:
                    equalized = computed * factors[name]
                    # The factor of each query is computed from its equalized channels.
                    equalized = normalized(equalized) if name in per_query else equalized
                    scaled[name].add(equalized, energies[name] / factors[name] ** 2)
            except ValueError as error:
                raise CalibrationError(
                    f"The tensor {name} has {error} on the calibration set. Check the checkpoint with "
                    "`python -m runtime.evaluate`.",
                    code="non_finite_activations",
                ) from error
    if not num_batches:
        raise CalibrationError("Expected calibration samples, got none. Pass at least one.", code="too_few_samples")
    return ActivationStatistics(plain, {**plain, **scaled}, gains)


def _largest(histogram: Histogram, levels: int) -> float:
    return histogram.magnitude


def _percentile(histogram: Histogram, levels: int) -> float:
    """Return the smallest bin end that `PERCENTILE` of all values, zeros included, do not exceed."""
    total = histogram.zeros + histogram.counts.sum()
    reached = histogram.zeros + np.cumsum(histogram.counts)
    expected = total * PERCENTILE / 100
    return 0.0 if histogram.zeros >= expected else float(histogram.edges[np.searchsorted(reached, expected)])


def _entropy(histogram: Histogram, levels: int) -> float:
    """Return the limit that minimizes the Kullback-Leibler divergence of quantized values from the original ones.

    Zeros are excluded: they are exact for every limit, and would dominate after ReLU. Source: Migacz, 8-bit inference
    with TensorRT, GTC 2017.
    """
    counts = histogram.counts.astype(np.float64)
    used = int(np.flatnonzero(counts)[-1]) + 1 if counts.any() else 0
    total = counts.sum()
    best, best_divergence = used, np.inf
    # 200 limits are about 1 % apart.
    for size in np.unique(np.geomspace(min(2 * levels, used), used, 200).astype(int)) if used else ():
        retained = counts[:size]
        reference = retained.copy()
        reference[-1] += total - retained.sum()
        # Each quantization step gets the mean of its bins that are not empty.
        step = np.arange(size) * levels // size
        filled = retained > 0
        mass = np.bincount(step, retained, levels)
        share = mass / np.maximum(np.bincount(step, filled, levels), 1)
        quantized = np.where(filled, share[step], 0)
        present = reference > 0
        quantized = np.maximum(quantized[present] / max(quantized.sum(), 1), 1e-9)
        reference = reference[present] / total
        divergence = float((reference * np.log(reference / quantized)).sum())
        if divergence < best_divergence:
            best, best_divergence = int(size), divergence
    return histogram.width * best


def _mse(histogram: Histogram, levels: int) -> float:
    """Return the limit that minimizes the squared error of the tensor."""
    return _least_squares(histogram, histogram.counts, levels)


def _output(histogram: Histogram, levels: int) -> float:
    """Return the limit that minimizes the squared error of the output of the layers that read the tensor.

    The output error of y = W x is W e. If the errors e of the channels are independent with mean zero, its expected
    square is the sum over channels of E[e_c^2] times the energy of the weights of the channel, sum_o W[o, c]^2.
    """
    return _least_squares(histogram, histogram.energies, levels)


def _least_squares(histogram: Histogram, weights: np.ndarray, levels: int) -> float:
    """Return the limit with the least squared error of rounding and clipping, each bin weighted by `weights`."""
    if not weights.any():
        return 0.0
    centers = histogram.edges - histogram.width / 2
    limits = histogram.magnitude * np.linspace(0.02, 1, 197)
    errors = []
    for limit in limits:
        scale = limit / levels
        error = centers - np.minimum(np.rint(centers / scale), levels) * scale
        errors.append(float((weights * error * error).sum()))
    return float(limits[int(np.argmin(errors))])


LIMITS = {"minmax": _largest, "percentile": _percentile, "entropy": _entropy, "mse": _mse, "output": _output}
