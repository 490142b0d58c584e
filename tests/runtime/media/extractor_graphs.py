"""Write small extractors whose features are sums of mean colors, so that the expected values are known."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from runtime.artifacts.extractor_manifest import FORMAT, METADATA_KEY, ExtractorManifest

onnx = pytest.importorskip("onnx", reason="onnx writes the graphs that are opened here")

CLIPS = ExtractorManifest("tiny", 16, 16, 8, (24, 32), (24, 24), (1.0, 2.0, 3.0))
IMAGES = ExtractorManifest("encoder", 16, 1, 8, 24, (24, 24), (0.5, 0.4, 0.3), (0.2, 0.25, 0.5), white=1.0)


def mixing(dim: int = 16) -> np.ndarray:
    """Return the (3, dim) weight of each color in each channel."""
    return np.random.default_rng(0).random((3, dim)).astype(np.float32) / 100


def write_clips(path: Path, manifest: ExtractorManifest = CLIPS) -> Path:
    """Write an extractor of clips: mean color times `mixing`."""
    nodes = [
        onnx.helper.make_node("Cast", ["clips"], ["numbers"], to=onnx.TensorProto.FLOAT),
        onnx.helper.make_node("ReduceMean", ["numbers"], ["colour"], axes=[1, 2, 3], keepdims=0),
        onnx.helper.make_node("MatMul", ["colour", "mixing"], ["features"]),
    ]
    shape = ["N", manifest.window, *manifest.crop, 3]
    return _write(path, nodes, "clips", onnx.TensorProto.UINT8, shape, manifest.dim, {METADATA_KEY: manifest.to_json()})


def write_images(path: Path, manifest: ExtractorManifest = IMAGES, beside: bool = True) -> Path:
    """Write an image encoder and its description: mean color, scaled by `manifest`, times `mixing`."""
    nodes = [
        onnx.helper.make_node("ReduceMean", ["pixels"], ["colour"], axes=[2, 3], keepdims=0),
        onnx.helper.make_node("MatMul", ["colour", "mixing"], ["image_embeds"]),
    ]
    if beside:
        path.with_name(f"{path.name}.json").write_text(json.dumps({"format": FORMAT, **dataclasses.asdict(manifest)}))
    return _write(path, nodes, "pixels", onnx.TensorProto.FLOAT, ["N", 3, *manifest.crop], manifest.dim, {})


def _write(
    path: Path, nodes: list[object], name: str, kind: int, shape: list[object], dim: int, metadata: dict[str, str]
) -> Path:
    helper = onnx.helper
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info(name, kind, shape)],
        [helper.make_tensor_value_info(nodes[-1].output[0], onnx.TensorProto.FLOAT, ["N", dim])],  # type: ignore[attr-defined]
        [onnx.numpy_helper.from_array(mixing(dim), "mixing")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    helper.set_model_props(model, metadata)
    onnx.save(model, path)
    return path
