"""Open 8-bit ONNX graphs so that ONNX Runtime multiplies them exactly on every CPU.

ONNX Runtime multiplies uint8 data by int8 weights. On an x86 CPU without VNNI its kernels add two products at a time in
16 bits (`vpmaddubsw`), and sums beyond 32,767 saturate (microsoft/onnxruntime#6004, #12072). Its kernels for uint8
weights add in 32 bits, on every CPU. On a CPU with VNNI, or an Arm CPU, int8 weights are exact too, and faster. So
files hold int8, and on other CPUs the runtime gives ONNX Runtime the same graph with uint8: 128 is added to every 8-bit
number and to its zero point, which changes no result.
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

# Field numbers of the messages in onnx.proto of ONNX, and its tensor types.
_MODEL_GRAPH = 7
_NODE, _INITIALIZER, _INPUT, _OUTPUT, _VALUE_INFO = 1, 5, 11, 12, 13
_NODE_INPUT, _NODE_OUTPUT, _NODE_OP_TYPE, _NODE_ATTRIBUTE = 1, 2, 4, 5
_ATTRIBUTE_TENSOR = 5
_DIMS, _DATA_TYPE, _INT32_DATA, _TENSOR_NAME, _RAW_DATA, _EXTERNAL_DATA = 1, 2, 5, 8, 9, 13
_VALUE_NAME, _VALUE_TYPE, _TENSOR_TYPE, _ELEM_TYPE = 1, 2, 1, 1
TYPES = {1: "fp32", 2: "uint8", 3: "int8", 10: "fp16", 16: "bf16", 17: "fp8"}
_UINT8, _INT8 = 2, 3

# Inputs of operators whose zero point is another input: number by number.
_ZERO_POINTS = {"QuantizeLinear": {}, "DequantizeLinear": {0: 2}, "MatMulInteger": {0: 2, 1: 3}}
_ZERO_POINT_INPUTS = {"QuantizeLinear": (2,), "DequantizeLinear": (2,), "MatMulInteger": (2, 3)}
# Operators that move numbers without reading them.
_MOVES = frozenset({"Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})
# A weight has at least this many numbers; biases, scales and constants of shapes may have any type.
WEIGHT_SIZE = 64


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A constant of a graph.

    Attributes:
        data_type: as in `TYPES`.
        size: how many numbers.
        start, end: of its field in the file, tag and length included.
        inline: whether its numbers are in the file.
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
    """An operator: its type, the names of its inputs and outputs, and whether it fixes a type by an attribute."""

    op_type: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    typed: bool


@dataclasses.dataclass(frozen=True)
class Contents:
    """The structure of an ONNX file, without the values of its tensors.

    Attributes:
        graph: start and end of the field of the graph, and start of its content.
        nodes: in the order of the file.
        tensors: constants by name.
        values: name, element type, start and end of each description of a tensor that is neither input nor output.
        ends: element types of inputs and outputs.
    """

    graph: tuple[int, int, int]
    nodes: Sequence[Node]
    tensors: Mapping[str, Tensor]
    values: Sequence[tuple[str, int, int, int]]
    ends: Sequence[int]

    def weight_types(self) -> dict[str, int]:
        """Return how many numbers the weights have in each type, most first."""
        counts: dict[str, int] = {}
        for tensor in self.tensors.values():
            if tensor.data_type in TYPES and tensor.size >= WEIGHT_SIZE:
                name = TYPES[tensor.data_type]
                counts[name] = counts.get(name, 0) + tensor.size
        return dict(sorted(counts.items(), key=lambda entry: -entry[1]))


def saturates(machine: str | None = None, features: Sequence[str] | None = None) -> bool:
    """Return whether sums of uint8 data times int8 weights may saturate on a CPU.

    Args:
        machine: its architecture, as `platform.machine` names it; this machine's when None.
        features: of `runtime.core.cpu_info.cpu_features`; this machine's when `machine` is None. None where
            they are not known: an x86 CPU is then taken for one that saturates, since uint8 is exact on every CPU.
    """
    if machine is None:
        machine, features = platform.machine(), cpu_features()
    if machine.lower() not in ("x86_64", "amd64", "i386", "i686", "x86"):
        return False
    return features is None or not {"avx512_vnni", "avx_vnni"} & set(features)


def source_for_cpu(path: Path) -> str | bytes:
    """Return what to give ONNX Runtime so that it computes the graph in a file exactly on this machine's CPU.

    That is the path, or the content with uint8 in the place of int8. A graph that cannot be written so is opened as it
    is, with a warning.
    """
    if not saturates():
        return str(path)
    try:
        with open(path, "rb") as stream:
            content = mapped(stream)
            contents = read_contents(content)
            if not _signed(contents):
                return str(path)
            changed = _unsigned(content, contents)
    # What cannot be read is reported by ONNX Runtime, which opens it next.
    except (OSError, ValueError):
        return str(path)
    if changed is None:
        log.warning(
            "%s multiplies by int8 weights, and sums of them may saturate on this CPU, which has no VNNI: answers may "
            "differ from those of other machines. Build it with `python -m export.build_engine --precision int8`.",
            path,
        )
        return str(path)
    return changed


def for_any_cpu(path: Path) -> bytes | None:
    """Return the content of a file that is exact on every CPU, with its digest: for servers that open files themselves.

    None where the file is that already; also where it cannot be, with a warning.
    """
    content = path.read_bytes()
    contents = read_contents(content)
    if not _signed(contents):
        return None
    changed = _unsigned(content, contents)
    if changed is None:
        log.warning(
            "%s multiplies by int8 weights, and sums of them may saturate in a server whose CPU has no VNNI. Build it "
            "with `python -m export.build_engine --precision int8`.",
            path,
        )
        return None
    return with_digest(changed)


def for_cpu(content: bytes) -> bytes:
    """Return a serialized graph as ONNX Runtime computes it exactly on this machine's CPU; see `source_for_cpu`."""
    return unsigned(content) or content if saturates() else content


def unsigned(content: bytes) -> bytes | None:
    """Return a serialized graph with uint8 in the place of int8; None where that could change what it computes."""
    contents = read_contents(content)
    return _unsigned(content, contents) if _signed(contents) else content


def read_contents(content: Buffer) -> Contents:
    """Return what a serialized model holds; ValueError if it is none."""
    graphs = [field for field in fields(content, 0, len(content)) if field[0] == _MODEL_GRAPH]
    if len(graphs) != 1:
        raise ValueError(f"it has {len(graphs)} graphs")
    _, _, graph_start, start, end = graphs[0]
    nodes, tensors, values, ends = [], {}, [], []
    for number, _, tag, first, last in fields(content, start, end):
        if number == _NODE:
            nodes.append(_node(content, first, last))
            if nodes[-1].op_type == "Constant":
                result = _constant(content, first, last)
                tensors.update({name: result for name in nodes[-1].outputs[:1] if result})
        elif number == _INITIALIZER:
            name, tensor = _tensor(content, tag, first, last)
            tensors[name] = tensor
        elif number in (_INPUT, _OUTPUT):
            ends.append(_value(content, first, last)[1])
        elif number == _VALUE_INFO:
            values.append((*_value(content, first, last), tag, last))
    return Contents((graph_start, end, start), nodes, tensors, values, ends)


def precision_in(recorded: str, weights: Mapping[str, int]) -> str:
    """Return the precision of a graph: what its manifest records, unless that is fp32 and its weights are not.

    Tools that quantize or convert a graph keep the manifest as it was.

    Args:
        recorded: in the manifest.
        weights: how many numbers of weights there are in each type, as of `Contents.weight_types`.
    """
    others = {name: count for name, count in weights.items() if name != "fp32"}
    if recorded != "fp32" or not others:
        return recorded
    most = max(others, key=lambda name: others[name])
    return "int8" if most == "uint8" else most


def precision_of_file(path: Path, recorded: str) -> str:
    """Return the precision of the graph in a file, whose manifest records one; see `precision_in`."""
    weights = weights_in_file(path)
    result = precision_in(recorded, weights)
    if result != recorded:
        log.warning(
            "%s records the precision %s, and its weights are %s: another tool changed it after the export.",
            path,
            recorded,
            weights_text(weights),
        )
    return result


def weights_in_file(path: Path) -> dict[str, int]:
    """Return how many numbers of weights a file has in each type; empty where it cannot be read."""
    try:
        with open(path, "rb") as stream:
            return read_contents(mapped(stream)).weight_types()
    except (OSError, ValueError):
        return {}


def weights_text(weights: Mapping[str, int]) -> str:
    """Return shares of weights by type, for people."""
    total = sum(weights.values())
    return ", ".join(f"{100 * count / total:.1f} % {name}" for name, count in weights.items())


def _signed(contents: Contents) -> bool:
    """Return whether a graph has int8 constants."""
    return any(entry.data_type == _INT8 for entry in contents.tensors.values())


def _unsigned(content: Buffer, contents: Contents) -> bytes | None:
    if not _can_shift(contents):
        return None
    graph_start, graph_end, start = contents.graph
    # Descriptions of tensors are hints, and ONNX Runtime finds the types itself.
    edits = [(first, last, b"") for _, kind, first, last in contents.values if kind == _INT8]
    for tensor in contents.tensors.values():
        if tensor.data_type == _INT8:
            edits.append((tensor.start, tensor.end, _shifted(content, tensor)))
    parts, reached = [], start
    for first, last, replacement in sorted(edits):
        parts += [content[reached:first], replacement]
        reached = last
    parts.append(content[reached:graph_end])
    size = sum(map(len, parts))
    return b"".join([content[:graph_start], header(_MODEL_GRAPH, size), *parts, content[graph_end:]])


def _can_shift(contents: Contents) -> bool:
    """Return whether every 8-bit number of a graph has a zero point that moves with it."""
    if _INT8 in contents.ends or not all(entry.inline for entry in contents.tensors.values()):
        return False
    if any(entry.in_node and entry.data_type == _INT8 for entry in contents.tensors.values()):
        return False
    signed = {name for name, entry in contents.tensors.items() if entry.data_type == _INT8}
    for node in contents.nodes:
        read = {index for index, name in enumerate(node.inputs) if name in signed}
        if not read:
            continue
        if node.op_type in _MOVES:
            if read != {0}:
                return False
            signed.update(node.outputs)
            continue
        if node.op_type not in _ZERO_POINTS or node.typed:
            return False
        pairs, zero_points = _ZERO_POINTS[node.op_type], _ZERO_POINT_INPUTS[node.op_type]
        if any(index not in zero_points and pairs.get(index) not in read for index in read):
            return False
        if any(zero in read and index not in read for index, zero in pairs.items()):
            return False
        if node.op_type == "QuantizeLinear":
            signed.update(node.outputs)
    return True


def _shifted(content: Buffer, tensor: Tensor) -> bytes:
    """Return the field of an int8 tensor as uint8, each number 128 more."""
    *_, start, end = next(fields(content, tensor.start, tensor.end))
    parts, numbers = [], []
    for number, _, tag, first, last in fields(content, start, end):
        if number == _DATA_TYPE:
            parts.append(number_field(_DATA_TYPE, _UINT8))
        elif number == _RAW_DATA:
            numbers.append((np.frombuffer(content[first:last], np.uint8) ^ 0x80).tobytes())
        elif number == _INT32_DATA:
            # Of 64 bits, also where they are negative; packed or one by one.
            numbers.append(bytes((value & 0xFF) ^ 0x80 for value in varints(content, first, last)))
        else:
            parts.append(content[tag:last])
    return bytes_field(_INITIALIZER, *parts, bytes_field(_RAW_DATA, *numbers))


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
    """Return the tensor of a `Constant` node; None where its value is no tensor."""
    for number, _, _, first, last in fields(content, start, end):
        if number == _NODE_ATTRIBUTE:
            for inner, _, tag, begin, finish in fields(content, first, last):
                if inner == _ATTRIBUTE_TENSOR:
                    return dataclasses.replace(_tensor(content, tag, begin, finish)[1], in_node=True)
    return None


def _tensor(content: Buffer, tag: int, start: int, end: int) -> tuple[str, Tensor]:
    name, data_type, size, inline = "", 0, 1, True
    for number, _, _, first, last in fields(content, start, end):
        if number == _TENSOR_NAME:
            name = content[first:last].decode()
        elif number == _DATA_TYPE:
            data_type = varint(content, first)[0]
        elif number == _DIMS:
            # Packed or one by one.
            for value in varints(content, first, last):
                size *= value
        elif number == _EXTERNAL_DATA:
            inline = False
    return name, Tensor(data_type, size, tag, end, inline)


def _value(content: Buffer, start: int, end: int) -> tuple[str, int]:
    """Return the name and the element type of a described tensor; 0 for what is no tensor."""
    name, kind = "", 0
    for number, _, _, first, last in fields(content, start, end):
        if number == _VALUE_NAME:
            name = content[first:last].decode()
        elif number == _VALUE_TYPE:
            for inner, _, _, begin, stop in fields(content, first, last):
                if inner == _TENSOR_TYPE:
                    kinds = [field for field in fields(content, begin, stop) if field[0] == _ELEM_TYPE]
                    kind = varint(content, kinds[0][3])[0] if kinds else 0
    return name, kind
