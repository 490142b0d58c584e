"""Write FP16 or BF16 into a graph: casts, half-precision weights, FP32 inputs and outputs.

TensorRT 11 takes the precision from the graph alone, and ONNX Runtime can run such a graph on a CPU. Modules that would
overflow, or that lose accuracy, stay in FP32: `measure_magnitudes` measures on real data, `overflow_prone_modules`
decides.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any, Literal

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from calib.graph.naming import drn_modules
from calib.graph.onnx_graph import infer_shapes, replace_nodes, tensor_types
from calib.graph.onnx_session import observe
from calib.graph.opset import opset_of
from runtime.core.bfloat16 import from_bfloat16, to_bfloat16
from runtime.core.errors import ModelFileError, ShapeError

Half = Literal["fp16", "bf16"]

TYPES = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
FLOAT16_MAX = 65504.0
# A tensor that comes within this factor of the largest FP16 number on a few hundred queries will pass it on others.
FP16_SAFETY_FACTOR = 4.0
# Least opset whose operators of ours all take the type; Q/DQ with half-precision scales came with 19.
OPSETS = {"fp16": 13, "bf16": 22}
QDQ_OPSET = 19
# exp and the learnt scale before it: an error there moves a boundary, and they are next to none of the arithmetic.
FP32_OPERATORS = ("Exp",)
# Inputs that are float32 whatever the precision of the rest.
_ALWAYS_FLOAT32 = {"Resize": (1, 2)}


def convert_to_half(model: onnx.ModelProto, kind: Half = "fp16", keep: Collection[str] = ()) -> onnx.ModelProto:
    """Return a copy of `model` that computes in half precision; its inputs and outputs stay FP32.

    Q/DQ pairs are kept, with scales in the half type, so that what is between them and around them is half.

    Args:
        model: an FP32 graph of ours, with or without Q/DQ. It stays as it is.
        kind: fp16 or bf16.
        keep: DRN modules (`prop_fc`, `fcos.head.mix_fc`, ...) that stay in FP32.

    Raises:
        ShapeError: a module of `keep` is not in the graph, or its opset is too low for the type.
    """
    opset = opset_of(model)
    has_qdq = any(node.op_type == "DequantizeLinear" for node in model.graph.node)
    needed = max(OPSETS[kind], QDQ_OPSET if has_qdq else 0)
    if opset < needed:
        raise ShapeError(
            f"{kind}{' around Q/DQ' if has_qdq else ''} needs opset {needed} and this graph has {opset}.",
            code="unsupported_opset",
        )
    unknown = set(keep) - modules(model)
    if unknown:
        raise ShapeError(
            f"There is no module {', '.join(sorted(unknown))}; this graph has {', '.join(sorted(modules(model)))}.",
            code="unknown_module",
        )
    halved = _Halving(model, TYPES[kind], frozenset(keep)).run()
    _add_initial_states(halved.graph, TYPES[kind])
    return halved


def _add_initial_states(graph: onnx.GraphProto, half: int) -> None:
    """Give every LSTM with half-precision weights its zero states, of shape (directions, B, H), in its own type.

    The parser of TensorRT 10.0 and 10.1 makes missing states FLOAT, which a strongly typed network refuses beside HALF
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
    """Return the DRN modules whose computation stands in a graph."""
    return {module for node in model.graph.node for module in drn_modules(node.name)}


def fp32_nodes(model: onnx.ModelProto) -> frozenset[str]:
    """Return the names of the nodes that a half-precision graph computes in FP32; none of an FP32 graph.

    They are `exp`, the scale before it, and the nodes of modules that were kept. Casts and Q/DQ are not computed.
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
    """One pass over the nodes in order; every tensor's type is known when a node is reached."""

    def __init__(self, model: onnx.ModelProto, half: int, keep: frozenset[str]) -> None:
        self.model = onnx.ModelProto()
        self.model.CopyFrom(model)
        self.graph = self.model.graph
        self.half = half
        self.keep = keep
        self.initialisers = {tensor.name: tensor for tensor in self.graph.initializer}
        self.types = tensor_types(model)
        # What each float tensor is in the new graph, and what its other form is called.
        self.form: dict[str, int] = {name: kind for name, kind in self.types.items() if kind == TensorProto.FLOAT}
        self.other: dict[tuple[str, int], str] = {}
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
                # Of whole numbers: straight to the type that is computed in.
                next(entry for entry in node.attribute if entry.name == "to").i = expected
            for index, name in enumerate(node.output):
                if name not in self.form:
                    continue
                self.form[name] = expected
                if name in outputs and expected == self.half:
                    node.output[index] = f"{name}/half"
                    self.form[node.output[index]] = self.half
                    self.nodes.append(self._cast(node.output[index], name, TensorProto.FLOAT, node))
                    # Whoever reads the output inside the graph gets the half form.
                    self.other[name, self.half] = node.output[index]
                    self.form[name] = TensorProto.FLOAT
        weights = list(self.initialisers.values())
        del self.graph.initializer[:], self.graph.value_info[:]
        self.graph.initializer.extend(weights)
        replace_nodes(self.graph, self.nodes)
        return self.model

    def _is_half(self, node: onnx.NodeProto) -> bool:
        if node.op_type in FP32_OPERATORS or any(n in self._before_exp() for n in node.output):
            return False
        return not self.keep.intersection(drn_modules(node.name))

    def _before_exp(self) -> set[str]:
        """Names of what goes straight into an exp: the learnt scale belongs to it."""
        return {name for node in self.model.graph.node if node.op_type == "Exp" for name in node.input}

    def _as(self, name: str, expected: int, node: onnx.NodeProto) -> str:
        """Return the name under which `name` is to be had in the type wanted, casting once for all readers."""
        if self.form[name] == expected and name not in self.initialisers:
            return name
        if name in self.initialisers:
            return self._weight(name, expected)
        if (name, expected) not in self.other:
            self.other[name, expected] = f"{name}/{'half' if expected == self.half else 'float'}"
            self.nodes.append(self._cast(name, self.other[name, expected], expected, node))
        return self.other[name, expected]

    def _weight(self, name: str, expected: int) -> str:
        if expected == TensorProto.FLOAT:
            return name
        if (name, expected) not in self.other:
            values = numpy_helper.to_array(self.initialisers[name])
            # A weight keeps its name unless an FP32 reader needs it too; unused forms are dropped at the end.
            half = f"{name}/half"
            self.initialisers[half] = _half_tensor(values, half, self.half)
            self.other[name, expected] = half
        return self.other[name, expected]

    def _cast(self, name: str, output: str, kind: int, node: onnx.NodeProto) -> onnx.NodeProto:
        scope = node.name.rpartition("/")[0]
        number = sum(other.op_type == "Cast" and other.name.startswith(f"{scope}/Cast_h") for other in self.nodes)
        return helper.make_node("Cast", [name], [output], name=f"{scope}/Cast_h{number}", to=kind)


def _half_tensor(values: np.ndarray, name: str, kind: int) -> TensorProto:
    if kind == TensorProto.FLOAT16:
        return numpy_helper.from_array(values.astype(np.float16), name)
    return TensorProto(name=name, data_type=kind, dims=values.shape, raw_data=to_bfloat16(values).tobytes())


def float32_values(tensor: TensorProto) -> np.ndarray:
    """Return the numbers of an FP32, FP16 or BF16 tensor as float32; nothing is lost."""
    if tensor.data_type != TensorProto.BFLOAT16:
        return np.asarray(numpy_helper.to_array(tensor), np.float32)
    return from_bfloat16(np.frombuffer(tensor.raw_data, np.uint16)).reshape(tensor.dims)


def emulate_bf16(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a graph that computes in FP32 and rounds every result to BF16, as a BF16 graph of `convert_to_half` stores
    them.

    ONNX Runtime has no BF16 kernels on a CPU. Graphs without BF16 are returned as they are.
    """
    kind = TensorProto.BFLOAT16
    casts = [n for n in model.graph.node if n.op_type == "Cast" and helper.get_node_attr_value(n, "to") == kind]
    if not casts and all(tensor.data_type != kind for tensor in model.graph.initializer):
        return model
    rounded = {value.name for value in infer_shapes(model).value_info if value.type.tensor_type.elem_type == kind}
    wide = onnx.ModelProto()
    wide.CopyFrom(model)
    graph = wide.graph
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
    return wide


def measure_magnitudes(model: onnx.ModelProto, batches: Iterable[Any]) -> dict[str, float]:
    """Return the largest magnitude in each DRN module's weights and in what its nodes compute, over all batches.

    Runs the FP32 graph in ONNX Runtime with every float tensor as an output. A batch has an attribute for each input.

    Raises:
        ModelFileError: a weight, or what a module computes in FP32, is NaN or infinite.
    """
    types = tensor_types(model)
    owner = {name: node.name for node in model.graph.node for name in node.output}
    # In the order of the nodes, so that the first module to go wrong is named, not one that it spoils.
    floats = [name for name in owner if types.get(name) == TensorProto.FLOAT]
    results: dict[str, float] = {}
    for tensor in model.graph.initializer:
        readers = [node.name for node in model.graph.node if tensor.name in node.input]
        if tensor.data_type == TensorProto.FLOAT and readers:
            _raise_to(results, readers[0], numpy_helper.to_array(tensor))
    for values in observe(model, floats, batches):
        for name, computed in values.items():
            _raise_to(results, owner[name], computed)
    return results


def _raise_to(measured: dict[str, float], node: str, values: np.ndarray) -> None:
    # NaN comes through both maxima.
    largest = float(np.abs(values).max(initial=0))
    if not np.isfinite(largest):
        raise ModelFileError(
            f"The FP32 model is not finite in {' and '.join(drn_modules(node)) or node}: it holds or computes "
            f"{largest}, so no precision can be chosen for it; check the checkpoint and the features with "
            "`python -m runtime.evaluate`.",
            code="non_finite_output",
        )
    for module in drn_modules(node):
        measured[module] = float(np.maximum(measured.get(module, 0.0), largest))


def overflow_prone_modules(scanned: Mapping[str, float], kind: Half = "fp16") -> tuple[str, ...]:
    """Return the modules that come too near the largest number of the type, largest first; NaN is beyond any.

    BF16 has FP32's range.
    """
    if kind == "bf16":
        return ()
    beyond = [module for module, largest in scanned.items() if not largest * FP16_SAFETY_FACTOR <= FLOAT16_MAX]
    return tuple(sorted(beyond, key=lambda module: -np.nan_to_num(scanned[module], nan=np.inf)))
