"""Eight bits on a CPU: quantised convolutions as matrix products of rows.

ONNX Runtime multiplies in eight bits what stands between Q/DQ and a matrix product. A convolution between them it
multiplies in FP32, after it has made all its weights wide again, every time. So an INT8 graph that ONNX Runtime is to
run on a CPU has every such convolution as a product: what each output column sees becomes a row, and is narrowed then.
Numbers stay the same: zeros, and copies of a number, are narrowed to the same eight bits wherever they are.
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
        """Return what a convolution becomes; the last node writes what it wrote."""
        from onnx import helper, numpy_helper

        attributes = {entry.name: helper.get_attribute_value(entry) for entry in conv.attribute}
        seen, weights = (self._made_by[name] for name in conv.input[:2])
        narrow = numpy_helper.to_array(self.constants[weights.input[0]])
        rank, taps = narrow.ndim, narrow.shape[-1]
        if (
            attributes.get("group", 1) != 1
            or any(step != 1 for step in attributes.get("dilations", ()))
            or any(size != 1 for size in narrow.shape[2:-1])
        ):
            raise ModelFileError(
                f"{conv.name} is grouped, dilated or of two dimensions, which has no form of rows; build fp32 instead.",
                code="unsupported_convolution",
            )
        stride = attributes.get("strides", [1])[-1]
        pads = attributes.get("pads", [0, 0])
        ends = np.zeros((2, rank), np.int64)
        ends[:, -2] = pads[rank - 3], pads[-1]
        module, added = conv.name.rpartition("/")[0], []

        def add(op_type: str, *inputs: str, **options: Any) -> str:
            name = self._free(f"{module}/{op_type}.rows")
            added.append(helper.make_node(op_type, inputs, [name], name, **options))
            return name

        def padded(tensor: str) -> str:
            return add("Pad", tensor, self._constant(f"{module}.pads", ends.ravel())) if ends.any() else tensor

        def shifted(tensor: str, tap: int, *columns: tuple[int, int]) -> str:
            # Up to as many rows before the end as there are taps behind this one.
            bounds = [(tap, tap + 1 - taps or END, stride), *((*pair, 1) for pair in columns)]
            axes = [rank - 2, *[rank - 1 for _ in columns]]
            starts, stops, steps = zip(*bounds)
            return add("Slice", tensor, *(self._numbers(numbers) for numbers in (starts, stops, axes, steps)))

        def multiplied(tensor: str, rows: np.ndarray, scales: Sequence[str]) -> str:
            for op_type in ("QuantizeLinear", "DequantizeLinear"):
                tensor = add(op_type, tensor, *seen.input[1:])
            constant = self._constant(f"{weights.input[0]}.rows", np.ascontiguousarray(rows))
            return add("MatMul", tensor, add("DequantizeLinear", constant, *scales, axis=1))

        places = list(range(rank))
        result = add("Transpose", self._made_by[seen.input[0]].input[0], perm=[0, *places[2:], 1])
        outputs, channels = narrow.shape[:2]
        # (N, C, taps), whatever is between.
        narrow = narrow.reshape(outputs, channels, taps)
        if taps > 1 and stride == 1 and outputs < channels:
            # Each tap's product of every row, and then the sum of those that meet: less is moved than if rows were.
            scales = [self._repeated(name, taps) for name in weights.input[1:]]
            result = padded(multiplied(result, narrow.transpose(1, 2, 0).reshape(channels, -1), scales))
            blocks = [(tap * outputs, (tap + 1) * outputs) for tap in range(taps)]
            result = add("Sum", *(shifted(result, tap, block) for tap, block in enumerate(blocks)))
        else:
            if taps > 1 or stride > 1:
                result = padded(result)
                parts = [shifted(result, tap) for tap in range(taps)]
                result = add("Concat", *parts, axis=rank - 1) if taps > 1 else parts[0]
            result = multiplied(result, narrow.transpose(2, 1, 0).reshape(-1, outputs), weights.input[1:])
        if len(conv.input) > 2:
            result = add("Add", result, conv.input[2])
        name = self._free(f"{module}/Transpose.rows")
        perm = [0, rank - 1, *places[1:-1]]
        return [*added, helper.make_node("Transpose", [result], list(conv.output), name, perm=perm)]

    def _free(self, expected: str) -> str:
        name, number = expected, 0
        while name in self._taken:
            number += 1
            name = f"{expected}_{number}"
        self._taken.add(name)
        return name

    def _constant(self, name: str, values: np.ndarray) -> str:
        from onnx import numpy_helper

        if name not in self.constants:
            self.constants[name] = numpy_helper.from_array(values, name)
        return name

    def _numbers(self, values: Sequence[int]) -> str:
        return self._constant(f"rows.{'.'.join(map(str, values))}", np.array(values, np.int64))

    def _repeated(self, name: str, times: int) -> str:
        """Return a constant for each output channel, once more for each tap."""
        from onnx import numpy_helper

        return self._constant(f"{name}.rows", np.tile(numpy_helper.to_array(self.constants[name]), times))
