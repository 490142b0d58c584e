"""The zeros at the ends of a convolution: an attribute of it, or a step of their own.

ONNX Runtime's convolution of few columns goes over all weights once more for every end that it pads itself. Behind a
Pad it does not, which makes one query a tenth faster (docs/performance.md). So an FP32 file of this toolkit contains
Pads, and `runtime.backends.onnxruntime_backend` keeps ONNX Runtime from putting them back. Whatever else is made of a
graph, in half precision, in eight bits or as an engine, is made of it with its padding inside, as TensorRT's
convolutions need it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import onnx

# A convolution of fewer channels has too few weights for its ends to matter.
LEAST_CHANNELS = 64


def extract_padding(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a graph whose convolutions of many channels have their padding in Pad nodes before them.

    A Pad is named after the module of its convolution: `fpn.layer_blocks.0/Pad` before `fpn.layer_blocks.0/Conv`.
    """
    from onnx import helper, numpy_helper

    copy = _copied(model)
    shapes = {tensor.name: tensor.dims for tensor in copy.graph.initializer}
    nodes: list[onnx.NodeProto] = []
    for node in copy.graph.node:
        pads = next((entry for entry in node.attribute if entry.name == "pads"), None)
        if node.op_type == "Conv" and pads is not None and any(pads.ints):
            weight = shapes.get(node.input[1], ())
            if len(weight) > 1 and weight[1] >= LEAST_CHANNELS:
                scope, _, number = node.name.rpartition("/Conv")
                name = f"{scope}/Pad{number}"
                half = len(pads.ints) // 2
                ends = np.array([0, 0, *pads.ints[:half], 0, 0, *pads.ints[half:]], np.int64)
                copy.graph.initializer.append(numpy_helper.from_array(ends, f"{name}.pads"))
                nodes.append(helper.make_node("Pad", [node.input[0], f"{name}.pads"], [name], name))
                node.input[0] = name
                pads.ints[:] = [0] * len(pads.ints)
        nodes.append(node)
    return _with_nodes(copy, nodes)


def inline_padding(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a graph whose convolutions do their padding themselves: `extract_padding` undone."""
    from onnx import numpy_helper

    copy = _copied(model)
    constants = {tensor.name: tensor for tensor in copy.graph.initializer}
    pads = {
        node.output[0]: node
        for node in copy.graph.node
        if node.op_type == "Pad" and len(node.input) == 2 and node.input[1] in constants
    }
    readers = [name for node in copy.graph.node for name in node.input]
    gone: set[str] = set()
    for node in copy.graph.node:
        pad = pads.get(node.input[0]) if node.op_type == "Conv" else None
        pads_attribute = next((entry for entry in node.attribute if entry.name == "pads"), None)
        if pad is None or pads_attribute is None or any(pads_attribute.ints) or readers.count(pad.output[0]) != 1:
            continue
        ends = numpy_helper.to_array(constants[pad.input[1]]).reshape(2, -1)
        if ends[:, :2].any():
            continue
        pads_attribute.ints[:] = ends[:, 2:].ravel().tolist()
        node.input[0] = pad.input[0]
        gone |= {pad.output[0], pad.input[1]}
    retained = [tensor for tensor in copy.graph.initializer if tensor.name not in gone]
    del copy.graph.initializer[:]
    copy.graph.initializer.extend(retained)
    return _with_nodes(copy, [node for node in copy.graph.node if node.output[0] not in gone])


def _copied(model: onnx.ModelProto) -> onnx.ModelProto:
    copy = type(model)()
    copy.CopyFrom(model)
    return copy


def _with_nodes(model: onnx.ModelProto, nodes: list[onnx.NodeProto]) -> onnx.ModelProto:
    retained = []
    for node in nodes:
        retained.append(type(node)())
        retained[-1].CopyFrom(node)
    del model.graph.node[:]
    model.graph.node.extend(retained)
    return model
