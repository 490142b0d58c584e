"""Test `runtime.backends.exact_int8`: 8-bit products are exact on every kind of CPU, or there is a warning."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from runtime.backends import exact_int8
from runtime.backends.exact_int8 import for_cpu, read_contents, saturates, source_for_cpu, unsigned
from runtime.backends.onnxruntime_session import create_session
from runtime.core import cpu_info
from tests.raising import records

# Architecture, features by Linux's names, and whether pairs of products are added in 16 bits.
CPUS = {
    "AVX2": ("x86_64", ("avx", "avx2"), True),
    "AVX-512 without VNNI": ("x86_64", ("avx", "avx2", "avx512f", "avx512bw"), True),
    "AVX-512 with VNNI": ("x86_64", ("avx", "avx2", "avx512f", "avx512bw", "avx512_vnni"), False),
    "AVX-VNNI": ("x86_64", ("avx", "avx2", "avx_vnni"), False),
    "Arm": ("aarch64", ("asimd", "asimddp"), False),
}


def exact(data: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the product of (M, K) and (K, N) integers, as VNNI adds it: in 32 bits."""
    return data.astype(np.int64) @ weights.astype(np.int64)


def saturating(data: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the product of (M, K) uint8 and (K, N) int8 numbers as `vpmaddubsw` adds it: pairs along K in 16 bits."""
    products = data.astype(np.int64)[:, :, None] * weights.astype(np.int64)[None]
    pairs = products[:, 0::2] + products[:, 1::2]
    return np.clip(pairs, -(2**15), 2**15 - 1).sum(1)


def product(weights: np.ndarray, zero_points: np.ndarray | None = None) -> onnx.ModelProto:
    """Return a graph of (M, K) float data, in int8 steps of 1, times (K, N) int8 weights with scales of 1."""
    if zero_points is None:
        zero_points = np.zeros(weights.shape[1], np.int8)
    constants = {
        "scale": np.float32(1),
        "zero": np.int8(0),
        "weight": weights,
        "scales": np.ones(weights.shape[1], np.float32),
        "zeros": zero_points,
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["dq"]),
        helper.make_node("DequantizeLinear", ["weight", "scales", "zeros"], ["w"], axis=1),
        helper.make_node("MatMul", ["dq", "w"], ["y"]),
    ]
    return graph_of(nodes, constants, values=[helper.make_tensor_value_info("q", TensorProto.INT8, None)])


def graph_of(nodes: list[Any], constants: dict[str, Any], values: list[Any] | None = None) -> onnx.ModelProto:
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["m", "n"]) for name in "xy")
    tensors = [numpy_helper.from_array(np.asarray(entry), name) for name, entry in constants.items()]
    graph = helper.make_graph(nodes, "one", [x], [y], tensors, value_info=values or [])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def computed(content: bytes, data: np.ndarray) -> np.ndarray:
    """Return the `y` of a serialized graph in ONNX Runtime, with all its own rewritings."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return session.run(["y"], {"x": data.astype(np.float32)})[0]


def numbers(rows: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return (rows, 64) data and (64, 24) weights over all of int8, half of them large: sums of pairs pass 16 bits."""
    rng = np.random.default_rng(seed)
    data, weights = rng.integers(-127, 128, (rows, 64)), rng.integers(-127, 128, (64, 24))
    data[:, ::3] = 127
    weights[::3] = rng.choice([-127, 127], (22, 24))
    return data, weights.astype(np.int8)


def as_data(data: np.ndarray) -> np.ndarray:
    """Return int8 numbers as kernels read them: uint8, 128 more."""
    return (data + 128).astype(np.uint8)


@pytest.mark.parametrize(("machine", "features", "has_16_bit_sums"), CPUS.values(), ids=CPUS)
def test_int8_form_chosen_per_cpu_is_exact(machine: str, features: tuple[str, ...], has_16_bit_sums: bool) -> None:
    data, weights = numbers(8)
    unsigned_data, wide_weights = as_data(data), weights.astype(np.int64)
    # Kernels subtract the zero points after the multiplication.
    shift = 128 * wide_weights.sum(0)
    multiply = saturating if has_16_bit_sums else exact
    signed = multiply(unsigned_data, weights) - shift
    shifted = exact(unsigned_data, wide_weights + 128) - 128 * unsigned_data.astype(np.int64).sum(1)[:, None] - shift
    uses_uint8 = saturates(machine, features)
    assert uses_uint8 == has_16_bit_sums
    assert ((shifted if uses_uint8 else signed) == exact(data, weights)).all()
    # With these numbers, int8 weights are wrong where pairs are added in 16 bits.
    assert (signed == exact(data, weights)).all() != has_16_bit_sums


def test_unknown_x86_cpu_gets_the_exact_int8_form() -> None:
    assert saturates("AMD64", None)
    assert not saturates("arm64", None)


@pytest.mark.parametrize("rows", [1, 8])
def test_kernels_saturate_as_cpu_features_predict(rows: int) -> None:
    if cpu_info.cpu_features() is None:
        pytest.skip("the system does not list the features of this CPU")
    data, weights = numbers(rows)
    expected = saturating(as_data(data), weights) - 128 * weights.astype(np.int64).sum(0)
    if not saturates():
        expected = exact(data, weights)
    assert (computed(product(weights).SerializeToString(), data) == expected).all()


@pytest.mark.parametrize("rows", [1, 8])
def test_int8_model_on_this_machine_is_exact(rows: int, tmp_path: Path) -> None:
    data, weights = numbers(rows)
    path = tmp_path / "m.onnx"
    onnx.save(product(weights), path)
    session, *_ = create_session(path, "cpu", 1)
    assert (session.run(["y"], {"x": data.astype(np.float32)})[0] == exact(data, weights)).all()
    assert (computed(for_cpu(path.read_bytes()), data) == exact(data, weights)).all()


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), raw=st.booleans())
def test_uint8_form_is_exact_on_this_machine(seed: int, raw: bool) -> None:
    data, weights = numbers(5, seed)
    zero_points = np.random.default_rng(seed).integers(-3, 4, 24).astype(np.int8)
    model = product(weights, zero_points)
    if not raw:
        # As onnx.helper.make_tensor writes numbers, by default.
        for tensor in model.graph.initializer:
            values = numpy_helper.to_array(tensor)
            tensor.CopyFrom(helper.make_tensor(tensor.name, tensor.data_type, values.shape, values.ravel().tolist()))
    content = unsigned(model.SerializeToString())
    assert content is not None
    onnx.checker.check_model(onnx.load_from_string(content), full_check=True)
    assert not any(tensor.data_type == TensorProto.INT8 for tensor in onnx.load_from_string(content).graph.initializer)
    assert (computed(content, data) == exact(data, weights.astype(np.int64) - zero_points)).all()


def test_uint8_form_changes_only_the_weights() -> None:
    model = product(numbers(1)[1])
    helper.set_model_props(model, {"drn.manifest": "{}", "other": "über"})
    content = unsigned(model.SerializeToString())
    assert content is not None
    changed = onnx.load_from_string(content)
    assert changed.metadata_props == model.metadata_props
    assert changed.graph.node == model.graph.node
    assert changed.opset_import == model.opset_import
    assert unsigned(content) == content


def test_dynamically_quantized_weights_become_uint8() -> None:
    data, weights = numbers(4)
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]),
        helper.make_node("MatMulInteger", ["q", "weight", "z", "zeros"], ["i"]),
        helper.make_node("Cast", ["i"], ["y"], to=TensorProto.FLOAT),
    ]
    model = graph_of(nodes, {"weight": weights, "zeros": np.zeros((), np.int8)})
    content = unsigned(model.SerializeToString())
    assert content is not None
    quantize = helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"])
    steps, zero = (
        computed(
            graph_of([quantize, helper.make_node("Cast", [name], ["y"], to=TensorProto.FLOAT)], {}).SerializeToString(),
            data,
        )
        for name in "qz"
    )
    assert (computed(content, data) == exact(steps - zero, weights)).all()


UNSHIFTABLE = {
    "no zero point": [helper.make_node("DequantizeLinear", ["weight", "one"], ["w"])],
    "computed zero point": [
        helper.make_node("Cast", ["one"], ["cast"], to=TensorProto.INT8),
        helper.make_node("DequantizeLinear", ["weight", "one", "cast"], ["w"]),
    ],
    "operator that reads the numbers": [helper.make_node("Cast", ["weight"], ["w"], to=TensorProto.FLOAT)],
    "transposed, then read": [
        helper.make_node("Transpose", ["weight"], ["moved"]),
        helper.make_node("Transpose", ["moved"], ["back"]),
        helper.make_node("Cast", ["back"], ["w"], to=TensorProto.FLOAT),
    ],
    "operator without zero points": [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]),
        helper.make_node("MatMulInteger", ["q", "weight", "z"], ["i"]),
        helper.make_node("Cast", ["i"], ["w"], to=TensorProto.FLOAT),
    ],
}


def unshiftable(name: str) -> onnx.ModelProto:
    """Return a graph whose int8 weights cannot be converted to uint8."""
    if name == "constants":
        model = product(numbers(1)[1])
        for tensor in model.graph.initializer:
            model.graph.node.insert(0, helper.make_node("Constant", [], [tensor.name], value=tensor))
        del model.graph.initializer[:]
        return model
    if name == "external data":
        return product(numbers(1)[1])
    is_product = name == "operator without zero points"
    last = helper.make_node("Add", ["w", "w"], ["y"]) if is_product else helper.make_node("MatMul", ["x", "w"], ["y"])
    return graph_of([*UNSHIFTABLE[name], last], {"weight": numbers(4)[1], "one": np.float32(1)})


@pytest.mark.parametrize("name", [*UNSHIFTABLE, "constants", "external data"])
def test_graph_that_cannot_be_shifted_is_opened_with_a_warning(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(unshiftable(name), path, save_as_external_data=name == "external data", size_threshold=8)
    assert unsigned(path.read_bytes()) is None
    for is_saturating in (False, True):
        monkeypatch.setattr(exact_int8, "saturates", lambda is_saturating=is_saturating: is_saturating)
        assert source_for_cpu(path) == str(path)
        assert len(records(caplog, logging.WARNING, path.name)) == is_saturating
    create_session(path, "cpu", 1)


def test_cpu_with_vnni_opens_the_original_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(product(numbers(1)[1]), path)
    monkeypatch.setattr(exact_int8, "saturates", lambda: False)
    assert source_for_cpu(path) == str(path)
    assert for_cpu(path.read_bytes()) == path.read_bytes()
    monkeypatch.setattr(exact_int8, "saturates", lambda: True)
    assert source_for_cpu(path) == unsigned(path.read_bytes())


def test_damaged_file_is_passed_to_onnx_runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact_int8, "saturates", lambda: True)
    content = product(numbers(1)[1]).SerializeToString()
    for damaged in (b"", content[:-30], content[:300], os.urandom(500), b"not a graph"):
        path = tmp_path / "m.onnx"
        path.write_bytes(damaged)
        assert source_for_cpu(path) == str(path)


def test_read_contents_lists_nodes_and_weight_types() -> None:
    contents = read_contents(product(numbers(1)[1]).SerializeToString())
    assert contents.weight_types() == {"int8": 64 * 24}
    assert read_contents(unshiftable("constants").SerializeToString()).weight_types() == {"int8": 64 * 24}
    assert [node.op_type for node in contents.nodes] == [
        "QuantizeLinear", "DequantizeLinear", "DequantizeLinear", "MatMul",
    ]  # fmt: skip
    with pytest.raises(ValueError):  # noqa: PT011
        read_contents(b"not a graph")
