"""Write Q/DQ scales, and the products between Q/DQ, in FP32 inside a half-precision graph.

TensorRT 10.16 did not infer the types of Q/DQ with FP16 scales on compute capability 8.7 ("Could not infer output types
for operation: dequantize", NVIDIA/TensorRT#4832). With FP32 scales and casts around them, engines fuse the same INT8
kernels. An FP16 scale is exact in FP32.
"""

from __future__ import annotations

import onnx
from onnx import TensorProto, helper, numpy_helper

from calib.graph.graph_editing import copied, replace_nodes
from calib.graph.half_precision import float32_values

_PRODUCTS = ("Conv", "MatMul", "Gemm")


def has_half_scales(model: onnx.ModelProto) -> bool:
    """Return whether a graph has Q/DQ with half-precision scales."""
    kinds = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    return any(kinds.get(node.input[1]) == TensorProto.FLOAT16 for node in model.graph.node if _is_qdq(node))


def with_wide_scales(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy of a half-precision graph in which Q/DQ and the products between them are FP32."""
    result = copied(model)
    graph = result.graph
    half = TensorProto.FLOAT16
    halves = {tensor.name: tensor for tensor in graph.initializer if tensor.data_type == half}
    quantized = {
        node.output[0] for node in graph.node if node.op_type == "DequantizeLinear" and node.input[1] in halves
    }
    products = [node for node in graph.node if node.op_type in _PRODUCTS and quantized.issuperset(node.input[:2])]
    names = {id(node) for node in products}
    # Dequantized tensors that are also read in FP16.
    read_in_half = {name for node in graph.node if id(node) not in names for name in node.input} & quantized
    weights: dict[str, str] = {}

    def wide(name: str) -> str:
        if name not in weights:
            weights[name] = f"{name}/float"
            graph.initializer.append(numpy_helper.from_array(float32_values(halves[name]), weights[name]))
        return weights[name]

    def cast(name: str, output: str, kind: int) -> onnx.NodeProto:
        return helper.make_node("Cast", [name], [output], f"{output}/Cast", to=kind)

    nodes = []
    for node in list(graph.node):
        if _is_qdq(node) and node.input[1] in halves:
            node.input[1] = wide(node.input[1])
            if node.op_type == "QuantizeLinear":
                source, node.input[0] = node.input[0], f"{node.name}/given"
                nodes += [cast(source, node.input[0], TensorProto.FLOAT), node]
                continue
            written, node.output[0] = node.output[0], f"{node.output[0]}/float"
            nodes.append(node)
            if written in read_in_half:
                nodes.append(cast(node.output[0], written, half))
        elif id(node) in names:
            node.input[0], node.input[1] = f"{node.input[0]}/float", f"{node.input[1]}/float"
            for index, name in enumerate(node.input[2:], 2):
                if name in halves:
                    node.input[index] = wide(name)
                elif name:
                    node.input[index] = f"{node.name}/input{index}"
                    nodes.append(cast(name, node.input[index], TensorProto.FLOAT))
            written, node.output[0] = node.output[0], f"{node.output[0]}/float"
            nodes += [node, cast(node.output[0], written, half)]
        else:
            nodes.append(node)
    del graph.value_info[:]
    replace_nodes(graph, nodes)
    return result


def _is_qdq(node: onnx.NodeProto) -> bool:
    return node.op_type in ("QuantizeLinear", "DequantizeLinear")
