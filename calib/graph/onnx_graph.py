"""Read ONNX graphs of this toolkit and their manifests, hash them, and infer their types."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from calib.graph.conv_padding import inline_padding
from calib.graph.graph_editing import copied
from runtime.artifacts.extractor_manifest import METADATA_KEY as EXTRACTOR_KEY
from runtime.artifacts.extractor_manifest import ExtractorManifest, no_model
from runtime.artifacts.manifest import METADATA_KEY, Manifest
from runtime.artifacts.onnx_metadata import check, read_metadata
from runtime.backends.exact_int8 import TYPES, WEIGHT_SIZE, precision_in
from runtime.core.batch import HEAD_NAMES, INPUT_NAMES
from runtime.core.errors import ModelFileError, importing
from runtime.core.io.input_files import check_file

if TYPE_CHECKING:
    import onnx


def load_onnx(path: str | os.PathLike[str]) -> onnx.ModelProto:
    """Return the graph in an `.onnx` file of any kind.

    Raises:
        ModelFileError: the file is missing, not ONNX, or damaged.
        DeviceError: onnx is not installed.
    """
    with importing("onnx", "engine"):
        import onnx
        from google.protobuf.message import DecodeError
    path = Path(path)
    check_file(path, "The ONNX file", ModelFileError)
    check(path)
    try:
        model = onnx.load(path)
        onnx.checker.check_model(model)
    except (DecodeError, onnx.checker.ValidationError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelFileError(
            f"{path} is not a valid ONNX model ({reason}). Export it again.", code="damaged_file"
        ) from error
    return model


def load_fp32_graph(path: str | os.PathLike[str]) -> onnx.ModelProto:
    """Return the FP32 graph in an `.onnx` file, with the padding in its convolutions (`calib.graph.conv_padding`).

    Raises:
        ModelFileError: the file is missing, not ONNX, not of this toolkit, or not FP32.
        DeviceError: onnx is not installed.
    """
    return read_source(path)[0]


def read_source(path: str | os.PathLike[str]) -> tuple[onnx.ModelProto, Manifest]:
    """Return the FP32 graph in an `.onnx` file, with the padding in its convolutions, and its manifest.

    Raises:
        ModelFileError: the file is missing, not ONNX, not of this toolkit, or not FP32.
        DeviceError: onnx is not installed.
    """
    model = load_onnx(path)
    manifest = read_manifest(model, str(path))
    if manifest.precision != "fp32":
        raise _not_fp32(path, manifest.precision)
    return inline_padding(model), manifest


def read_extractor(path: Path) -> tuple[onnx.ModelProto, ExtractorManifest]:
    """Return the FP32 graph of a feature extractor, with the padding in its convolutions, and its manifest.

    Raises:
        ModelFileError: the file is not an FP32 feature extractor of this toolkit.
    """
    graph = load_onnx(path)
    manifest_json = _properties(graph).get(EXTRACTOR_KEY)
    names = [value.name for value in (*graph.graph.input, *graph.graph.output)]
    if manifest_json is None or names != ["clips", "features"]:
        raise ModelFileError(
            f"{path} is not a feature extractor of drn-deploy with features as its only output. Export C3D or I3D with "
            "`python -m export.to_onnx`, without --class-scores.",
            code="wrong_model_kind",
        )
    try:
        manifest = ExtractorManifest.from_dict(json.loads(manifest_json), str(path))
    except ValueError as error:
        raise ModelFileError(
            f"The manifest in {path} is not JSON ({error}). Export the model again.", code="invalid_json"
        ) from error
    if manifest.precision != "fp32":
        raise _not_fp32(path, manifest.precision)
    graph = inline_padding(graph)
    _name_nodes(graph)
    return graph, manifest


def _name_nodes(model: onnx.ModelProto) -> None:
    """Give every node a name of its own, by which conversions identify it; ONNX requires none."""
    taken: set[str] = set()
    for node in model.graph.node:
        if not node.name or node.name in taken:
            node.name = f"{node.op_type}:{node.output[0]}"
        taken.add(node.name)


def _not_fp32(path: str | os.PathLike[str], precision: str) -> ModelFileError:
    return ModelFileError(
        f"{path} is {precision}, but only FP32 graphs are calibrated and converted. Give the file that "
        "`python -m export.to_onnx` wrote.",
        code="not_fp32",
    )


def _manifest_in(metadata: Mapping[str, str], source: str) -> Manifest:
    if EXTRACTOR_KEY in metadata:
        raise no_model(source)
    return Manifest.from_json(metadata.get(METADATA_KEY), source)


def manifest_in(path: Path) -> Manifest:
    """Return the manifest of a graph of any precision; ModelFileError if the file is damaged or has none."""
    check(path)
    return _manifest_in(read_metadata(path), str(path))


def manifest_of(model: onnx.ModelProto, source: str = "the graph") -> Manifest:
    """Return the manifest of a graph or of a part of one, with the precision of its weights.

    `source` names the graph in messages.

    Raises:
        ModelFileError: the graph has no manifest.
    """
    manifest = _manifest_in(_properties(model), source)
    return dataclasses.replace(manifest, precision=precision_in(manifest.precision, _weight_types(model)))


def read_manifest(model: onnx.ModelProto, source: str = "the graph") -> Manifest:
    """Return the manifest of an unsplit DRN graph; see `manifest_of`.

    Raises:
        ModelFileError: the graph has no manifest, is one part of a split model, contains decoding and NMS, or is not a
            DRN graph.
    """
    manifest = manifest_of(model, source)
    if manifest.part != "whole":
        raise ModelFileError(
            f"{source} is the {manifest.part} part of a split model. Give the unsplit graph.",
            code="model_part",
        )
    if manifest.moments:
        raise ModelFileError(
            f"{source} contains decoding and NMS (.moments.onnx). Give the .onnx file without them, which "
            "`python -m export.to_onnx` wrote too.",
            code="contains_moments",
        )
    names = {value.name for value in (*model.graph.input, *model.graph.output)}
    missing = {*INPUT_NAMES, *HEAD_NAMES} - names
    if missing:
        raise ModelFileError(
            f"{source} is not a DRN graph: it has no {', '.join(sorted(missing))}. Export it again.",
            code="unexpected_tensors",
        )
    return manifest


def with_manifest(model: onnx.ModelProto, manifest: Manifest) -> onnx.ModelProto:
    """Return a copy of a graph with another manifest."""
    copy = copied(model)
    set_manifest(copy, manifest)
    return copy


def set_manifest(model: onnx.ModelProto, manifest: Manifest) -> None:
    """Replace the manifest of a graph, in place."""
    for entry in model.metadata_props:
        if entry.key == METADATA_KEY:
            entry.value = manifest.to_json()


def _properties(model: onnx.ModelProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in model.metadata_props}


def _weight_types(model: onnx.ModelProto) -> dict[str, int]:
    """Return the number of weight elements of a graph in each type."""
    counts: dict[str, int] = {}
    for tensor in model.graph.initializer:
        size = int(np.prod(tensor.dims))
        if tensor.data_type in TYPES and size >= WEIGHT_SIZE:
            counts[TYPES[tensor.data_type]] = counts.get(TYPES[tensor.data_type], 0) + size
    return counts


def graph_hash(model: onnx.ModelProto) -> str:
    """Return the SHA-256 of the operators, attributes, connections and shapes, without weights and manifest."""
    total = hashlib.sha256()
    for opset in model.opset_import:
        total.update(f"{opset.domain} {opset.version}\n".encode())
    for value in (*model.graph.input, *model.graph.output, *model.graph.node):
        total.update(value.SerializeToString(deterministic=True))
    for tensor in model.graph.initializer:
        total.update(f"{tensor.name} {tensor.data_type} {list(tensor.dims)}\n".encode())
    return total.hexdigest()


def weights_hash(model: onnx.ModelProto) -> str:
    """Return the SHA-256 of the values of all constants in a graph."""
    from onnx import numpy_helper

    total = hashlib.sha256()
    for tensor in sorted(model.graph.initializer, key=lambda entry: entry.name):
        total.update(tensor.name.encode() + b"\n")
        total.update(numpy_helper.to_array(tensor).tobytes())
    return total.hexdigest()


def strip_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a graph with its large constants as inputs, which is sufficient for shape and type inference."""
    import onnx

    light = onnx.ModelProto()
    light.opset_import.extend(model.opset_import)
    light.ir_version = model.ir_version
    light.graph.name = model.graph.name
    light.graph.node.extend(model.graph.node)
    light.graph.input.extend(model.graph.input)
    light.graph.output.extend(model.graph.output)
    light.graph.value_info.extend(model.graph.value_info)
    for tensor in model.graph.initializer:
        if np.prod(tensor.dims) > 1024:
            light.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
        else:
            light.graph.initializer.append(tensor)
    return light


def infer_shapes(model: onnx.ModelProto) -> onnx.GraphProto:
    """Return a graph without its large constants, with the inferred type, and shape if known, of every tensor."""
    import onnx

    return onnx.shape_inference.infer_shapes(strip_weights(model)).graph


def tensor_types(model: onnx.ModelProto) -> dict[str, int]:
    """Return the data type of every tensor of a graph by name, as an `onnx.TensorProto` number."""
    inferred = infer_shapes(model)
    values = (*inferred.value_info, *inferred.input, *inferred.output)
    types: dict[str, int] = {value.name: value.type.tensor_type.elem_type for value in values}
    types.update({tensor.name: tensor.data_type for tensor in model.graph.initializer})
    return types
