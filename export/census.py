"""What precision a model really has: counted, not believed.

Of a graph: the multiply-adds and weight bytes of every DRN module by data type. Of a TensorRT engine: its layers by
data type, from the inspector's JSON, in the dialect of TensorRT 8 to 10 or of 11.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto

from calib.graphs import without_weights
from export.to_onnx import drn_modules
from runtime.errors import ModelFileError, PromiseBroken

NAMES = {
    TensorProto.FLOAT: "fp32",
    TensorProto.FLOAT16: "fp16",
    TensorProto.BFLOAT16: "bf16",
    TensorProto.INT8: "int8",
    TensorProto.FLOAT8E4M3FN: "fp8",
}
# Least share of the multiply-adds that must be in the precision that a file calls its own.
LEAST_SHARE = {"fp32": 1.0, "fp16": 0.9, "bf16": 0.9, "int8": 0.85, "fp8": 0.85}
# The part of an engine's weights that must be as small as its precision says; kernels come on top: TensorRT-RTX brings
# 21 MB of them even to a network of a few kilobytes.
_KERNEL_BYTES = 24_000_000
_LARGEST_PLAN = {"fp32": 1.6, "fp16": 0.8, "bf16": 0.8, "int8": 0.6, "fp8": 0.6}


@dataclasses.dataclass(frozen=True)
class Census:
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


def census(model: onnx.ModelProto, query_length: int = 8) -> Census:
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
    return Census(macs, weights)


def _sized(model: onnx.ModelProto, query_length: int) -> onnx.ModelProto:
    """Return the graph for one query of `query_length` tokens, without weights: shapes are all that is needed."""
    sized = without_weights(model)
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


@dataclasses.dataclass(frozen=True)
class EngineCensus:
    """The layers of an engine by the data type of what they write.

    Attributes:
        layers: data type -> number of layers.
        quantised_inputs: data type -> number of layers that read tensors of it; int8 kernels may write wider types.
        plan_bytes: size of the plan.
    """

    layers: Mapping[str, int]
    quantised_inputs: Mapping[str, int]
    plan_bytes: int

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def engine_census(inspector: str, plan_bytes: int = 0) -> EngineCensus:
    """Count an engine's layers by data type from the inspector's JSON (detailed verbosity).

    Up to TensorRT 10 a tensor says "Format/Datatype": "Half NCHW ..."; from 11 on "Format" and "DataType" stand apart.

    Raises:
        ModelFileError: it is not such JSON, or tells no layer details.
    """
    try:
        layers = json.loads(inspector)["Layers"]
    except (ValueError, KeyError, TypeError) as error:
        raise ModelFileError(
            f"This is not what TensorRT's engine inspector writes ({type(error).__name__})."
        ) from error
    detailed = [layer for layer in layers if isinstance(layer, dict)]
    if not detailed:
        raise ModelFileError("The engine tells only its layers' names; build it with detailed profiling verbosity.")
    written: collections.Counter[str] = collections.Counter()
    read: collections.Counter[str] = collections.Counter()
    for layer in detailed:
        outputs = {_engine_type(tensor) for tensor in layer.get("Outputs", ())}
        written.update(sorted(kind for kind in outputs if kind)[:1])
        read.update({kind for kind in map(_engine_type, layer.get("Inputs", ())) if kind})
    return EngineCensus(dict(written), dict(read), plan_bytes)


# Longest first, since "Float" begins more than one.
_ENGINE_TYPES = (
    (r"bfloat16|bf16", "bf16"),
    (r"half|fp16|float16", "fp16"),
    (r"fp8|float8|e4m3", "fp8"),
    (r"int8", "int8"),
    (r"fp32|float32|float", "fp32"),
)


def _engine_type(tensor: Mapping[str, Any]) -> str | None:
    text = str(tensor.get("DataType") or tensor.get("Datatype") or tensor.get("Format/Datatype") or "").lower()
    return next((name for pattern, name in _ENGINE_TYPES if re.search(pattern, text)), None)


def check(found: Census, precision: str) -> None:
    """Raise PromiseBroken unless a graph is of the precision it is to be called by."""
    share, least = found.share(precision), LEAST_SHARE[precision]
    if share < least:
        others = ", ".join(f"{100 * found.share(kind):.1f} % {kind}" for kind in found.total())
        raise PromiseBroken(
            f"{precision} was asked for, and {100 * share:.1f} % of the multiply-adds are in it where at least "
            f"{100 * least:.0f} % must be ({others})."
        )


def check_engine(found: EngineCensus, precision: str, fp32_weight_bytes: int) -> None:
    """Raise PromiseBroken unless an engine is of the precision it is to be called by.

    Args:
        found: its layers.
        precision: what was asked for.
        fp32_weight_bytes: size of the weights in FP32; a plan much larger than they would be in `precision` holds them
            wider.
    """
    there = found.layers.get(precision, 0) + found.quantised_inputs.get(precision, 0)
    if not there:
        kinds = ", ".join(f"{count} {kind}" for kind, count in found.layers.items()) or "none told"
        raise PromiseBroken(f"{precision} was asked for and no layer of the engine is in it (layers: {kinds}).")
    check_size(found.plan_bytes, precision, fp32_weight_bytes)


def check_size(plan_bytes: int, precision: str, fp32_weight_bytes: int) -> None:
    """Raise PromiseBroken for a plan that is larger than its weights in that precision, and kernels, can make it."""
    largest = _LARGEST_PLAN[precision] * fp32_weight_bytes + _KERNEL_BYTES
    if plan_bytes > largest:
        raise PromiseBroken(
            f"{precision} was asked for and the plan has {plan_bytes / 1e6:.0f} MB, where at most "
            f"{largest / 1e6:.0f} MB are expected: some weights are held in a wider type."
        )
