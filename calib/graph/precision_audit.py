"""Count in which data types a graph computes: multiply-adds of every DRN module, and weight bytes.

Engines are judged in `export.engine.precision_verdict`.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto

from calib.graph.naming import drn_modules
from calib.graph.onnx_graph import strip_weights
from runtime.core.errors import CheckFailed

NAMES = {
    TensorProto.FLOAT: "fp32",
    TensorProto.FLOAT16: "fp16",
    TensorProto.BFLOAT16: "bf16",
    TensorProto.INT8: "int8",
    TensorProto.FLOAT8E4M3FN: "fp8",
}
# Least share of the multiply-adds that must be in the precision that a file calls its own.
LEAST_SHARE = {"fp32": 1.0, "fp16": 0.9, "bf16": 0.9, "int8": 0.85, "fp8": 0.85}


@dataclasses.dataclass(frozen=True)
class PrecisionStats:
    """How much of a graph is computed in which data type, for one query of `query_length` tokens.

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
        """Return the share of the multiply-adds that is computed in `kind`, 0 to 1."""
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


def audit_graph(model: onnx.ModelProto, query_length: int = 8) -> PrecisionStats:
    """Count the multiply-adds of a graph of ours, by DRN module and data type, and its weights by data type.

    A convolution or matrix product counts as int8 or fp8 when both its data and its weights come through Q/DQ pairs of
    that type, which is what TensorRT fuses into one kernel; otherwise as the type of its data.
    """
    graph = model.graph
    inferred = onnx.shape_inference.infer_shapes(_sized(model, query_length)).graph
    values = {value.name: value.type.tensor_type for value in (*inferred.value_info, *inferred.input, *inferred.output)}
    # What shape inference cannot follow is the length of the query, after arithmetic on shapes.
    shapes = {name: [size.dim_value or query_length for size in kind.shape.dim] for name, kind in values.items()}
    types = {name: kind.elem_type for name, kind in values.items()}
    for tensor in graph.initializer:
        shapes[tensor.name], types[tensor.name] = list(tensor.dims), tensor.data_type
    producers = {name: node for node in graph.node for name in node.output}
    macs: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for node in graph.node:
        count = _macs(node, shapes)
        if count:
            module = (drn_modules(node.name) or ("other",))[0]
            macs[module][_type(node, producers, types)] += count
    weights: collections.Counter[str] = collections.Counter()
    for tensor in graph.initializer:
        if tensor.data_type in NAMES:
            size = int(np.prod(tensor.dims)) * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
            weights[NAMES[tensor.data_type]] += size
    return PrecisionStats(macs, weights)


def _sized(model: onnx.ModelProto, query_length: int) -> onnx.ModelProto:
    """Return the graph for one query of `query_length` tokens, without weights: shapes are all that is needed."""
    sized = strip_weights(model)
    graph = sized.graph
    # Noted by the exporter for free sizes.
    del graph.value_info[:]
    free = {"batch": 1, "query_length": query_length, "video": 1}
    for value in graph.input:
        for size in value.type.tensor_type.shape.dim:
            if size.dim_param:
                size.dim_value = free[size.dim_param]
    for value in graph.output:
        value.type.tensor_type.ClearField("shape")
    return sized


def _macs(node: onnx.NodeProto, shapes: Mapping[str, list[int]]) -> int:
    if node.op_type == "Conv":
        weight, output = shapes[node.input[1]], shapes[node.output[0]]
        return int(np.prod(output)) * int(np.prod(weight[1:]))
    if node.op_type in ("MatMul", "Gemm"):
        return int(np.prod(shapes[node.output[0]])) * shapes[node.input[0]][-1]
    if node.op_type == "LSTM":
        inputs, weight, recurrent = (shapes[name] for name in node.input[:3])
        return inputs[0] * inputs[1] * weight[1] * (weight[2] + recurrent[2])
    return 0


def _type(node: onnx.NodeProto, producers: Mapping[str, onnx.NodeProto], types: Mapping[str, int]) -> str:
    quantised = []
    for name in node.input[:2]:
        source = producers.get(name)
        # A transpose or reshape of a quantised weight is still one.
        while source is not None and source.op_type in ("Transpose", "Reshape"):
            source = producers.get(source.input[0])
        kind = types.get(source.input[0]) if source is not None and source.op_type == "DequantizeLinear" else None
        quantised.append(kind)
    if quantised[0] == quantised[1] is not None:
        return NAMES[quantised[0]]
    return NAMES.get(types.get(node.output[0], 0), "unknown")


def require_precision(stats: PrecisionStats, precision: str, attainable: float = 1.0) -> str:
    """Return the name of the check with the real share, as "int8 in 51.3 % of the multiply-adds".

    Args:
        stats: what was counted in a graph.
        precision: that it is to be called by.
        attainable: the share of this network's multiply-adds that can be in `precision` at most, 0 to 1. In a narrow
            network the LSTM, the attention and the gates, which stay wide, are most of the work. It is then held to as
            large a part of the attainable share as others of the whole.

    Raises:
        CheckFailed: less is in that precision than must be.
    """
    share, least = stats.share(precision), LEAST_SHARE[precision]
    if attainable < least:
        least *= attainable
    if share < least:
        others = ", ".join(f"{100 * stats.share(kind):.1f} % {kind}" for kind in stats.total())
        raise CheckFailed(
            f"{precision} was asked for, and {100 * share:.1f} % of the multiply-adds are in it where at least "
            f"{100 * least:.0f} % must be ({others}).",
            code="precision_not_reached",
        )
    return f"{precision} in {100 * share:.1f} % of the multiply-adds"
