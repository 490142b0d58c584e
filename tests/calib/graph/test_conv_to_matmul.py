"""Test `calib.graph.conv_to_matmul`: equal results as matrix products, which ONNX Runtime computes in INT8."""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic

from calib.calibration_table import CalibrationTable
from calib.graph.conv_to_matmul import convs_to_matmul
from calib.graph.onnx_graph import load_fp32_graph, read_manifest
from calib.graph.onnx_session import InMemoryBackend, InMemorySplitBackend, open_session
from calib.graph.precision_audit import audit_graph
from calib.graph.split_model import split_graph
from calib.qdq_quantizer import QuantizationPolicy, attainable_share, insert_qdq
from runtime.artifacts.manifest import METADATA_KEY
from runtime.backends.onnx_backend import open_graph
from runtime.core.batch import Batch, Heads
from runtime.core.errors import ModelFileError
from runtime.describe import describe
from tests import tolerances
from tests.raising import raises, records

OUTPUTS = list(Heads.__dataclass_fields__)


@pytest.fixture(scope="module")
def narrowed(model: onnx.ModelProto, table: CalibrationTable) -> onnx.ModelProto:
    return insert_qdq(model, table, QuantizationPolicy(stored=(), unsigned=True))


@pytest.fixture(scope="module")
def rows(narrowed: onnx.ModelProto) -> onnx.ModelProto:
    return convs_to_matmul(narrowed)


def convolution(
    channels: int, outputs: int, taps: int, stride: int, pads: tuple[int, int], rank: int
) -> onnx.ModelProto:
    """Return a convolution between Q/DQ, of (2, channels, 1, 12) or (2, channels, 12)."""
    rng = np.random.default_rng(channels + 7 * outputs + taps)
    middle = [1] * (rank - 3)
    constants = {
        "scale": np.float32(0.05),
        "zero": np.int8(0),
        "weight": rng.integers(-127, 128, (outputs, channels, *middle, taps)).astype(np.int8),
        "scales": rng.uniform(1e-3, 2e-3, outputs).astype(np.float32),
        "zeros": np.zeros(outputs, np.int8),
        "bias": rng.normal(size=outputs).astype(np.float32),
    }
    ends = [0] * len(middle)
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"], "module/QuantizeLinear"),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["dq"], "module/DequantizeLinear"),
        helper.make_node("DequantizeLinear", ["weight", "scales", "zeros"], ["w"], "module/DequantizeLinear_1", axis=0),
        helper.make_node(
            "Conv",
            ["dq", "w", "bias"],
            ["y"],
            "module/Conv",
            pads=[*ends, pads[0], *ends, pads[1]],
            strides=[*middle, stride],
        ),
    ]
    sizes = [[2, channels, *middle, 12], [2, outputs, *middle, "columns"]]
    x, y = (helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, s) for n, s in zip("xy", sizes, strict=True))
    tensors = [numpy_helper.from_array(np.asarray(values), name) for name, values in constants.items()]
    graph = helper.make_graph(nodes, "one", [x], [y], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.parametrize(
    ("channels", "outputs", "taps", "stride", "pads", "rank"),
    [
        (6, 5, 1, 1, (0, 0), 4),
        (5, 6, 3, 1, (1, 1), 3),
        (6, 5, 3, 1, (1, 1), 4),
        (6, 5, 3, 1, (1, 2), 3),
        (5, 6, 3, 1, (0, 2), 4),
        (6, 5, 3, 2, (1, 1), 3),
        (6, 5, 3, 2, (1, 1), 4),
        (5, 6, 1, 2, (0, 0), 3),
        (8, 2, 5, 1, (2, 0), 4),
    ],
)
def test_convs_to_matmul_equals_convolution(
    channels: int, outputs: int, taps: int, stride: int, pads: tuple[int, int], rank: int
) -> None:
    model = convolution(channels, outputs, taps, stride, pads, rank)
    turned = convs_to_matmul(model)
    assert not any(node.op_type == "Conv" for node in turned.graph.node)
    features = {"x": np.random.default_rng(0).normal(size=[2, channels, *[1] * (rank - 3), 12]).astype(np.float32)}
    (expected,), (actual,) = (open_session(entry, 1).run(["y"], features) for entry in (model, turned))
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerances.HEADS * np.abs(expected).max())


@pytest.mark.parametrize(("has_sign", "optimized"), [(True, True), (False, False), (False, True)])
def test_convs_to_matmul_keeps_heads(
    model: onnx.ModelProto, table: CalibrationTable, batch: Batch, has_sign: bool, optimized: bool
) -> None:
    int8 = insert_qdq(model, table, QuantizationPolicy(stored=(), unsigned=not has_sign))
    actual = open_session(convs_to_matmul(int8), 1, optimized).run(OUTPUTS, vars(batch))
    expected = open_session(int8, 1).run(OUTPUTS, vars(batch))
    for name, ours, theirs in zip(OUTPUTS, actual, expected, strict=True):
        errors = np.abs(ours - theirs) / np.abs(theirs).max()
        # Sums in another order round some numbers to the neighboring 8-bit step.
        assert np.quantile(errors, 0.95) <= tolerances.HEADS, name
        assert errors.max() <= tolerances.INT8, name


def test_int8_share_is_attainable(model: onnx.ModelProto, narrowed: onnx.ModelProto, rows: onnx.ModelProto) -> None:
    actual, expected = audit_graph(rows), audit_graph(narrowed)
    assert 0 < attainable_share(model) < 1
    assert attainable_share(model) == pytest.approx(expected.share("int8"), abs=1e-9)
    assert actual.macs == expected.macs
    assert actual.weight_bytes["int8"] <= expected.weight_bytes["int8"] * 1.01


def test_graph_that_another_tool_quantized_is_int8(
    onnx_file: Path, batch: Batch, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "drn.onnx"
    quantize_dynamic(onnx_file, path, weight_type=QuantType.QInt8, op_types_to_quantize=["MatMul", "Gemm"])
    assert read_manifest(onnx.load(path)).precision == "int8"
    with caplog.at_level(logging.WARNING, "drn"):
        backend = open_graph(path, "cpu", 1)
    assert backend.manifest.precision == "int8"
    assert records(caplog, logging.WARNING, path)
    backend.run(batch)
    assert describe(path)["precision"] == "int8"
    assert "int8" in capsys.readouterr().out
    with raises(ModelFileError, "not_fp32", path, "int8"):
        load_fp32_graph(path)
    assert open_graph(onnx_file, "cpu", 1).manifest.precision == "fp32"


def test_int8_file_without_a_recorded_cpu_is_reported(
    rows: onnx.ModelProto, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "drn.int8.onnx"
    onnx.save(rows, path)
    open_graph(path, "cpu", 1)
    assert records(caplog, logging.WARNING, path, "export.verify")
    caplog.clear()
    recorded = onnx.load(path)
    about = read_manifest(recorded)
    about = dataclasses.replace(about, training={**about.training, "precision": {"cpu": {}}})
    helper.set_model_props(recorded, {METADATA_KEY: about.to_json()})
    onnx.save(recorded, path)
    open_graph(path, "cpu", 1)
    assert not records(caplog, logging.WARNING)


def test_in_memory_backend_equals_saved_graph(rows: onnx.ModelProto, batch: Batch, tmp_path: Path) -> None:
    path = tmp_path / "drn.int8.onnx"
    onnx.save(rows, path)
    actual, expected = InMemoryBackend(rows, 1, optimized=True).run(batch), open_graph(path, "cpu", 1).run(batch)
    for name in OUTPUTS:
        # The runtime keeps Pad nodes, which is the only difference.
        np.testing.assert_allclose(getattr(actual, name), getattr(expected, name), rtol=0, atol=1e-6, err_msg=name)


def test_onnx_runtime_multiplies_in_int8(rows: onnx.ModelProto, narrowed: onnx.ModelProto, tmp_path: Path) -> None:
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(rows.SerializeToString(), options, providers=["CPUExecutionProvider"])
    optimized = onnx.load(options.optimized_model_filepath)
    counts, before, after = (
        Counter(node.op_type for node in model.graph.node) for model in (optimized, narrowed, rows)
    )
    assert counts["MatMulIntegerToFloat"] == before["Conv"] - after["Conv"] == 13
    assert counts["DequantizeLinear"] == 0


def test_convs_to_matmul_graph_can_be_split(rows: onnx.ModelProto, batch: Batch) -> None:
    video, query = split_graph(rows)
    assert dict.fromkeys(node.op_type for node in video.graph.node).keys() >= {"MatMul", "QuantizeLinear"}
    actual, unsplit = InMemorySplitBackend(video, query, 1).run(batch), InMemoryBackend(rows, 1).run(batch)
    for name, expected in vars(unsplit).items():
        atol = tolerances.HEADS * np.abs(expected).max()
        np.testing.assert_allclose(getattr(actual, name), expected, rtol=0, atol=atol)


def test_dilated_convolution_is_rejected_by_name() -> None:
    model = convolution(6, 6, 3, 1, (1, 1), 4)
    model.graph.node[-1].attribute.append(helper.make_attribute("dilations", [1, 2]))
    with raises(ModelFileError, "unsupported_convolution", "module/Conv"):
        convs_to_matmul(model)


def test_unquantized_graph_is_not_converted(model: onnx.ModelProto) -> None:
    assert [node.name for node in convs_to_matmul(model).graph.node] == [node.name for node in model.graph.node]
