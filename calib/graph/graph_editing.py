"""Copy a graph, select the nodes that its outputs need, and replace its nodes."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import onnx


Message = TypeVar("Message")


def copied(message: Message) -> Message:
    """Return a deep copy of a model, a node or another part of a graph."""
    copy: Any = type(message)()
    copy.CopyFrom(message)
    return copy


def needed_nodes(nodes: Sequence[onnx.NodeProto], outputs: Collection[str]) -> list[onnx.NodeProto]:
    """Return the nodes from which the named outputs are computed, in their order."""
    needed, read = [], set(outputs)
    for node in reversed(nodes):
        if read.intersection(node.output):
            read |= read_by(node)
            needed.append(node)
    return needed[::-1]


def read_by(node: onnx.NodeProto) -> set[str]:
    """Return the names of the tensors that a node reads, those of subgraphs included."""
    return {*node.input, *(name for entry in node.attribute for inner in entry.g.node for name in inner.input)}


def replace_nodes(graph: onnx.GraphProto, nodes: Sequence[onnx.NodeProto]) -> None:
    """Replace the nodes of a graph, in place, and drop the constants that none of them reads."""
    read = {name for node in nodes for name in read_by(node)}
    constants = [tensor for tensor in graph.initializer if tensor.name in read]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(nodes)
    graph.initializer.extend(constants)
