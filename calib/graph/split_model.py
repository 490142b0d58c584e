"""A graph in two: what depends on the video alone, which is 60 % of the arithmetic, and what asks.

    segment_features (V, T, D) -> video part -> encoded_features (V, D, T)
    query_tokens, query_length, video_index (B, ...), encoded_features, segment_spans (V, ...) -> query part -> heads

Any twin can be cut, in any precision: the cut is found by what each tensor depends on, and computes nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from calib.graph.conv_padding import extract_padding
from calib.graph.onnx_graph import strip_weights
from runtime.artifacts.manifest import METADATA_KEY, Manifest
from runtime.artifacts.onnx_metadata import with_digest
from runtime.core.batch import ENCODED_FEATURES, PREPARED_FEATURES, VIDEO_INDEX
from runtime.core.errors import ModelFileError
from runtime.core.io.atomic_files import atomic_write

if TYPE_CHECKING:
    import onnx

FEATURES, SPANS = "segment_features", "segment_spans"


def pair_paths(path: Path) -> tuple[Path, Path]:
    """Return where the two parts of a model file stand: drn.video.onnx and drn.query.onnx for drn.onnx."""
    return path.with_name(f"{path.stem}.video{path.suffix}"), path.with_name(f"{path.stem}.query{path.suffix}")


def prepared_paths(path: Path) -> tuple[Path, Path]:
    """Return where the graphs of `prepared_graphs` stand: drn.prepare.onnx and drn.prepared.onnx for drn.onnx."""
    return path.with_name(f"{path.stem}.prepare{path.suffix}"), path.with_name(f"{path.stem}.prepared{path.suffix}")


def split_graph(model: onnx.ModelProto) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """Return the video part and the query part of a whole graph of ours; together they compute what it does.

    Encoded features are of the type that the graph computes in there: nothing is cast on account of the cut. The
    parts' manifests say which they are; `write_split_model` lets the second name the first.

    Raises:
        ModelFileError: the graph is a part already, or has no single tensor to be cut at.
    """
    import onnx
    from onnx import helper

    manifest = _manifest(model)
    if manifest.part != "whole":
        raise ModelFileError(
            f"This graph is the {manifest.part} part of a pair already; split the whole one.", code="model_part"
        )
    graph = model.graph
    depends = _dependence(graph)
    # What is computed of the video alone and read by something that also sees the query.
    border = {
        name: depends[name]
        for node in graph.node
        for name in node.input
        if depends.get(name) and not depends[node.output[0]] <= {FEATURES, SPANS}
        if depends[name] <= {FEATURES, SPANS}
    }
    cuts = [name for name, seen in border.items() if FEATURES in seen]
    inferred = onnx.shape_inference.infer_shapes(strip_weights(model)).graph
    kinds = {value.name: value.type.tensor_type for value in inferred.value_info}
    if len(cuts) != 1 or border[cuts[0]] != {FEATURES} or cuts[0] not in kinds:
        raise ModelFileError(
            f"The graph should have one tensor at which what depends on the video alone ends, and has {len(cuts)}; "
            "export it with this version.",
            code="ambiguous_split",
        )
    (cut,) = cuts
    rows, channels, _, segments = kinds[cut].shape.dim
    del rows
    encoded = helper.make_tensor_value_info(
        ENCODED_FEATURES, kinds[cut].elem_type, ["video", channels.dim_value, segments.dim_value]
    )
    axis = helper.make_tensor("video/axis", onnx.TensorProto.INT64, [1], [2])

    nodes = [*graph.node, helper.make_node("Squeeze", [cut, axis.name], [ENCODED_FEATURES], "prop_fc/Squeeze")]
    video = _part(model, nodes, [axis], [_renamed(graph.input, FEATURES, "video")], [encoded], "video")

    gathered = {name: f"{name}/asked" for name in border}
    # For each query the row of its video: of the encoding, and of what its spans amount to.
    heads = [
        helper.make_node("Gather", [ENCODED_FEATURES, VIDEO_INDEX], ["video/Gather"], "prop_fc/Gather", axis=0),
        helper.make_node("Unsqueeze", ["video/Gather", axis.name], [gathered[cut]], "prop_fc/Unsqueeze_asked"),
    ]
    nodes = heads
    for node in graph.node:
        if not depends[node.output[0]] <= {FEATURES, SPANS} or not depends[node.output[0]]:
            copy = onnx.NodeProto()
            copy.CopyFrom(node)
            copy.input[:] = [gathered.get(name, name) for name in node.input]
            nodes.append(copy)
        elif FEATURES not in depends[node.output[0]]:
            nodes.append(node)
            nodes += [
                helper.make_node("Gather", [name, VIDEO_INDEX], [gathered[name]], f"{node.name}_asked", axis=0)
                for name in node.output
                if name in border
            ]
    inputs = [value for value in graph.input if value.name not in (FEATURES, SPANS)]
    index = helper.make_tensor_value_info(VIDEO_INDEX, onnx.TensorProto.INT32, ["batch"])
    inputs += [index, encoded, _renamed(graph.input, SPANS, "video")]
    return video, _part(model, nodes, [axis], inputs, list(graph.output), "query")


def prepared_graphs(query: onnx.ModelProto) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """Return what prepares one encoded video to be asked very often, and what asks it; FP32 graphs only.

    The first convolution over gated features, the sum over c and k of W[o, c, k] g[c] P[c, t + k], is linear in the
    gates g. With A[o, t, c], the sum over k of W[o, c, k] P[c, t + k], computed once for a video, all its queries
    together take one matrix product A g of a third of the multiply-adds. A is 256 T by D: 134 MB at full size.

    Args:
        query: the query part that `split_graph` returns.

    Returns:
        (1, D, T) `encoded_features` to (256 T, D) `prepared_features`; and the query part that takes these, about one
        video, in the place of `encoded_features` and `video_index`.

    Raises:
        ModelFileError: the graph is not an FP32 query part.
    """
    import onnx
    from onnx import helper, numpy_helper

    graph = query.graph
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    chain = [ENCODED_FEATURES]
    for kind in ("Gather", "Unsqueeze", "Mul", "Conv"):
        result = readers.get(chain[-1], [])
        if len(result) != 1 or result[0].op_type != kind:
            raise ModelFileError(
                "This graph is no FP32 query part, which alone can be prepared for; export it again.",
                code="not_a_query_part",
            )
        chain.append(result[0].output[0])
    makers = {name: node for node in graph.node for name in node.output}
    gated, convolution = makers[chain[3]], makers[chain[4]]
    gate = makers[next(name for name in gated.input if name != chain[2])].input[0]
    weight = numpy_helper.to_array(next(entry for entry in graph.initializer if entry.name == convolution.input[1]))
    channels, width = weight.shape[:2]
    if weight.dtype != np.float32 or weight.shape[2:] != (1, 3) or len(convolution.input) > 2:
        raise ModelFileError(
            "This graph is no FP32 query part, which alone can be prepared for; export it again.",
            code="not_a_query_part",
        )
    segments = next(value for value in graph.input if value.name == ENCODED_FEATURES).type.tensor_type.shape.dim[2]
    rows = channels * segments.dim_value
    floats, scope = onnx.TensorProto.FLOAT, convolution.name.rpartition("/")[0]
    encoded = helper.make_tensor_value_info(ENCODED_FEATURES, floats, [1, width, segments.dim_value])
    prepared = helper.make_tensor_value_info(PREPARED_FEATURES, floats, [rows, width])

    def integers(name: str, *values: int) -> onnx.TensorProto:
        return numpy_helper.from_array(np.array(values, np.int64), f"{scope}.{name}")

    # Channel after channel, so that what a step reads stays in the cache.
    taps = numpy_helper.from_array(np.ascontiguousarray(weight[:, :, 0].transpose(0, 2, 1)), f"{scope}.taps")
    body = helper.make_graph(
        [
            helper.make_node("Split", ["taps_of_one"], ["tap_0", "tap_1", "tap_2"], axis=0),
            *(helper.make_node("Mul", [f"shifted_{k}", f"tap_{k}"], [f"term_{k}"]) for k in range(3)),
            helper.make_node("Add", ["term_0", "term_1"], ["two_terms"]),
            helper.make_node("Add", ["two_terms", "term_2"], ["row"]),
        ],
        "one_channel",
        [helper.make_tensor_value_info("taps_of_one", floats, [3, width])],
        [helper.make_tensor_value_info("row", floats, [segments.dim_value, width])],
    )
    nodes = [
        helper.make_node("Transpose", [ENCODED_FEATURES], ["laid"], f"{scope}/Transpose", perm=[0, 2, 1]),
        helper.make_node("Pad", ["laid", f"{scope}.pads"], ["padded"], f"{scope}/Pad"),
    ]
    constants = [taps, integers("pads", 0, 1, 0, 0, 1, 0), integers("first", 0), integers("time", 1)]
    for k in range(3):
        constants += [integers(f"from_{k}", k), integers(f"to_{k}", k + segments.dim_value)]
        bounds = [f"{scope}.from_{k}", f"{scope}.to_{k}", f"{scope}.time"]
        nodes += [
            helper.make_node("Slice", ["padded", *bounds], [f"sliced_{k}"], f"{scope}/Slice_{k}"),
            helper.make_node("Squeeze", [f"sliced_{k}", f"{scope}.first"], [f"shifted_{k}"], f"{scope}/Squeeze_{k}"),
        ]
    constants.append(integers("rows", rows, width))
    nodes += [
        helper.make_node("Scan", [taps.name], ["by_channel"], f"{scope}/Scan", body=body, num_scan_inputs=1),
        helper.make_node("Reshape", ["by_channel", f"{scope}.rows"], [PREPARED_FEATURES], f"{scope}/Reshape"),
    ]
    prepare = _part(query, nodes, constants, [encoded], [prepared], "prepare")

    requested = [
        helper.make_node("Transpose", [gate], [f"{scope}/gates"], f"{scope}/Transpose", perm=[1, 0]),
        helper.make_node("MatMul", [PREPARED_FEATURES, f"{scope}/gates"], [f"{scope}/MatMul"], f"{scope}/MatMul"),
        helper.make_node("Transpose", [f"{scope}/MatMul"], [f"{scope}/rows"], f"{scope}/Transpose_2", perm=[1, 0]),
        helper.make_node("Reshape", [f"{scope}/rows", f"{scope}.shape"], [chain[4]], f"{scope}/Reshape"),
    ]
    retained: list[onnx.NodeProto] = []
    for node in graph.node:
        if node.name == convolution.name:
            retained += requested
        elif node.op_type == "Gather" and node.input[1] == VIDEO_INDEX and node.input[0] != ENCODED_FEATURES:
            # One video: its positions stand for every query as they are.
            retained.append(helper.make_node("Identity", [node.input[0]], [node.output[0]], node.name))
        else:
            retained.append(node)
    spans = _renamed(query.graph.input, SPANS, "")
    spans.type.tensor_type.shape.dim[0].dim_value = 1
    given = ("query_tokens", "query_length")
    inputs = [*(value for value in query.graph.input if value.name in given), spans]
    shape = integers("shape", -1, channels, 1, segments.dim_value)
    return prepare, _part(query, retained, [shape], [*inputs, prepared], list(query.graph.output), "prepared")


def write_split_model(
    video: onnx.ModelProto, query: onnx.ModelProto, path: Path, *, prepare: bool = False
) -> list[Path]:
    """Write both parts beside the whole graph's `path`, the query part naming the other by file name and SHA-256.

    Args:
        video, query: of `split_graph`.
        path: of the whole graph, as drn.onnx.
        prepare: whether to write what `prepared_graphs` returns too.

    Returns:
        The files, the query part last.
    """
    parts = {pair_paths(path)[0]: video}
    if prepare:
        parts.update(zip(prepared_paths(path), prepared_graphs(query)))
    query_path = pair_paths(path)[1]
    with contextlib.ExitStack() as whole_or_none:
        digests = []
        for location, part in parts.items():
            temporary = whole_or_none.enter_context(atomic_write(location))
            content = with_digest(_written(part).SerializeToString())
            temporary.write_bytes(content)
            digests.append((location.name, hashlib.sha256(content).hexdigest()))
        temporary = whole_or_none.enter_context(atomic_write(query_path))
        requested = with_part_hashes(query, dict(digests[:1]), dict(digests[1:]))
        temporary.write_bytes(with_digest(_written(requested).SerializeToString()))
    return [*parts, query_path]


def _written(part: onnx.ModelProto) -> onnx.ModelProto:
    """Return a part as it is written: in FP32, with its padding where ONNX Runtime is fastest."""
    return extract_padding(part) if _manifest(part).precision == "fp32" else part


def with_part_hashes(
    query: onnx.ModelProto, video_part: Mapping[str, str], prepared_parts: Mapping[str, str] | None = None
) -> onnx.ModelProto:
    """Return a query part whose manifest names its other parts, file name to SHA-256."""
    manifest = dataclasses.replace(_manifest(query), video_part=video_part, prepared_parts=prepared_parts or {})
    return _with_manifest(query, manifest)


def _dependence(graph: onnx.GraphProto) -> dict[str, frozenset[str]]:
    """Return which of the graph's inputs each tensor depends on; nothing for constants."""
    depends = {value.name: frozenset((value.name,)) for value in graph.input}
    depends.update((tensor.name, frozenset[str]()) for tensor in graph.initializer)
    for node in graph.node:
        seen = frozenset[str]().union(*(depends.get(name, frozenset()) for name in node.input))
        depends.update(dict.fromkeys(node.output, seen))
    return depends


def _part(
    model: onnx.ModelProto,
    nodes: list[onnx.NodeProto],
    constants: list[onnx.TensorProto],
    inputs: list[onnx.ValueInfoProto],
    outputs: list[onnx.ValueInfoProto],
    part: str,
) -> onnx.ModelProto:
    """Return a model of those of `nodes` that the outputs need."""
    import onnx

    expected = {value.name for value in outputs}
    retained: list[onnx.NodeProto] = []
    for node in reversed(nodes):
        if expected & set(node.output):
            retained.insert(0, node)
            expected |= set(node.input)
            # The body of a Scan also reads what stands outside it.
            expected |= {name for entry in node.attribute for inner in entry.g.node for name in inner.input}
    piece = onnx.ModelProto()
    piece.CopyFrom(onnx.ModelProto(ir_version=model.ir_version, producer_name=model.producer_name))
    piece.producer_version, piece.doc_string = model.producer_version, model.doc_string
    piece.opset_import.extend(model.opset_import)
    piece.metadata_props.extend(model.metadata_props)
    piece.graph.name = model.graph.name
    piece.graph.node.extend(retained)
    everything: Iterable[onnx.TensorProto] = (*model.graph.initializer, *constants)
    piece.graph.initializer.extend(tensor for tensor in everything if tensor.name in expected)
    piece.graph.input.extend(inputs)
    piece.graph.output.extend(outputs)
    onnx.checker.check_model(piece, full_check=True)
    return _with_manifest(piece, dataclasses.replace(_manifest(model), part=part))


def _renamed(values: Iterable[onnx.ValueInfoProto], name: str, rows: str) -> onnx.ValueInfoProto:
    """Return an input with its first dimension called `rows`."""
    import onnx

    value = onnx.ValueInfoProto()
    value.CopyFrom(next(value for value in values if value.name == name))
    value.type.tensor_type.shape.dim[0].dim_param = rows
    return value


def _manifest(model: onnx.ModelProto) -> Manifest:
    return Manifest.from_json({entry.key: entry.value for entry in model.metadata_props}.get(METADATA_KEY), "the graph")


def _with_manifest(model: onnx.ModelProto, manifest: Manifest) -> onnx.ModelProto:
    copied = type(model)()
    copied.CopyFrom(model)
    for entry in copied.metadata_props:
        if entry.key == METADATA_KEY:
            entry.value = manifest.to_json()
    return copied
