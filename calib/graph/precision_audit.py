"""Count the multiply-adds and weight bytes of a graph by data type.

`export.engine.precision_verdict` does this for engines.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from calib.graph.naming import drn_modules
from calib.graph.onnx_graph import strip_weights
from runtime.backends.exact_int8 import TYPES
from runtime.core.errors import CheckFailed

if TYPE_CHECKING:
    import onnx

# Minimum share of the multiply-adds in the precision that the file name states.
MIN_SHARES = {"fp32": 1.0, "fp16": 0.9, "bf16": 0.9, "int8": 0.85, "fp8": 0.85}


@dataclasses.dataclass(frozen=True)
class PrecisionStats:
    """The share of a graph's computation by data type, for one query of `query_length` tokens.

    Attributes:
        macs: DRN module -> data type -> multiply-adds.
        weight_bytes: data type -> bytes of weights.
    """

    macs: Mapping[str, Mapping[str, int]]
    weight_bytes: Mapping[str, int]

    def total(self) -> dict[str, int]:
        """Return the multiply-adds by data type."""
        total: collections.Counter[str] = collections.Counter()
        for counts in self.macs.values():
            total.update(counts)
        return dict(total)

    def share(self, kind: str) -> float:
        """Return the share of the multiply-adds that is computed in a data type such as "int8", 0 to 1."""
        total = self.total()
        return total.get(kind, 0) / max(sum(total.values()), 1)

    def precision(self) -> str:
        """Return the data type that most multiply-adds are computed in."""
        return max(self.total().items(), key=lambda entry: entry[1])[0]

    def to_dict(self) -> dict[str, Any]:
        return {
            "precision": self.precision(),
            "shares": {kind: self.share(kind) for kind in self.total()},
            "macs": {module: dict(counts) for module, counts in self.macs.items()},
            "weight_bytes": dict(self.weight_bytes),
        }


@dataclasses.dataclass(frozen=True)
class OperatorMacs:
    """The multiply-adds of one operator for one query, and the data type in which it multiplies."""

    count: int
    dtype: str


def count_macs(model: onnx.ModelProto, query_length: int = 8) -> dict[str, OperatorMacs]:
    """Return the multiply-adds of every operator that multiplies, by the name of its node, in the order of the graph.

    A convolution or matrix product multiplies in int8 or fp8 if both its data and its weights come through Q/DQ pairs
    of that type, which TensorRT fuses into one kernel; otherwise in the type of its output. The query has
    `query_length` tokens.
    """
    import onnx

    inferred = onnx.shape_inference.infer_shapes(_sized(model, query_length)).graph
    values = {value.name: value.type.tensor_type for value in (*inferred.value_info, *inferred.input, *inferred.output)}
    # Shape inference loses the query length in arithmetic on shapes.
    shapes = {name: [size.dim_value or query_length for size in kind.shape.dim] for name, kind in values.items()}
    types = {name: kind.elem_type for name, kind in values.items()}
    for tensor in model.graph.initializer:
        shapes[tensor.name], types[tensor.name] = list(tensor.dims), tensor.data_type
    producers = {name: node for node in model.graph.node for name in node.output}
    counts = ((node, _macs(node, shapes)) for node in model.graph.node)
    return {node.name: OperatorMacs(count, _dtype(node, producers, types)) for node, count in counts if count}


def audit_graph(model: onnx.ModelProto, query_length: int = 8) -> PrecisionStats:
    """Count the multiply-adds of a graph by DRN module and data type (`count_macs`), and its weight bytes by type."""
    import onnx

    macs: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for name, operator in count_macs(model, query_length).items():
        macs[(drn_modules(name) or ("other",))[0]][operator.dtype] += operator.count
    weights: collections.Counter[str] = collections.Counter()
    for tensor in model.graph.initializer:
        if tensor.data_type in TYPES:
            size = int(np.prod(tensor.dims)) * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
            weights[TYPES[tensor.data_type]] += size
    return PrecisionStats(macs, weights)


def _sized(model: onnx.ModelProto, query_length: int) -> onnx.ModelProto:
    """Return the graph without weights, with the input shapes of one query of `query_length` tokens."""
    sized = strip_weights(model)
    graph = sized.graph
    # Described for free dimensions.
    del graph.value_info[:]
    for value in graph.input:
        for size in value.type.tensor_type.shape.dim:
            if size.dim_param:
                # The others are "batch" and "video", or in foreign extractors any name for the batch.
                size.dim_value = query_length if size.dim_param == "query_length" else 1
    for value in graph.output:
        value.type.tensor_type.ClearField("shape")
    return sized


def _macs(node: onnx.NodeProto, shapes: Mapping[str, list[int]]) -> int:
    """Return the multiply-adds of a node; 0 for an operator that does not multiply matrices."""
    if node.op_type == "Conv":
        weight, output = shapes[node.input[1]], shapes[node.output[0]]
        return int(np.prod(output)) * int(np.prod(weight[1:]))
    if node.op_type in ("MatMul", "Gemm"):
        transposed = any(entry.name == "transA" and entry.i for entry in node.attribute)
        return int(np.prod(shapes[node.output[0]])) * shapes[node.input[0]][0 if transposed else -1]
    if node.op_type == "LSTM":
        inputs, weight, recurrent = (shapes[name] for name in node.input[:3])
        return inputs[0] * inputs[1] * weight[1] * (weight[2] + recurrent[2])
    return 0


def _dtype(node: onnx.NodeProto, producers: Mapping[str, onnx.NodeProto], types: Mapping[str, int]) -> str:
    """Return the data type in which a node multiplies; see `count_macs`."""
    quantized: list[int | None] = []
    for name in node.input[:2]:
        source = producers.get(name)
        # A quantized weight may be transposed or reshaped first.
        while source is not None and source.op_type in ("Transpose", "Reshape"):
            source = producers.get(source.input[0])
        kind = types.get(source.input[0]) if source is not None and source.op_type == "DequantizeLinear" else None
        quantized.append(kind)
    if quantized[0] is not None and quantized[0] == quantized[1]:
        return TYPES[quantized[0]]
    return TYPES.get(types.get(node.output[0], 0), "unknown")


def require_precision(stats: PrecisionStats, precision: str, attainable: float = 1.0) -> str:
    """Return the precision with its share, as "int8 in 51.3 % of the multiply-adds".

    Args:
        stats: counts of a graph.
        precision: that the graph must have.
        attainable: maximum share of this network's multiply-adds in `precision`, 0 to 1. It is below the minimum in a
            narrow network, which is mostly LSTM, attention and gates. Then half of `attainable` is required.

    Raises:
        CheckFailed: the share is below the minimum.
    """
    share, minimum = stats.share(precision), MIN_SHARES[precision]
    if attainable < minimum:
        minimum = attainable / 2
    if share < minimum:
        others = ", ".join(f"{100 * stats.share(kind):.1f} % {kind}" for kind in stats.total())
        raise CheckFailed(
            f"{100 * share:.1f} % of the multiply-adds are in {precision}, expected at least {100 * minimum:.0f} % "
            f"({others}).",
            code="precision_not_reached",
        )
    return f"{precision} in {100 * share:.1f} % of the multiply-adds"
