"""Test `calib.graph.channel_equalization`: equal outputs in FP32, and a smaller error in INT8."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from calib.accuracy import Candidate, table_of
from calib.calibration_set import CalibrationSet
from calib.calibration_table import CalibrationTable, calibration_key
from calib.errors import CalibrationError
from calib.graph.channel_equalization import (
    apply_channel_scales,
    equalizable_tensors,
    equalized_name,
    exponents,
    measure_channel_scales,
)
from calib.graph.gate_normalization import normalize_gated_features
from calib.graph.graph_editing import copied
from calib.graph.onnx_session import InMemoryBackend
from calib.qdq_quantizer import QuantizationPolicy, insert_qdq
from calib.range_estimation import ActivationStatistics, ValueRange, collect_statistics
from runtime.artifacts.manifest import Manifest
from runtime.core.batch import HEAD_NAMES, Batch
from tests.calib.conftest import weights
from tests.raising import raises


def test_equalizable_tensors_are_gates_and_features(model: onnx.ModelProto) -> None:
    assert equalizable_tensors(model) == {
        "prop_fc/Unsqueeze": ("prop_fc/Conv", None),
        **{
            f"backbone_net/Mul{suffix}": (f"backbone_net.layers.{level}/Conv", f"qInput.{level}/Gemm")
            for level, suffix in enumerate(("", "_2", "_3"))
        },
    }


def test_channel_scales_keep_outputs_bit_identical(model: onnx.ModelProto, batch: Batch) -> None:
    rng = np.random.default_rng(0)
    constants = weights(model)
    other = copied(model)
    gains = {
        name: rng.integers(-6, 7, constants[conv.replace("/Conv", ".weight")].shape[1]).tolist()
        for name, (conv, _) in equalizable_tensors(model).items()
    }
    apply_channel_scales(other, gains)
    onnx.checker.check_model(other, full_check=True)
    changed = {name for name, values in weights(other).items() if not np.array_equal(values, constants.get(name))}
    assert {name.rpartition(".")[0] for name in changed} == {
        "prop_fc",
        *(f"backbone_net.layers.{level}" for level in range(3)),
        *(f"qInput.{level}" for level in range(3)),
    }
    ours, theirs = (InMemoryBackend(entry, 1).run(batch) for entry in (other, model))
    for name in HEAD_NAMES:
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))


REACH = arrays.arrays(np.float64, st.integers(1, 50), elements=st.floats(0, 1e3).map(lambda x: x if x > 1e-6 else 0))


@given(REACH, st.floats(0, 1))
def test_equal_weights_keep_every_channel_below_the_maximum(reach: np.ndarray, share: float) -> None:
    actual = exponents(reach, np.ones(len(reach)), share)
    assert actual[np.argmax(reach)] == 0
    assert np.all(actual >= 0)
    # Rounding to a power of two exceeds the largest channel by a factor of at most sqrt(2).
    assert np.all(reach * np.exp2(actual) <= reach.max() * 2**0.5 * (1 + 1e-9))
    assert np.all(actual[reach == 0] == 0)


def test_small_weight_absorbs_more_of_the_scale_than_large_one() -> None:
    reach = np.array([8.0, 1.0, 1.0])
    assert exponents(reach, np.array([1.0, 1.0, 1.0]), 1.0).tolist() == [0, 3, 3]
    first, light, heavy = exponents(reach, np.array([1.0, 1 / 16, 1.0]), 0.5).tolist()
    assert first <= 0
    assert light < heavy


def test_default_equalization_share_is_0_75(model: onnx.ModelProto, drawn: CalibrationSet, manifest: Manifest) -> None:
    assert exponents(np.array([16.0, 1.0]), np.ones(2)).tolist() == [0, 3]
    assert exponents(np.array([1.0, 1.0]), np.array([16.0, 1.0])).tolist() == [0, -1]
    batches = list(drawn.batches(manifest, 32))[:1]
    gains = measure_channel_scales(model, batches, 1)
    assert gains == measure_channel_scales(model, batches, 1, share=0.75)
    assert gains != measure_channel_scales(model, batches, 1, share=0)


def test_equalization_lowers_error_of_uneven_channels(
    model: onnx.ModelProto, drawn: CalibrationSet, manifest: Manifest, batch: Batch
) -> None:
    # Every other channel of the features is 32 times smaller and its weights larger, with equal outputs in FP32.
    uneven = copied(model)
    loudness = np.where(np.arange(16) % 2, 1, 1 / 32).astype(np.float32)
    tensor = next(entry for entry in uneven.graph.initializer if entry.name == "prop_fc.weight")
    values = onnx.numpy_helper.to_array(tensor) / loudness[None, :, None, None]
    tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))

    def quieter(entry: Batch) -> Batch:
        return Batch(entry.query_tokens, entry.query_length, entry.segment_features * loudness, entry.segment_spans)

    batches = [quieter(entry) for entry in drawn.batches(manifest, 32)]
    gains = measure_channel_scales(uneven, batches, 1)
    assert min(gains["prop_fc/Unsqueeze"][0::2]) >= max(gains["prop_fc/Unsqueeze"][1::2]) + 3
    actual = {}
    for label, used in (("plain", {}), ("equalized", {"prop_fc/Unsqueeze": gains["prop_fc/Unsqueeze"]})):
        after = copied(uneven)
        apply_channel_scales(after, used)
        name = equalized_name(uneven, "prop_fc/Unsqueeze") if used else "prop_fc/Unsqueeze"
        (reached,) = collect_statistics(after, {name: np.ones(1)}, batches, 1).ranges("minmax").values()
        table = CalibrationTable(
            {"prop_fc/Unsqueeze": reached},
            calibration_key(uneven, "-", "minmax"),
            gains={k: tuple(v) for k, v in used.items()},
        )
        narrowed = insert_qdq(uneven, table, QuantizationPolicy().only("prop_fc"))
        ours, theirs = (InMemoryBackend(entry, 1).run(quieter(batch)) for entry in (narrowed, uneven))
        actual[label] = np.abs(ours.matching_logits - theirs.matching_logits).mean()
    assert actual["equalized"] < 0.4 * actual["plain"]


def test_equalization_skips_modules_not_quantized(model: onnx.ModelProto, table: CalibrationTable) -> None:
    assert set(table.gains) == set(equalizable_tensors(normalize_gated_features(model)))
    actual = insert_qdq(model, table, QuantizationPolicy().only("fpn"))
    before = weights(model)
    for name in ("prop_fc.weight", "backbone_net.layers.0.weight", "qInput.0.weight", "qInput.0.bias"):
        np.testing.assert_array_equal(weights(actual)[name], before[name])
    assert "prop_fc/Mul" not in {node.name for node in actual.graph.node}


def test_gains_of_another_graph_are_rejected(
    model: onnx.ModelProto, statistics: ActivationStatistics, drawn: CalibrationSet
) -> None:
    statistics = dataclasses.replace(statistics, gains={"fpn/Add": [1] * 16})
    table = table_of(model, statistics, drawn, Candidate("minmax"))
    with raises(CalibrationError, "equalization_mismatch", "fpn/Add"):
        insert_qdq(model, table)
    assert isinstance(table.ranges["fpn/Add"], ValueRange)
