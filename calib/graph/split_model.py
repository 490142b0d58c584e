"""Split a graph into a video part, which has 60 % of the arithmetic, and a query part.

    segment_features (V, T, D) -> video part -> encoded_features (V, D, T)
    query_tokens, query_length, video_index (B, ...), encoded_features, segment_spans (V, ...) -> query part -> heads

A graph of any precision can be split. The tensor to split at is the one that depends on the video alone and is read
together with the query; no values are computed.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from calib.graph.conv_padding import extract_padding
from calib.graph.graph_editing import copied, needed_nodes, read_by
from calib.graph.onnx_graph import (
    infer_shapes,
    manifest_of,
    read_manifest,
    set_manifest,
    strip_weights,
    with_manifest,
)
from runtime.artifacts.onnx_metadata import with_digest
from runtime.core.batch import ENCODED_FEATURES, VIDEO_INDEX
from runtime.core.errors import ModelFileError
from runtime.core.io.atomic_files import atomic_write

if TYPE_CHECKING:
    import onnx

FEATURES, SPANS = "segment_features", "segment_spans"


def pair_paths(path: Path) -> tuple[Path, Path]:
    """Return the paths of the two parts of a model file: drn.video.onnx and drn.query.onnx for drn.onnx."""
    return path.with_name(f"{path.stem}.video{path.suffix}"), path.with_name(f"{path.stem}.query{path.suffix}")


def split_graph(model: onnx.ModelProto) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """Return the video part and the query part of a graph, which together compute the same outputs.

    Encoded features have the type in which the graph computes them. The manifest of each part states its role;
    `write_split_model` adds the hash of the video part to the manifest of the query part.

    Raises:
        ModelFileError: the graph is a part already, contains decoding and NMS, or has no single tensor to split at.
    """
    import onnx
    from onnx import helper

    read_manifest(model)
    graph = model.graph
    depends = _dependence(graph)
    border = _border(graph, depends)
    cuts = [name for name, seen in border.items() if FEATURES in seen]
    kinds = {value.name: value.type.tensor_type for value in infer_shapes(model).value_info}
    if len(cuts) != 1 or border[cuts[0]] != {FEATURES} or cuts[0] not in kinds:
        raise ModelFileError(
            f"Expected one tensor to split the graph at, got {len(cuts)}. Export the model with this version.",
            code="ambiguous_split",
        )
    (cut,) = cuts
    _, channels, _, segments = kinds[cut].shape.dim
    shape = ["video", channels.dim_value, segments.dim_value]
    encoded = helper.make_tensor_value_info(ENCODED_FEATURES, kinds[cut].elem_type, shape)
    axis = helper.make_tensor("video/axis", onnx.TensorProto.INT64, [1], [2])

    nodes = [*graph.node, helper.make_node("Squeeze", [cut, axis.name], [ENCODED_FEATURES], "prop_fc/Squeeze")]
    video = _part(model, nodes, [axis], [_renamed(graph.input, FEATURES, "video")], [encoded], "video")

    inputs = [value for value in graph.input if value.name not in (FEATURES, SPANS)]
    index = helper.make_tensor_value_info(VIDEO_INDEX, onnx.TensorProto.INT32, ["batch"])
    inputs += [index, encoded, _renamed(graph.input, SPANS, "video")]
    nodes = _query_nodes(graph, depends, border, cut, axis.name)
    return video, _part(model, nodes, [axis], inputs, list(graph.output), "query")


def _border(graph: onnx.GraphProto, depends: Mapping[str, frozenset[str]]) -> dict[str, frozenset[str]]:
    """Return the tensors that only the video determines and that a node of the query part reads.

    `depends`, and the result, map a tensor to the graph inputs that it depends on.
    """
    return {
        name: depends[name]
        for node in graph.node
        for name in node.input
        if depends.get(name) and not depends[node.output[0]] <= {FEATURES, SPANS}
        if depends[name] <= {FEATURES, SPANS}
    }


def _query_nodes(
    graph: onnx.GraphProto,
    depends: Mapping[str, frozenset[str]],
    border: Collection[str],
    cut: str,
    axis: str,
) -> list[onnx.NodeProto]:
    """Return the nodes of the query part, which gather the row of its video for each query."""
    from onnx import helper

    gathered = {name: f"{name}/asked" for name in border}
    nodes = [
        helper.make_node("Gather", [ENCODED_FEATURES, VIDEO_INDEX], ["video/Gather"], "prop_fc/Gather", axis=0),
        helper.make_node("Unsqueeze", ["video/Gather", axis], [gathered[cut]], "prop_fc/Unsqueeze_asked"),
    ]
    for node in graph.node:
        if not depends[node.output[0]] <= {FEATURES, SPANS} or not depends[node.output[0]]:
            copy = copied(node)
            copy.input[:] = [gathered.get(name, name) for name in node.input]
            nodes.append(copy)
        elif FEATURES not in depends[node.output[0]]:
            nodes.append(node)
            nodes += [
                helper.make_node("Gather", [name, VIDEO_INDEX], [gathered[name]], f"{node.name}_asked", axis=0)
                for name in node.output
                if name in border
            ]
    return nodes


def write_split_model(video: onnx.ModelProto, query: onnx.ModelProto, path: Path) -> list[Path]:
    """Write both parts of a split graph; the query part names the other by file name and SHA-256.

    Args:
        video, query: parts that `split_graph` returned.
        path: file of the whole graph, as drn.onnx, after which the parts are named.

    Returns:
        The two files, the query part last.
    """
    video_path, query_path = pair_paths(path)
    with atomic_write(video_path) as video_file, atomic_write(query_path) as query_file:
        content = with_digest(_written(video).SerializeToString())
        video_file.write_bytes(content)
        digests = {video_path.name: hashlib.sha256(content).hexdigest()}
        named = with_manifest(query, dataclasses.replace(manifest_of(query), video_part=digests))
        query_file.write_bytes(with_digest(_written(named).SerializeToString()))
    return [video_path, query_path]


def _written(part: onnx.ModelProto) -> onnx.ModelProto:
    """Return a part with Pad nodes if it is FP32 for ONNX Runtime (`calib.graph.conv_padding`)."""
    manifest = manifest_of(part)
    return extract_padding(part) if (manifest.precision, manifest.library) == ("fp32", "onnxruntime") else part


def _dependence(graph: onnx.GraphProto) -> dict[str, frozenset[str]]:
    """Return the graph inputs that each tensor depends on; none for constants."""
    depends = {value.name: frozenset((value.name,)) for value in graph.input}
    depends.update((tensor.name, frozenset[str]()) for tensor in graph.initializer)
    for node in graph.node:
        inputs = frozenset[str]().union(*(depends.get(name, frozenset()) for name in node.input))
        depends.update(dict.fromkeys(node.output, inputs))
    return depends


def _part(
    model: onnx.ModelProto,
    nodes: list[onnx.NodeProto],
    constants: list[onnx.TensorProto],
    inputs: list[onnx.ValueInfoProto],
    outputs: list[onnx.ValueInfoProto],
    part: Literal["video", "query"],
) -> onnx.ModelProto:
    """Return a model with the nodes that the outputs need."""
    import onnx

    needed = needed_nodes(nodes, {value.name for value in outputs})
    read = {name for node in needed for name in read_by(node)}
    piece = onnx.ModelProto()
    piece.CopyFrom(onnx.ModelProto(ir_version=model.ir_version, producer_name=model.producer_name))
    piece.producer_version, piece.doc_string = model.producer_version, model.doc_string
    piece.opset_import.extend(model.opset_import)
    piece.metadata_props.extend(model.metadata_props)
    piece.graph.name = model.graph.name
    piece.graph.node.extend(needed)
    everything: Iterable[onnx.TensorProto] = (*model.graph.initializer, *constants)
    piece.graph.initializer.extend(tensor for tensor in everything if tensor.name in read)
    piece.graph.input.extend(inputs)
    piece.graph.output.extend(outputs)
    # The checks do not depend on the weights, which would be serialized for them.
    onnx.checker.check_model(strip_weights(piece), full_check=True)
    set_manifest(piece, dataclasses.replace(manifest_of(model), part=part))
    return piece


def _renamed(values: Iterable[onnx.ValueInfoProto], name: str, rows: str) -> onnx.ValueInfoProto:
    """Return a copy of an input whose first dimension has the name `rows`."""
    value = copied(next(value for value in values if value.name == name))
    value.type.tensor_type.shape.dim[0].dim_param = rows
    return value
