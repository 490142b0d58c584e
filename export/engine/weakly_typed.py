"""TensorRT 8.6, which is weakly typed: the graph it takes, its precision flags, and the layers it must keep in FP32.

From TensorRT 10 on a graph's own types decide what is computed in what. 8.6 chooses by flags and by speed, so it gets
the same graph in FP32 with the Q/DQ pairs around what multiplies, the flags of the precision, and FP32 for the nodes
that the graph computes in FP32: `exp`, the scale before it, and the modules of `--keep`, those that would overflow, and
those restored for accuracy.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from runtime.core.errors import DeviceError, ModelFileError, one_line

if TYPE_CHECKING:
    import onnx

log = logging.getLogger("drn")

# "TensorRT 8.6 supports operators up to Opset 17" (onnx-tensorrt, release/8.6-GA, docs/operators.md).
OPSET = 17
# INT8 kernels are among FP16 ones, as in the strongly typed graph.
_FLAGS: dict[str, tuple[str, ...]] = {
    "fp32": (),
    "fp16": ("FP16",),
    "bf16": ("BF16",),
    "int8": ("INT8", "FP16"),
    "fp8": ("FP8", "FP16"),
}


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A graph as 8.6 takes it.

    Attributes:
        graph: serialized, in FP32.
        nodes: names of all its nodes.
        fp32_nodes: those that must stay in FP32; see `calib.graph.half_precision.fp32_nodes`.
    """

    graph: bytes
    nodes: frozenset[str]
    fp32_nodes: frozenset[str]


def precision_flags(precision: str) -> tuple[str, ...]:
    """Return the names of the builder flags of a precision."""
    return _FLAGS[precision]


def check_precision(trt: Any, precision: str) -> None:
    """Raise DeviceError for a precision that this version cannot build."""
    # 8.6 has the flag of FP8, but not the Q/DQ nodes that carry it.
    missing = [name for name in precision_flags(precision) if not hasattr(trt.BuilderFlag, name)]
    if missing or precision == "fp8":
        raise DeviceError(
            f"TensorRT {trt.__version__} cannot build {precision}; use fp16 or int8, or TensorRT 10 or later.",
            code="precision_unsupported",
        )


def configure(trt: Any, network: Any, config: Any, precision: str, prepared: Prepared) -> None:
    """Set the flags of a precision, and FP32 for the layers of the nodes that must stay in it."""
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
    named = {index for index, node in enumerate(nodes) if node in prepared.fp32_nodes}
    unnamed = {index for index, node in enumerate(nodes) if node is None}
    for index in sorted(named | _helpers(layers, named, unnamed)):
        if _takes_precision(trt, layers[index]):
            layers[index].precision = trt.float32
    missing = prepared.fp32_nodes - set(nodes)
    if missing:
        log.warning(
            "TensorRT %s may compute %s in a narrower type than FP32: no layer has the name. Check the accuracy with "
            "--data.",
            *(trt.__version__, ", ".join(sorted(missing)[:8])),
        )


def _helpers(layers: Sequence[Any], fp32: set[int], unnamed: set[int]) -> set[int]:
    """Return the positions of layers without the name of a node whose outputs only layers in FP32 read.

    The parser adds such a layer before an elementwise operator to give both operands one rank (`broadcastTensor` in
    importerUtils.cpp of onnx-tensorrt). Layers that the builder
    adds later, such as reformats, are not in the network, and the API gives no access to them.

    Args:
        layers: of the network, in the order in which the parser added them.
        fp32: positions of those that must stay in FP32.
        unnamed: positions of those whose name shows no node.
    """
    readers: dict[str, set[int]] = {}
    for index, layer in enumerate(layers):
        for number in range(layer.num_inputs):
            tensor = layer.get_input(number)
            if tensor is not None:
                readers.setdefault(str(tensor.name), set()).add(index)
    helpers: set[int] = set()
    # A layer is added after those that it reads from.
    for index in sorted(unnamed, reverse=True):
        outputs = [layers[index].get_output(number) for number in range(layers[index].num_outputs)]
        reading = {reader for tensor in outputs if tensor is not None for reader in readers.get(str(tensor.name), ())}
        if reading and reading <= fp32 | helpers:
            helpers.add(index)
    return helpers


def node_of(layer: str, nodes: Collection[str]) -> str | None:
    """Return the node of a graph that a layer of TensorRT's network is from; None where the name shows none.

    The parser names a layer after its node. Further layers of that node get a number, as `fcos.head/Mul_17`
    (`generateUniqueName` in onnx-tensorrt), which may look like another node's name, but the numbers are free ones.
    """
    ends = [len(layer), *(result.start() for result in re.finditer(r"[^A-Za-z0-9]", layer))]
    return next((layer[:end] for end in sorted(ends, reverse=True) if layer[:end] in nodes), None)


def _share_profiles(trt: Any, config: Any) -> None:
    """Let several contexts use one profile, as from TensorRT 10 on: the runtime keeps one for each shape."""
    # 8.5 has the class without this member.
    if hasattr(trt.PreviewFeature, "PROFILE_SHARING_0806"):
        config.set_preview_feature(trt.PreviewFeature.PROFILE_SHARING_0806, True)


def _use_own_tactics(trt: Any, config: Any) -> None:
    """Leave out the tactics of cuBLAS and cuDNN, which 8.6 has on by default (`TacticSource` in its documentation).

    They are off by default from TensorRT 10 on. An engine that uses them needs their libraries wherever it runs.
    """
    own = (trt.TacticSource.EDGE_MASK_CONVOLUTIONS, trt.TacticSource.JIT_CONVOLUTIONS)
    config.set_tactic_sources(sum(1 << int(source) for source in own))


def _takes_precision(trt: Any, layer: Any) -> bool:
    """Return whether a layer may be given a precision. Under OBEY_PRECISION_CONSTRAINTS others fail to build, or crash.

    trtexec skips integer and boolean layers, integer constants, layers of shape tensors, and layers from INT32 to INT32
    (`setLayerPrecisions` in samples/common/sampleEngines.cpp, release/8.6). Constants take their precision from what
    reads them. Q/DQ layers are defined by their own types.
    """
    integers = (trt.int32, trt.bool)
    # By name, which is the same in all versions.
    if str(layer.type).rpartition(".")[2] in ("CONSTANT", "SHAPE", "QUANTIZE", "DEQUANTIZE"):
        return False
    if layer.precision in integers:
        return False
    first = layer.get_input(0) if layer.num_inputs else None
    if first is None:
        return True
    if first.is_shape_tensor:
        return False
    written = layer.get_output(0) if layer.num_outputs else None
    return not (first.dtype in integers and written is not None and written.dtype in integers)


def prepare(graph: bytes) -> Prepared:
    """Return a serialized graph as 8.6 takes it, with the nodes that must stay in FP32; see `without_types`."""
    import onnx

    from calib.graph.half_precision import fp32_nodes

    try:
        model = onnx.load_from_string(graph)
    # protobuf's own class, which differs between its versions.
    except Exception as error:
        raise ModelFileError(f"The graph is not an ONNX model ({one_line(error)}).", code="not_onnx") from error
    plain = without_types(model)
    names = frozenset(node.name for node in plain.graph.node)
    return Prepared(plain.SerializeToString(), names, fp32_nodes(model) & names)


def without_types(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a graph of any precision in FP32, for flags to decide: no casts, no half-precision weights, opset 17.

    Q/DQ stays around what multiplies in INT8. Weights that are only stored in INT8 become FP32, since 8.6 has no use
    for them. All numbers are those of the graph that was held against FP32.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    from calib.graph.graph_editing import replace_nodes
    from calib.graph.half_precision import float32_values
    from calib.graph.onnx_graph import tensor_types
    from calib.graph.opset import opset_of, with_opset

    floats = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16)
    types = tensor_types(model)
    result = onnx.ModelProto()
    result.CopyFrom(model)
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
            # The output keeps its name, and what wrote the input of the cast writes the output.
            names[node.input[0]] = node.output[0]
    for node in nodes:
        node.input[:] = [_renamed(name, names) for name in node.input]
        node.output[:] = [_renamed(name, names) for name in node.output]
    replace_nodes(graph, list(_without_stored_weights(graph, nodes)))
    lowered = with_opset(result, min(OPSET, opset_of(result)))
    _slice_shapes(lowered.graph)
    return lowered


def _renamed(name: str, names: dict[str, str]) -> str:
    while name in names:
        name = names[name]
    return name


def _without_stored_weights(graph: onnx.GraphProto, nodes: Collection[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """Yield nodes without the DequantizeLinear of weights whose readers do not multiply in INT8; those become FP32."""
    from onnx import numpy_helper

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
    """Replace the attributes `start` and `end` of `Shape` by `Slice`: TensorRT 8.6's parser ignores them.

    It returns all sizes instead, and a `Range` of these ends the process (8.6.0 on an H200).
    """
    from onnx import helper, numpy_helper

    nodes = []
    for node in graph.node:
        bounds = {entry.name: entry.i for entry in node.attribute}
        if node.op_type != "Shape" or not bounds:
            nodes.append(node)
            continue
        whole, first, last = (f"{node.output[0]}/{name}" for name in ("sizes", "start", "end"))
        limits = {first: bounds.get("start", 0), last: bounds.get("end", np.iinfo(np.int32).max)}
        for name, value in limits.items():
            graph.initializer.append(numpy_helper.from_array(np.array([value], np.int64), name))
        nodes.append(helper.make_node("Shape", node.input, [whole], f"{node.name}/sizes"))
        nodes.append(helper.make_node("Slice", [whole, first, last], node.output, node.name))
    del graph.node[:]
    graph.node.extend(nodes)
