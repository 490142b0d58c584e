"""Read the ONNX graph that a build starts from, and its manifest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.artifacts.extractor_manifest import METADATA_KEY as EXTRACTOR_KEY
from runtime.artifacts.extractor_manifest import ExtractorManifest
from runtime.artifacts.manifest import METADATA_KEY, Manifest
from runtime.artifacts.onnx_metadata import check, read_metadata
from runtime.core.errors import ModelFileError

if TYPE_CHECKING:
    import onnx


def read_source(path: Path) -> tuple[onnx.ModelProto, Manifest]:
    """Return an FP32 graph and its manifest; ModelFileError if it has no drn-deploy manifest."""
    from calib.graph.onnx_graph import load_fp32_graph, read_manifest

    graph = load_fp32_graph(path)
    return graph, read_manifest(graph, str(path))


def read_extractor(path: Path) -> tuple[onnx.ModelProto, ExtractorManifest]:
    """Return the FP32 graph of a feature extractor and its manifest; ModelFileError if it has no manifest."""
    from calib.graph.onnx_graph import load_onnx

    graph = load_onnx(path)
    manifest_json = next((entry.value for entry in graph.metadata_props if entry.key == EXTRACTOR_KEY), None)
    names = [value.name for value in (*graph.graph.input, *graph.graph.output)]
    if manifest_json is None or names != ["clips", "features"]:
        raise ModelFileError(
            f"{path} is not a drn-deploy feature extractor; export C3D with `python -m export.to_onnx`."
        )
    try:
        manifest = ExtractorManifest.from_dict(json.loads(manifest_json), str(path))
    except ValueError as error:
        raise ModelFileError(f"What {path} says of itself is not JSON ({error}); export it again.") from error
    if manifest.precision != "fp32":
        raise ModelFileError(
            f"{path} is {manifest.precision} already, and narrow weights are made from the FP32 graph; give the file "
            "that `python -m export.to_onnx` wrote.",
            code="not_fp32",
        )
    return graph, manifest


def manifest_in(path: Path) -> Manifest:
    """Return the manifest of a graph of any precision; ModelFileError if the file is damaged or carries none."""
    check(path)
    return Manifest.from_json(read_metadata(path).get(METADATA_KEY), str(path))
