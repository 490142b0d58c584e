"""Test `calib.graph.gate_normalization`: equal outputs in FP32, and inputs between -1 and 1 for every query."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx

from calib.calibration_set import CalibrationSet
from calib.graph.channel_equalization import apply_channel_scales, equalizable_tensors
from calib.graph.gate_normalization import normalize_gated_features, normalized, normalized_tensors
from calib.graph.onnx_session import InMemoryBackend, observe
from calib.qdq_quantizer import channel_energies
from calib.range_estimation import collect_statistics
from runtime.artifacts.manifest import Manifest
from runtime.core.batch import HEAD_NAMES, Batch
from tests.calib.conftest import weights

TENSORS = {"backbone_net.layers.1/Div", "backbone_net.layers.2/Div"}


def test_normalized_graph_has_the_same_heads(model: onnx.ModelProto, batch: Batch) -> None:
    other = normalize_gated_features(model)
    onnx.checker.check_model(other, full_check=True)
    assert normalized_tensors(other) == TENSORS
    assert normalized_tensors(model) == set()
    assert {name: values.size for name, values in weights(other).items() if name in weights(model)} == {
        name: values.size for name, values in weights(model).items()
    }
    ours, theirs = (InMemoryBackend(entry, 1).run(batch) for entry in (other, model))
    for name in HEAD_NAMES:
        expected = getattr(theirs, name)
        np.testing.assert_allclose(getattr(ours, name), expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def test_every_query_reaches_one(model: onnx.ModelProto, batch: Batch) -> None:
    (values,) = observe(normalize_gated_features(model), sorted(TENSORS), [batch], 1)
    for computed in values.values():
        assert len(computed) == len(batch) > 1
        np.testing.assert_allclose(np.abs(computed).max(axis=(1, 2, 3)), 1, rtol=1e-6)


def test_features_of_zero_stay_finite(model: onnx.ModelProto, batch: Batch) -> None:
    other = normalize_gated_features(model)
    for tensor in other.graph.initializer:
        if tensor.name.startswith("qInput.1."):
            tensor.CopyFrom(onnx.numpy_helper.from_array(0 * weights(other)[tensor.name], tensor.name))
    heads = InMemoryBackend(other, 1).run(batch)
    assert all(np.isfinite(getattr(heads, name)).all() for name in HEAD_NAMES)


def test_scale_of_a_query_cancels() -> None:
    values = np.random.default_rng(0).normal(size=(3, 4, 1, 5)).astype(np.float32)
    factors = np.array([0.5, 8, 1024], np.float32)[:, None, None, None]
    np.testing.assert_array_equal(normalized(values * factors), normalized(values))
    np.testing.assert_array_equal(np.abs(normalized(values)).max(axis=(1, 2, 3)), 1)


def test_modules_not_quantized_are_not_normalized(model: onnx.ModelProto) -> None:
    assert normalize_gated_features(model, ("fpn.inner_blocks.0",)) == model
    assert normalized_tensors(normalize_gated_features(model, ("backbone_net.layers.2",))) == {
        "backbone_net.layers.2/Div"
    }


def test_equalized_histogram_is_that_of_the_equalized_graph(
    model: onnx.ModelProto, manifest: Manifest, drawn: CalibrationSet
) -> None:
    few = dataclasses.replace(drawn, annotations=drawn.annotations[:4])
    other = normalize_gated_features(model)
    rng = np.random.default_rng(0)
    channels = {name: values.shape[1] for name, values in weights(other).items() if name.endswith(".weight")}
    gains = {
        name: rng.integers(-3, 4, channels[conv.replace("/Conv", ".weight")]).tolist()
        for name, (conv, gate) in equalizable_tensors(other).items()
        if gate
    }
    statistics = collect_statistics(other, channel_energies(other), few.batches(manifest), 1, gains)
    apply_channel_scales(other, gains)
    expected = collect_statistics(other, channel_energies(other), few.batches(manifest), 1)
    assert set(gains) >= TENSORS
    for name in gains:
        ours, theirs = statistics.equalized[name], expected.plain[name]
        np.testing.assert_allclose((ours.low, ours.high), (theirs.low, theirs.high), rtol=1e-5)
        assert np.abs(np.cumsum(ours.counts) - np.cumsum(theirs.counts)).max() <= 0.01 * theirs.counts.sum()
