"""Read ONNX graphs of this toolkit, hash them, run them as they are, and count their work."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from calib.errors import CalibrationError
from calib.graph.conv_padding import inline_padding
from runtime.artifacts.manifest import METADATA_KEY, Manifest
from runtime.artifacts.onnx_metadata import check
from runtime.backends.base import run_pair
from runtime.backends.exact_int8 import TYPES, WEIGHT_SIZE, for_cpu, precision_in
from runtime.core.batch import ENCODED_FEATURES, VIDEO_INDEX, Batch, Heads
from runtime.core.errors import DeviceError, ModelFileError
from runtime.core.io.input_files import check_file

if TYPE_CHECKING:
    import onnx

    from runtime.artifacts.encoded_video import EncodedVideo

OUTPUTS = tuple(Heads.__dataclass_fields__)


def load_onnx(path: str | os.PathLike[str]) -> onnx.ModelProto:
    """Return the graph in an `.onnx` file, whatever it computes.

    Raises:
        ModelFileError: it is not there, not ONNX, or damaged.
        DeviceError: onnx is not installed.
    """
    try:
        import onnx
        from google.protobuf.message import DecodeError
    except ImportError as error:
        raise DeviceError(
            f"Changing a graph needs onnx, which cannot be imported ({error}); run `pip install 'drn-deploy[engine]'`.",
            code="missing_library",
        ) from error
    path = Path(path)
    check_file(path, "The ONNX file", ModelFileError)
    check(path)
    try:
        model = onnx.load(path)
        onnx.checker.check_model(model)
    except (DecodeError, onnx.checker.ValidationError, ValueError) as error:
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelFileError(f"{path} is not a valid ONNX model ({said}); export it again.") from error
    return model


def load_fp32_graph(path: str | os.PathLike[str]) -> onnx.ModelProto:
    """Return the FP32 graph in an `.onnx` file, its padding inside the convolutions (`calib.graph.conv_padding`).

    Raises:
        ModelFileError: it is not there, not ONNX, not of this toolkit, or narrowed already.
        DeviceError: onnx is not installed.
    """
    model = load_onnx(path)
    manifest = read_manifest(model, str(path))
    if manifest.precision != "fp32":
        raise ModelFileError(
            f"{path} is {manifest.precision} already, and ranges and narrow weights are made from the FP32 graph; "
            "give the file that `python -m export.to_onnx` wrote.",
            code="not_fp32",
        )
    return inline_padding(model)


def read_manifest(model: onnx.ModelProto, source: str = "the graph") -> Manifest:
    """Return the manifest that travels in a graph; ModelFileError if it has none or is no DRN graph."""
    properties = {entry.key: entry.value for entry in model.metadata_props}
    manifest = Manifest.from_json(properties.get(METADATA_KEY), source)
    manifest = dataclasses.replace(manifest, precision=precision_in(manifest.precision, _weight_types(model)))
    if manifest.part != "whole":
        raise ModelFileError(
            f"{source} is one part of a model ({manifest.part}); give the whole graph it was cut from.",
            code="model_part",
        )
    names = {value.name for value in (*model.graph.input, *model.graph.output)}
    missing = (set(Batch.__dataclass_fields__) | set(OUTPUTS)) - names
    if missing:
        raise ModelFileError(f"{source} lacks {', '.join(sorted(missing))}, so it is no DRN graph; export it again.")
    return manifest


def _weight_types(model: onnx.ModelProto) -> dict[str, int]:
    """Return how many numbers of weights a graph has in each type."""
    counts: dict[str, int] = {}
    for tensor in model.graph.initializer:
        size = int(np.prod(tensor.dims))
        if tensor.data_type in TYPES and size >= WEIGHT_SIZE:
            counts[TYPES[tensor.data_type]] = counts.get(TYPES[tensor.data_type], 0) + size
    return counts


def graph_hash(model: onnx.ModelProto) -> str:
    """Return the SHA-256 of what is computed: operators, attributes, wiring and shapes, without weights or manifest."""
    total = hashlib.sha256()
    for opset in model.opset_import:
        total.update(f"{opset.domain} {opset.version}\n".encode())
    for value in (*model.graph.input, *model.graph.output, *model.graph.node):
        total.update(value.SerializeToString(deterministic=True))
    for tensor in model.graph.initializer:
        total.update(f"{tensor.name} {tensor.data_type} {list(tensor.dims)}\n".encode())
    return total.hexdigest()


def weights_hash(model: onnx.ModelProto) -> str:
    """Return the SHA-256 of the numbers in a graph."""
    from onnx import numpy_helper

    total = hashlib.sha256()
    for tensor in sorted(model.graph.initializer, key=lambda entry: entry.name):
        total.update(tensor.name.encode() + b"\n")
        total.update(numpy_helper.to_array(tensor).tobytes())
    return total.hexdigest()


def open_session(model: onnx.ModelProto, threads: int | None = None, optimised: bool = False) -> Any:
    """Return an ONNX Runtime session on the CPU.

    `optimised` lets ONNX Runtime rewrite the graph, as the runtime does (`runtime.backends.exact_int8`). Without it
    INT8 is computed operator by operator, as engines do: ONNX Runtime's fusions differ from that by up to 2.7e-2.
    """
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise DeviceError("ONNX Runtime is not installed; run `pip install 'drn-deploy[cpu]'`.") from error
    options = ort.SessionOptions()
    options.log_severity_level = 3
    level = ort.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimised else level.ORT_DISABLE_ALL
    if threads is not None:
        options.intra_op_num_threads = threads
    content = model.SerializeToString()
    return ort.InferenceSession(for_cpu(content) if optimised else content, options, ["CPUExecutionProvider"])


def with_extra_outputs(model: onnx.ModelProto, tensors: Sequence[str]) -> onnx.ModelProto:
    """Return a copy of a graph that also gives out these tensors; CalibrationError if it lacks one."""
    import onnx

    known = {name for node in model.graph.node for name in node.output} | {value.name for value in model.graph.input}
    missing = sorted(set(tensors) - known)
    if missing:
        raise CalibrationError(
            f"The graph has no tensor {', '.join(missing)}; export it with this version.", code="unknown_tensor"
        )
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    present = {value.name for value in copy.graph.output}
    for name in tensors:
        if name not in present:
            copy.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
    return copy


def strip_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a graph with its large constants as inputs: all that shapes and types need, a thousandth of the size."""
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


def cut_video(model: onnx.ModelProto) -> tuple[onnx.ModelProto, onnx.ModelProto] | None:
    """Return a graph in two: what depends on the video alone (`prop_fc`, most of the arithmetic), and the rest.

    The first takes `segment_features` and returns (B, C, 1, T); the second takes all that the whole takes, but in
    place of the features what the first returned, as (B, T, C). Together they compute what the whole does. None if
    the graph has no `prop_fc` of the expected kind.
    """
    import onnx

    makers = {node.output[0]: node for node in model.graph.node}
    project = next(
        (node for node in model.graph.node if node.op_type == "Conv" and node.name.startswith("prop_fc")), None
    )
    if project is None:
        return None
    arranged = project.input[0]
    while arranged in makers and makers[arranged].op_type in ("QuantizeLinear", "DequantizeLinear", "Mul"):
        arranged = makers[arranged].input[0]
    constants = {tensor.name: tensor for tensor in model.graph.initializer}

    def part(nodes: list[onnx.NodeProto], outputs: list[onnx.ValueInfoProto]) -> onnx.ModelProto:
        expected = {value.name for value in outputs}
        retained: list[onnx.NodeProto] = []
        for node in reversed(nodes):
            if expected & set(node.output):
                retained.insert(0, node)
                expected |= set(node.input)
        piece = onnx.ModelProto()
        piece.ir_version = model.ir_version
        piece.opset_import.extend(model.opset_import)
        piece.metadata_props.extend(model.metadata_props)
        piece.graph.name = model.graph.name
        piece.graph.node.extend(retained)
        piece.graph.initializer.extend(constants[name] for name in sorted(expected & constants.keys()))
        piece.graph.input.extend(value for value in model.graph.input if value.name in expected)
        piece.graph.output.extend(outputs)
        return piece

    encoder = part(list(model.graph.node), [onnx.helper.make_empty_tensor_value_info(project.output[0])])
    rest = []
    for node in model.graph.node:
        if node.name == project.name:
            continue
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        copy.input[:] = [arranged if name == project.output[0] else name for name in node.input]
        rest.append(copy)
    return encoder, part(rest, list(model.graph.output))


class InMemoryBackend:
    """A graph in memory as a `runtime.Backend`, computed operator by operator as it is."""

    def __init__(self, model: onnx.ModelProto, threads: int | None = None, optimised: bool = False) -> None:
        self.manifest = read_manifest(model)
        self._session = open_session(model, threads, optimised)

    def run(self, batch: Batch) -> Heads:
        """Return the heads of a batch."""
        return Heads(*self._session.run(OUTPUTS, vars(batch)))


class InMemorySplitBackend:
    """Run the two parts of a split graph in memory as a `runtime.PairBackend`: videos are encoded once."""

    def __init__(
        self, video: onnx.ModelProto, query: onnx.ModelProto, threads: int | None = None, optimised: bool = False
    ) -> None:
        properties = {entry.key: entry.value for entry in query.metadata_props}
        self.manifest = Manifest.from_json(properties.get(METADATA_KEY), "the query part")
        self._video, self._query = (open_session(part, threads, optimised) for part in (video, query))

    def encode(self, segment_features: np.ndarray) -> np.ndarray:
        """Return the encodings of V videos."""
        return self._video.run(None, {"segment_features": segment_features})[0]

    def ask(
        self,
        query_tokens: np.ndarray,
        query_length: np.ndarray,
        videos: Sequence[EncodedVideo],
        video_index: np.ndarray,
    ) -> Heads:
        """Return the heads of B queries."""
        given = {
            "query_tokens": query_tokens,
            "query_length": query_length,
            VIDEO_INDEX: video_index,
            ENCODED_FEATURES: np.stack([video.features for video in videos]),
            "segment_spans": np.stack([video.spans for video in videos]),
        }
        return Heads(*self._query.run(OUTPUTS, given))

    def run(self, batch: Batch) -> Heads:
        """Return the heads of a batch."""
        return run_pair(self, batch)
