"""Move the padding of convolutions into Pad nodes, and back into the convolutions.

ONNX Runtime's convolution of few columns reads all weights once more for every end that it pads itself. With a Pad node
before it, one query is 10 % faster (docs/performance.md). So FP32 files contain Pad nodes, which
`runtime.backends.onnxruntime_session` prevents ONNX Runtime from fusing. All other forms of a graph are derived from
one with the padding in the convolutions, which TensorRT requires.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from calib.graph.graph_editing import copied, replace_nodes

if TYPE_CHECKING:
    import onnx

# A convolution of fewer channels has too few weights for a Pad node to pay.
MIN_CHANNELS = 64


def extract_padding(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy of a graph in which convolutions of `MIN_CHANNELS` or more are padded by a Pad node before them.

    A Pad is named after the module of its convolution: `fpn.layer_blocks.0/Pad` before `fpn.layer_blocks.0/Conv`.
    """
    from onnx import helper, numpy_helper

    copy = copied(model)
    shapes = {tensor.name: tensor.dims for tensor in copy.graph.initializer}
    nodes: list[onnx.NodeProto] = []
    for node in copy.graph.node:
        pads = next((entry for entry in node.attribute if entry.name == "pads"), None)
        if node.op_type == "Conv" and pads is not None and any(pads.ints):
            weight = shapes.get(node.input[1], ())
            if len(weight) > 1 and weight[1] >= MIN_CHANNELS:
                scope, _, number = node.name.rpartition("/Conv")
                name = f"{scope}/Pad{number}"
                half = len(pads.ints) // 2
                ends = np.array([0, 0, *pads.ints[:half], 0, 0, *pads.ints[half:]], np.int64)
                copy.graph.initializer.append(numpy_helper.from_array(ends, f"{name}.pads"))
                nodes.append(helper.make_node("Pad", [node.input[0], f"{name}.pads"], [name], name))
                node.input[0] = name
                pads.ints[:] = [0] * len(pads.ints)
        nodes.append(node)
    replace_nodes(copy.graph, nodes)
    return copy


def inline_padding(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy of a graph in which convolutions pad their own input: the inverse of `extract_padding`."""
    from onnx import numpy_helper

    copy = copied(model)
    constants = {tensor.name: tensor for tensor in copy.graph.initializer}
    pads = {
        node.output[0]: node
        for node in copy.graph.node
        if node.op_type == "Pad" and len(node.input) == 2 and node.input[1] in constants
    }
    readers = [name for node in copy.graph.node for name in node.input]
    inlined: set[str] = set()
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
        inlined.add(pad.output[0])
    replace_nodes(copy.graph, [node for node in copy.graph.node if node.output[0] not in inlined])
    return copy
