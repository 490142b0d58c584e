"""Test `export.engine.weakly_typed`: graphs and precisions for TensorRT 8.6."""

from __future__ import annotations

import functools

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto

from calib.calibration_table import CalibrationTable
from calib.graph.half_precision import FP32_OPERATORS, convert_to_half, fp32_nodes
from calib.graph.naming import drn_modules
from calib.graph.opset import opset_of, raise_opset
from calib.graph.split_model import split_graph
from calib.graph.unroll_lstm import unroll_lstm
from calib.qdq_quantizer import QuantizationPolicy, insert_qdq
from export.engine.builder import build
from export.engine.weakly_typed import node_of, prepare, without_types
from runtime.core.errors import ModelFileError
from tests.export.conftest import CONFIGS, TINY, random_inputs, table_for
from tests.export.engine.builder_double import (
    EMPTY,
    Calls,
    Recorder,
    cuts_shapes,
    layer,
    named,
    options,
    stand_in,
    with_layers,
)
from tests.raising import raises

FLOATS = {TensorProto.FLOAT16, TensorProto.BFLOAT16}
KEPT = ("prop_fc", "fpn.layer_blocks.0")


@pytest.fixture(scope="module")
def table(exported: dict[str, onnx.ModelProto]) -> CalibrationTable:
    return table_for(exported["tiny"], CONFIGS["tiny"], balance=True)


@pytest.fixture(scope="module")
def int8(exported: dict[str, onnx.ModelProto], table: CalibrationTable) -> onnx.ModelProto:
    return convert_to_half(insert_qdq(exported["tiny"], table, opset=19))


def answers(model: onnx.ModelProto, lengths: list[int]) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    arrays = [tensor.numpy() for tensor in random_inputs(TINY, lengths)]
    return list(session.run(None, dict(zip((value.name for value in session.get_inputs()), arrays, strict=True))))


def test_without_types_removes_fp16_and_keeps_outputs(exported: dict[str, onnx.ModelProto]) -> None:
    half = convert_to_half(exported["tiny"], keep=KEPT)
    plain = without_types(half)
    onnx.checker.check_model(plain, full_check=True)
    assert not FLOATS & {tensor.data_type for tensor in plain.graph.initializer}
    assert opset_of(plain) == 17
    casts = [node for node in plain.graph.node if node.op_type == "Cast"]
    assert not FLOATS & {onnx.helper.get_node_attr_value(node, "to") for node in casts}
    # The weights are rounded to FP16, and a CPU computes FP16 layers in FP32.
    for expected, actual in zip(answers(half, [5, 3]), answers(plain, [5, 3]), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=0.02, atol=0.02)


def test_int8_graph_keeps_qdq_without_quantized_weights(int8: onnx.ModelProto) -> None:
    plain = without_types(int8)
    onnx.checker.check_model(plain, full_check=True)
    assert opset_of(plain) == 17
    assert not FLOATS & {tensor.data_type for tensor in plain.graph.initializer}
    written = {node.output[0] for node in plain.graph.node if node.op_type == "DequantizeLinear"}
    for name in written:
        for reader in plain.graph.node:
            if name in reader.input:
                assert reader.op_type in ("Conv", "MatMul", "Gemm")
                assert {*reader.input[:2]} <= written
    assert written
    # FP16 rounds some values to another INT8 step, which has a larger effect in this small network.
    for expected, actual in zip(answers(int8, [5, 3]), answers(plain, [5, 3]), strict=True):
        assert np.corrcoef(actual.ravel(), expected.ravel())[0, 1] > 0.95


def test_without_types_handles_parts_and_unrolled_graphs(int8: onnx.ModelProto) -> None:
    video, query = split_graph(int8)
    assert cuts_shapes(query.SerializeToString())
    for part in (video, query, unroll_lstm(query, 6)):
        plain = without_types(part)
        assert not cuts_shapes(plain.SerializeToString())
        onnx.checker.check_model(plain, full_check=True)
        # Encoded videos between the parts are FP32 too.
        for value in (*plain.graph.input, *plain.graph.output):
            assert value.type.tensor_type.elem_type not in FLOATS


@pytest.mark.parametrize(("start", "end"), [(0, 2), (1, None), (-2, -1), (-1, None), (1, 9)])
def test_replaced_shape_slice_returns_same_sizes(start: int, end: int | None) -> None:
    bounds = {"start": start} | ({} if end is None else {"end": end})
    shape = onnx.helper.make_node("Shape", ["x"], ["y"], "shape", **bounds)
    x = onnx.helper.make_tensor_value_info("x", TensorProto.FLOAT, ["a", "b", "c"])
    y = onnx.helper.make_tensor_value_info("y", TensorProto.INT64, [None])
    opset = onnx.helper.make_opsetid("", 18)
    model = onnx.helper.make_model(onnx.helper.make_graph([shape], "g", [x], [y]), opset_imports=[opset], ir_version=8)
    plain = without_types(model)
    onnx.checker.check_model(plain, full_check=True)
    assert not cuts_shapes(plain.SerializeToString())
    session = onnxruntime.InferenceSession(plain.SerializeToString(), providers=["CPUExecutionProvider"])
    (actual,) = session.run(None, {"x": np.zeros((3, 5, 7), np.float32)})
    assert actual.tolist() == [3, 5, 7][start:end]


@pytest.mark.parametrize("kept", [(), KEPT, ("query_encoder.biLSTM",)])
def test_fp32_modules_are_read_from_the_graph(kept: tuple[str, ...], exported: dict[str, onnx.ModelProto]) -> None:
    half = convert_to_half(exported["tiny"], keep=kept)
    named = {node.name: node for node in half.graph.node}
    held = {named[name].op_type: named[name] for name in fp32_nodes(half)}
    assert {module for name in fp32_nodes(half) for module in drn_modules(name)} == {*kept, "fcos.head"}
    # exp and the scale before it, but no other node of modules that are not kept.
    (exp,) = (node for node in half.graph.node if node.op_type in FP32_OPERATORS)
    assert held["Exp"] == exp
    assert exp.input[0] in {name for node in held.values() for name in node.output}
    assert len([name for name in fp32_nodes(half) if "fcos.head" in drn_modules(name)]) == 2
    assert fp32_nodes(exported["tiny"]) == frozenset()
    # All of them are in the graph for 8.6.
    prepared = prepare(half.SerializeToString())
    assert prepared.fp32_nodes == fp32_nodes(half) <= prepared.nodes


def test_fp32_nodes_stay_fp32_in_engine(exported: dict[str, onnx.ModelProto], caplog: pytest.LogCaptureFixture) -> None:
    library, calls = stand_in("8.6.1")
    half = convert_to_half(exported["tiny"], keep=("prop_fc",))
    fp32 = sorted(fp32_nodes(half))
    kept = next(name for name in fp32 if name.startswith("prop_fc"))
    # The second has a further layer, like a padded convolution.
    held = [*(layer(calls, name) for name in fp32), layer(calls, f"{kept}_1234", "SHUFFLE")]
    others = [
        *(layer(calls, node.name) for node in without_types(half).graph.node if node.name not in fp32),
        # The layers that trtexec skips (setLayerPrecisions in sampleEngines.cpp), and Q/DQ.
        layer(calls, f"{kept}_1", "FILL", precision="int32"),
        layer(calls, f"{kept}_2", "ELEMENTWISE", precision="bool"),
        layer(calls, f"{kept}_3", "CONSTANT"),
        layer(calls, f"{kept}_4", "SLICE", shapes=True),
        layer(calls, f"{kept}_5", "SHUFFLE", dtype="int32"),
        layer(calls, f"{kept}_6", "QUANTIZE"),
        layer(calls, f"{kept}_7", "DEQUANTIZE"),
        layer(calls, "(Unnamed Layer* 7) [Shuffle]", "SHUFFLE"),
    ]
    with_layers(library, [*held, *others])
    build(half.SerializeToString(), options(), library=library)
    assert named(calls, "precision") == [("float32",)] * len(held)
    assert not caplog.records
    assert ("OBEY_PRECISION_CONSTRAINTS",) in named(calls, "set_flag")
    given = onnx.load_from_string(named(calls, "parse")[0][0])
    assert not FLOATS & {tensor.data_type for tensor in given.graph.initializer}


def precisions(graph: onnx.ModelProto, layers: list[Recorder], precision: str = "fp16") -> dict[str, str]:
    """Build a graph in 8.6 as these layers, and return the precisions that are set, by layer."""
    written: dict[str, str] = {}

    def record(entry: tuple[str, tuple[str, ...]], name: str) -> None:
        if entry[0] == "precision":
            written[name] = entry[1][0]

    for one in layers:
        one._calls.append = functools.partial(record, name=one.name)  # type: ignore[method-assign]
    library, calls = stand_in("8.6.1")
    with_layers(library, layers)
    build(graph.SerializeToString(), options(precision), library=library)
    assert ("OBEY_PRECISION_CONSTRAINTS",) in named(calls, "set_flag")
    return written


def test_unnamed_layers_that_only_fp32_layers_read_stay_fp32(exported: dict[str, onnx.ModelProto]) -> None:
    half = convert_to_half(exported["tiny"])
    (exp,) = (node for node in half.graph.node if node.op_type == "Exp")
    (scale,) = (node for node in half.graph.node if exp.input[0] in node.output)
    first, second, shared = (f"(Unnamed Layer* {number}) [Shuffle]" for number in (1, 2, 3))
    layers = [
        layer(Calls(), first, "SHUFFLE"),
        layer(Calls(), second, "SHUFFLE", reads=(f"{first}_output",)),
        layer(Calls(), shared, "SHUFFLE"),
        layer(Calls(), scale.name, "ELEMENTWISE", reads=(f"{second}_output", f"{shared}_output")),
        layer(Calls(), exp.name, "UNARY", reads=(f"{scale.name}_output",)),
        layer(Calls(), "prop_fc/Conv", reads=(f"{shared}_output",)),
    ]
    assert precisions(half, layers) == dict.fromkeys((first, second, scale.name, exp.name), "float32")


@pytest.mark.parametrize("part", ["whole", "query", "unrolled", "int8"])
def test_exp_and_scale_default_to_fp32(part: str, exported: dict[str, onnx.ModelProto], int8: onnx.ModelProto) -> None:
    half = convert_to_half(exported["tiny"])
    graph = {"whole": half, "query": split_graph(half)[1], "unrolled": unroll_lstm(half, 6), "int8": int8}[part]
    layers = [layer(Calls(), node.name) for node in without_types(graph).graph.node]
    written = precisions(graph, layers, "int8" if part == "int8" else "fp16")
    (exp,) = (node for node in graph.graph.node if node.op_type == "Exp")
    (scale,) = (node for node in graph.graph.node if exp.input[0] in node.output)
    assert written == dict.fromkeys((exp.name, scale.name), "float32")


def test_node_without_layer_warns(exported: dict[str, onnx.ModelProto], caplog: pytest.LogCaptureFixture) -> None:
    build(convert_to_half(exported["tiny"]).SerializeToString(), options(), library=stand_in("8.6.1")[0])
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "fcos.head/Exp" in warning
    caplog.clear()
    build(exported["tiny"].SerializeToString(), options("fp32"), library=stand_in("8.6.1")[0])
    assert not caplog.records


def test_layer_maps_to_node_with_longest_matching_name() -> None:
    nodes = {"fcos.head/Mul", "fcos.head/Mul_4", "prop_fc.conv/Conv"}
    for layer_name, node in {
        "fcos.head/Mul_4": "fcos.head/Mul_4", "fcos.head/Mul_41": "fcos.head/Mul",
        "fcos.head/Mul_4_17": "fcos.head/Mul_4", "prop_fc.conv/Conv [Shuffle]": "prop_fc.conv/Conv",
        "fcos.head/Multiply": None, "(Unnamed Layer* 4) [Shuffle]": None, "": None,
    }.items():  # fmt: skip
        assert node_of(layer_name, nodes) == node


def test_invalid_graph_raises_not_onnx() -> None:
    library, _ = stand_in("8.6.1")
    with raises(ModelFileError, "not_onnx"):
        build(b"graph", options(), library=library)


@pytest.mark.parametrize("member", [True, False])
def test_profiles_are_shared_if_the_api_supports_it(member: bool, exported: dict[str, onnx.ModelProto]) -> None:
    library, calls = stand_in("8.6.1")
    library.PreviewFeature = type("PreviewFeature", (), {"PROFILE_SHARING_0806": 0} if member else {})
    build(exported["tiny"].SerializeToString(), options("fp32"), library=library)
    assert len(named(calls, "set_preview_feature")) == member


def test_tactic_sources_exclude_cublas_and_cudnn() -> None:
    library, calls = stand_in("8.6.1")
    build(EMPTY, options("fp16"), library=library)
    ((chosen,),) = named(calls, "set_tactic_sources")
    sources = library.TacticSource
    assert chosen == 1 << sources.EDGE_MASK_CONVOLUTIONS | 1 << sources.JIT_CONVOLUTIONS


def test_bfloat16_weights_keep_their_values(exported: dict[str, onnx.ModelProto]) -> None:
    brain = convert_to_half(raise_opset(exported["tiny"], 22), "bf16")
    plain = {tensor.name: tensor for tensor in without_types(brain).graph.initializer}
    for tensor in brain.graph.initializer:
        if tensor.data_type == TensorProto.BFLOAT16 and tensor.name in plain:
            bits = np.frombuffer(tensor.raw_data, np.uint16).astype(np.uint32) << 16
            np.testing.assert_array_equal(onnx.numpy_helper.to_array(plain[tensor.name]).ravel(), bits.view(np.float32))


def test_fp16_modules_of_int8_are_unconstrained(exported: dict[str, onnx.ModelProto], table: CalibrationTable) -> None:
    # Modules kept out of 8 bits are FP16, like the layers around INT8.
    kept = convert_to_half(insert_qdq(exported["tiny"], table, QuantizationPolicy(keep=("fpn",)), opset=19))
    modules = {module for name in fp32_nodes(kept) for module in drn_modules(name)}
    assert not modules & {"fpn.layer_blocks.0", "fpn.inner_blocks.0"}
