"""Prepare graphs for TensorRT 8.6, which is weakly typed: FP32 graphs, precision flags and layers that stay in FP32.

TensorRT 10 and later take the data types from the graph. TensorRT 8.6 chooses them by flags and speed. It gets the same
graph in FP32 with the Q/DQ pairs around INT8 operators, the flags of the precision, and FP32 as the precision of all
layers that are FP32 in the graph (`exp`, the scale before it, and the modules kept in FP32).
"""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from calib.graph.graph_editing import copied, replace_nodes
from calib.graph.half_precision import float32_values, fp32_nodes
from calib.graph.onnx_graph import tensor_types
from calib.graph.opset import opset_of, with_opset
from runtime.core.errors import DeviceError, ModelFileError, one_line

log = logging.getLogger("drn")

# "TensorRT 8.6 supports operators up to Opset 17" (onnx-tensorrt, release/8.6-GA, docs/operators.md).
OPSET = 17
# The layers around INT8 are FP16, as in the strongly typed graph.
_FLAGS: dict[str, tuple[str, ...]] = {
    "fp32": (),
    "fp16": ("FP16",),
    "bf16": ("BF16",),
    "int8": ("INT8", "FP16"),
    "fp8": ("FP8", "FP16"),
}


@dataclasses.dataclass(frozen=True)
class Fp32Graph:
    """A graph for TensorRT 8.6.

    Attributes:
        graph: serialized FP32 graph.
        nodes: names of all nodes.
        fp32_nodes: names of the nodes that must stay in FP32; see `calib.graph.half_precision.fp32_nodes`.
    """

    graph: bytes
    nodes: frozenset[str]
    fp32_nodes: frozenset[str]


def precision_flags(precision: str) -> tuple[str, ...]:
    """Return the names of the builder flags of a precision."""
    return _FLAGS[precision]


def check_precision(trt: Any, precision: str) -> None:
    """Raise DeviceError for a precision that this version does not support."""
    # 8.6 has the FP8 flag, but no FP8 Q/DQ.
    missing = [name for name in precision_flags(precision) if not hasattr(trt.BuilderFlag, name)]
    if missing or precision == "fp8":
        raise DeviceError(
            f"TensorRT {trt.__version__} does not support {precision}. Choose --precision fp16 or int8, or install "
            "TensorRT 10 or later.",
            code="precision_unsupported",
        )


def configure(trt: Any, network: Any, config: Any, precision: str, prepared: Fp32Graph) -> None:
    """Set the flags of a precision, and FP32 for the layers of the nodes that must stay in FP32.

    Args:
        trt: the module of TensorRT 8.6.
        network: `INetworkDefinition` with the parsed graph.
        config: `IBuilderConfig` to change.
        precision: fp32, fp16, bf16 or int8.
        prepared: graph that was parsed.
    """
    for name in precision_flags(precision):
        config.set_flag(getattr(trt.BuilderFlag, name))
    if hasattr(trt, "PreviewFeature"):
        _share_profiles(trt, config)
    _use_own_tactics(trt, config)
    if not prepared.fp32_nodes:
        return
    config.set_flag(trt.BuilderFlag.OBEY_PRECISION_CONSTRAINTS)
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    nodes = [node_of(str(layer.name), prepared.nodes) for layer in layers]
    fp32 = {index for index, node in enumerate(nodes) if node in prepared.fp32_nodes}
    unnamed = {index for index, node in enumerate(nodes) if node is None}
    for index in sorted(fp32 | _fp32_helpers(layers, fp32, unnamed)):
        if _takes_precision(trt, layers[index]):
            layers[index].precision = trt.float32
    missing = prepared.fp32_nodes - set(nodes)
    if missing:
        log.warning(
            "TensorRT %s may compute %s in a narrower type than FP32, because no layer has that name. Check the "
            "accuracy with --data.",
            *(trt.__version__, ", ".join(sorted(missing)[:8])),
        )


def _fp32_helpers(layers: Sequence[Any], fp32: set[int], unnamed: set[int]) -> set[int]:
    """Return the indices of the unnamed layers whose outputs only FP32 layers read.

    The parser adds such layers before an elementwise operator to give both operands the same rank (`broadcastTensor` in
    importerUtils.cpp of onnx-tensorrt). The API gives no access to layers that the builder adds later.
    """
    readers: dict[str, set[int]] = {}
    for index, layer in enumerate(layers):
        for number in range(layer.num_inputs):
            tensor = layer.get_input(number)
            if tensor is not None:
                readers.setdefault(str(tensor.name), set()).add(index)
    helpers: set[int] = set()
    # Readers come after the layers they read, so they are decided first.
    for index in sorted(unnamed, reverse=True):
        outputs = [layers[index].get_output(number) for number in range(layers[index].num_outputs)]
        consumers = {reader for tensor in outputs if tensor is not None for reader in readers.get(str(tensor.name), ())}
        if consumers and consumers <= fp32 | helpers:
            helpers.add(index)
    return helpers


def node_of(layer: str, nodes: Collection[str]) -> str | None:
    """Return the node that a layer of a TensorRT network comes from; None if its name contains none.

    The parser names a layer after its node. Further layers of the node get an unused number, as `fcos.head/Mul_17`
    (`generateUniqueName` in onnx-tensorrt).
    """
    ends = [len(layer), *(result.start() for result in re.finditer(r"[^A-Za-z0-9]", layer))]
    return next((layer[:end] for end in sorted(ends, reverse=True) if layer[:end] in nodes), None)


def _share_profiles(trt: Any, config: Any) -> None:
    """Let several execution contexts use one profile, as in TensorRT 10: the runtime has a context for each shape."""
    # 8.5 has the class without this member.
    if hasattr(trt.PreviewFeature, "PROFILE_SHARING_0806"):
        config.set_preview_feature(trt.PreviewFeature.PROFILE_SHARING_0806, True)


def _use_own_tactics(trt: Any, config: Any) -> None:
    """Disable the tactics of cuBLAS and cuDNN, so that an engine does not need these libraries.

    They are enabled by default in 8.6 (`TacticSource` in its documentation), but not in TensorRT 10 and later.
    """
    own = (trt.TacticSource.EDGE_MASK_CONVOLUTIONS, trt.TacticSource.JIT_CONVOLUTIONS)
    config.set_tactic_sources(sum(1 << int(source) for source in own))


def _takes_precision(trt: Any, layer: Any) -> bool:
    """Return whether the precision of a layer may be set: other layers fail or crash with OBEY_PRECISION_CONSTRAINTS.

    trtexec skips integer and boolean layers, integer constants, layers of shape tensors, and layers from INT32 to INT32
    (`setLayerPrecisions` in samples/common/sampleEngines.cpp, release/8.6). Constants get the precision of their
    readers, and Q/DQ layers have fixed types.
    """
    integers = (trt.int32, trt.bool)
    # Names of layer types are the same in all versions.
    if str(layer.type).rpartition(".")[2] in ("CONSTANT", "SHAPE", "QUANTIZE", "DEQUANTIZE"):
        return False
    if layer.precision in integers:
        return False
    first = layer.get_input(0) if layer.num_inputs else None
    if first is None:
        return True
    if first.is_shape_tensor:
        return False
    output = layer.get_output(0) if layer.num_outputs else None
    return not (first.dtype in integers and output is not None and output.dtype in integers)


def prepare(graph: bytes) -> Fp32Graph:
    """Convert a serialized graph for TensorRT 8.6; see `without_types`.

    Raises:
        ModelFileError: `graph` is not an ONNX model.
    """
    try:
        model = onnx.load_from_string(graph)
    # The exception class of protobuf differs between its versions.
    except Exception as error:
        raise ModelFileError(
            f"The graph is not an ONNX model ({one_line(error)}). Export it again.", code="not_onnx"
        ) from error
    converted = without_types(model)
    names = frozenset(node.name for node in converted.graph.node)
    return Fp32Graph(converted.SerializeToString(), names, fp32_nodes(model) & names)


def without_types(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a graph of any precision in FP32 with opset 17, without casts and half-precision weights.

    Q/DQ pairs around INT8 operators stay. Weights that are only stored in INT8 become FP32. The values of the weights
    are those of the graph whose accuracy was checked.
    """
    floats = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16)
    types = tensor_types(model)
    result = copied(model)
    graph = result.graph
    del graph.value_info[:]
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.elem_type in floats:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    for tensor in graph.initializer:
        if tensor.data_type in floats[1:]:
            tensor.CopyFrom(numpy_helper.from_array(float32_values(tensor), tensor.name))
    outputs = {value.name for value in graph.output}
    fixed = outputs | {value.name for value in graph.input}
    names: dict[str, str] = {}
    nodes = []
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.TENSOR and attribute.t.data_type in floats[1:]:
                attribute.t.CopyFrom(numpy_helper.from_array(float32_values(attribute.t), attribute.t.name))
        if node.op_type != "Cast" or helper.get_node_attr_value(node, "to") not in floats:
            nodes.append(node)
        elif types.get(node.input[0]) not in floats:
            next(entry for entry in node.attribute if entry.name == "to").i = TensorProto.FLOAT
            nodes.append(node)
        elif node.output[0] not in outputs:
            names[node.output[0]] = node.input[0]
        elif node.input[0] in fixed:
            nodes.append(helper.make_node("Identity", node.input, node.output, node.name))
        else:
            # The output of the graph keeps its name: the producer of the input of the cast writes it.
            names[node.input[0]] = node.output[0]
    for node in nodes:
        node.input[:] = [_resolve(name, names) for name in node.input]
        node.output[:] = [_resolve(name, names) for name in node.output]
    replace_nodes(graph, list(_without_stored_weights(graph, nodes)))
    lowered = with_opset(result, min(OPSET, opset_of(result)))
    _slice_shapes(lowered.graph)
    return lowered


def _resolve(name: str, names: dict[str, str]) -> str:
    while name in names:
        name = names[name]
    return name


def _without_stored_weights(graph: onnx.GraphProto, nodes: Collection[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """Yield all nodes but the DequantizeLinear of weights whose readers are not INT8; such weights become FP32."""
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    producers = {name: node for node in nodes for name in node.output}

    def is_quantized(name: str) -> bool:
        return name in producers and producers[name].op_type == "DequantizeLinear"

    for node in nodes:
        if node.op_type == "DequantizeLinear" and node.input[0] in tensors:
            readers = [reader for reader in nodes if node.output[0] in reader.input]
            if not all(all(map(is_quantized, reader.input[:2])) for reader in readers):
                numbers, scale = (numpy_helper.to_array(tensors[name]).astype(np.float32) for name in node.input[:2])
                axes = [entry.i for entry in node.attribute if entry.name == "axis"]
                if scale.ndim:
                    shape = [1] * numbers.ndim
                    shape[axes[0] if axes else 1] = -1
                    scale = scale.reshape(shape)
                graph.initializer.append(numpy_helper.from_array(numbers * scale, node.output[0]))
                continue
        yield node


def _slice_shapes(graph: onnx.GraphProto) -> None:
    """Replace the attributes `start` and `end` of `Shape` by a `Slice`: the parser of TensorRT 8.6 ignores them.

    The output would be all sizes, and a `Range` of these ends the process (8.6.0 on an H200).
    """
    nodes = []
    for node in graph.node:
        bounds = {entry.name: entry.i for entry in node.attribute}
        if node.op_type != "Shape" or not bounds:
            nodes.append(node)
            continue
        sizes, start, end = (f"{node.output[0]}/{name}" for name in ("sizes", "start", "end"))
        limits = {start: bounds.get("start", 0), end: bounds.get("end", np.iinfo(np.int32).max)}
        for name, value in limits.items():
            graph.initializer.append(numpy_helper.from_array(np.array([value], np.int64), name))
        nodes.append(helper.make_node("Shape", node.input, [sizes], f"{node.name}/sizes"))
        nodes.append(helper.make_node("Slice", [sizes, start, end], node.output, node.name))
    del graph.node[:]
    graph.node.extend(nodes)
