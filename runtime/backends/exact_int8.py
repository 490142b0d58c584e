"""Convert INT8 ONNX graphs so that ONNX Runtime computes them exactly on every CPU.

ONNX Runtime multiplies uint8 activations by int8 weights. On x86 CPUs without VNNI, its kernels add two products in 16
bits (`vpmaddubsw`), which saturates beyond 32,767 (microsoft/onnxruntime#6004, #12072). Its kernels for uint8 weights
add in 32 bits. With VNNI or on Arm, int8 weights are exact and faster. So model files contain int8 weights, and on
other CPUs the runtime converts them to uint8 when it opens a file: 128 is added to every weight and its zero point,
which changes no result.
"""

from __future__ import annotations

import dataclasses
import logging
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from runtime.artifacts.onnx_metadata import with_digest
from runtime.core.cpu_info import cpu_features
from runtime.core.io.protobuf import Buffer, bytes_field, fields, header, mapped, number_field, varint, varints

log = logging.getLogger("drn")

# Field numbers and tensor types of onnx.proto.
_MODEL_GRAPH = 7
_NODE, _INITIALIZER, _INPUT, _OUTPUT, _VALUE_INFO = 1, 5, 11, 12, 13
_NODE_INPUT, _NODE_OUTPUT, _NODE_OP_TYPE, _NODE_ATTRIBUTE = 1, 2, 4, 5
_ATTRIBUTE_TENSOR = 5
_DIMS, _DATA_TYPE, _INT32_DATA, _TENSOR_NAME, _RAW_DATA, _EXTERNAL_DATA = 1, 2, 5, 8, 9, 13
_VALUE_NAME, _VALUE_TYPE, _TENSOR_TYPE, _ELEM_TYPE = 1, 2, 1, 1
TYPES = {1: "fp32", 2: "uint8", 3: "int8", 10: "fp16", 16: "bf16", 17: "fp8"}
_UINT8, _INT8 = 2, 3

# By operator: index of a quantized input -> index of its zero point.
_ZERO_POINTS = {"QuantizeLinear": {}, "DequantizeLinear": {0: 2}, "MatMulInteger": {0: 2, 1: 3}}
_ZERO_POINT_INPUTS = {"QuantizeLinear": (2,), "DequantizeLinear": (2,), "MatMulInteger": (2, 3)}
# Operators that copy values unchanged.
_MOVES = frozenset({"Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})
# Smaller constants are biases, scales or shapes, of any type, and do not count as weights.
WEIGHT_SIZE = 64


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A constant of a graph.

    Attributes:
        data_type: a key of `TYPES`.
        start, end: offsets of its field in the file, with tag and length.
        inline: whether its values are in the file, not in external data.
        in_node: whether it is an attribute of a `Constant` node, not an initializer.
    """

    data_type: int
    size: int
    start: int
    end: int
    inline: bool
    in_node: bool = False


@dataclasses.dataclass(frozen=True)
class Node:
    """A node: its operator, the names of its inputs and outputs, and whether an attribute fixes its output type."""

    op_type: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    typed: bool


@dataclasses.dataclass(frozen=True)
class Contents:
    """The structure of an ONNX file, without the values of its tensors.

    Attributes:
        graph: start and end offset of the graph's field, and start of its content.
        nodes: in the order of the file.
        values: name, element type, start and end offset of each `value_info` field.
    """

    graph: tuple[int, int, int]
    nodes: Sequence[Node]
    tensors: Mapping[str, Tensor]
    values: Sequence[tuple[str, int, int, int]]
    io_types: Sequence[int]

    def weight_types(self) -> dict[str, int]:
        """Return the number of weights of each data type, in descending order."""
        counts: dict[str, int] = {}
        for tensor in self.tensors.values():
            if tensor.data_type in TYPES and tensor.size >= WEIGHT_SIZE:
                name = TYPES[tensor.data_type]
                counts[name] = counts.get(name, 0) + tensor.size
        return dict(sorted(counts.items(), key=lambda entry: -entry[1]))


def saturates(machine: str | None = None, features: Sequence[str] | None = None) -> bool:
    """Return whether products of uint8 activations and int8 weights may saturate on a CPU.

    Args:
        machine: architecture, as `platform.machine` returns it; this machine's when None.
        features: as `runtime.core.cpu_info.cpu_features` returns them; ignored if `machine` is None. An x86 CPU of
            unknown features (None) counts as one that saturates, because uint8 is exact on every CPU.
    """
    if machine is None:
        machine, features = platform.machine(), cpu_features()
    if machine.lower() not in ("x86_64", "amd64", "i386", "i686", "x86"):
        return False
    return features is None or not {"avx512_vnni", "avx_vnni"} & set(features)


def source_for_cpu(path: Path) -> str | bytes:
    """Return the source of an ONNX Runtime session that computes a model file exactly on this machine's CPU.

    Returns:
        The path, or the content with uint8 weights in place of int8. If the graph cannot be converted, the path is
        returned with a warning.
    """
    if not saturates():
        return str(path)
    try:
        with open(path, "rb") as stream:
            content = mapped(stream)
            contents = read_contents(content)
            if not _has_int8(contents):
                return str(path)
            converted = _to_uint8(content, contents)
    # ONNX Runtime opens the file next and reports that it cannot be read.
    except (OSError, ValueError):
        return str(path)
    if converted is None:
        log.warning(
            "%s has int8 weights that may saturate on this CPU, which has no VNNI. Build it with `python -m "
            "export.build_engine --precision int8`.",
            path,
        )
    return converted or str(path)


def for_any_cpu(path: Path) -> bytes | None:
    """Convert a model file for servers that open files themselves on CPUs of any kind.

    Returns:
        The converted content with its digest. None if the file is exact already, or, with a warning, if it cannot be
        converted.
    """
    content = path.read_bytes()
    converted = unsigned(content)
    if converted is None:
        log.warning(
            "%s has int8 weights that may saturate on a server without VNNI. Build it with `python -m "
            "export.build_engine --precision int8`.",
            path,
        )
    return None if converted is None or converted is content else with_digest(converted)


def for_cpu(content: bytes) -> bytes:
    """Return a serialized graph that ONNX Runtime computes exactly on this machine's CPU; see `source_for_cpu`."""
    return unsigned(content) or content if saturates() else content


def unsigned(content: bytes) -> bytes | None:
    """Return a serialized graph with uint8 weights in place of int8; None if that could change its results."""
    contents = read_contents(content)
    return _to_uint8(content, contents) if _has_int8(contents) else content


def read_contents(content: Buffer) -> Contents:
    """Return the structure of a serialized model; ValueError if it is no model."""
    graphs = [field for field in fields(content, 0, len(content)) if field[0] == _MODEL_GRAPH]
    if len(graphs) != 1:
        raise ValueError(f"it has {len(graphs)} graphs, expected one")
    _, _, graph_start, start, end = graphs[0]
    nodes, tensors, values, io_types = [], {}, [], []
    for number, _, tag, first, last in fields(content, start, end):
        if number == _NODE:
            nodes.append(_node(content, first, last))
            if nodes[-1].op_type == "Constant":
                constant = _constant(content, first, last)
                tensors.update({name: constant for name in nodes[-1].outputs[:1] if constant})
        elif number == _INITIALIZER:
            name, tensor = _tensor(content, tag, first, last)
            tensors[name] = tensor
        elif number in (_INPUT, _OUTPUT):
            io_types.append(_value(content, first, last)[1])
        elif number == _VALUE_INFO:
            values.append((*_value(content, first, last), tag, last))
    return Contents((graph_start, end, start), nodes, tensors, values, io_types)


def precision_in(recorded: str, weights: Mapping[str, int]) -> str:
    """Return the precision of a graph: the recorded one, unless it is fp32 but some weights have another type.

    Other tools that convert a graph do not update the manifest.
    """
    others = {name: count for name, count in weights.items() if name != "fp32"}
    if recorded != "fp32" or not others:
        return recorded
    majority = max(others, key=lambda name: others[name])
    return "int8" if majority == "uint8" else majority


def precision_of_file(path: Path, recorded: str) -> str:
    """Return the precision of a model file, with a warning if it differs from the recorded one; see `precision_in`."""
    weights = weights_in_file(path)
    actual = precision_in(recorded, weights)
    if actual != recorded:
        log.warning(
            "%s records precision %s, but its weights are %s, so another tool converted it. Export it again to be sure "
            "of its accuracy.",
            *(path, recorded, weights_text(weights)),
        )
    return actual


def weights_in_file(path: Path) -> dict[str, int]:
    """Return the number of weights of each data type in a file; empty if it cannot be read."""
    try:
        with open(path, "rb") as stream:
            return read_contents(mapped(stream)).weight_types()
    except (OSError, ValueError):
        return {}


def weights_text(weights: Mapping[str, int]) -> str:
    """Return the share of each data type among the weights as text: "99.0 % int8, 1.0 % fp32"."""
    total = sum(weights.values())
    return ", ".join(f"{100 * count / total:.1f} % {name}" for name, count in weights.items())


def _has_int8(contents: Contents) -> bool:
    return any(tensor.data_type == _INT8 for tensor in contents.tensors.values())


def _to_uint8(content: Buffer, contents: Contents) -> bytes | None:
    if not _can_shift(contents):
        return None
    graph_start, graph_end, start = contents.graph
    # `value_info` is optional, and ONNX Runtime infers the new types.
    edits = [(first, last, b"") for _, data_type, first, last in contents.values if data_type == _INT8]
    for tensor in contents.tensors.values():
        if tensor.data_type == _INT8:
            edits.append((tensor.start, tensor.end, _shifted(content, tensor)))
    parts, offset = [], start
    for first, last, replacement in sorted(edits):
        parts += [content[offset:first], replacement]
        offset = last
    parts.append(content[offset:graph_end])
    size = sum(map(len, parts))
    return b"".join([content[:graph_start], header(_MODEL_GRAPH, size), *parts, content[graph_end:]])


def _can_shift(contents: Contents) -> bool:
    """Return whether every int8 tensor of a graph is used only together with a zero point that can be shifted too."""
    tensors = contents.tensors.values()
    if _INT8 in contents.io_types or not all(tensor.inline for tensor in tensors):
        return False
    if any(tensor.in_node and tensor.data_type == _INT8 for tensor in tensors):
        return False
    int8_names = {name for name, tensor in contents.tensors.items() if tensor.data_type == _INT8}
    for node in contents.nodes:
        int8_inputs = {index for index, name in enumerate(node.inputs) if name in int8_names}
        if not int8_inputs:
            continue
        if node.op_type in _MOVES:
            if int8_inputs != {0}:
                return False
            int8_names.update(node.outputs)
            continue
        if node.op_type not in _ZERO_POINTS or node.typed:
            return False
        zero_point_of, zero_points = _ZERO_POINTS[node.op_type], _ZERO_POINT_INPUTS[node.op_type]
        if any(index not in zero_points and zero_point_of.get(index) not in int8_inputs for index in int8_inputs):
            return False
        if any(zero in int8_inputs and index not in int8_inputs for index, zero in zero_point_of.items()):
            return False
        if node.op_type == "QuantizeLinear":
            int8_names.update(node.outputs)
    return True


def _shifted(content: Buffer, tensor: Tensor) -> bytes:
    """Return the field of an int8 tensor as uint8, with 128 added to each value."""
    *_, start, end = next(fields(content, tensor.start, tensor.end))
    parts, values = [], []
    for number, _, tag, first, last in fields(content, start, end):
        if number == _DATA_TYPE:
            parts.append(number_field(_DATA_TYPE, _UINT8))
        elif number == _RAW_DATA:
            values.append((np.frombuffer(content[first:last], np.uint8) ^ 0x80).tobytes())
        elif number == _INT32_DATA:
            # Negative values are encoded in 64 bits.
            values.append(bytes((value & 0xFF) ^ 0x80 for value in varints(content, first, last)))
        else:
            parts.append(content[tag:last])
    return bytes_field(_INITIALIZER, *parts, bytes_field(_RAW_DATA, *values))


def _node(content: Buffer, start: int, end: int) -> Node:
    texts: dict[int, list[str]] = {_NODE_INPUT: [], _NODE_OUTPUT: [], _NODE_OP_TYPE: []}
    typed = False
    for number, _, _, first, last in fields(content, start, end):
        if number in texts:
            texts[number].append(content[first:last].decode())
        elif number == _NODE_ATTRIBUTE:
            typed = typed or b"output_dtype" in content[first : min(first + 32, last)]
    return Node("".join(texts[_NODE_OP_TYPE][:1]), tuple(texts[_NODE_INPUT]), tuple(texts[_NODE_OUTPUT]), typed)


def _constant(content: Buffer, start: int, end: int) -> Tensor | None:
    """Return the tensor of a `Constant` node; None if its value is no tensor."""
    for number, _, _, first, last in fields(content, start, end):
        if number == _NODE_ATTRIBUTE:
            for inner, _, tag, inner_start, inner_end in fields(content, first, last):
                if inner == _ATTRIBUTE_TENSOR:
                    return dataclasses.replace(_tensor(content, tag, inner_start, inner_end)[1], in_node=True)
    return None


def _tensor(content: Buffer, tag: int, start: int, end: int) -> tuple[str, Tensor]:
    name, data_type, size, inline = "", 0, 1, True
    for number, _, _, first, last in fields(content, start, end):
        if number == _TENSOR_NAME:
            name = content[first:last].decode()
        elif number == _DATA_TYPE:
            data_type = varint(content, first)[0]
        elif number == _DIMS:
            for value in varints(content, first, last):
                size *= value
        elif number == _EXTERNAL_DATA:
            inline = False
    return name, Tensor(data_type, size, tag, end, inline)


def _value(content: Buffer, start: int, end: int) -> tuple[str, int]:
    """Return the name and the element type of a `ValueInfoProto`; 0 if it is no tensor."""
    name, data_type = "", 0
    for number, _, _, first, last in fields(content, start, end):
        if number == _VALUE_NAME:
            name = content[first:last].decode()
        elif number == _VALUE_TYPE:
            for inner, _, _, inner_start, inner_end in fields(content, first, last):
                if inner == _TENSOR_TYPE:
                    types = [field for field in fields(content, inner_start, inner_end) if field[0] == _ELEM_TYPE]
                    data_type = varint(content, types[0][3])[0] if types else 0
    return name, data_type
