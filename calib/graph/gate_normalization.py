"""Divide gated features by their largest magnitude, so that one INT8 scale fits every query.

A gate has no activation function, so the magnitude of the features that it multiplies depends on the query. A constant
scale clips large ones or wastes steps on small ones. Here each query has its own factor, computed in the graph:
y = W (x / r) r + b with r = max |x|. docs/quantization.md has the measured noise.

The clip features are excluded, because the graph would read D x T values twice more.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

import numpy as np

from calib.graph.graph_editing import copied, replace_nodes

if TYPE_CHECKING:
    import onnx

# Convolutions that read gated features of few channels.
_MODULES = ("backbone_net.layers.1", "backbone_net.layers.2")
NORMALIZED_TENSORS = frozenset(f"{module}/Div" for module in _MODULES)
# The smallest normal FP16 number: a smaller magnitude would become 0 in an FP16 graph.
_SMALLEST = 2.0**-14


def normalize_gated_features(model: onnx.ModelProto, modules: Collection[str] = _MODULES) -> onnx.ModelProto:
    """Return a copy of an FP32 graph in which gated convolutions read features between -1 and 1.

    The outputs of the graph are equal except for rounding.

    Args:
        model: FP32 graph of `python -m export.to_onnx`.
        modules: modules to quantize; others are not changed.
    """
    result = copied(model)
    for module in _MODULES:
        if module in modules:
            _normalize(result.graph, module)
    return result


def normalized_tensors(model: onnx.ModelProto) -> set[str]:
    """Return the names of the tensors of `normalize_gated_features` with values between -1 and 1."""
    return {node.name for node in model.graph.node} & NORMALIZED_TENSORS


def normalized(values: np.ndarray) -> np.ndarray:
    """Return (B, C, 1, T) values divided by the largest magnitude of each query."""
    largest = np.abs(values).max(axis=(1, 2, 3), keepdims=True)
    return values / np.maximum(largest, np.float32(_SMALLEST))


def _normalize(graph: onnx.GraphProto, module: str) -> None:
    """Insert the division before the convolution of a module, and the multiplication and the bias after it."""
    from onnx import helper, numpy_helper

    nodes = list(graph.node)
    position = next((index for index, node in enumerate(nodes) if node.name == f"{module}/Conv"), None)
    if position is None:
        return
    conv = nodes[position]
    features, output = conv.input[0], conv.output[0]
    constants = {
        f"{module}.row_shape": np.array([0, 1, 1, -1]),
        f"{module}.smallest": np.array(_SMALLEST, np.float32),
    }
    graph.initializer.extend(numpy_helper.from_array(values, name) for name, values in constants.items())

    def node(op_type: str, *inputs: str, output: str | None = None) -> onnx.NodeProto:
        name = f"{module}/{op_type}"
        return helper.make_node(op_type, inputs, [output or name], name=name)

    before = [
        node("Abs", features),
        # GlobalMaxPool of one row is the maximum of a query in every opset; ReduceMax has another form since 18.
        node("Reshape", f"{module}/Abs", f"{module}.row_shape"),
        node("GlobalMaxPool", f"{module}/Reshape"),
        node("Max", f"{module}/GlobalMaxPool", f"{module}.smallest"),
        node("Div", features, f"{module}/Max"),
    ]
    conv.input[0], conv.output[0] = f"{module}/Div", f"{module}/product"
    after = [node("Mul", f"{module}/product", f"{module}/Max", output=None if len(conv.input) == 3 else output)]
    if len(conv.input) == 3:
        bias = next(tensor for tensor in graph.initializer if tensor.name == conv.input[2])
        column = numpy_helper.to_array(bias).reshape(-1, 1, 1)
        bias.CopyFrom(numpy_helper.from_array(column, bias.name))
        after.append(node("Add", f"{module}/Mul", bias.name, output=output))
        del conv.input[2]
    replace_nodes(graph, [*nodes[:position], *before, conv, *after, *nodes[position + 1 :]])
    shapes = {value.name: value for value in graph.value_info}
    for source, name in ((features, f"{module}/Div"), (output, f"{module}/product")):
        if source in shapes:
            graph.value_info.append(shapes[source])
            graph.value_info[-1].name = name
