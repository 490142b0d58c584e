"""Test `calib.graph.conv_padding`: Pad nodes for wide convolutions, with equal outputs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from calib.graph.conv_padding import extract_padding, inline_padding
from calib.graph.onnx_graph import graph_hash, load_fp32_graph, weights_hash
from calib.graph.onnx_session import open_session
from runtime.backends.onnxruntime_session import DISABLED_OPTIMIZERS
from runtime.core.batch import Batch, Heads

OUTPUTS = list(Heads.__dataclass_fields__)


def padding(model: onnx.ModelProto) -> dict[str, list[int]]:
    """Return the pads of every convolution that has some."""
    actual = {}
    for node in model.graph.node:
        for entry in node.attribute:
            if node.op_type == "Conv" and entry.name == "pads" and any(entry.ints):
                actual[node.name] = list(entry.ints)
    return actual


def test_extract_padding_keeps_outputs_of_wide_convolutions(model: onnx.ModelProto, batch: Batch) -> None:
    apart = extract_padding(model)
    expected, actual = (open_session(graph, threads=1).run(OUTPUTS, vars(batch)) for graph in (model, apart))
    for name, ours, theirs in zip(OUTPUTS, actual, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs, err_msg=name)
    # The tiny network's head has 16 channels; its backbone has the published width.
    levels = [f"backbone_net.layers.{level}" for level in (1, 2)]
    assert padding(model).keys() - padding(apart).keys() == {f"{level}/Conv" for level in levels}
    assert [node.name for node in apart.graph.node if node.op_type == "Pad"] == [f"{level}/Pad" for level in levels]


def test_inline_padding_reverts_extract_padding(model: onnx.ModelProto, tmp_path: Path) -> None:
    apart = extract_padding(model)
    onnx.save(apart, tmp_path / "drn.onnx")
    assert graph_hash(apart) != graph_hash(model)
    for again in (inline_padding(apart), load_fp32_graph(tmp_path / "drn.onnx")):
        assert graph_hash(again) == graph_hash(model)
        assert weights_hash(again) == weights_hash(model)


def test_asymmetric_padding_keeps_its_sides() -> None:
    weight = numpy_helper.from_array(np.random.default_rng(0).random((4, 64, 1, 3), np.float32), "w")
    node = helper.make_node("Conv", ["x", "w"], ["y"], "a/Conv", kernel_shape=[1, 3], pads=[0, 2, 0, 1])
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in "y"]
    shape = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 64, 1, 8])
    model = helper.make_model(
        helper.make_graph([node], "g", [shape], values, [weight]),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    )
    feed = {"x": np.random.default_rng(1).random((1, 64, 1, 8), np.float32)}
    apart = extract_padding(model)
    (expected,), (actual,) = (open_session(graph, threads=1).run(None, feed) for graph in (model, apart))
    np.testing.assert_array_equal(actual, expected)
    assert padding(apart) == {}
    assert padding(inline_padding(apart)) == {"a/Conv": [0, 2, 0, 1]}


@pytest.mark.parametrize("pads", [[0, 1, 0, 1, 0, 0, 0, 0], [0, 0, 0, 1, 0, 0, 0, 1]])
def test_pad_of_channels_or_with_two_readers_is_not_inlined(pads: list[int]) -> None:
    weight = numpy_helper.from_array(np.ones((64, 64 + sum(pads[1::4]), 1, 3), np.float32), "w")
    nodes = [
        helper.make_node("Pad", ["x", "p"], ["padded"], "a/Pad"),
        helper.make_node("Conv", ["padded", "w"], ["y"], "a/Conv", kernel_shape=[1, 3], pads=[0, 0, 0, 0]),
        helper.make_node("Identity", ["padded"], ["z"], "a/Identity"),
    ]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in "yz"]
    shape = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 64, 1, 8])
    constants = [weight, numpy_helper.from_array(np.array(pads, np.int64), "p")]
    # The second reader prevents inlining of the first Pad; padded channels that of the other.
    chosen = nodes if pads[1] == 0 else nodes[:2]
    graph = helper.make_graph(chosen, "g", [shape], values[: len(chosen) - 1], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    assert [node.op_type for node in inline_padding(model).graph.node] == [node.op_type for node in chosen]


def test_onnx_runtime_option_keeps_padding_separate(model: onnx.ModelProto, tmp_path: Path) -> None:
    """A newer ONNX Runtime that renames its optimizer would inline the padding silently."""
    counts: dict[bool, int] = {}
    for disabled in (False, True):
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath = str(tmp_path / f"{disabled}.onnx")
        onnxruntime.InferenceSession(
            extract_padding(model).SerializeToString(),
            options,
            providers=["CPUExecutionProvider"],
            disabled_optimizers=DISABLED_OPTIMIZERS if disabled else None,
        )
        optimized = onnx.load(options.optimized_model_filepath)
        counts[disabled] = sum(node.op_type == "Pad" for node in optimized.graph.node)
    assert counts == {False: 0, True: 2}
