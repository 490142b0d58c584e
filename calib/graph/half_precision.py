"""Convert a graph to FP16 or BF16 with casts and half-precision weights; inputs and outputs stay FP32.

TensorRT 11 takes the precision from the graph alone, and ONNX Runtime runs such a graph on a CPU. Modules that would
overflow or lose accuracy stay in FP32: `measure_magnitudes` measures on data, `overflow_prone_modules` selects.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any, Literal

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from calib.graph.graph_editing import copied, replace_nodes
from calib.graph.naming import drn_modules
from calib.graph.onnx_graph import infer_shapes, tensor_types
from calib.graph.onnx_session import observe
from calib.graph.opset import opset_of
from runtime.core.bfloat16 import from_bfloat16, to_bfloat16
from runtime.core.errors import ModelFileError, ShapeError

Half = Literal["fp16", "bf16"]

TYPES = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
FLOAT16_MAX = 65504.0
# A tensor within this factor of the largest FP16 number on a few hundred queries is expected to exceed it on others.
FP16_SAFETY_FACTOR = 4.0
# Minimum opset in which all operators of exported graphs accept the type, and in which Q/DQ accepts half scales.
OPSETS = {"fp16": 13, "bf16": 22}
QDQ_OPSET = 19
# exp and the learned scale before it: their errors move boundaries, and their cost is negligible.
FP32_OPERATORS = ("Exp",)
# Inputs that are float32 in every precision.
_ALWAYS_FLOAT32 = {"Resize": (1, 2)}


def convert_to_half(model: onnx.ModelProto, kind: Half = "fp16", keep: Collection[str] = ()) -> onnx.ModelProto:
    """Return a copy of `model` that computes in half precision; its inputs and outputs stay FP32.

    Args:
        model: an FP32 graph of this toolkit, with or without Q/DQ. Q/DQ gets scales of the half type.
        keep: DRN modules (`prop_fc`, `fcos.head.mix_fc`, ...) that stay in FP32.

    Raises:
        ShapeError: a module of `keep` is not in the graph, or the opset is too low for the type.
    """
    opset = opset_of(model)
    has_qdq = any(node.op_type == "DequantizeLinear" for node in model.graph.node)
    needed = max(OPSETS[kind], QDQ_OPSET if has_qdq else 0)
    if opset < needed:
        raise ShapeError(
            f"Expected opset {needed} or later for {kind}{' with Q/DQ' if has_qdq else ''}, got {opset}. Export the "
            "model with a later --opset.",
            code="unsupported_opset",
        )
    check_modules(model, keep)
    halved = _Halving(model, TYPES[kind], frozenset(keep)).run()
    _add_initial_states(halved.graph, TYPES[kind])
    return halved


def _add_initial_states(graph: onnx.GraphProto, half: int) -> None:
    """Add zero initial states, (directions, B, H), to every LSTM with half-precision weights, in their type.

    The parser of TensorRT 10.0 and 10.1 makes missing states FLOAT, which a strongly typed network rejects
    (`getInitialInputValue` in onnxOpImporters.cpp of onnx-tensorrt, branch 10.1-GA).
    """
    weights = {tensor.name: tensor for tensor in graph.initializer}
    nodes = []
    for node in graph.node:
        weight = weights.get(node.input[1]) if node.op_type == "LSTM" else None
        if weight is None or weight.data_type != half or any(node.input[5:7]):
            nodes.append(node)
            continue
        recurrent = weights[node.input[2]].dims
        zeros = np.zeros((recurrent[0], 1, recurrent[2]), np.float32)
        constants = {
            "zeros": _half_tensor(zeros, f"{node.name}/zeros", half),
            "first": numpy_helper.from_array(np.array([1], np.int64), f"{node.name}/first"),
            "last": numpy_helper.from_array(np.array([2], np.int64), f"{node.name}/last"),
            "before": numpy_helper.from_array(np.array([recurrent[0]], np.int64), f"{node.name}/directions"),
            "after": numpy_helper.from_array(np.array([recurrent[2]], np.int64), f"{node.name}/width"),
        }
        graph.initializer.extend(constants.values())
        names = {role: tensor.name for role, tensor in constants.items()}
        steps = (
            ("Shape", [node.input[0]], "sizes"),
            ("Slice", [f"{node.name}/sizes", names["first"], names["last"]], "batch"),
            ("Concat", [names["before"], f"{node.name}/batch", names["after"]], "shape"),
            ("Expand", [names["zeros"], f"{node.name}/shape"], "states"),
        )
        for kind, inputs, name in steps:
            axis: dict[str, Any] = {"axis": 0} if kind == "Concat" else {}
            nodes.append(helper.make_node(kind, inputs, [f"{node.name}/{name}"], f"{node.name}/{kind}_{name}", **axis))
        states = f"{node.name}/states"
        inputs = [*node.input, *[""] * (5 - len(node.input))]
        node.input[:] = [*inputs[:5], states, states, *inputs[7:]]
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)


def modules(model: onnx.ModelProto) -> set[str]:
    """Return the DRN modules that a graph computes."""
    return {module for node in model.graph.node for module in drn_modules(node.name)}


def check_modules(model: onnx.ModelProto, keep: Collection[str]) -> None:
    """Raise ShapeError unless the graph computes each module of `keep`."""
    available = modules(model)
    unknown = set(keep) - available
    if unknown:
        raise ShapeError(
            f"The graph has no module {', '.join(sorted(unknown))}. Choose --keep from {', '.join(sorted(available))}.",
            code="unknown_module",
        )


def fp32_nodes(model: onnx.ModelProto) -> frozenset[str]:
    """Return the names of the nodes that a half-precision graph computes in FP32, without casts and Q/DQ.

    They are `exp`, the scale before it, and the nodes of FP32 modules. The result is empty for an FP32 graph.
    """
    types = tensor_types(model)
    result: set[str] = set()
    has_half = any(tensor.data_type in TYPES.values() for tensor in model.graph.initializer)
    for node in model.graph.node:
        if node.op_type in ("Cast", "QuantizeLinear", "DequantizeLinear"):
            continue
        written = {types.get(name) for name in node.output}
        has_half |= bool(written.intersection(TYPES.values()))
        if TensorProto.FLOAT in written:
            result.add(node.name)
    return frozenset(result) if has_half else frozenset()


class _Halving:
    """Convert a graph to half precision in one pass over its nodes, which are in topological order."""

    def __init__(self, model: onnx.ModelProto, half: int, keep: frozenset[str]) -> None:
        self.model = copied(model)
        self.graph = self.model.graph
        self.half = half
        self.keep = keep
        self.initializers = {tensor.name: tensor for tensor in self.graph.initializer}
        # Inputs of all exp nodes.
        self.exponents = {name for node in self.graph.node if node.op_type == "Exp" for name in node.input}
        # The new type of each float tensor, and (tensor, type) to the name of its cast form.
        self.form = {name: kind for name, kind in tensor_types(model).items() if kind == TensorProto.FLOAT}
        self.cast_names: dict[tuple[str, int], str] = {}
        self.nodes: list[onnx.NodeProto] = []

    def run(self) -> onnx.ModelProto:
        outputs = {value.name for value in self.graph.output}
        for node in list(self.graph.node):
            expected = self.half if self._is_half(node) else TensorProto.FLOAT
            fixed = _ALWAYS_FLOAT32.get(node.op_type, ())
            for index, name in enumerate(node.input):
                if name in self.form and index not in fixed:
                    node.input[index] = self._as(name, expected, node)
            self.nodes.append(node)
            if node.op_type == "Cast" and node.output[0] in self.form:
                # A cast of integers goes to the new type directly.
                next(entry for entry in node.attribute if entry.name == "to").i = expected
            for index, name in enumerate(node.output):
                if name not in self.form:
                    continue
                self.form[name] = expected
                if name in outputs and expected == self.half:
                    node.output[index] = f"{name}/half"
                    self.form[node.output[index]] = self.half
                    self.nodes.append(self._cast(node.output[index], name, TensorProto.FLOAT, node))
                    # Readers of the output inside the graph get the half form.
                    self.cast_names[name, self.half] = node.output[index]
                    self.form[name] = TensorProto.FLOAT
        weights = list(self.initializers.values())
        del self.graph.initializer[:], self.graph.value_info[:]
        self.graph.initializer.extend(weights)
        replace_nodes(self.graph, self.nodes)
        return self.model

    def _is_half(self, node: onnx.NodeProto) -> bool:
        if node.op_type in FP32_OPERATORS or self.exponents.intersection(node.output):
            return False
        return not self.keep.intersection(drn_modules(node.name))

    def _as(self, name: str, expected: int, node: onnx.NodeProto) -> str:
        """Return the name of a tensor in the expected type; a cast is added once for all readers."""
        if name in self.initializers:
            return self._weight(name, expected)
        if self.form[name] == expected:
            return name
        if (name, expected) not in self.cast_names:
            self.cast_names[name, expected] = f"{name}/{'half' if expected == self.half else 'float'}"
            self.nodes.append(self._cast(name, self.cast_names[name, expected], expected, node))
        return self.cast_names[name, expected]

    def _weight(self, name: str, expected: int) -> str:
        if expected == TensorProto.FLOAT:
            return name
        half = f"{name}/half"
        if half not in self.initializers:
            self.initializers[half] = _half_tensor(numpy_helper.to_array(self.initializers[name]), half, self.half)
        return half

    def _cast(self, name: str, output: str, kind: int, node: onnx.NodeProto) -> onnx.NodeProto:
        scope = node.name.rpartition("/")[0]
        number = sum(other.op_type == "Cast" and other.name.startswith(f"{scope}/Cast_h") for other in self.nodes)
        return helper.make_node("Cast", [name], [output], name=f"{scope}/Cast_h{number}", to=kind)


def _half_tensor(values: np.ndarray, name: str, kind: int) -> TensorProto:
    if kind == TensorProto.FLOAT16:
        return numpy_helper.from_array(values.astype(np.float16), name)
    return TensorProto(name=name, data_type=kind, dims=values.shape, raw_data=to_bfloat16(values).tobytes())


def float32_values(tensor: TensorProto) -> np.ndarray:
    """Return the values of an FP32, FP16 or BF16 tensor as float32 of the same shape, exactly."""
    if tensor.data_type != TensorProto.BFLOAT16:
        return np.asarray(numpy_helper.to_array(tensor), np.float32)
    return from_bfloat16(np.frombuffer(tensor.raw_data, np.uint16)).reshape(tensor.dims)


def emulate_bf16(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy of a BF16 graph that computes in FP32 and rounds every result to BF16.

    ONNX Runtime has no BF16 kernels on a CPU. A graph without BF16 is returned unchanged.
    """
    kind = TensorProto.BFLOAT16
    casts = [n for n in model.graph.node if n.op_type == "Cast" and helper.get_node_attr_value(n, "to") == kind]
    if not casts and all(tensor.data_type != kind for tensor in model.graph.initializer):
        return model
    rounded = {value.name for value in infer_shapes(model).value_info if value.type.tensor_type.elem_type == kind}
    result = copied(model)
    graph = result.graph
    for tensor in graph.initializer:
        if tensor.data_type == kind:
            tensor.CopyFrom(numpy_helper.from_array(float32_values(tensor), tensor.name))
    nodes = []
    for node in graph.node:
        nodes.append(node)
        if node.op_type == "Cast" and helper.get_node_attr_value(node, "to") == kind:
            node.output[0], name = f"{node.output[0]}/bits", node.output[0]
            nodes.append(helper.make_node("Cast", [node.output[0]], [name], f"{node.name}_back", to=TensorProto.FLOAT))
            continue
        for index, name in enumerate(node.output):
            if name in rounded:
                node.output[index] = f"{name}/wide"
                nodes.append(helper.make_node("Cast", [f"{name}/wide"], [f"{name}/bits"], f"{name}/round", to=kind))
                nodes.append(helper.make_node("Cast", [f"{name}/bits"], [name], f"{name}/back", to=TensorProto.FLOAT))
    del graph.node[:]
    graph.node.extend(nodes)
    del graph.value_info[:]
    return result


def measure_magnitudes(model: onnx.ModelProto, batches: Iterable[Any]) -> dict[str, float]:
    """Return the largest magnitude of each DRN module's weights and results over all batches.

    Args:
        model: FP32 graph, which ONNX Runtime runs with every float tensor as an output.
        batches: objects with one attribute per input of the graph, such as `runtime.core.batch.Batch`.

    Raises:
        ModelFileError: a weight or result is NaN or infinite.
    """
    types = tensor_types(model)
    owner = {name: node.name for node in model.graph.node for name in node.output}
    # In the order of the nodes, so that the error names the first module that is not finite.
    floats = [name for name in owner if types.get(name) == TensorProto.FLOAT]
    results: dict[str, float] = {}
    for tensor in model.graph.initializer:
        readers = [node.name for node in model.graph.node if tensor.name in node.input]
        if tensor.data_type == TensorProto.FLOAT and readers:
            _update_max(results, readers[0], numpy_helper.to_array(tensor))
    for values in observe(model, floats, batches):
        for name, computed in values.items():
            _update_max(results, owner[name], computed)
    return results


def _update_max(measured: dict[str, float], node: str, values: np.ndarray) -> None:
    """Raise the largest magnitude of a node's modules to that of its values; ModelFileError if it is not finite."""
    largest = float(np.abs(values).max(initial=0))
    if not np.isfinite(largest):
        raise ModelFileError(
            f"Expected finite values in {' and '.join(drn_modules(node)) or node} of the FP32 model, got {largest}. "
            "Check the checkpoint and the features with `python -m runtime.evaluate`.",
            code="non_finite_output",
        )
    for module in drn_modules(node):
        measured[module] = float(np.maximum(measured.get(module, 0.0), largest))


def overflow_prone_modules(scanned: Mapping[str, float], kind: Half = "fp16") -> tuple[str, ...]:
    """Return the modules within `FP16_SAFETY_FACTOR` of the largest FP16 number, largest magnitude first.

    `scanned` is the result of `measure_magnitudes`. BF16 has the range of FP32, so its result is empty.
    """
    if kind == "bf16":
        return ()
    prone = [module for module, largest in scanned.items() if not largest * FP16_SAFETY_FACTOR <= FLOAT16_MAX]
    return tuple(sorted(prone, key=lambda module: -np.nan_to_num(scanned[module], nan=np.inf)))
