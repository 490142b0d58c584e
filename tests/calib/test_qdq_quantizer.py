"""Test `calib.qdq_quantizer`: positions of Q/DQ, their constants, and the error of the graph."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from calib.calibration_table import CalibrationTable
from calib.errors import CalibrationError
from calib.graph.gate_normalization import normalize_gated_features, normalized_tensors
from calib.graph.onnx_graph import read_manifest
from calib.graph.onnx_session import InMemoryBackend
from calib.graph.opset import with_opset
from calib.graph.precision_audit import MIN_SHARES, audit_graph, count_macs
from calib.qdq_quantizer import (
    LARGEST,
    MAX_EXACT_WEIGHT,
    QuantizationPolicy,
    channel_energies,
    half_precision_scale,
    insert_qdq,
    modules,
    quantize_weight,
)
from runtime.core.batch import HEAD_NAMES, Batch
from tests.calib.conftest import altered, weights
from tests.raising import raises, records

COMPUTED = [
    "prop_fc",
    *(f"backbone_net.layers.{level}" for level in range(3)),
    *(f"fpn.inner_blocks.{level}" for level in range(3)),
    *(f"fpn.layer_blocks.{level}" for level in range(3)),
    "fcos.head.towers.0",
    "fcos.head.mix_fc",
    "fcos.head.iou_scores.0",
]
STORED = ["query_encoder.embedding", "query_encoder.W3", "query_encoder.W2", "qInput.0", "qInput.1", "qInput.2"]


@pytest.fixture(scope="module")
def int8(model: onnx.ModelProto, table: CalibrationTable) -> onnx.ModelProto:
    return insert_qdq(model, table)


def makers(model: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    return {output: node for node in model.graph.node for output in node.output}


def nodes(model: onnx.ModelProto, op_type: str) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.op_type == op_type]


def module_of(node: onnx.NodeProto) -> str:
    return node.name.rpartition("/")[0]


def measured(quantizer: onnx.NodeProto) -> str:
    """Return the tensor whose range a QuantizeLinear has; features are quantized after equalization."""
    return "prop_fc/Unsqueeze" if quantizer.input[0] == "prop_fc/Mul" else quantizer.input[0]


def errors(actual: onnx.ModelProto, expected: onnx.ModelProto, batch: Batch) -> dict[str, float]:
    """Return for each output the root mean square error divided by the standard deviation of the output."""
    ours, theirs = (InMemoryBackend(entry, 1).run(batch) for entry in (actual, expected))
    return {
        name: float(np.sqrt(((getattr(ours, name) - getattr(theirs, name)) ** 2).mean()) / getattr(theirs, name).std())
        for name in HEAD_NAMES
    }


@given(
    arrays.arrays(np.float32, st.tuples(st.integers(1, 5), st.integers(1, 40)), elements=st.floats(-50, 50, width=32)),
    st.sampled_from([None, 0, 1]),
    st.sampled_from([LARGEST["int8"], MAX_EXACT_WEIGHT]),
)
@settings(max_examples=60, deadline=None)
def test_dequantized_weight_is_within_half_a_step(weight: np.ndarray, axis: int | None, limit: float) -> None:
    numbers, scale = quantize_weight(weight, "int8", axis, limit)
    shape = [1, 1]
    if axis is not None:
        shape[axis] = -1
        assert scale.shape == (weight.shape[axis],)
    step = scale.reshape(shape).astype(np.float64)
    assert np.all(np.abs(numbers * step - weight) <= step / 2 * (1 + 1e-6))
    assert numbers.dtype == np.int8
    assert numbers.min() >= -limit
    assert numbers.max() <= limit
    assert np.all(scale > 0)


@given(st.floats(1e-12, 6e4))
def test_scale_is_fp16_value_not_below_the_input(expected: float) -> None:
    scale = half_precision_scale(np.array(expected))
    assert scale == np.float16(scale)
    assert expected <= scale <= max(expected * (1 + 2**-10), 2**-24 + expected)


def test_computed_modules_quantize_both_factors_but_no_bias(int8: onnx.ModelProto) -> None:
    made_by, constants = makers(int8), weights(int8)
    for module in COMPUTED:
        (conv,) = [node for node in nodes(int8, "Conv") if module_of(node) == module]
        data, weight = (made_by[name] for name in conv.input[:2])
        assert data.op_type == weight.op_type == "DequantizeLinear"
        assert made_by[data.input[0]].op_type == "QuantizeLinear"
        numbers = constants[f"{module}.weight"]
        assert weight.input[0] == f"{module}.weight"
        assert numbers.dtype == np.int8
        # Each output channel uses the full range.
        assert np.all(np.abs(numbers.astype(int)).reshape(len(numbers), -1).max(axis=1) == 127), module
        assert constants[f"{module}.weight_scale"].shape == (len(numbers),)
        for bias in conv.input[2:]:
            assert constants[bias].dtype == np.float32
    assert modules_of(int8, "Conv") == set(COMPUTED)


def modules_of(model: onnx.ModelProto, op_type: str) -> set[str]:
    """Return the modules of the operators of a type that read any DequantizeLinear."""
    narrowed = {node.output[0] for node in nodes(model, "DequantizeLinear")}
    return {module_of(node) for node in nodes(model, op_type) if narrowed & set(node.input)}


def test_weight_only_modules_keep_their_inputs(int8: onnx.ModelProto, model: onnx.ModelProto) -> None:
    made_by, before = makers(int8), {node.name: node for node in model.graph.node}
    assert modules_of(int8, "Gemm") == set(STORED) - {"query_encoder.embedding"}
    for gemm in nodes(int8, "Gemm"):
        assert made_by[gemm.input[1]].op_type == "DequantizeLinear"
        assert gemm.input[0] == before[gemm.name].input[0]
        assert gemm.input[2] == before[gemm.name].input[2]


def test_insert_qdq_keeps_lstm_attention_and_last_layers(int8: onnx.ModelProto, model: onnx.ModelProto) -> None:
    before = {node.name: node for node in model.graph.node}
    unchanged = [node for node in int8.graph.node if node.op_type in ("LSTM", "MatMul", "Softmax", "Exp", "Mul")]
    unchanged += [
        node
        for node in nodes(int8, "Conv")
        if module_of(node) in ("fcos.head.predictions", "fcos.head.iou_scores.1", "position_transform")
    ]
    assert len(unchanged) >= 12
    # Channel equalization and gate normalization add products.
    added = {"prop_fc/Mul", "backbone_net.layers.1/Mul", "backbone_net.layers.2/Mul"}
    assert all(node == before[node.name] for node in unchanged if node.name not in added)


def test_calibrated_tensors_are_quantized_once_with_their_scale(
    int8: onnx.ModelProto, model: onnx.ModelProto, table: CalibrationTable
) -> None:
    quantizers, constants = nodes(int8, "QuantizeLinear"), weights(int8)
    expected = channel_energies(normalize_gated_features(model))
    assert sorted(map(measured, quantizers)) == sorted(expected) == sorted(table.ranges)
    for node in quantizers:
        scale, zero_point = (constants[name] for name in node.input[1:])
        assert scale == half_precision_scale(table.ranges[measured(node)].magnitude / 127)
        assert (zero_point, zero_point.dtype) == (0, np.int8)


def test_tensor_with_two_readers_is_quantized_once(model: onnx.ModelProto, table: CalibrationTable) -> None:
    policy = QuantizationPolicy()
    wider = dataclasses.replace(policy, computed=(*policy.computed, "fcos.head.predictions"))
    assert list(channel_energies(model, wider)) == list(channel_energies(model))
    actual = insert_qdq(model, table, wider)
    (quantizer,) = [node for node in nodes(actual, "QuantizeLinear") if node.input[0] == "fcos.head/Mul_2"]
    (back,) = [node for node in nodes(actual, "DequantizeLinear") if node.input[0] == quantizer.output[0]]
    readers = {module_of(node) for node in nodes(actual, "Conv") if node.input[0] == back.output[0]}
    assert readers == {"fcos.head.mix_fc", "fcos.head.predictions"}
    # The embedding has two readers, one constant and one DequantizeLinear.
    (table_of_words,) = [node for node in nodes(actual, "DequantizeLinear") if "embedding" in node.input[0]]
    assert sum(table_of_words.output[0] in node.input for node in nodes(actual, "Gather")) == 2


def test_qdq_node_names_are_unique_and_name_the_module(int8: onnx.ModelProto) -> None:
    names = [node.name for node in int8.graph.node]
    assert len(set(names)) == len(names)
    for op_type in ("QuantizeLinear", "DequantizeLinear"):
        for node in nodes(int8, op_type):
            assert module_of(node) in (*COMPUTED, *STORED)
            assert node.name.rpartition("/")[2].split("_")[0] == op_type
            assert node.output[0] == node.name


@pytest.mark.parametrize(
    ("keep", "left"),
    [
        (("prop_fc",), {"prop_fc"}),
        (("fpn",), {name for name in COMPUTED if name.startswith("fpn.")}),
        (("fcos.head.cls_tower", "fcos.head.mix_fc"), {"fcos.head.towers.0", "fcos.head.mix_fc"}),
        (("qInput.1",), {"qInput.1"}),
    ],
)
def test_excluded_modules_stay_fp32(
    model: onnx.ModelProto, table: CalibrationTable, keep: tuple[str, ...], left: set[str]
) -> None:
    policy = QuantizationPolicy(keep=keep)
    assert set(modules(model, policy)) == {*COMPUTED, *STORED} - left
    actual = insert_qdq(model, table, policy)
    assert modules_of(actual, "Conv") == set(COMPUTED) - left
    kept = weights(actual)
    for module in left:
        assert kept[f"{module}.weight"].dtype == np.float32
        # The weights of a gate change by the powers of two of its channels.
        factor = np.log2(np.abs(kept[f"{module}.weight"] / weights(model)[f"{module}.weight"]))
        np.testing.assert_array_equal(factor, np.rint(factor))
        assert module.startswith("qInput") or not factor.any()


def test_policy_names_single_modules_and_rejects_unknown_ones(model: onnx.ModelProto, table: CalibrationTable) -> None:
    with raises(CalibrationError, "unknown_module", "'fpm'", "fpn.layer_blocks.0"):
        insert_qdq(model, table, QuantizationPolicy(keep=("fpm",)))
    with raises(CalibrationError, "nothing_to_quantize"):
        insert_qdq(model, table, QuantizationPolicy(keep=tuple(modules(model, QuantizationPolicy()))))
    for module in ("fpn.layer_blocks.1", "qInput.0"):
        actual = insert_qdq(model, table, QuantizationPolicy().only(module))
        assert {module_of(node) for node in nodes(actual, "DequantizeLinear")} == {module}
        assert bool(nodes(actual, "QuantizeLinear")) == (module in COMPUTED)


def test_int8_by_int8_counts_as_int8(int8: onnx.ModelProto, model: onnx.ModelProto, table: CalibrationTable) -> None:
    assert audit_graph(int8).share("int8") >= MIN_SHARES["int8"]
    assert audit_graph(model).share("int8") == 0
    counts = {name: operator.count for name, operator in count_macs(model).items()}
    assert {name: operator.count for name, operator in count_macs(int8).items()} == counts
    # 16 x 16 channels at 32 segments; both LSTMs, 8 words, 4 gates of 12, from 8 + 12.
    assert counts["prop_fc/Conv"] == 32 * 16 * 16
    assert counts["query_encoder.biLSTM.0.forwards/LSTM"] == 8 * 48 * 20
    assert counts["qInput.0/Gemm"] == 24 * 16
    gates, projection = (insert_qdq(model, table, QuantizationPolicy().only(name)) for name in ("qInput", "prop_fc"))
    assert audit_graph(gates).share("int8") == 0
    assert audit_graph(projection).share("int8") == counts["prop_fc/Conv"] / sum(counts.values())


def test_error_grows_with_quantized_modules_and_clipping(
    int8: onnx.ModelProto, model: onnx.ModelProto, table: CalibrationTable, batch: Batch
) -> None:
    ranges = table.ranges.items()
    tight = {name: dataclasses.replace(actual, low=actual.low / 8, high=actual.high / 8) for name, actual in ranges}
    weight_only, complete, clipped = (
        errors(graph, model, batch)
        for graph in (
            insert_qdq(model, table, QuantizationPolicy().only(*STORED)),
            int8,
            insert_qdq(model, dataclasses.replace(table, ranges=tight)),
        )
    )
    for name in HEAD_NAMES:
        assert 0 < weight_only[name] < 0.7 * complete[name]
        assert complete[name] < min(0.15, clipped[name] / 3)


def test_insert_qdq_records_sources_and_keeps_input_unchanged(model: onnx.ModelProto, table: CalibrationTable) -> None:
    content = model.SerializeToString(deterministic=True)
    before, after = read_manifest(model), read_manifest(insert_qdq(model, table))
    assert model.SerializeToString(deterministic=True) == content
    assert after.precision == "int8"
    assert after.sources == {
        **before.sources,
        "fp32 graph": hashlib.sha256(model.SerializeToString()).hexdigest(),
        "calibration": table.digest,
    }
    assert dataclasses.replace(after, precision="fp32", sources=before.sources) == before


def test_table_of_another_network_is_rejected(model: onnx.ModelProto, table: CalibrationTable) -> None:
    with raises(CalibrationError, "table_of_another_model"):
        insert_qdq(altered(model), table)
    few = dict(list(table.ranges.items())[1:])
    with raises(CalibrationError, "missing_range", next(iter(table.ranges))):
        insert_qdq(model, dataclasses.replace(table, ranges=few))


@pytest.mark.parametrize("opset", [18, 23])
def test_newer_opset_keeps_outputs_bit_identical(
    int8: onnx.ModelProto, model: onnx.ModelProto, table: CalibrationTable, batch: Batch, opset: int
) -> None:
    newer = insert_qdq(model, table, opset=opset)
    assert newer.opset_import[0].version == opset
    actual, expected = (InMemoryBackend(entry, 1).run(batch) for entry in (newer, int8))
    for name in HEAD_NAMES:
        np.testing.assert_array_equal(getattr(actual, name), getattr(expected, name))


def test_set_opset_rejects_unsupported_ops_and_versions(model: onnx.ModelProto) -> None:
    strange = copy.deepcopy(model)
    strange.graph.node[-1].op_type = "ReduceMean"
    with raises(CalibrationError, "unsupported_opset", 19, "ReduceMean"):
        with_opset(strange, 19)
    for opset in (16, 24):
        with raises(CalibrationError, "unsupported_opset", opset):
            with_opset(copy.deepcopy(model), opset)


def test_fp8_weights_are_e4m3_in_opset_19(
    model: onnx.ModelProto, table: CalibrationTable, batch: Batch, int8: onnx.ModelProto
) -> None:
    actual = insert_qdq(model, table, kind="fp8")
    assert actual.opset_import[0].version == 19
    assert read_manifest(actual).precision == "fp8"
    types = {tensor.name: tensor.data_type for tensor in actual.graph.initializer}
    for module in COMPUTED:
        assert types[f"{module}.weight"] == onnx.TensorProto.FLOAT8E4M3FN
    assert types["qInput.0.weight"] == onnx.TensorProto.FLOAT
    constants = weights(actual)
    for node in nodes(actual, "QuantizeLinear"):
        magnitude = table.ranges[measured(node)].magnitude
        assert constants[node.input[1]] == half_precision_scale(magnitude / LARGEST["fp8"])
    assert audit_graph(actual).share("fp8") == audit_graph(int8).share("int8")
    assert all(0 < error < 0.5 for error in errors(actual, model, batch).values())
    with raises(CalibrationError, "unsupported_opset", "FP8", 19, 18):
        insert_qdq(model, table, kind="fp8", opset=18)


def test_unsigned_policy_uses_256_steps(model: onnx.ModelProto, table: CalibrationTable, batch: Batch) -> None:
    signed, policy = insert_qdq(model, table), QuantizationPolicy(unsigned=True)
    unsigned = insert_qdq(model, table, policy)
    before, after = weights(signed), weights(unsigned)
    changed = {name for name, values in after.items() if not np.array_equal(values, before[name])}
    quantizers = {node.input[2]: measured(node) for node in nodes(unsigned, "QuantizeLinear")}
    without_sign = {name for name, tensor in quantizers.items() if table.ranges[tensor].low >= 0}
    assert without_sign
    assert without_sign < set(quantizers)
    assert changed == without_sign | {name.replace("zero_point", "scale") for name in without_sign}
    for name in without_sign:
        assert after[name] == -128
        scale = name.replace("zero_point", "scale")
        assert after[scale] == pytest.approx(before[scale] * 127 / 255, rel=1e-3)
    heads = [InMemoryBackend(graph, 1).run(batch) for graph in (model, signed, unsigned)]
    errors = [np.square(graph.matching_logits - heads[0].matching_logits).mean() for graph in heads[1:]]
    assert errors[1] < 0.8 * errors[0]
    # FP8 has a sign bit of its own.
    assert insert_qdq(model, table, policy, "fp8") == insert_qdq(model, table, None, "fp8")


def test_table_of_version_0_1_has_constant_scales(
    model: onnx.ModelProto, table: CalibrationTable, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def renamed(values: Mapping[str, Any]) -> dict[str, Any]:
        products = {
            "backbone_net.layers.1/Div": "backbone_net/Mul_2",
            "backbone_net.layers.2/Div": "backbone_net/Mul_3",
        }
        return {products.get(name, name): value for name, value in values.items()}

    path = tmp_path / "drn.calibration.json"
    dataclasses.replace(table, ranges=renamed(table.ranges), gains=renamed(table.gains)).save(path)
    older = CalibrationTable.load(path)
    assert records(caplog, logging.WARNING, path)
    assert not normalized_tensors(insert_qdq(model, older))
    table.save(path)
    caplog.clear()
    assert normalized_tensors(insert_qdq(model, CalibrationTable.load(path)))
    assert not caplog.records
