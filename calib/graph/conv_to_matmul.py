"""Write quantized convolutions as matrix products (im2col), which ONNX Runtime multiplies in INT8 on a CPU.

A convolution between Q/DQ it multiplies in FP32, after it has dequantized all weights, every time. Here the inputs of
each output position become a row, which is quantized then. The results stay the same: zeros, and copies of a number,
have the same 8 bits wherever they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from calib.graph.onnx_graph import needed_nodes, replace_nodes
from runtime.core.errors import ModelFileError

if TYPE_CHECKING:
    import onnx

END = np.iinfo(np.int64).max


def convs_to_matmul(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a graph whose convolutions between Q/DQ are matrix products of rows, with the same answers.

    For `fpn.layer_blocks.0/Conv` of (B, C, 1, T) and N channels: `/Transpose.rows` (B, 1, T, C), `/Pad.rows`, a
    `/Slice.rows` for each tap, `/Concat.rows` (B, 1, T, taps x C), `/QuantizeLinear.rows`, `/DequantizeLinear.rows`,
    `/MatMul.rows` (B, 1, T, N), `/Add.rows` for the bias, and a transpose back, whose output keeps the convolution's
    name. ONNX Runtime takes out the transposes that meet. Where N is below C the product comes first, of all taps at
    once, (B, 1, T, taps x N), and `/Pad.rows`, a `/Slice.rows` for each tap and their `/Sum.rows` come after it.

    Args:
        model: of `calib.qdq_quantizer.insert_qdq`, FP32 around; its convolutions pad themselves
            (`calib.graph.conv_padding.inline_padding`).

    Raises:
        ModelFileError: a convolution is grouped, dilated or of two dimensions.
    """
    writer = _Writer(model)
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        nodes += writer.product(node) if writer.is_narrow(node) else [node]
    needed = needed_nodes(nodes, {value.name for value in model.graph.output})
    created = {name for node in needed for name in node.output}
    result = type(model)()
    result.CopyFrom(model)
    graph = result.graph
    del graph.initializer[:], graph.value_info[:]
    graph.initializer.extend(writer.constants.values())
    graph.value_info.extend(value for value in model.graph.value_info if value.name in created)
    replace_nodes(graph, needed)
    return result


class _Writer:
    """Writes the products of one graph, and keeps its constants."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self._taken = {node.name for node in model.graph.node}
        self._made_by = {name: node for node in model.graph.node for name in node.output}
        self.constants = {tensor.name: tensor for tensor in model.graph.initializer}

    def is_narrow(self, node: onnx.NodeProto) -> bool:
        """Return whether a node is a convolution of eight bits by eight bits."""
        made_by = [self._made_by.get(name) for name in node.input[:2]]
        return node.op_type == "Conv" and all(created and created.op_type == "DequantizeLinear" for created in made_by)

    def product(self, conv: onnx.NodeProto) -> list[onnx.NodeProto]:
        """Return the nodes that replace a convolution; the last one writes its output."""
        from onnx import helper, numpy_helper

        data, weights = (self._made_by[name] for name in conv.input[:2])
        kernel = numpy_helper.to_array(self.constants[weights.input[0]])
        stride, pads = _stride_and_pads(conv, kernel)
        rows = _Rows(self, conv.name.rpartition("/")[0], data, weights, kernel.ndim, pads)
        outputs, channels, taps = kernel.shape[0], kernel.shape[1], kernel.shape[-1]
        # (N, C, taps): the dimensions between have one element.
        kernel = kernel.reshape(outputs, channels, taps)
        axes = list(range(rows.rank))
        result = rows.add("Transpose", self._made_by[data.input[0]].input[0], perm=[0, *axes[2:], 1])
        if taps > 1 and stride == 1 and outputs < channels:
            # First the product of every row with every tap, then the sum of those that meet: this moves less data.
            scales = [self._repeated(name, taps) for name in weights.input[1:]]
            flat = kernel.transpose(1, 2, 0).reshape(channels, -1)
            result = rows.padded(rows.multiplied(result, flat, scales))
            blocks = [(tap * outputs, (tap + 1) * outputs) for tap in range(taps)]
            result = rows.add("Sum", *(rows.shifted(result, tap, taps, 1, block) for tap, block in enumerate(blocks)))
        else:
            if taps > 1 or stride > 1:
                result = rows.padded(result)
                parts = [rows.shifted(result, tap, taps, stride) for tap in range(taps)]
                result = rows.add("Concat", *parts, axis=rows.rank - 1) if taps > 1 else parts[0]
            result = rows.multiplied(result, kernel.transpose(2, 1, 0).reshape(-1, outputs), weights.input[1:])
        if len(conv.input) > 2:
            result = rows.add("Add", result, conv.input[2])
        perm = [0, rows.rank - 1, *axes[1:-1]]
        name = self.free_name(f"{rows.module}/Transpose.rows")
        return [*rows.nodes, helper.make_node("Transpose", [result], list(conv.output), name, perm=perm)]

    def free_name(self, expected: str) -> str:
        name, number = expected, 0
        while name in self._taken:
            number += 1
            name = f"{expected}_{number}"
        self._taken.add(name)
        return name

    def constant(self, name: str, values: np.ndarray) -> str:
        from onnx import numpy_helper

        if name not in self.constants:
            self.constants[name] = numpy_helper.from_array(values, name)
        return name

    def numbers(self, values: Sequence[int]) -> str:
        return self.constant(f"rows.{'.'.join(map(str, values))}", np.array(values, np.int64))

    def _repeated(self, name: str, times: int) -> str:
        """Return a constant for each output channel, once more for each tap."""
        from onnx import numpy_helper

        return self.constant(f"{name}.rows", np.tile(numpy_helper.to_array(self.constants[name]), times))


class _Rows:
    """The nodes that compute one convolution over rows, (B, 1, T, C).

    Args:
        writer: of the graph.
        module: after which the nodes are named.
        data, weights: the DequantizeLinear nodes of the two factors.
        rank: of the data.
        pads: zeros before the first and after the last row.
    """

    def __init__(
        self,
        writer: _Writer,
        module: str,
        data: onnx.NodeProto,
        weights: onnx.NodeProto,
        rank: int,
        pads: tuple[int, int],
    ) -> None:
        self.module, self.rank, self.nodes = module, rank, list[Any]()
        self._writer, self._data, self._weights = writer, data, weights
        self._ends = np.zeros((2, rank), np.int64)
        self._ends[:, -2] = pads

    def add(self, op_type: str, *inputs: str, **options: Any) -> str:
        """Add a node, and return the name of its output."""
        from onnx import helper

        name = self._writer.free_name(f"{self.module}/{op_type}.rows")
        self.nodes.append(helper.make_node(op_type, inputs, [name], name, **options))
        return name

    def padded(self, tensor: str) -> str:
        """Return a tensor with the rows of zeros."""
        if not self._ends.any():
            return tensor
        return self.add("Pad", tensor, self._writer.constant(f"{self.module}.pads", self._ends.ravel()))

    def shifted(self, tensor: str, tap: int, taps: int, stride: int, *columns: tuple[int, int]) -> str:
        """Return the rows that one tap of the kernel reads, of all columns or of some."""
        # Up to as many rows before the end as there are taps behind this one.
        bounds = [(tap, tap + 1 - taps or END, stride), *((*pair, 1) for pair in columns)]
        axes = [self.rank - 2, *[self.rank - 1 for _ in columns]]
        starts, stops, steps = zip(*bounds)
        return self.add("Slice", tensor, *(self._writer.numbers(values) for values in (starts, stops, axes, steps)))

    def multiplied(self, tensor: str, matrix: np.ndarray, scales: Sequence[str]) -> str:
        """Return the product of quantized rows and a quantized matrix."""
        for op_type in ("QuantizeLinear", "DequantizeLinear"):
            tensor = self.add(op_type, tensor, *self._data.input[1:])
        constant = self._writer.constant(f"{self._weights.input[0]}.rows", np.ascontiguousarray(matrix))
        return self.add("MatMul", tensor, self.add("DequantizeLinear", constant, *scales, axis=1))


def _stride_and_pads(conv: onnx.NodeProto, kernel: np.ndarray) -> tuple[int, tuple[int, int]]:
    """Return the stride of a convolution of one dimension, and its zeros at both ends.

    Raises:
        ModelFileError: it is grouped, dilated or of two dimensions.
    """
    from onnx import helper

    attributes = {entry.name: helper.get_attribute_value(entry) for entry in conv.attribute}
    if (
        attributes.get("group", 1) != 1
        or any(step != 1 for step in attributes.get("dilations", ()))
        or any(size != 1 for size in kernel.shape[2:-1])
    ):
        raise ModelFileError(
            f"{conv.name} is grouped, dilated or of two dimensions, which has no form of rows; build fp32 instead.",
            code="unsupported_convolution",
        )
    pads = attributes.get("pads", [0, 0])
    return attributes.get("strides", [1])[-1], (pads[kernel.ndim - 3], pads[-1])
