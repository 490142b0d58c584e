"""Parse and build all kinds of graphs with TensorRT-RTX, which takes the precision from the graph."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from calib.calibration_table import CalibrationTable
from calib.graph.conv_padding import extract_padding, inline_padding
from calib.graph.fp32_scales import has_half_scales, with_wide_scales
from calib.graph.half_precision import OPSETS, QDQ_OPSET, convert_to_half
from calib.graph.onnx_graph import load_onnx
from calib.graph.opset import MAX_OPSET, MIN_OPSET, raise_opset
from calib.graph.precision_audit import audit_graph
from calib.graph.split_model import split_graph
from calib.graph.unroll_lstm import unroll_lstm
from calib.qdq_quantizer import QuantizationPolicy, insert_qdq
from tests.export.conftest import CONFIGS, random_inputs, table_for
from tests.export.rtx import build_with_rtx

pytestmark = pytest.mark.rtx

KEPT = ("prop_fc", "fcos.head.mix_fc", "query_encoder.W2")
"""A convolution, one that others feed, and one of the query's: casts stand on all sides of them."""

Tables = dict[str, CalibrationTable]
Make = Callable[[onnx.ModelProto, CalibrationTable], onnx.ModelProto]


@pytest.fixture(scope="module")
def tables(exported: dict[str, onnx.ModelProto]) -> Tables:
    return {name: table_for(model, CONFIGS[name], balance=True) for name, model in exported.items()}


FORMS: dict[str, tuple[Make, str, str]] = {
    "fp32": (lambda model, table: model, "8.6", "fp32"),
    "fp32, as it is written": (lambda model, table: extract_padding(model), "8.6", "fp32"),
    "fp16": (lambda model, table: convert_to_half(model), "8.6", "fp16"),
    "fp16, modules kept": (lambda model, table: convert_to_half(model, keep=KEPT), "8.6", "fp16"),
    "bf16, modules kept": (lambda model, table: convert_to_half(raise_opset(model, 22), "bf16", KEPT), "8.6", "bf16"),
    "int8": (lambda model, table: convert_to_half(insert_qdq(model, table, opset=19)), "8.6", "int8"),
    "int8, modules kept": (
        lambda model, table: convert_to_half(
            insert_qdq(model, table, QuantizationPolicy(keep=("fpn", *KEPT)), opset=19), keep=KEPT
        ),
        "8.6",
        "int8",
    ),
    "fp8": (lambda model, table: convert_to_half(insert_qdq(model, table, kind="fp8")), "8.9", "fp8"),
    "fp8, modules kept": (
        lambda model, table: convert_to_half(
            insert_qdq(model, table, QuantizationPolicy(keep=("fpn", *KEPT)), "fp8"), keep=KEPT
        ),
        "8.9",
        "fp8",
    ),
}
"""Each form: how it is made, the compute capability that it needs, and the precision that must be in it.

Around INT8 and FP8 there is FP16; of the modules kept out of 8 bits, `KEPT` are FP32 and the pyramid is FP16.
"""
# With modules kept, a graph also has the operators of the form without.
CASES = [
    *((form, "tiny") for form in FORMS if form.startswith("fp32") or form.endswith("kept")),
    *((form, "deep") for form in ("fp16", "int8", "fp8")),
]


@pytest.mark.parametrize(("form", "network"), CASES)
def test_every_precision_builds(form: str, network: str, exported: dict[str, onnx.ModelProto], tables: Tables) -> None:
    make, capability, precision = FORMS[form]
    model = make(exported[network], tables[network])
    assert precision in audit_graph(model).total()
    assert len(build_with_rtx(model, capability=capability)) > 10_000


@pytest.mark.parametrize("form", ["int8, modules kept", "fp8"])
def test_unrolled_int8_graph_keeps_mac_count(form: str, exported: dict[str, onnx.ModelProto], tables: Tables) -> None:
    make, capability, precision = FORMS[form]
    _, part = split_graph(make(exported["deep"], tables["deep"]))
    written = unroll_lstm(part, 8)
    before, after = audit_graph(part), audit_graph(written)
    # Other modules have the same counts as before, and the LSTM has its own type.
    lstm = "query_encoder.biLSTM"
    assert {**after.macs, lstm: {}} == {**before.macs, lstm: {}}
    assert after.macs[lstm].keys() == before.macs[lstm].keys()
    assert after.share(precision) == pytest.approx(before.share(precision), rel=0.01)
    assert len(build_with_rtx(written, capability=capability)) > 10_000


def test_int8_with_fp32_scales_builds_and_agrees(exported: dict[str, onnx.ModelProto], tables: Tables) -> None:
    half = FORMS["int8, modules kept"][0](exported["tiny"], tables["tiny"])
    assert has_half_scales(half)
    wide = with_wide_scales(half)
    assert not has_half_scales(wide)
    onnx.checker.check_model(wide, full_check=True)
    types = {tensor.name: tensor.data_type for tensor in wide.graph.initializer}
    qdq = [node for node in wide.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    scales = {types[node.input[1]] for node in qdq}
    assert scales == {onnx.TensorProto.FLOAT}
    assert audit_graph(wide).total() == audit_graph(half).total()
    inputs = [tensor.numpy() for tensor in random_inputs(CONFIGS["tiny"], [5, 3])]
    before, after = (
        _exact(model).run(None, dict(zip((value.name for value in model.graph.input), inputs, strict=True)))
        for model in (half, wide)
    )
    # FP16 rounds some values to another INT8 step, which has a larger effect in this small network.
    for expected, actual in zip(before, after, strict=True):
        assert np.corrcoef(actual.ravel(), expected.ravel())[0, 1] > 0.95
    assert len(build_with_rtx(wide)) > 10_000


def _exact(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    """Open a graph without fusions of Q/DQ."""
    settings = onnxruntime.SessionOptions()
    settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    settings.log_severity_level = 3
    return onnxruntime.InferenceSession(model.SerializeToString(), settings, ["CPUExecutionProvider"])


def test_lstm_states_have_the_type_of_the_weights(exported: dict[str, onnx.ModelProto]) -> None:
    for kind, half in (("fp16", onnx.TensorProto.FLOAT16), ("bf16", onnx.TensorProto.BFLOAT16)):
        model = convert_to_half(raise_opset(exported["deep"], OPSETS[kind]), kind)  # type: ignore[arg-type]
        types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
        producers = {name: node for node in model.graph.node for name in node.output}
        lstms = [node for node in model.graph.node if node.op_type == "LSTM"]
        assert len(lstms) == 4
        for node in lstms:
            for state in node.input[5:7]:
                assert producers[state].op_type == "Expand"
                assert types[producers[state].input[0]] == half
    # In FP32 the states that the parser adds have the right type.
    kept = convert_to_half(exported["deep"], keep=("query_encoder.biLSTM",))
    assert all(not any(node.input[5:7]) for node in kept.graph.node if node.op_type == "LSTM")


@pytest.mark.parametrize("kind", ["C3D", "I3D"])
def test_clip_extractor_builds(kind: str, c3d: Path, i3d: Path) -> None:
    traced = load_onnx(c3d) if kind == "C3D" else inline_padding(load_onnx(i3d))
    # Clips are inputs of bytes, which TensorRT accepts only before a cast.
    assert traced.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.UINT8
    forms = {"fp32": traced, "fp16": convert_to_half(traced), "bf16": convert_to_half(raise_opset(traced, 22), "bf16")}
    # A build of I3D takes seconds, and only its operators differ.
    for precision, model in forms.items() if kind == "C3D" else [("fp16", forms["fp16"])]:
        assert set(audit_graph(model).total()) == {precision}
        assert len(build_with_rtx(model)) > 10_000


# QuantizeLinear changed in opsets 19, 21 and 23; other tests use 19.
@pytest.mark.parametrize("opset", [MIN_OPSET, 21, MAX_OPSET])
def test_int8_without_equalization_builds_in_every_opset(opset: int, exported: dict[str, onnx.ModelProto]) -> None:
    table = table_for(exported["tiny"], CONFIGS["tiny"], balance=False)
    int8 = insert_qdq(exported["tiny"], table, opset=opset)
    assert int8.opset_import[0].version == opset
    assert "prop_fc.gain" not in {tensor.name for tensor in int8.graph.initializer}
    # Below opset 19 Q/DQ have FP32 scales only, so the layers around them are FP32.
    assert build_with_rtx(convert_to_half(int8) if opset >= QDQ_OPSET else int8)


def test_fp8_build_fails_for_hardware_without_fp8(exported: dict[str, onnx.ModelProto], tables: Tables) -> None:
    # E4M3 needs compute capability 8.9; the graph was accepted otherwise.
    with pytest.raises(AssertionError, match=r"parses but does not build.*HW-specific datatypes: fp8_e4m3"):
        build_with_rtx(insert_qdq(exported["tiny"], tables["tiny"], kind="fp8"), capability="8.6")


def test_build_fails_for_an_unknown_operator(exported: dict[str, onnx.ModelProto]) -> None:
    broken = copy.deepcopy(exported["tiny"])
    next(node for node in broken.graph.node if node.op_type == "Softmax").op_type = "Hardmax3"
    with pytest.raises(AssertionError, match=r"does not parse.*Plugin not found"):
        build_with_rtx(broken)
