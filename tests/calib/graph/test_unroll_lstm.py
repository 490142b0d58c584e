"""Test `calib.graph.unroll_lstm`: an unrolled LSTM gives the same outputs for queries of up to S tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calib.graph.half_precision import convert_to_half
from calib.graph.onnx_session import open_session
from calib.graph.opset import raise_opset
from calib.graph.split_model import split_graph
from calib.graph.unroll_lstm import unroll_lstm
from runtime.core.batch import Heads
from runtime.core.errors import ModelFileError
from tests import tolerances
from tests.export.conftest import CONFIGS, random_inputs
from tests.export.rtx import build_with_rtx
from tests.raising import raises

NAMES = ("query_tokens", "query_length", "segment_features", "segment_spans")
# Limited by the queries of random_inputs.
LONGEST = 12


def heads(
    model: onnx.ModelProto, network: str, lengths: Sequence[int], longest: int, seed: int = 0, seen: int | None = None
) -> Heads:
    """Return the heads of random queries padded to `longest` tokens, with only the first `seen` tokens as input."""
    inputs = random_inputs(CONFIGS[network], list(lengths), longest, seed)
    feed = {name: values.numpy() for name, values in zip(NAMES, inputs, strict=True)}
    feed["query_tokens"] = feed["query_tokens"][:, :seen]
    return Heads(*open_session(model, 1).run(list(Heads.__dataclass_fields__), feed))


def assert_same(actual: Heads, expected: Heads, relative: float) -> None:
    for name, values in vars(expected).items():
        np.testing.assert_allclose(getattr(actual, name), values, rtol=0, atol=relative * np.abs(values).max())


@pytest.mark.parametrize(("network", "steps"), [("tiny", 1), ("tiny", 2), ("deep", 5), ("tiny", LONGEST)])
def test_unrolled_lstm_equals_lstm(network: str, steps: int, exported: dict[str, onnx.ModelProto]) -> None:
    model = unroll_lstm(exported[network], steps)
    onnx.checker.check_model(model, full_check=True)
    assert not [node for node in model.graph.node if node.op_type in ("LSTM", "Loop", "Scan", "If")]
    lengths = [steps, 1, max(1, steps // 2), max(1, steps - 1)]
    actual, expected = (heads(graph, network, lengths, steps) for graph in (model, exported[network]))
    assert_same(actual, expected, tolerances.HEADS)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, LONGEST), min_size=1, max_size=5), st.integers(0, 100))
def test_unrolled_lstm_ignores_padding(exported: dict[str, onnx.ModelProto], lengths: list[int], seed: int) -> None:
    model = unroll_lstm(exported["tiny"], LONGEST)
    actual = heads(model, "tiny", lengths, LONGEST, seed)
    # The LSTM gets the tokens of the longest query.
    expected = heads(exported["tiny"], "tiny", lengths, LONGEST, seed, seen=max(lengths))
    assert_same(actual, expected, tolerances.HEADS)


def test_unrolled_fp16_lstm_is_close_to_fp32(exported: dict[str, onnx.ModelProto]) -> None:
    half = convert_to_half(exported["tiny"])
    expected = heads(exported["tiny"], "tiny", [7, 3, 12], LONGEST)
    for model in (half, unroll_lstm(half, LONGEST)):
        assert_same(heads(model, "tiny", [7, 3, 12], LONGEST), expected, tolerances.HALF)


def test_unroll_keeps_the_input_graph_and_stores_weights_once(exported: dict[str, onnx.ModelProto]) -> None:
    before = exported["tiny"].SerializeToString()
    model = unroll_lstm(exported["tiny"], 4)
    assert exported["tiny"].SerializeToString() == before
    named = [tensor.name for tensor in model.graph.initializer]
    assert len(named) == len(set(named))
    assert not [name for name in named if ".forwards." in name or ".backwards." in name]
    # Two directions of W, R and B.
    size = sum(tensor.ByteSize() for tensor in model.graph.initializer)
    assert size < sum(tensor.ByteSize() for tensor in exported["tiny"].graph.initializer) + 1000


def test_unroll_fixes_only_the_query_length(exported: dict[str, onnx.ModelProto]) -> None:
    _, query = split_graph(exported["tiny"])
    shapes = {
        value.name: [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]
        for value in unroll_lstm(query, 6).graph.input
    }
    assert shapes["query_tokens"] == ["batch", 6]
    assert shapes["query_length"] == shapes["video_index"] == ["batch"]
    assert shapes["encoded_features"][0] == "video"


def test_graph_without_supported_lstm_is_rejected(exported: dict[str, onnx.ModelProto]) -> None:
    video, _ = split_graph(exported["tiny"])
    with raises(ModelFileError, "unsupported_lstm"):
        unroll_lstm(video, 8)
    with raises(ModelFileError, "unsupported_lstm"):
        unroll_lstm(unroll_lstm(exported["tiny"], 8), 8)


@pytest.mark.parametrize(("precision", "network"), [("fp32", "tiny"), ("fp16", "deep"), ("bf16", "tiny")])
def test_unrolled_graph_builds_in_rtx(precision: str, network: str, exported: dict[str, onnx.ModelProto]) -> None:
    model = exported[network]
    if precision != "fp32":
        model = convert_to_half(raise_opset(model, 22 if precision == "bf16" else 17), precision)  # type: ignore[arg-type]
    for part in (model, split_graph(model)[1]):
        assert len(build_with_rtx(unroll_lstm(part, 8))) > 10_000
