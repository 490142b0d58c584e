"""Write quantized convolutions as matrix products (im2col), which ONNX Runtime multiplies in INT8 on a CPU.

ONNX Runtime computes a convolution between Q/DQ in FP32 and dequantizes all weights on every call. Here the inputs of
each output position become a row that is quantized afterwards. The results are equal, because quantization maps equal
numbers to equal numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from calib.graph.graph_editing import copied, needed_nodes, replace_nodes
from runtime.core.errors import ModelFileError

END = np.iinfo(np.int64).max


def convs_to_matmul(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy of a graph in which convolutions between Q/DQ are matrix products of rows, with equal results.

    For `fpn.layer_blocks.0/Conv` of (B, C, 1, T) and N channels: `/Transpose.rows` (B, 1, T, C), `/Pad.rows`, a
    `/Slice.rows` for each tap, `/Concat.rows` (B, 1, T, taps x C), `/QuantizeLinear.rows`, `/DequantizeLinear.rows`,
    `/MatMul.rows` (B, 1, T, N), `/Add.rows` for the bias, and a transpose to the convolution's output name. ONNX
    Runtime removes pairs of inverse transposes. If N is less than C, the product of all taps at once is first,
    (B, 1, T, taps x N), then `/Pad.rows`, a `/Slice.rows` for each tap and `/Sum.rows`, which moves less data.

    Args:
        model: graph that `calib.qdq_quantizer.insert_qdq` returned, in FP32 outside Q/DQ, with the padding in its
            convolutions (`calib.graph.conv_padding.inline_padding`).

    Raises:
        ModelFileError: a convolution is grouped, dilated or 2-D.
    """
    writer = _Writer(model)
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        nodes += writer.product(node) if writer.is_quantized(node) else [node]
    needed = needed_nodes(nodes, {value.name for value in model.graph.output})
    created = {name for node in needed for name in node.output}
    result = copied(model)
    graph = result.graph
    del graph.initializer[:], graph.value_info[:]
    graph.initializer.extend(writer.constants.values())
    graph.value_info.extend(value for value in model.graph.value_info if value.name in created)
    replace_nodes(graph, needed)
    return result


class _Writer:
    """Writes the matrix products of one graph, and adds the constants that they read."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self._taken = {node.name for node in model.graph.node}
        self._producers = {name: node for node in model.graph.node for name in node.output}
        self.constants = {tensor.name: tensor for tensor in model.graph.initializer}

    def is_quantized(self, node: onnx.NodeProto) -> bool:
        """Return whether a node is a convolution with dequantized data and weights."""
        producers = [self._producers.get(name) for name in node.input[:2]]
        return node.op_type == "Conv" and all(made and made.op_type == "DequantizeLinear" for made in producers)

    def product(self, conv: onnx.NodeProto) -> list[onnx.NodeProto]:
        """Return the nodes that replace a convolution; the last one writes its output."""
        data, weights = (self._producers[name] for name in conv.input[:2])
        kernel = numpy_helper.to_array(self.constants[weights.input[0]])
        stride, pads = _stride_and_pads(conv, kernel)
        rows = _Rows(self, conv.name.rpartition("/")[0], data, weights, kernel.ndim, pads)
        outputs, channels, taps = kernel.shape[0], kernel.shape[1], kernel.shape[-1]
        # (N, C, taps), without dimensions of one element.
        kernel = kernel.reshape(outputs, channels, taps)
        axes = list(range(rows.rank))
        result = rows.add("Transpose", self._producers[data.input[0]].input[0], perm=[0, *axes[2:], 1])
        if taps > 1 and stride == 1 and outputs < channels:
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
        """Return a node name that is not in use, with a number after `expected` if needed."""
        name, number = expected, 0
        while name in self._taken:
            number += 1
            name = f"{expected}_{number}"
        self._taken.add(name)
        return name

    def constant(self, name: str, values: np.ndarray) -> str:
        """Add a constant unless there is one of this name, and return the name."""
        if name not in self.constants:
            self.constants[name] = numpy_helper.from_array(values, name)
        return name

    def integers(self, values: Sequence[int]) -> str:
        """Return the name of a constant of int64 values."""
        return self.constant(f"rows.{'.'.join(map(str, values))}", np.array(values, np.int64))

    def _repeated(self, name: str, times: int) -> str:
        """Return the name of a constant that repeats `times` times the values of another one, (N,) for N channels."""
        return self.constant(f"{name}.rows", np.tile(numpy_helper.to_array(self.constants[name]), times))


class _Rows:
    """The nodes that compute one convolution over rows, (B, 1, T, C), of the DequantizeLinear nodes of both factors.

    `pads` are the numbers of zero rows before the first and after the last row.
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
        name = self._writer.free_name(f"{self.module}/{op_type}.rows")
        self.nodes.append(helper.make_node(op_type, inputs, [name], name, **options))
        return name

    def padded(self, tensor: str) -> str:
        """Add the rows of zeros to a tensor."""
        if not self._ends.any():
            return tensor
        return self.add("Pad", tensor, self._writer.constant(f"{self.module}.pads", self._ends.ravel()))

    def shifted(self, tensor: str, tap: int, taps: int, stride: int, *columns: tuple[int, int]) -> str:
        """Return the rows that one tap of the kernel reads; `columns` selects a (start, end) range of channels."""
        bounds = [(tap, tap + 1 - taps or END, stride), *((*pair, 1) for pair in columns)]
        axes = [self.rank - 2, *[self.rank - 1 for _ in columns]]
        starts, stops, steps = zip(*bounds)
        return self.add("Slice", tensor, *(self._writer.integers(values) for values in (starts, stops, axes, steps)))

    def multiplied(self, tensor: str, matrix: np.ndarray, scales: Sequence[str]) -> str:
        """Quantize rows, and return their product with a quantized matrix."""
        for op_type in ("QuantizeLinear", "DequantizeLinear"):
            tensor = self.add(op_type, tensor, *self._data.input[1:])
        constant = self._writer.constant(f"{self._weights.input[0]}.rows", np.ascontiguousarray(matrix))
        return self.add("MatMul", tensor, self.add("DequantizeLinear", constant, *scales, axis=1))


def _stride_and_pads(conv: onnx.NodeProto, kernel: np.ndarray) -> tuple[int, tuple[int, int]]:
    """Return the stride of a 1-D convolution, and its padding at both ends; ModelFileError for other convolutions."""
    attributes = {entry.name: helper.get_attribute_value(entry) for entry in conv.attribute}
    if (
        attributes.get("group", 1) != 1
        or any(step != 1 for step in attributes.get("dilations", ()))
        or any(size != 1 for size in kernel.shape[2:-1])
    ):
        raise ModelFileError(
            f"Expected a 1-D convolution without groups and dilation, got {conv.name}. Build fp32 instead.",
            code="unsupported_convolution",
        )
    pads = attributes.get("pads", [0, 0])
    return attributes.get("strides", [1])[-1], (pads[kernel.ndim - 3], pads[-1])
