"""Quantize a graph to INT8 or FP8 with explicit QuantizeLinear and DequantizeLinear nodes.

The 8-bit numbers of `fpn.layer_blocks.0` keep the name of its weight, `fpn.layer_blocks.0.weight`.
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
from calib.graph.channel_equalization import apply_channel_scales, balanced_name, equalizable_tensors
from calib.graph.naming import ALIASES
from calib.graph.onnx_graph import read_manifest, set_manifest
from calib.graph.opset import opset_of, with_opset
from calib.graph.precision_audit import count_macs
from calib.range_estimation import ValueRange
from runtime.core.errors import excerpt

if TYPE_CHECKING:
    import onnx

QuantDtype = Literal["int8", "fp8"]

LARGEST = {"int8": 127.0, "fp8": 448.0}
"""The largest number of each kind; INT8 is symmetric, so -128 is left out."""

FP8_OPSET = 19
"""Q/DQ reads E4M3, and FP16 scales, from here on."""


@dataclasses.dataclass(frozen=True)
class QuantizationPolicy:
    """The layers to quantize to INT8.

    Names are modules of the graph and mean all below them: `fpn` is every convolution of the pyramid. The defaults
    take 95 % of the multiply-adds. What is in neither list stays as it is: the LSTM and the attention, whose errors add
    up over words; the inputs of the gates, which scale whole channels; the last layers of the heads, whose outputs
    become scores and, through exp, seconds.

    Attributes:
        computed: inputs and weights are 8 bits, so that engines multiply in 8 bits.
        stored: weights alone are 8 bits, and are multiplied as they were: half of the file of FP16 for a rounding error
            beside which nothing is measurable. INT8 only: E4M3 has 3 bits of mantissa.
        op_types: operators looked at.
        per_channel: weights have a scale for each output channel, else one.
        keep: modules of those lists that are left alone after all. DRN's own names are understood too.
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
    op_types: tuple[str, ...] = ("Conv", "Gemm", "MatMul", "Gather")
    per_channel: bool = True
    keep: tuple[str, ...] = ()

    def keeping(self, *modules: str) -> QuantizationPolicy:
        """Return this policy with more modules left alone."""
        return dataclasses.replace(self, keep=(*self.keep, *modules))

    def only(self, *modules: str) -> QuantizationPolicy:
        """Return a policy under which nothing but these modules becomes INT8."""
        computed = tuple(module for module in modules if _under(module, self.computed))
        return dataclasses.replace(
            self, computed=computed, stored=tuple(module for module in modules if module not in computed), keep=()
        )


@dataclasses.dataclass(frozen=True)
class QuantizedOp:
    """An operator that becomes INT8.

    Attributes:
        module: whose it is.
        node: its name.
        weight: the weight's name.
        axis: of the weight's output channels.
        tensor: the input to be quantised; None where weights alone are.
    """

    module: str
    node: str
    weight: str
    axis: int
    tensor: str | None


def find_quantizable_ops(
    model: onnx.ModelProto, policy: QuantizationPolicy, kind: QuantDtype = "int8"
) -> list[QuantizedOp]:
    """Return the operators that become INT8 under a policy, in the order of the graph.

    Raises:
        CalibrationError: a module to keep is none of the policy's.
    """
    result = list(_sites(model, policy, kind))
    # What only INT8 stores narrowly may be named for FP8 too.
    nameable = list(dict.fromkeys(site.module for site in _sites(model, policy, "int8")))
    keep = tuple(ALIASES.get(name, name) for name in policy.keep)
    for name, given in zip(keep, policy.keep):
        if not any(_under(module, (name,)) for module in nameable):
            known = ", ".join(nameable)
            raise CalibrationError(
                f"There is no module {excerpt(given)} to keep; those that become INT8 are {known}.",
                code="unknown_module",
            )
    return [site for site in result if not _under(site.module, keep)]


def modules(model: onnx.ModelProto, policy: QuantizationPolicy, kind: QuantDtype = "int8") -> list[str]:
    """Return the modules that become INT8 under a policy, in the order of the graph."""
    return list(dict.fromkeys(site.module for site in find_quantizable_ops(model, policy, kind)))


def tensors_to_calibrate(model: onnx.ModelProto, policy: QuantizationPolicy | None = None) -> list[str]:
    """Return the tensors whose ranges a policy needs, each once."""
    return list(
        dict.fromkeys(
            site.tensor
            for site in find_quantizable_ops(model, policy or QuantizationPolicy())
            if site.tensor is not None
        )
    )


def insert_qdq(
    model: onnx.ModelProto,
    table: CalibrationTable,
    policy: QuantizationPolicy | None = None,
    kind: QuantDtype = "int8",
    opset: int | None = None,
) -> onnx.ModelProto:
    """Return a copy of an FP32 graph with explicit Q/DQ around the operators of a policy.

    Quantization is symmetric: an input has one scale, from the table; a weight has one for each output channel, from
    its largest value. Biases stay as they are, because TensorRT refuses quantized ones. A tensor that several operators
    read is quantized once.

    Args:
        model: as `python -m export.to_onnx` writes it.
        table: measured on this very model.
        policy: what becomes 8 bits; the default policy when None.
        kind: INT8, or FP8 in the form E4M3.
        opset: of the result; the model's own when None, but 19 at least for FP8. FP16 around INT8 needs 19 too.

    Raises:
        CalibrationError: the table was measured on something else or lacks a tensor, or a module to keep is unknown.
    """
    import onnx

    policy = policy or QuantizationPolicy()
    opset = opset or max(opset_of(model), FP8_OPSET if kind == "fp8" else 0)
    if kind == "fp8" and opset < FP8_OPSET:
        raise CalibrationError(
            f"FP8 needs opset {FP8_OPSET} at least, and {opset} was asked for; leave --opset out.",
            code="unsupported_opset",
        )
    manifest = read_manifest(model)
    table.check(model)
    tensors = {site.tensor for site in find_quantizable_ops(model, policy, kind)}
    lacking = sorted(name for name in tensors if name is not None and name not in table.ranges)
    if lacking:
        raise CalibrationError(
            f"The table has no range for {', '.join(lacking)}; calibrate again with this policy.", code="missing_range"
        )
    source = hashlib.sha256(model.SerializeToString()).hexdigest()
    model, ranges = balanced(model, table, tensors)
    chosen = {site.node: site for site in find_quantizable_ops(model, policy, kind)}
    if not chosen:
        raise CalibrationError("Nothing is left to quantize; keep fewer modules.", code="nothing_to_quantize")
    result = with_opset(_Writer(model, chosen, ranges, policy.per_channel, kind).run(), opset)
    sources = {**manifest.sources, "fp32 graph": source, "calibration": table.digest}
    set_manifest(result, dataclasses.replace(manifest, precision=kind, sources=sources))
    onnx.checker.check_model(result, full_check=True)
    return result


def balanced(
    model: onnx.ModelProto, table: CalibrationTable, tensors: Collection[str | None] | None = None
) -> tuple[onnx.ModelProto, dict[str, ValueRange]]:
    """Return a graph with the table's gains in it, and the ranges under the names that its tensors then have.

    `tensors` are those that will be quantised, all when None: no other is touched.
    """
    import onnx

    gains = {name: row for name, row in table.gains.items() if tensors is None or name in tensors}
    ranges = dict(table.ranges)
    if not gains:
        return model, ranges
    where = equalizable_tensors(model)
    strange = sorted(set(gains) - set(where))
    if strange:
        raise CalibrationError(
            f"The table balances {', '.join(strange)}, which this graph cannot; calibrate again.",
            code="equalization_mismatch",
        )
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    weights = {node.name: node.input[1] for node in model.graph.node if node.op_type == "Conv"}
    for name, row in gains.items():
        channels = constants[weights[where[name][0]]].dims[1]
        if len(row) != channels:
            raise CalibrationError(
                f"The table has {len(row)} gains for {name}, which has {channels} channels; calibrate again.",
                code="equalization_mismatch",
            )
        if name in ranges:
            ranges[balanced_name(model, name)] = ranges[name]
    result = onnx.ModelProto()
    result.CopyFrom(model)
    apply_channel_scales(result, gains)
    return result, ranges


def quantize_weight(weight: np.ndarray, kind: QuantDtype, axis: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Return a weight as 8-bit numbers, and the float32 scales that give it back: one, or one per index of `axis`.

    A number times its scale is within half a step of the weight. A channel of zeros has a scale of 1.
    """
    weight = weight.astype(np.float64)
    others = None if axis is None else tuple(index for index in range(weight.ndim) if index != axis)
    largest = np.abs(weight).max(axis=others, keepdims=True)
    # Rounded first, since that is what the number will be multiplied with.
    scale = half_precision_scale(np.where(largest > 0, largest / LARGEST[kind], 1))
    scaled = weight / scale.astype(np.float64)
    clipped = np.clip(scaled if kind == "fp8" else np.rint(scaled), -LARGEST[kind], LARGEST[kind])
    # Through float32: from float64 to E4M3 numbers would be rounded differently.
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
            f"{what} is not finite, or too large for FP16; train the network again, or calibrate again.",
            code="invalid_scale",
        )


def half_precision_scale(scale: np.ndarray) -> np.ndarray:
    """Return float32 scales that FP16 holds exactly, none below what is asked for and none 0.

    Around Q/DQ in FP16 the scales are FP16 too: one rounded down to 0 is refused by TensorRT, and one rounded after the
    numbers were made would multiply them by another factor than they were divided by.
    """
    with np.errstate(over="ignore"):
        rounded = np.asarray(scale, np.float64).astype(np.float16)
    up = np.nextafter(rounded, np.float16(np.inf))
    return np.where(rounded.astype(np.float64) < scale, up, rounded).astype(np.float32)


def attainable_share(model: onnx.ModelProto, kind: QuantDtype = "int8") -> float:
    """Return the share of the multiply-adds of an FP32 graph that becomes 8-bit when no module is kept out, 0 to 1."""
    computed = {
        site.node for site in find_quantizable_ops(model, QuantizationPolicy(), kind) if site.tensor is not None
    }
    macs = count_macs(model)
    return sum(macs[name].count for name in computed) / sum(operator.count for operator in macs.values())


def _sites(model: onnx.ModelProto, policy: QuantizationPolicy, kind: QuantDtype) -> Iterator[QuantizedOp]:
    import onnx

    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        position = 0 if node.op_type == "Gather" else 1
        if node.op_type not in policy.op_types or len(node.input) < 2:
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
        axis = {"Conv": 0, "Gather": 0, "MatMul": len(weight.dims) - 1, "Gemm": 1}[node.op_type]
        if node.op_type == "Gemm" and any(entry.name == "transB" and entry.i for entry in node.attribute):
            axis = 0
        yield QuantizedOp(module, node.name, weight.name, axis, tensor)


def _under(module: str, names: Collection[str]) -> bool:
    return any(module == name or module.startswith(f"{name}.") for name in names)


class _Writer:
    """Writes a graph with Q/DQ. A node that is added for `fpn.layer_blocks.0` is `fpn.layer_blocks.0/QuantizeLinear`.

    Args:
        model: an FP32 graph, which stays as it is.
        chosen: the operators that become 8-bit, by the name of their node.
        ranges: of the tensors that they read.
        per_channel: whether weights have a scale for each output channel.
        kind: int8 or fp8.
    """

    def __init__(
        self,
        model: onnx.ModelProto,
        chosen: Mapping[str, QuantizedOp],
        ranges: Mapping[str, ValueRange],
        per_channel: bool,
        kind: QuantDtype,
    ) -> None:
        self._source, self._chosen, self._ranges = model.graph, chosen, ranges
        self._per_channel, self._kind = per_channel, kind
        self._taken = {node.name for node in model.graph.node}
        self._model = type(model)()
        self._model.CopyFrom(model)
        self._graph = self._model.graph
        # What a tensor is called once it is dequantized.
        self._dequantized: dict[str, str] = {}

    def run(self) -> onnx.ModelProto:
        """Return the graph with Q/DQ."""
        weights = {site.weight: site for site in self._chosen.values()}
        del self._graph.node[:], self._graph.initializer[:], self._graph.value_info[:]
        # The types of weights, which change, are described too.
        self._graph.value_info.extend(value for value in self._source.value_info if value.name not in weights)
        for tensor in self._source.initializer:
            if tensor.name in weights:
                self._weight(tensor, weights[tensor.name])
            else:
                self._graph.initializer.add().CopyFrom(tensor)
        for node in self._source.node:
            site = self._chosen.get(node.name)
            if site is not None:
                self._dequantize(site)
            copy = self._graph.node.add()
            copy.CopyFrom(node)
            if site is not None:
                names = (site.weight, site.tensor)
                copy.input[:] = [self._dequantized[name] if name in names else name for name in node.input]
        return self._model

    def _axis(self, site: QuantizedOp) -> int | None:
        return site.axis if self._per_channel else None

    def _weight(self, tensor: onnx.TensorProto, site: QuantizedOp) -> None:
        """Write a weight as 8-bit numbers under its own name, with scale and zero point."""
        from onnx import numpy_helper

        values = numpy_helper.to_array(tensor)
        _check_finite(values, f"The weight {tensor.name}")
        numbers, scale = quantize_weight(values, self._kind, self._axis(site))
        _check_finite(scale, f"The scale of {tensor.name}")
        self._constant(tensor.name, numbers)
        self._constant(f"{tensor.name}_scale", scale)
        self._constant(f"{tensor.name}_zero_point", np.zeros(scale.shape, numbers.dtype))

    def _dequantize(self, site: QuantizedOp) -> None:
        """Add the Q/DQ of an operator's input and weight, each once for all readers."""
        if site.tensor is not None and site.tensor not in self._dequantized:
            magnitude = max(self._ranges[site.tensor].magnitude, LARGEST[self._kind] * 2**-24)
            scale = half_precision_scale(np.asarray(magnitude / LARGEST[self._kind]))
            _check_finite(scale, f"The scale for the range of {site.tensor}")
            name = f"{site.module}.input"
            self._constant(f"{name}_scale", np.array(scale, np.float32))
            self._constant(f"{name}_zero_point", np.zeros((), number_type(self._kind)))
            quantized = self._node(site.module, "QuantizeLinear", site.tensor, name, like=site.tensor)
            dequantized = self._node(site.module, "DequantizeLinear", quantized, name, like=site.tensor)
            self._dequantized[site.tensor] = dequantized
        if site.weight not in self._dequantized:
            self._dequantized[site.weight] = self._node(
                site.module, "DequantizeLinear", site.weight, site.weight, axis=self._axis(site)
            )

    def _constant(self, name: str, values: np.ndarray) -> None:
        from onnx import numpy_helper

        contiguous = np.ascontiguousarray(values).reshape(values.shape)
        self._graph.initializer.append(numpy_helper.from_array(contiguous, name))

    def _node(
        self, module: str, op_type: str, tensor: str, constants: str, axis: int | None = None, like: str | None = None
    ) -> str:
        """Add a node that reads `constants`_scale and _zero_point.

        Args:
            module, op_type: after which it is named.
            tensor: its input.
            constants: after which its scale and zero point are named.
            axis: of the scales; None for one scale.
            like: a tensor of the same shape, where one is known.

        Returns:
            The name of the node, which is also that of its output.
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
            copy = self._graph.value_info.add()
            copy.CopyFrom(value)
            copy.name = name
            if op_type == "QuantizeLinear":
                element = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(number_type(self._kind)))
                copy.type.tensor_type.elem_type = element
        return name
