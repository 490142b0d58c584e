"""Test `export.triton.model_config`: configurations, and models that Triton cannot run."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import onnx
import pytest

pytest.importorskip("tritonclient.grpc", reason="tritonclient has Triton's definitions")

from benchmarks.fake_tensorrt import write_plan
from calib.graph.half_precision import convert_to_half
from calib.graph.split_model import split_graph, write_split_model
from export.engine.profiles import part_profiles, profiles
from export.triton.model_config import ServingOptions, TritonModel, build_models, padded_lengths, read_model
from export.triton.writer import message
from runtime.artifacts.manifest import Manifest
from runtime.artifacts.onnx_metadata import read_metadata, with_digest
from runtime.core.errors import DeviceError, GroundingError, ModelFileError
from tests.export.conftest import TINY, manifest
from tests.raising import raises


def complete_engine(graph: Path, **content: Any) -> Path:
    about = manifest(TINY)
    built_for = [dataclasses.asdict(profile) for profile in profiles((1, 4, 16), (1, 5, 10), about)]
    return write_plan(graph.with_name("drn.engine"), graph, built_for, about, **content)


def pair_engine(graph: Path, **content: Any) -> Path:
    """Write the engines of the two parts next to `graph`."""
    complete = profiles((1, 4, 16), (1, 5, 10), manifest(TINY))
    for part in ("video", "query"):
        part_path = graph.with_name(f"drn.{part}.onnx")
        about = Manifest.from_json(read_metadata(part_path)["drn.manifest"])
        built_for = part_profiles(part, complete, about, 20, TINY.feature_dim)
        profiles_of_part = [dataclasses.asdict(profile) for profile in built_for]
        path = write_plan(part_path.with_suffix(".engine"), part_path, profiles_of_part, about, **content)
    return path


def described(path: Path, serving: ServingOptions | None = None) -> dict[str, Any]:
    """Return the configurations as Triton messages by model name, the front last."""
    serving = serving or ServingOptions()
    parts = build_models(read_model(path, serving), serving)
    assert [part.name for part in parts][-1] == serving.name
    return {part.name: message(part.config) for part in parts}


def shapes(values: Any) -> dict[str, list[int]]:
    return {value.name: list(value.dims) for value in values}


def test_onnx_model_config_matches_graph_shapes(graph: Path) -> None:
    network = described(graph)["drn_network"]
    assert (network.platform, network.backend) == ("onnxruntime_onnx", "onnxruntime")
    assert network.max_batch_size == 32
    assert shapes(network.input) == {
        "query_tokens": [-1],
        "query_length": [1],
        "segment_features": [16, 16],
        "segment_spans": [16, 2],
    }
    # 16 + 8 + 4 locations of 16 segments.
    assert shapes(network.output) == {"matching_logits": [28], "boundary_distances": [28, 2], "iou_logits": [28]}
    assert [value.name for value in network.input if value.HasField("reshape")] == ["query_length"]
    assert list(network.dynamic_batching.preferred_batch_size) == [8, 32]
    assert network.instance_group[0].kind == network.instance_group[0].KIND_AUTO
    assert not network.HasField("optimization")
    known = onnx.load(graph).graph
    assert [value.name for value in known.input] == [value.name for value in network.input]
    assert [value.name for value in known.output] == [value.name for value in network.output]


def test_serving_options_appear_in_model_config(graph: Path) -> None:
    serving = ServingOptions("charades", "cuda", batch=4, instances=3, wait_ms=2.5, threads=6)
    parts = described(graph, serving)
    assert list(parts) == ["charades_network", "charades"]
    network, front = parts.values()
    assert network.instance_group[0].kind == network.instance_group[0].KIND_GPU
    assert network.parameters["intra_op_thread_count"].string_value == "6"
    assert list(network.dynamic_batching.preferred_batch_size) == [4]
    assert (network.max_batch_size, front.max_batch_size) == (4, 4)
    assert front.instance_group[0].count == 3
    assert front.dynamic_batching.max_queue_delay_microseconds == 2500


def test_engine_config_lists_profiles_and_cuda_graphs(graph: Path) -> None:
    network = described(complete_engine(graph), ServingOptions(device="auto"))["drn_network"]
    assert (network.platform, network.backend) == ("tensorrt_plan", "tensorrt")
    assert network.max_batch_size == 16
    (group,) = network.instance_group
    assert group.kind == group.KIND_GPU
    assert list(group.profile) == ["0", "1"]
    assert list(network.dynamic_batching.preferred_batch_size) == [4, 16]
    assert network.optimization.cuda.graphs
    specs = network.optimization.cuda.graph_spec
    assert {(spec.batch_size, spec.input["query_tokens"].dim[0]) for spec in specs} == {
        (batch, length) for batch in (1, 4, 16) for length in (4, 6, 8, 10)
    }
    for spec in specs:
        assert set(spec.input) == {value.name for value in network.input}
        # Triton would read memory after a smaller request as tokens.
        assert not spec.HasField("graph_lower_bound")
    about = json.loads(described(complete_engine(graph))["drn"].parameters["drn.front"].string_value)
    assert about["manifest"]["max_query_length"] == 10


def test_split_pair_gets_one_config_per_part(graph: Path) -> None:
    parts = described(graph.with_name("drn.query.onnx"))
    assert list(parts) == ["drn_video", "drn_query", "drn"]
    assert shapes(parts["drn_video"].output) == {"encoded_features": [16, 16]}
    assert parts["drn_video"].max_batch_size == 8
    # Rows are queries in some inputs, and videos in others.
    assert parts["drn_query"].max_batch_size == 0
    assert not parts["drn_query"].HasField("dynamic_batching")
    assert shapes(parts["drn_query"].input) == {
        "query_tokens": [-1, -1],
        "query_length": [-1],
        "video_index": [-1],
        "encoded_features": [-1, 16, 16],
        "segment_spans": [-1, 16, 2],
    }


def test_engine_pair_config_uses_engine_limits(graph: Path) -> None:
    parts = described(pair_engine(graph))
    about = json.loads(parts["drn"].parameters["drn.front"].string_value)
    assert (about["batch"], about["videos"], about["encoded_together"]) == (16, 20, 8)
    assert list(parts["drn_video"].instance_group[0].profile) == ["0"]
    assert parts["drn_video"].optimization.cuda.graphs
    specs = parts["drn_query"].optimization.cuda.graph_spec
    assert {spec.batch_size for spec in specs} == {0}
    assert {tuple(spec.input["query_tokens"].dim) for spec in specs} >= {(1, 6), (16, 10)}
    assert {tuple(spec.input["encoded_features"].dim) for spec in specs} == {(1, 16, 16)}


def test_encoding_type_matches_the_video_part(graph: Path) -> None:
    video = graph.with_name("drn.video.onnx")
    half = convert_to_half(onnx.load(graph))
    write_split_model(*split_graph(half), graph)
    of = {value: name for name, value in onnx.TensorProto.DataType.items()}
    assert of[onnx.load(video).graph.output[0].type.tensor_type.elem_type] == "FLOAT16"
    config = described(pair_engine(graph))["drn_query"]
    kinds = {value.name: value.data_type for value in config.input}
    names = type(config).DESCRIPTOR.file.enum_types_by_name["DataType"].values_by_number
    assert names[kinds["encoded_features"]].name == "TYPE_FP16"
    warm = config.model_warmup[0].inputs
    assert names[warm["encoded_features"].data_type].name == "TYPE_FP16"
    weak = described(pair_engine(graph, strongly_typed=False))["drn_query"]
    assert names[next(v for v in weak.input if v.name == "encoded_features").data_type].name == "TYPE_FP32"


def test_query_lengths_are_padded_to_few_sizes() -> None:
    assert padded_lengths(64) == [4, 6, 8, 12, 16, 24, 32, 48, 64]
    assert padded_lengths(10) == [4, 6, 8, 10]
    assert padded_lengths(3) == [3]


def test_front_model_allows_ragged_batches(graph: Path) -> None:
    front = described(graph)["drn"]
    assert front.backend == "python"
    assert front.HasField("dynamic_batching")
    assert all(value.allow_ragged_batch for value in front.input)
    assert [value.name for value in front.input if not value.optional] == ["QUERY", "FEATURES", "DURATION"]


def test_models_that_triton_cannot_run_are_rejected(graph: Path, tmp_path: Path) -> None:
    def refuse(path: Path, code: str, *values: object) -> None:
        with raises(ModelFileError, code, path.name, *values):
            read_model(path, ServingOptions())

    refuse(tmp_path / "drn.pt", "wrong_suffix")
    refuse(tmp_path / "gone.onnx", "missing_file")
    refuse(graph.with_name("drn.video.onnx"), "model_part", "video")
    refuse(complete_engine(graph, target="tensorrt-rtx"), "target_unsupported", "tensorrt-rtx", "--target tensorrt")
    half = Manifest.from_json(read_metadata(graph)["drn.manifest"])
    model = onnx.load(graph)
    onnx.helper.set_model_props(model, {"drn.manifest": dataclasses.replace(half, precision="bf16").to_json()})
    onnx.save(model, tmp_path / "drn.bf16.onnx")
    refuse(tmp_path / "drn.bf16.onnx", "precision_unsupported")
    onnx.helper.set_model_props(model, {"drn.manifest": dataclasses.replace(half, library="openvino").to_json()})
    onnx.save(model, tmp_path / "drn.openvino.onnx")
    refuse(tmp_path / "drn.openvino.onnx", "target_unsupported", "OpenVINO", "--target onnxruntime")
    plan = complete_engine(graph)
    with raises(DeviceError, "gpu_required", plan.name):
        read_model(plan, ServingOptions(device="cpu"))
    plan.write_bytes(b"another plan")
    refuse(plan, "digest_mismatch")


def test_bfloat16_between_two_parts_is_rejected(graph: Path) -> None:
    video = graph.with_name("drn.video.onnx")
    path = pair_engine(graph)
    model = onnx.load(video)
    model.graph.output[0].type.tensor_type.elem_type = onnx.TensorProto.BFLOAT16
    video.write_bytes(with_digest(model.SerializeToString()))
    with raises(ModelFileError, "precision_unsupported", path.name):
        read_model(path, ServingOptions())
    video.unlink()
    with raises(ModelFileError, "missing_file", video):
        read_model(path, ServingOptions())


@pytest.mark.parametrize(
    "values",
    [{"name": "a/b"}, {"name": ""}, {"batch": 0}, {"instances": 0}, {"threads": 0}, {"wait_ms": -1}, {"wait_ms": 5000}],
)
def test_invalid_serving_options_are_rejected(values: dict[str, Any]) -> None:
    ((option, value),) = values.items()
    named = repr(value) if option == "name" else value
    with raises(GroundingError, "invalid_option", f"--{option.replace('_', '-')}", named):
        ServingOptions(**values)


def test_unknown_model_config_field_raises_error() -> None:
    from google.protobuf.json_format import ParseError

    with pytest.raises(ParseError):
        message(TritonModel({"name": "drn", "maximum_batch_size": 3}, {}).config)
