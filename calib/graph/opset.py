"""Read the opset of a graph, and convert a graph to another opset."""

from __future__ import annotations

from typing import TYPE_CHECKING

from calib.errors import CalibrationError
from calib.graph.graph_editing import copied

if TYPE_CHECKING:
    import onnx

MIN_OPSET, MAX_OPSET = 17, 23

# Operators of exported graphs with equal semantics in opsets 17 to 23, except for the attributes in `_NEW_ATTRIBUTES`.
# fmt: off
SAME_IN_ALL_OPSETS = frozenset((
    "Abs", "Add", "AveragePool", "Cast", "Concat", "Conv", "DequantizeLinear", "Div", "Exp", "Expand", "Flatten",
    "Gather", "GatherElements", "Gemm", "GlobalMaxPool", "GreaterOrEqual", "Identity", "LSTM", "MatMul", "Max",
    "MaxPool", "Mul", "Pad", "QuantizeLinear", "Range", "Relu", "Reshape", "Resize", "Shape", "Sigmoid", "Slice",
    "Softmax", "Split", "Squeeze", "Sub", "Sum", "Tanh", "Transpose", "Unsqueeze", "Where",
))
# fmt: on
# Attributes since opset 18 whose values here are the behavior of older opsets.
_NEW_ATTRIBUTES = {"Split": ("num_outputs",), "Resize": ("antialias", "keep_aspect_ratio_policy")}
_NEW_ATTRIBUTES_SINCE = 18


def opset_of(model: onnx.ModelProto) -> int:
    """Return the version of the standard operators that a graph uses."""
    return int(next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")))


def raise_opset(model: onnx.ModelProto, opset: int) -> onnx.ModelProto:
    """Return a graph with an opset of at least `opset`; the graph itself if it has one.

    Raises:
        CalibrationError: the opset is not in 17 to 23, or the semantics of an operator may differ in it.
    """
    return with_opset(model, max(opset, opset_of(model)))


def with_opset(model: onnx.ModelProto, opset: int) -> onnx.ModelProto:
    """Return a copy of a graph in another opset, or the graph itself if it has that opset.

    Operators of exported graphs have equal semantics in opsets 17 to 23; only attributes are added or removed.

    Raises:
        CalibrationError: the opset is not in 17 to 23, or the semantics of an operator may differ in it.
    """
    import onnx

    before = opset_of(model)
    if opset == before:
        return model
    unknown = sorted({node.op_type for node in model.graph.node} - SAME_IN_ALL_OPSETS)
    if unknown or not MIN_OPSET <= opset <= MAX_OPSET:
        reason = f"operators {', '.join(unknown)}" if unknown else f"expected {MIN_OPSET} to {MAX_OPSET}"
        raise CalibrationError(
            f"A graph of opset {before} cannot be written as opset {opset} ({reason}). Export it with "
            "`python -m export.to_onnx --opset`.",
            code="unsupported_opset",
        )
    result = copied(model)
    for node in result.graph.node:
        new = _NEW_ATTRIBUTES.get(node.op_type, ())
        if opset < _NEW_ATTRIBUTES_SINCE:
            retained = [attribute for attribute in node.attribute if attribute.name not in new]
            del node.attribute[:]
            node.attribute.extend(retained)
        elif before < _NEW_ATTRIBUTES_SINCE and node.op_type == "Split" and len(node.input) < 2:
            node.attribute.append(onnx.helper.make_attribute("num_outputs", len(node.output)))
    next(entry for entry in result.opset_import if entry.domain in ("", "ai.onnx")).version = opset
    needed = onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", opset)])
    result.ir_version = max(result.ir_version, needed) if opset > before else min(result.ir_version, needed)
    return result
