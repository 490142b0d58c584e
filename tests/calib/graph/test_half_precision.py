"""Test `calib.graph.half_precision`: the graph computes in half precision, its inputs and outputs stay FP32."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, numpy_helper

from calib.graph.graph_editing import copied
from calib.graph.half_precision import (
    FLOAT16_MAX,
    FP16_SAFETY_FACTOR,
    _half_tensor,
    convert_to_half,
    emulate_bf16,
    measure_magnitudes,
    modules,
    overflow_prone_modules,
)
from calib.graph.naming import drn_modules
from calib.graph.opset import opset_of, raise_opset
from runtime.core.batch import HEAD_NAMES, Batch
from runtime.core.errors import ModelFileError, ShapeError
from tests.export.conftest import CONFIGS, random_inputs
from tests.raising import raises
from tests.tolerances import HALF

LENGTHS = [4, 9, 1, 12]


def batch(name: str) -> Batch:
    return Batch(*(tensor.numpy() for tensor in random_inputs(CONFIGS[name], LENGTHS)))


def run(model: onnx.ModelProto, given: Batch) -> dict[str, np.ndarray]:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return dict(zip(HEAD_NAMES, session.run(list(HEAD_NAMES), vars(given)), strict=True))


def types(model: onnx.ModelProto) -> dict[str, int]:
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    return {value.name: value.type.tensor_type.elem_type for value in (*inferred.value_info, *inferred.output)}


@pytest.mark.parametrize("name", CONFIGS)
def test_fp16_heads_are_close_to_fp32(name: str, exported: dict[str, onnx.ModelProto]) -> None:
    half = convert_to_half(exported[name])
    onnx.checker.check_model(half, full_check=True)
    given = batch(name)
    actual, expected = run(half, given), run(exported[name], given)
    for output in HEAD_NAMES:
        assert actual[output].dtype == np.float32
        np.testing.assert_allclose(actual[output], expected[output], atol=HALF * np.abs(expected[output]).max())
        assert not np.array_equal(actual[output], expected[output])


def test_fp16_graph_has_fp32_only_at_its_ends_and_in_exp(exported: dict[str, onnx.ModelProto]) -> None:
    model = exported["tiny"]
    before = model.SerializeToString(deterministic=True)
    half = convert_to_half(model)
    assert model.SerializeToString(deterministic=True) == before
    kinds = types(half)
    (exp,) = [node for node in half.graph.node if node.op_type == "Exp"]
    assert kinds[exp.input[0]] == kinds[exp.output[0]] == TensorProto.FLOAT
    assert [value.SerializeToString() for value in half.graph.input] == [
        value.SerializeToString() for value in model.graph.input
    ]
    assert {kinds[name] for name in HEAD_NAMES} == {TensorProto.FLOAT}
    assert not [t.name for t in half.graph.initializer if t.data_type == TensorProto.FLOAT and np.prod(t.dims) > 64]


def test_products_are_fp16_except_in_excluded_modules(exported: dict[str, onnx.ModelProto]) -> None:
    half = convert_to_half(exported["tiny"], keep=["prop_fc", "fcos.head.mix_fc"])
    kinds = types(half)
    for node in half.graph.node:
        if node.op_type in ("Conv", "Gemm", "LSTM", "MatMul"):
            excluded = {"prop_fc", "fcos.head.mix_fc"} & set(drn_modules(node.name))
            assert kinds[node.output[0]] == (TensorProto.FLOAT if excluded else TensorProto.FLOAT16), node.name


def test_shared_tensor_is_cast_once(exported: dict[str, onnx.ModelProto]) -> None:
    casts = [n for n in convert_to_half(exported["deep"], keep=["fpn"]).graph.node if n.op_type == "Cast"]
    assert len({(cast.input[0], onnx.helper.get_node_attr_value(cast, "to")) for cast in casts}) == len(casts)
    assert len({cast.name for cast in casts}) == len(casts)


def test_bf16_emulation_is_close_to_fp32(exported: dict[str, onnx.ModelProto]) -> None:
    model = raise_opset(exported["tiny"], 22)
    assert opset_of(model) == 22
    assert run(model, batch("tiny")).keys() == set(HEAD_NAMES)
    fp16 = convert_to_half(model)
    assert emulate_bf16(fp16) is fp16
    half = convert_to_half(model, "bf16")
    onnx.checker.check_model(half, full_check=True)
    given = batch("tiny")
    actual, expected = run(emulate_bf16(half), given), run(model, given)
    for output in HEAD_NAMES:
        # Three bits fewer than FP16.
        np.testing.assert_allclose(actual[output], expected[output], atol=16 * HALF * np.abs(expected[output]).max())
        assert not np.array_equal(actual[output], expected[output])


@given(st.floats(-(2.0**126), 2.0**126, width=32))
def test_bf16_weights_are_rounded_to_nearest(value: float) -> None:
    tensor = _half_tensor(np.array([value], np.float32), "w", TensorProto.BFLOAT16)
    stored = (np.frombuffer(tensor.raw_data, np.uint16).astype(np.uint32) << 16).view(np.float32)[0]
    step = 2.0 ** (np.floor(np.log2(max(abs(value), 2.0**-126))) - 7)
    assert abs(float(stored) - value) <= step / 2


def test_unknown_module_and_low_opset_are_rejected(exported: dict[str, onnx.ModelProto]) -> None:
    with raises(ShapeError, "unknown_module", "prop_fcc"):
        convert_to_half(exported["tiny"], keep=["prop_fcc"])
    with raises(ShapeError, "unsupported_opset", "bf16", 22, 17):
        convert_to_half(exported["tiny"], "bf16")


def with_weight(model: onnx.ModelProto, value: float) -> onnx.ModelProto:
    """Return a copy with this value in a weight of fpn.layer_blocks.1."""
    other = copied(model)
    (weight,) = [tensor for tensor in other.graph.initializer if tensor.name == "fpn.layer_blocks.1.weight"]
    values = numpy_helper.to_array(weight).copy()
    values.flat[0] = value
    weight.CopyFrom(numpy_helper.from_array(values, weight.name))
    return other


def test_measure_magnitudes_returns_maximum_per_module(exported: dict[str, onnx.ModelProto]) -> None:
    model, loud = exported["tiny"], batch("tiny")
    loud.segment_features[:] *= 50
    before = measure_magnitudes(model, [batch("tiny")])
    assert overflow_prone_modules(before) == ()
    after = measure_magnitudes(with_weight(model, -7e4), [batch("tiny")])
    assert set(after) <= modules(model)
    assert after["fpn.layer_blocks.1"] >= 7e4
    assert after["prop_fc"] == before["prop_fc"] < 1e3
    assert "fpn.layer_blocks.1" in overflow_prone_modules(after)
    # The maximum over all batches.
    alone, both = (measure_magnitudes(model, batches)["prop_fc"] for batches in ([loud], [loud, batch("tiny")]))
    assert alone == both > before["prop_fc"]


def test_module_above_a_quarter_of_fp16_max_stays_fp32() -> None:
    limit = FLOAT16_MAX / FP16_SAFETY_FACTOR
    scanned = {"a": limit, "b": limit * 1.01, "c": float("inf"), "d": float("nan")}
    assert set(overflow_prone_modules(scanned)) == {"b", "c", "d"}
    assert overflow_prone_modules({"b": limit * 1.01, "c": float("inf")}) == ("c", "b")
    assert overflow_prone_modules({"c": 1e30}, "bf16") == ()
    # The limit itself, 16,376.
    assert overflow_prone_modules({"a": 16_300.0, "b": 16_400.0}) == ("b",)
    assert overflow_prone_modules({"b": 1e6, "d": float("nan"), "c": 1e9}) == ("d", "c", "b")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_model_not_finite_in_fp32_is_rejected_by_module(exported: dict[str, onnx.ModelProto], value: float) -> None:
    spoilt = batch("tiny")
    spoilt.segment_features[1, 3, 2] = value
    with raises(ModelFileError, "non_finite_output", "fpn.layer_blocks.1"):
        measure_magnitudes(with_weight(exported["tiny"], value), [batch("tiny")])
    with raises(ModelFileError, "non_finite_output", "prop_fc"):
        measure_magnitudes(exported["tiny"], [batch("tiny"), spoilt])
