"""Define fixtures for the tests of `runtime`: a backend with known moments, small graphs and model files."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings

from runtime.artifacts.manifest import METADATA_KEY, Features, Manifest
from runtime.core.decoding import Decoding
from runtime.core.io.digests import sha256
from tests.runtime.engine_bench import Graphs

# No deadline: a test must not fail because its machine is busy.
settings.register_profile("house", deadline=None, max_examples=50)
settings.load_profile("house")


@pytest.fixture(scope="session")
def write_graph() -> Callable[..., Path]:
    """Write a graph with the inputs and outputs of a DRN, D = 16, whose logits depend on query and features."""
    onnx = pytest.importorskip("onnx", reason="onnx writes the graphs that are opened here")
    helper, kinds = onnx.helper, onnx.TensorProto

    def write(path: Path, metadata: dict[str, str], outputs: tuple[str, ...] | None = None, dim: int = 16) -> Path:
        normal = np.random.RandomState(0).normal
        constants = {
            "flat": np.array([-1, 32 * dim], np.int64),
            "pairs": np.array([-1, 56, 2], np.int64),
            "axes": np.array([1], np.int64),
            "word": np.array([0.05], np.float32),
            "to_matching": normal(0, 0.05, (32 * dim, 56)).astype(np.float32),
            "to_distances": normal(0, 0.02, (32 * dim, 112)).astype(np.float32),
        }
        nodes = [
            helper.make_node("Reshape", ["segment_features", "flat"], ["rows"]),
            helper.make_node("MatMul", ["rows", "to_matching"], ["from_video"]),
            helper.make_node("Cast", ["query_tokens"], ["words"], to=kinds.FLOAT),
            helper.make_node("ReduceSum", ["words", "axes"], ["sum"], keepdims=1),
            helper.make_node("Mul", ["sum", "word"], ["from_query"]),
            helper.make_node("Add", ["from_video", "from_query"], ["matching_logits"]),
            helper.make_node("MatMul", ["rows", "to_distances"], ["logarithms"]),
            helper.make_node("Exp", ["logarithms"], ["distances"]),
            helper.make_node("Reshape", ["distances", "pairs"], ["boundary_distances"]),
            helper.make_node("Neg", ["matching_logits"], ["iou_logits"]),
        ]
        inputs = {
            "query_tokens": (kinds.INT32, ["B", "L"]),
            "query_length": (kinds.INT32, ["B"]),
            "segment_features": (kinds.FLOAT, ["B", 32, dim]),
            "segment_spans": (kinds.FLOAT, ["B", 32, 2]),
        }
        shapes = {"matching_logits": ["B", 56], "boundary_distances": ["B", 56, 2], "iou_logits": ["B", 56]}
        graph = helper.make_graph(
            nodes,
            "tiny",
            [helper.make_tensor_value_info(name, *what) for name, what in inputs.items()],
            [helper.make_tensor_value_info(name, kinds.FLOAT, shapes[name]) for name in outputs or shapes],
            [onnx.numpy_helper.from_array(value, name) for name, value in constants.items()],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        helper.set_model_props(model, metadata)
        onnx.save(model, path)
        return path

    return write


@pytest.fixture(scope="session")
def tiny_manifest(golden: Path) -> Manifest:
    """The manifest of `tiny_model`: the words of the mini data set, features of width 16."""
    from runtime.datasets.dataset import DataSet

    return Manifest(
        DataSet(golden / "mini").vocabulary,
        Decoding(),
        Features("C3D", 16),
        max_query_length=13,
        sources={"drn.pt": "0" * 64},
        producer={"drn-deploy": "0"},
    )


@pytest.fixture(scope="session")
def write_model(write_graph: Callable[..., Path], tiny_manifest: Manifest) -> Callable[..., Path]:
    """Write a model file like `tiny_model`, with other values of some fields of its manifest."""

    def write(path: Path, **changes: Any) -> Path:
        return write_graph(path, {METADATA_KEY: dataclasses.replace(tiny_manifest, **changes).to_json()})

    return write


@pytest.fixture(scope="session")
def tiny_model(write_model: Callable[..., Path], tmp_path_factory: Any) -> Path:
    """A model file for the mini data set."""
    return write_model(tmp_path_factory.mktemp("model") / "tiny.onnx")


@pytest.fixture(scope="session")
def pair_files(tiny_model: Path, tiny_manifest: Manifest, tmp_path_factory: Any) -> Path:
    """The query part of `tiny_model`, with its video part in the same directory."""
    onnx = pytest.importorskip("onnx", reason="onnx writes the graphs that are opened here")
    directory = tmp_path_factory.mktemp("pair")
    helper, kinds = onnx.helper, onnx.TensorProto
    encoded = helper.make_tensor_value_info("encoded_features", kinds.FLOAT, ["video", 16, 32])

    def save(name: str, graph: Any, manifest: Manifest) -> Path:
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        helper.set_model_props(model, {METADATA_KEY: manifest.to_json()})
        onnx.checker.check_model(model, full_check=True)
        onnx.save(model, directory / name)
        return directory / name

    features = helper.make_tensor_value_info("segment_features", kinds.FLOAT, ["video", 32, 16])
    node = helper.make_node("Transpose", ["segment_features"], ["encoded_features"], perm=[0, 2, 1])
    video_graph = helper.make_graph([node], "video", [features], [encoded])
    video_file = save("tiny.video.onnx", video_graph, dataclasses.replace(tiny_manifest, part="video"))

    complete = onnx.load(tiny_model).graph
    inputs = [value for value in complete.input if value.name != "segment_features"]
    inputs += [helper.make_tensor_value_info("video_index", kinds.INT32, ["B"]), encoded]
    next(value for value in inputs if value.name == "segment_spans").type.tensor_type.shape.dim[0].dim_param = "video"
    nodes = [
        helper.make_node("Gather", ["encoded_features", "video_index"], ["asked"], axis=0),
        helper.make_node("Transpose", ["asked"], ["segment_features"], perm=[0, 2, 1]),
        *complete.node,
    ]
    query_graph = helper.make_graph(nodes, "query", inputs, list(complete.output), list(complete.initializer))
    named = dataclasses.replace(tiny_manifest, part="query", video_part={"tiny.video.onnx": sha256(video_file)})
    return save("tiny.query.onnx", query_graph, named)


@pytest.fixture(scope="session")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> Graphs:
    """A small network for engines on a simulated GPU; see `tests.runtime.engine_bench`."""
    for name in ("torch", "onnx", "onnxruntime"):
        pytest.importorskip(name, reason=f"{name} makes and computes the graphs")
    return Graphs.trace(tmp_path_factory.mktemp("graphs"))


@pytest.fixture
def mini(golden: Path, tmp_path: Path) -> Path:
    """A copy of the mini data set without its two broken test lines."""
    directory = tmp_path / "mini"
    shutil.copytree(golden / "mini", directory)
    test = directory / "Charades_sta_test.txt"
    test.write_text("".join(test.read_text().splitlines(keepends=True)[:5]))
    return directory
