"""Quantize a graph to INT8 or FP8 with explicit QuantizeLinear and DequantizeLinear nodes.

The 8-bit values of a weight have the name of the weight, such as `fpn.layer_blocks.0.weight`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from calib.calibration_table import CalibrationTable
from calib.errors import CalibrationError
from calib.graph.channel_equalization import apply_channel_scales, equalizable_tensors, equalized_name
from calib.graph.gate_normalization import NORMALIZED_TENSORS, normalize_gated_features
from calib.graph.graph_editing import copied
from calib.graph.naming import ALIASES
from calib.graph.onnx_graph import read_manifest, set_manifest
from calib.graph.opset import opset_of, with_opset
from calib.graph.precision_audit import count_macs
from calib.range_estimation import UNSIGNED_LEVELS, ValueRange
from runtime.core.errors import excerpt

if TYPE_CHECKING:
    import onnx

QuantDtype = Literal["int8", "fp8"]

# The largest number of each kind. INT8 is symmetric, so -128 is not used.
LARGEST = {"int8": 127.0, "fp8": 448.0}
# The largest INT8 weight of which two products with uint8 activations fit into 16 bits: 2 x 255 x 64 is below 32,768.
MAX_EXACT_WEIGHT = 64.0
# The first opset in which Q/DQ accepts E4M3 and FP16 scales.
FP8_OPSET = 19
# Axis of the output channels in the weight of each operator that is quantized; of MatMul the last one.
OUTPUT_AXES = {"Conv": 0, "Gather": 0, "MatMul": -1, "Gemm": 1}


@dataclasses.dataclass(frozen=True)
class QuantizationPolicy:
    """The layers to quantize.

    A name is a module of the graph with everything below it: `fpn` is every convolution of the pyramid. The defaults
    contain 95 % of the multiply-adds. They exclude the LSTM and the attention, whose errors accumulate over words; the
    inputs of the gates, which scale entire channels; and the last layers of the heads, which compute scores and times.

    Attributes:
        computed: modules whose inputs and weights are 8-bit, so that engines multiply in 8 bits.
        stored: modules whose weights alone are 8-bit and are dequantized before use, which halves an FP16 file without
            a measurable error. INT8 only: E4M3 has 3 bits of mantissa.
        keep: modules to exclude, by the names of the graph or of DRN.
        unsigned: whether inputs without negative values use all 256 steps (INT8 with zero point -128). ONNX Runtime
            computes this form; TensorRT requires a zero point of 0.
        max_weight: largest number of an INT8 weight.
    """

    computed: tuple[str, ...] = (
        "prop_fc",
        "backbone_net.layers",
        "fpn.inner_blocks",
        "fpn.layer_blocks",
        "fcos.head.towers",
        "fcos.head.mix_fc",
        "fcos.head.iou_scores.0",
    )
    stored: tuple[str, ...] = ("qInput", "query_encoder.W2", "query_encoder.W3", "query_encoder.embedding")
    keep: tuple[str, ...] = ()
    unsigned: bool = False
    max_weight: float = LARGEST["int8"]

    def keeping(self, *modules: str) -> QuantizationPolicy:
        """Return this policy with more modules to exclude."""
        return dataclasses.replace(self, keep=(*self.keep, *modules))

    def only(self, *modules: str) -> QuantizationPolicy:
        """Return this policy with only the given modules to quantize."""
        computed = tuple(module for module in modules if _under(module, self.computed))
        return dataclasses.replace(
            self, computed=computed, stored=tuple(module for module in modules if module not in computed), keep=()
        )


@dataclasses.dataclass(frozen=True)
class QuantizedOp:
    """An operator to quantize.

    Attributes:
        module: name of its module.
        node: name of its node.
        weight: name of its weight.
        axis: axis of the output channels in the weight.
        tensor: name of the input to quantize; None if only the weight is quantized.
    """

    module: str
    node: str
    weight: str
    axis: int
    tensor: str | None


def find_quantizable_ops(
    model: onnx.ModelProto, policy: QuantizationPolicy, kind: QuantDtype = "int8"
) -> list[QuantizedOp]:
    """Return the operators to quantize under a policy, in the order of the graph.

    Args:
        model: FP32 graph.

    Raises:
        CalibrationError: a module of `policy.keep` is not in the policy.
    """
    # Modules that only INT8 stores in 8 bits are accepted in `keep` for FP8 too.
    known = list(dict.fromkeys(op.module for op in _candidates(model, policy, "int8")))
    keep = tuple(ALIASES.get(name, name) for name in policy.keep)
    for name, option in zip(keep, policy.keep):
        if not any(_under(module, (name,)) for module in known):
            raise CalibrationError(
                f"There is no module {excerpt(option)} to keep. Choose from {', '.join(known)}.", code="unknown_module"
            )
    return [op for op in _candidates(model, policy, kind) if not _under(op.module, keep)]


def modules(model: onnx.ModelProto, policy: QuantizationPolicy, kind: QuantDtype = "int8") -> list[str]:
    """Return the names of the modules to quantize under a policy, in the order of the graph.

    Args:
        model: FP32 graph.
    """
    return list(dict.fromkeys(op.module for op in find_quantizable_ops(model, policy, kind)))


def channel_energies(model: onnx.ModelProto, policy: QuantizationPolicy | None = None) -> dict[str, np.ndarray]:
    """Return the tensors to quantize under a policy, with the energy of the weights that read each channel.

    The energy of channel c is the sum of W[o, c]^2 over the outputs o, and the taps, of all operators that read the
    tensor.

    Returns:
        Tensor name to float64 energies: (C, 1, ...) for the input of a convolution, with one axis per tap axis; (C,)
        for that of a matrix product.
    """
    from onnx import numpy_helper

    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    groups = {node.name: entry.i for node in model.graph.node for entry in node.attribute if entry.name == "group"}
    energies: dict[str, np.ndarray] = {}
    for op in find_quantizable_ops(model, policy or QuantizationPolicy()):
        if op.tensor is not None:
            squares = numpy_helper.to_array(constants[op.weight]).astype(np.float64) ** 2
            if squares.ndim > 2:
                # A kernel of (O, C / groups, taps) reads C channels, each group its own.
                outputs, inputs, taps = *squares.shape[:2], squares.ndim - 2
                count = groups.get(op.node, 1)
                by_group = squares.reshape(count, outputs // count, inputs, -1)
                energy = by_group.sum(axis=(1, 3)).reshape(-1, *(1,) * taps)
            else:
                energy = squares.sum(axis=op.axis)
            energies[op.tensor] = energies.get(op.tensor, 0) + energy
    return energies


def insert_qdq(
    model: onnx.ModelProto,
    table: CalibrationTable,
    policy: QuantizationPolicy | None = None,
    kind: QuantDtype = "int8",
    opset: int | None = None,
) -> onnx.ModelProto:
    """Return a copy of an FP32 graph with explicit Q/DQ around the operators of a policy.

    An input has one scale, from the table. A weight has one scale per output channel, from its largest value. Biases
    are not quantized, because TensorRT rejects quantized ones. A tensor that several operators read is quantized once.

    Args:
        model: FP32 graph of `python -m export.to_onnx`.
        policy: layers to quantize; the default policy when None.
        kind: int8, or fp8 in the form E4M3.
        opset: opset of the result. None: that of the model, but at least 19 for FP8. FP16 around INT8 needs 19 too.

    Raises:
        CalibrationError: the table is of another model or has no range for a tensor, or a module to keep is unknown.
    """

    policy = policy or QuantizationPolicy()
    opset = opset or max(opset_of(model), FP8_OPSET if kind == "fp8" else 0)
    if kind == "fp8" and opset < FP8_OPSET:
        raise CalibrationError(
            f"Expected --opset of at least {FP8_OPSET} for FP8, got {opset}. Remove the option.",
            code="unsupported_opset",
        )
    manifest = read_manifest(model)
    table.check(model)
    source = hashlib.sha256(model.SerializeToString()).hexdigest()
    # Tables of version 0.1 have constant scales.
    if NORMALIZED_TENSORS & set(table.ranges):
        model = normalize_gated_features(model, modules(model, policy, kind))
    tensors = {op.tensor for op in find_quantizable_ops(model, policy, kind) if op.tensor is not None}
    missing = sorted(tensors - set(table.ranges))
    if missing:
        raise CalibrationError(
            f"The calibration table has no range for {', '.join(missing)}. Calibrate again, or exclude their modules "
            "with --keep.",
            code="missing_range",
        )
    model, ranges = _equalized(model, table, tensors)
    result = write_qdq(model, ranges, policy, kind, opset)
    sources = {**manifest.sources, "fp32 graph": source, "calibration": table.digest}
    set_manifest(result, dataclasses.replace(manifest, precision=kind, sources=sources))
    return result


def write_qdq(
    model: onnx.ModelProto,
    ranges: Mapping[str, ValueRange],
    policy: QuantizationPolicy,
    kind: QuantDtype,
    opset: int,
) -> onnx.ModelProto:
    """Return a copy of any FP32 graph with Q/DQ around the operators of a policy; metadata is copied.

    Args:
        model: FP32 graph of DRN or of an extractor.
        ranges: range of every tensor that the operators read.
        kind: int8, or fp8 in the form E4M3.

    Raises:
        CalibrationError: no module remains to quantize, or a module to keep is unknown.
    """
    import onnx

    ops = {op.node: op for op in find_quantizable_ops(model, policy, kind)}
    if not ops:
        raise CalibrationError(
            "No layer with a constant weight remains to quantize. Name fewer modules with --keep, or choose another "
            "--precision.",
            code="nothing_to_quantize",
        )
    result = with_opset(_Writer(model, ops, ranges, policy, kind).run(), opset)
    onnx.checker.check_model(result, full_check=True)
    return result


def _equalized(
    model: onnx.ModelProto, table: CalibrationTable, tensors: Collection[str]
) -> tuple[onnx.ModelProto, dict[str, ValueRange]]:
    """Return a graph with the gains of the given tensors applied, and the ranges by the new names of the tensors."""
    gains = {name: row for name, row in table.gains.items() if name in tensors}
    ranges = dict(table.ranges)
    if not gains:
        return model, ranges
    equalizable = equalizable_tensors(model)
    unknown = sorted(set(gains) - set(equalizable))
    if unknown:
        raise CalibrationError(
            f"The table equalizes {', '.join(unknown)}, which is not possible in this graph. Calibrate again.",
            code="equalization_mismatch",
        )
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    weights = {node.name: node.input[1] for node in model.graph.node if node.op_type == "Conv"}
    for name, row in gains.items():
        channels = constants[weights[equalizable[name][0]]].dims[1]
        if len(row) != channels:
            raise CalibrationError(
                f"Expected the equalization of {channels} channels of {name}, got {len(row)} in the table. Calibrate "
                "again.",
                code="equalization_mismatch",
            )
        if name in ranges:
            ranges[equalized_name(model, name)] = ranges[name]
    result = copied(model)
    apply_channel_scales(result, gains)
    return result, ranges


def quantize_weight(
    weight: np.ndarray, kind: QuantDtype, axis: int | None, limit: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return a weight as 8-bit numbers of the same shape, and their float32 scales.

    A number times its scale is within half a step of the weight. A channel of zeros has the scale 1.

    Args:
        weight: values in FP32.
        axis: axis of the output channels, which have one scale each; None for a single scale.
        limit: largest number.
    """
    weight = weight.astype(np.float64)
    others = None if axis is None else tuple(index for index in range(weight.ndim) if index != axis)
    largest = np.abs(weight).max(axis=others, keepdims=True)
    # Rounded first, because the rounded scale multiplies the numbers.
    scale = half_precision_scale(np.where(largest > 0, largest / limit, 1))
    scaled = weight / scale.astype(np.float64)
    clipped = np.clip(scaled if kind == "fp8" else np.rint(scaled), -limit, limit)
    # Through float32, because float64 is rounded to E4M3 differently.
    numbers = clipped.astype(np.float32).astype(number_type(kind))
    return numbers, scale.reshape(()) if axis is None else scale.reshape(-1)


def number_type(kind: QuantDtype) -> Any:
    """Return the NumPy type of 8-bit numbers."""
    if kind == "int8":
        return np.int8
    import ml_dtypes

    return ml_dtypes.float8_e4m3fn


def _check_finite(values: np.ndarray, what: str) -> None:
    if not np.isfinite(values).all():
        raise CalibrationError(
            f"{what} is not finite, or too large for FP16. Train the network again, or calibrate again.",
            code="invalid_scale",
        )


def half_precision_scale(scale: np.ndarray) -> np.ndarray:
    """Return scales rounded up to the next FP16 number, as float32.

    In an FP16 graph the scales of Q/DQ are FP16: TensorRT rejects a scale of 0, and a scale that is rounded after
    quantization would multiply by another factor than it divided by.
    """
    with np.errstate(over="ignore"):
        rounded = np.asarray(scale, np.float64).astype(np.float16)
    up = np.nextafter(rounded, np.float16(np.inf))
    return np.where(rounded.astype(np.float64) < scale, up, rounded).astype(np.float32)


def attainable_share(model: onnx.ModelProto, kind: QuantDtype = "int8") -> float:
    """Return the share of the multiply-adds of an FP32 graph that the default policy computes in 8 bits, 0 to 1."""
    macs = count_macs(model)
    ops = find_quantizable_ops(model, QuantizationPolicy(), kind)
    computed = sum(macs[op.node].count for op in ops if op.tensor is not None)
    return computed / sum(operator.count for operator in macs.values())


def _candidates(model: onnx.ModelProto, policy: QuantizationPolicy, kind: QuantDtype) -> Iterator[QuantizedOp]:
    """Yield the operators to quantize under a policy, those of `policy.keep` included."""
    import onnx

    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        position = 0 if node.op_type == "Gather" else 1
        if node.op_type not in OUTPUT_AXES or len(node.input) < 2:
            continue
        weight = constants.get(node.input[position])
        if weight is None or weight.data_type != onnx.TensorProto.FLOAT or len(weight.dims) < 2:
            continue
        module = weight.name.rpartition(".")[0]
        if _under(module, policy.computed) and node.op_type != "Gather":
            tensor: str | None = node.input[0]
        elif _under(module, policy.stored) and kind == "int8":
            tensor = None
        else:
            continue
        axis = OUTPUT_AXES[node.op_type] % len(weight.dims)
        if node.op_type == "Gemm" and any(entry.name == "transB" and entry.i for entry in node.attribute):
            axis = 0
        yield QuantizedOp(module, node.name, weight.name, axis, tensor)


def _under(module: str, names: Collection[str]) -> bool:
    return any(module == name or module.startswith(f"{name}.") for name in names)


class _Writer:
    """Writes a graph with Q/DQ. A new node of `fpn.layer_blocks.0` is `fpn.layer_blocks.0/QuantizeLinear`."""

    def __init__(
        self,
        model: onnx.ModelProto,
        ops: Mapping[str, QuantizedOp],
        ranges: Mapping[str, ValueRange],
        policy: QuantizationPolicy,
        kind: QuantDtype,
    ) -> None:
        self._source, self._ops, self._ranges = model.graph, ops, ranges
        self._policy, self._kind = policy, kind
        self._taken = {node.name for node in model.graph.node}
        self._model = copied(model)
        self._graph = self._model.graph
        # Tensor name to the name of its dequantized form.
        self._dequantized: dict[str, str] = {}

    def run(self) -> onnx.ModelProto:
        """Return the graph with Q/DQ."""
        weights = {op.weight: op for op in self._ops.values()}
        del self._graph.node[:], self._graph.initializer[:], self._graph.value_info[:]
        # The types of weights change.
        self._graph.value_info.extend(value for value in self._source.value_info if value.name not in weights)
        for tensor in self._source.initializer:
            if tensor.name in weights:
                self._weight(tensor, weights[tensor.name])
            else:
                self._graph.initializer.add().CopyFrom(tensor)
        for node in self._source.node:
            op = self._ops.get(node.name)
            if op is not None:
                self._dequantize(op)
            self._graph.node.append(node)
            if op is not None:
                names = (op.weight, op.tensor)
                self._graph.node[-1].input[:] = [
                    self._dequantized[name] if name in names else name for name in node.input
                ]
        return self._model

    def _weight(self, tensor: onnx.TensorProto, op: QuantizedOp) -> None:
        """Write a weight as 8-bit numbers of the same name, with scale and zero point."""
        from onnx import numpy_helper

        values = numpy_helper.to_array(tensor)
        _check_finite(values, f"The weight {tensor.name}")
        limit = self._policy.max_weight if self._kind == "int8" else LARGEST[self._kind]
        numbers, scale = quantize_weight(values, self._kind, op.axis, limit)
        _check_finite(scale, f"The scale of {tensor.name}")
        self._constant(tensor.name, numbers)
        self._constant(f"{tensor.name}_scale", scale)
        self._constant(f"{tensor.name}_zero_point", np.zeros(scale.shape, numbers.dtype))

    def _dequantize(self, op: QuantizedOp) -> None:
        """Add the Q/DQ of an operator's input and weight, each once for all readers."""
        if op.tensor is not None and op.tensor not in self._dequantized:
            unsigned = self._policy.unsigned and self._kind == "int8" and self._ranges[op.tensor].low >= 0
            levels = UNSIGNED_LEVELS if unsigned else LARGEST[self._kind]
            scale = half_precision_scale(np.asarray(max(self._ranges[op.tensor].magnitude / levels, 2**-24)))
            _check_finite(scale, f"The scale for the range of {op.tensor}")
            name = f"{op.module}.input"
            self._constant(f"{name}_scale", np.array(scale, np.float32))
            self._constant(f"{name}_zero_point", np.array(-128 if unsigned else 0, number_type(self._kind)))
            quantized = self._node(op.module, "QuantizeLinear", op.tensor, name, like=op.tensor)
            dequantized = self._node(op.module, "DequantizeLinear", quantized, name, like=op.tensor)
            self._dequantized[op.tensor] = dequantized
        if op.weight not in self._dequantized:
            self._dequantized[op.weight] = self._node(op.module, "DequantizeLinear", op.weight, op.weight, axis=op.axis)

    def _constant(self, name: str, values: np.ndarray) -> None:
        from onnx import numpy_helper

        contiguous = np.ascontiguousarray(values).reshape(values.shape)
        self._graph.initializer.append(numpy_helper.from_array(contiguous, name))

    def _node(
        self, module: str, op_type: str, tensor: str, constants: str, axis: int | None = None, like: str | None = None
    ) -> str:
        """Add a node that reads `constants`_scale and `constants`_zero_point, and return its name, that of its output.

        `axis` is that of the scales, None for a single one; `like` names a tensor whose shape the result gets.
        """
        import onnx

        name, number = f"{module}/{op_type}", 1
        while name in self._taken:
            number += 1
            name = f"{module}/{op_type}_{number}"
        self._taken.add(name)
        inputs = [tensor, f"{constants}_scale", f"{constants}_zero_point"]
        options: dict[str, Any] = {} if axis is None else {"axis": axis}
        self._graph.node.append(onnx.helper.make_node(op_type, inputs, [name], name=name, **options))
        described = (value for value in (*self._source.input, *self._source.value_info) if value.name == like)
        for value in itertools.islice(described, 1):
            self._graph.value_info.append(value)
            self._graph.value_info[-1].name = name
            if op_type == "QuantizeLinear":
                element = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(number_type(self._kind)))
                self._graph.value_info[-1].type.tensor_type.elem_type = element
        return name
