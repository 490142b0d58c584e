"""Test `calib.range_estimation`: histograms, and the limit that each method selects."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from calib.calibration_set import CalibrationSet
from calib.errors import CalibrationError
from calib.graph.channel_equalization import apply_channel_scales, equalized_name
from calib.qdq_quantizer import channel_energies
from calib.range_estimation import LEVELS, METHODS, PERCENTILE, Histogram, Method, ValueRange, collect_statistics
from runtime.artifacts.manifest import Manifest
from runtime.core.batch import Batch
from tests.raising import raises

VALUES = arrays.arrays(
    np.float32, st.integers(1, 300), elements=st.floats(-1e4, 1e4, width=32).map(lambda x: x if abs(x) > 1e-20 else 0.0)
)


def histogram(*chunks: np.ndarray, bins: int = 16384) -> Histogram:
    actual = Histogram(bins)
    for chunk in chunks:
        actual.add(np.asarray(chunk, np.float32))
    return actual


def squared_error(values: np.ndarray, limit: float) -> float:
    step = limit / LEVELS
    return float(((values - np.clip(np.rint(values / step), -LEVELS, LEVELS) * step) ** 2).mean())


@given(st.lists(VALUES, min_size=1, max_size=4))
@settings(max_examples=15, deadline=None)
def test_min_max_contains_every_value_and_no_method_is_wider(chunks: list[np.ndarray]) -> None:
    seen = histogram(*chunks)
    values = np.concatenate(chunks)
    widest = seen.range("minmax")
    assert widest == ValueRange(float(values.min()), float(values.max()))
    for method in METHODS:
        actual = seen.range(method)
        assert widest.low <= actual.low <= actual.high <= widest.high
        assert actual.magnitude <= widest.magnitude


@given(st.lists(VALUES, min_size=1, max_size=4))
@settings(max_examples=15, deadline=None)
def test_histogram_counts_each_value_once_while_growing(chunks: list[np.ndarray]) -> None:
    seen = histogram(*chunks, bins=64)
    values = np.abs(np.concatenate(chunks)).astype(np.float64)
    assert seen.counts.sum() + seen.zeros == len(values)
    if seen.width:
        # Merged bins count the values themselves, except those whose float32 quotient rounds across the border.
        for index in (7, 31, 62):
            edge = seen.edges[index]
            near = np.abs(values - edge) <= 1e-5 * edge
            below = int(((values < edge) & (values > 0) & ~near).sum())
            assert below <= seen.counts[: index + 1].sum() <= below + near.sum()


@pytest.mark.parametrize(("outliers", "limit"), [(5, 1), (20, 10)])
def test_percentile_excludes_one_value_in_ten_thousand(outliers: int, limit: float) -> None:
    actual = histogram(np.ones(100_000 - outliers), np.full(outliers, 10)).range("percentile")
    assert actual.magnitude == pytest.approx(limit, rel=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_range_of_zeros_is_empty_and_of_even_values_complete(method: Method) -> None:
    assert histogram(np.zeros(10)).range(method) == ValueRange(0, 0)
    assert histogram(np.linspace(-1, 1, 100_001)).range(method).magnitude > 0.98


def test_outlier_changes_only_the_min_max_range() -> None:
    values = np.random.default_rng(0).standard_normal(200_000).astype(np.float32)
    spoilt = values.copy()
    spoilt[0] = 100
    before, after = histogram(values), histogram(spoilt)
    assert after.range("minmax").magnitude == 100
    for method in ("percentile", "entropy"):
        assert after.range(method).magnitude == pytest.approx(before.range(method).magnitude, rel=0.2), method
        assert squared_error(values, after.range(method).magnitude) < 0.1 * squared_error(values, 100), method


def test_mse_range_minimizes_squared_error() -> None:
    values = np.random.default_rng(1).laplace(size=100_000).astype(np.float32)
    actual = squared_error(values, histogram(values).range("mse").magnitude)
    best = min(squared_error(values, limit) for limit in np.linspace(0.05, 1, 300) * np.abs(values).max())
    assert actual <= 1.02 * best
    assert actual < 0.9 * squared_error(values, float(np.abs(values).max()))


def test_zeros_do_not_affect_entropy_range() -> None:
    values = np.abs(np.random.default_rng(2).standard_normal(50_000))
    with_zeros = histogram(values, np.zeros(1_000_000))
    assert with_zeros.range("entropy") == ValueRange(0.0, histogram(values).range("entropy").high)


def output_error(values: np.ndarray, weight: np.ndarray, limit: float, levels: int = LEVELS) -> float:
    """Return the mean squared error of `values @ weight` when the values, (N, C), are quantized."""
    step = limit / levels
    error = values - np.clip(np.rint(values / step), -levels, levels) * step
    return float(((error @ weight) ** 2).mean())


def test_output_range_minimizes_error_of_the_layer() -> None:
    rng = np.random.default_rng(3)
    # A large channel that the layer hardly reads, beside small ones that it reads.
    values = rng.standard_normal((20_000, 8)).astype(np.float32) * np.array([30, *[1] * 7], np.float32)
    weight = rng.standard_normal((8, 5)) * np.array([0.01, *[1] * 7])[:, None]
    seen = Histogram()
    seen.add(values, (weight**2).sum(axis=1))
    actual = output_error(values, weight, seen.range("output").magnitude)
    best = min(output_error(values, weight, limit) for limit in np.linspace(0.02, 1, 197) * seen.magnitude)
    assert actual <= 1.05 * best
    assert actual < 0.5 * output_error(values, weight, seen.range("mse").magnitude)


def test_energies_without_weights_equal_counts_after_growth() -> None:
    values = np.random.default_rng(4).laplace(size=(50, 4)).astype(np.float32)
    plain, weighted = histogram(values, 100 * values, bins=64), Histogram(64)
    np.testing.assert_array_equal(plain.energies, plain.counts)
    for chunk in (values, 100 * values):
        weighted.add(chunk, np.array([1.0, 2.0, 3.0, 4.0]))
    np.testing.assert_array_equal(weighted.counts, plain.counts)
    assert weighted.energies.sum() == pytest.approx(10 * 2 * 50)


def test_unsigned_range_uses_255_steps_for_values_without_sign() -> None:
    values = np.abs(np.random.default_rng(5).laplace(size=100_000)).astype(np.float32)
    seen = histogram(values)
    for method in ("mse", "output"):
        # More steps let a wider range pay.
        assert seen.range(method, unsigned=True).high > 1.05 * seen.range(method).high
        signed = histogram(values, np.float32([-1]))
        assert signed.range(method, unsigned=True) == signed.range(method)


def test_statistics_scale_equalized_channels(model: onnx.ModelProto, drawn: CalibrationSet, manifest: Manifest) -> None:
    name = "prop_fc/Unsqueeze"
    batches = list(drawn.batches(manifest, 32))
    gains = {name: [3 * (channel % 2) for channel in range(16)]}
    energies = channel_energies(model)
    statistics = collect_statistics(model, energies, batches, 1, gains)
    after = onnx.ModelProto()
    after.CopyFrom(model)
    apply_channel_scales(after, gains)
    renamed = equalized_name(model, name)
    expected = collect_statistics(after, {renamed: channel_energies(after)[renamed]}, batches, 1).plain[renamed]
    actual = statistics.equalized[name]
    np.testing.assert_array_equal(actual.counts, expected.counts)
    np.testing.assert_allclose(actual.energies, expected.energies, rtol=1e-9)
    assert actual.range("minmax") != statistics.plain[name].range("minmax")
    assert statistics.equalized["fpn/Add"] is statistics.plain["fpn/Add"]


def test_non_finite_values_name_their_tensor(model: onnx.ModelProto, batch: Batch) -> None:
    spoilt = Batch(
        batch.query_tokens, batch.query_length, np.full_like(batch.segment_features, np.nan), batch.segment_spans
    )
    tensor = next(iter(channel_energies(model)))
    with raises(CalibrationError, "non_finite_activations", tensor):
        collect_statistics(model, {tensor: np.ones(1)}, [spoilt])
    with raises(CalibrationError, "too_few_samples"):
        collect_statistics(model, {tensor: np.ones(1)}, [])
    with raises(CalibrationError, "unknown_tensor", "nowhere"):
        collect_statistics(model, {"nowhere": np.ones(1)}, [batch])


def test_ranges_do_not_depend_on_batch_size(model: onnx.ModelProto, drawn: CalibrationSet, manifest: Manifest) -> None:
    energies = dict(list(channel_energies(model).items())[:4])
    complete, apart = (
        collect_statistics(model, energies, drawn.batches(manifest, size), threads=1).ranges("minmax")
        for size in (64, 7)
    )
    for tensor in energies:
        assert apart[tensor].magnitude == pytest.approx(complete[tensor].magnitude, rel=1e-5)


def test_histograms_agree_with_onnx_runtime_calibrators(
    model: onnx.ModelProto, drawn: CalibrationSet, manifest: Manifest, tmp_path: Path
) -> None:
    from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod
    from onnxruntime.quantization.calibrate import create_calibrator

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = iter(drawn.batches(manifest, 16))

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self.batches, None)
            return None if batch is None else vars(batch)

    path = tmp_path / "drn.onnx"
    onnx.save(model, path)
    statistics = collect_statistics(model, channel_energies(model), drawn.batches(manifest, 16), threads=1)
    for ours, theirs in (("minmax", CalibrationMethod.MinMax), ("percentile", CalibrationMethod.Percentile)):
        options = {"symmetric": ours == "percentile", "num_bins": 4096, "percentile": PERCENTILE}
        calibrator = create_calibrator(path, ["Conv"], str(tmp_path / "tapped.onnx"), theirs, extra_options=options)
        calibrator.collect_data(Reader())
        expected = calibrator.compute_data()
        for tensor, actual in statistics.ranges(ours).items():
            low, high = (float(np.max(end)) for end in expected[tensor].range_value)
            assert actual.magnitude == pytest.approx(max(-low, high), rel=2e-2 if ours == "percentile" else 1e-5), (
                tensor
            )
