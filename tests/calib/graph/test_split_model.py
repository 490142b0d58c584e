"""Test `calib.graph.split_model`: the two parts compute the outputs of the unsplit graph."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import onnx
import pytest

from calib.graph.graph_editing import copied, replace_nodes
from calib.graph.half_precision import convert_to_half
from calib.graph.split_model import pair_paths, split_graph, write_split_model
from export.to_onnx import to_onnx
from export.tracing.torch_check import relative_difference
from runtime.artifacts.encoded_video import EncodedVideo
from runtime.artifacts.manifest import METADATA_KEY, Manifest
from runtime.backends import open_backend
from runtime.backends.base import run_pair
from runtime.core.batch import Batch
from runtime.core.errors import CheckFailed, ModelFileError, OutputError
from runtime.core.io.digests import sha256
from tests.export.conftest import CONFIGS, TINY, random_inputs, signature
from tests.export.rtx import build_with_rtx
from tests.raising import raises, records
from train.network.model import DRN

SAME = 1e-5
"""Relative error of operators that ONNX Runtime fuses across the cut."""


def written(model: onnx.ModelProto, directory: Path) -> Path:
    """Write a split model and the unsplit graph, and return the path of the latter."""
    path = directory / "drn.onnx"
    onnx.save(model, path)
    write_split_model(*split_graph(model), path)
    return path


@pytest.mark.parametrize(("name", "videos"), [("tiny", [0]), ("tiny", [2, 0, 2, 1]), ("deep", [4, 3, 2, 1, 0])])
def test_split_is_exact(exported: dict[str, onnx.ModelProto], tmp_path: Path, name: str, videos: list[int]) -> None:
    path = written(exported[name], tmp_path)
    tokens, lengths, *_ = (values.numpy() for values in random_inputs(CONFIGS[name], [5, 1, 9, 3, 9][: len(videos)]))
    *_, features, spans = (values.numpy() for values in random_inputs(CONFIGS[name], [1] * (max(videos) + 1), seed=1))
    pair = open_backend(pair_paths(path)[1], "cpu", 1)
    encoded = pair.encode(features)  # type: ignore[attr-defined]
    assert encoded.shape == (len(features), CONFIGS[name].feature_dim, CONFIGS[name].num_segments)
    known = [EncodedVideo(row, span, 1.0) for row, span in zip(encoded, spans, strict=True)]
    actual = pair.ask(tokens, lengths, known, np.array(videos, np.int32))  # type: ignore[attr-defined]
    batch = Batch(tokens, lengths, features[videos], spans[videos])
    expected = open_backend(path, "cpu", 1).run(batch)
    for field, theirs in vars(expected).items():
        assert relative_difference(getattr(actual, field), theirs) <= SAME, field
        assert relative_difference(getattr(pair.run(batch), field), theirs) <= SAME, field


def test_split_parts_have_contract_inputs_and_outputs(exported: dict[str, onnx.ModelProto]) -> None:
    video, query = split_graph(exported["tiny"])
    int32, float32 = onnx.TensorProto.INT32, onnx.TensorProto.FLOAT
    encoded = (float32, ["video", 16, 16])
    assert signature(video.graph.input) == {"segment_features": (float32, ["video", 16, 16])}
    assert signature(video.graph.output) == {"encoded_features": encoded}
    assert signature(query.graph.input) == {
        "query_tokens": (int32, ["batch", "query_length"]),
        "query_length": (int32, ["batch"]),
        "video_index": (int32, ["batch"]),
        "encoded_features": encoded,
        "segment_spans": (float32, ["video", 16, 2]),
    }
    assert signature(query.graph.output) == signature(exported["tiny"].graph.output)
    # Each weight is in exactly one part.
    weights = [{tensor.name for tensor in part.graph.initializer} for part in (video, query)]
    assert {name for name in weights[0] if "." in name} == {"prop_fc.weight", "prop_fc.bias"}
    assert not any(name.startswith("prop_fc") for name in weights[1])
    assert {tensor.name for tensor in exported["tiny"].graph.initializer} <= weights[0] | weights[1]


def test_query_part_records_hash_of_video_part(exported: dict[str, onnx.ModelProto], tmp_path: Path) -> None:
    path = written(exported["tiny"], tmp_path)
    video, query = pair_paths(path)
    assert (video.name, query.name) == ("drn.video.onnx", "drn.query.onnx")
    manifests = [
        Manifest.from_json({entry.key: entry.value for entry in onnx.load(part).metadata_props}[METADATA_KEY])
        for part in (video, query)
    ]
    assert [manifest.part for manifest in manifests] == ["video", "query"]
    assert manifests[0].video_part == {}
    assert manifests[1].video_part == {"drn.video.onnx": sha256(video)}


def test_fp16_graph_splits_without_extra_casts(exported: dict[str, onnx.ModelProto], tmp_path: Path) -> None:
    half = convert_to_half(exported["tiny"])
    video, query = split_graph(half)
    float16 = onnx.TensorProto.FLOAT16
    assert signature(video.graph.output)["encoded_features"][0] == float16
    assert signature(query.graph.input)["encoded_features"][0] == float16
    in_parts, unsplit = (
        sum(node.op_type == "Cast" for graph in graphs for node in graph.graph.node)
        for graphs in ((video, query), (half,))
    )
    assert in_parts == unsplit
    path = written(half, tmp_path)
    batch = Batch(*(values.numpy() for values in random_inputs(TINY, [3, 7])))
    pair = open_backend(pair_paths(path)[1], "cpu", 1)
    expected = open_backend(path, "cpu", 1).run(batch)
    for field, theirs in vars(run_pair(pair, batch)).items():  # type: ignore[arg-type]
        assert relative_difference(theirs, getattr(expected, field)) <= 2e-3, field


@pytest.mark.rtx
@pytest.mark.parametrize("half", [False, True])
def test_both_parts_parse_and_build_in_tensorrt_rtx(exported: dict[str, onnx.ModelProto], half: bool) -> None:
    for part in split_graph(convert_to_half(exported["tiny"]) if half else exported["tiny"]):
        build_with_rtx(part, video=(1, 2, 8))


def test_splitting_a_part_is_rejected(exported: dict[str, onnx.ModelProto]) -> None:
    for part in split_graph(exported["tiny"]):
        with raises(ModelFileError, "model_part"):
            split_graph(part)


def test_graph_without_unique_split_point_is_rejected(exported: dict[str, onnx.ModelProto]) -> None:
    other = copied(exported["tiny"])
    by_name = {node.name: node for node in other.graph.node}
    projection, gate = by_name["prop_fc/Conv"], by_name["backbone_net/Mul"]
    # A second path around the projection.
    projection.output[0] = "elsewhere"
    gate.input[0] = "prop_fc/Unsqueeze"
    other.graph.node.append(
        onnx.helper.make_node("Mul", ["elsewhere", gate.input[1]], ["second way"], "backbone_net/Mul_twice")
    )
    with raises(ModelFileError, "ambiguous_split", 2):
        split_graph(other)


def test_split_with_spans_in_encoding_is_rejected(exported: dict[str, onnx.ModelProto]) -> None:
    other = copied(exported["tiny"])
    nodes = [copied(node) for node in other.graph.node]
    index = next(index for index, node in enumerate(nodes) if node.name == "prop_fc/Conv")
    (encoded,) = nodes[index].output
    for node in nodes[index + 1 :]:
        node.input[:] = ["mixed" if name == encoded else name for name in node.input]
    nodes[index + 1 : index + 1] = [
        onnx.helper.make_node("ReduceMax", ["segment_spans"], ["latest"], "ReduceMax", keepdims=0),
        onnx.helper.make_node("Add", [encoded, "latest"], ["mixed"], "Add"),
    ]
    replace_nodes(other.graph, nodes)
    with raises(ModelFileError, "ambiguous_split", 1):
        split_graph(other)


def test_to_onnx_split_writes_all_parts(checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    # --prepare is an option of version 0.1 without effect.
    output = to_onnx(checkpoint, tmp_path / "drn.onnx", split=True, prepare=True, max_query_length=3)
    assert len(records(caplog, logging.WARNING, "--prepare")) == 1
    names = ["drn.onnx", "drn.query.onnx", "drn.video.onnx"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert open_backend(pair_paths(output)[1], "cpu", 1).manifest.part == "query"
    # FP32 files have Pad nodes.
    for path in (output, pair_paths(output)[1]):
        assert "backbone_net.layers.2/Pad" in [node.name for node in onnx.load(path).graph.node]


def test_split_pair_failing_torch_parity_is_deleted(
    checkpoint: Path, networks: dict[str, DRN], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(model: onnx.ModelProto) -> tuple[onnx.ModelProto, onnx.ModelProto]:
        video, query = split_graph(model)
        for node in query.graph.node:
            if node.op_type == "Gather" and node.name.endswith("_asked"):
                # The first video's positions for every query.
                node.input[1] = "zero"
        zero = onnx.numpy_helper.from_array(np.zeros(1, np.int32), "zero")
        query.graph.initializer.append(zero)
        return video, query

    monkeypatch.setattr("export.tracing.checkpoint_to_onnx.split_graph", wrong)
    with raises(CheckFailed, "parity_failed", "matching_logits", "1e-04"):
        to_onnx(checkpoint, tmp_path / "drn.onnx", split=True, max_query_length=3)
    assert list(tmp_path.iterdir()) == []


def test_unwritable_part_is_rejected_first(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    traced = "export.tracing.checkpoint_to_onnx.export_model"
    monkeypatch.setattr(traced, lambda *_, **__: pytest.fail("traced"))
    (tmp_path / "drn.query.onnx").mkdir()
    with raises(OutputError, "output_is_directory", tmp_path / "drn.query.onnx"):
        to_onnx(checkpoint, tmp_path / "drn.onnx", split=True)
