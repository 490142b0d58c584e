"""Where a graph becomes INT8 or FP8: QuantizeLinear and DequantizeLinear written out, so that no engine has to guess.

Nodes and tensors keep the house's names: what is added for `fpn.layer_blocks.0` is `fpn.layer_blocks.0/QuantizeLinear`,
and its 8-bit numbers stay `fpn.layer_blocks.0.weight`.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from calib.calibration_table import CalibrationTable
from calib.errors import CalibrationError
from calib.graph.channel_equalization import apply_channel_scales, balanced_name, equalizable_tensors
from calib.graph.naming import ALIASES
from calib.graph.onnx_graph import read_manifest, strip_weights
from calib.range_estimation import ValueRange
from runtime.artifacts.manifest import METADATA_KEY
from runtime.core.errors import excerpt

if TYPE_CHECKING:
    import onnx

QuantDtype = Literal["int8", "fp8"]

LARGEST = {"int8": 127.0, "fp8": 448.0}
"""The largest number of each kind; INT8 is symmetric, so -128 is left out."""

LEAST_SHARE = 0.85
"""Of the multiply-adds in 8 bits, below which a graph is hardly worth its name."""

FP8_OPSET = 19
"""Q/DQ reads E4M3, and FP16 scales, from here on."""

# Operators of our graphs that read the same from opset 17 to 23, but for `Split`, which since 18 says its part count.
# fmt: off
SAME_IN_ALL_OPSETS = frozenset((
    "Add", "Cast", "Concat", "Conv", "Exp", "Expand", "Gather", "GatherElements", "Gemm", "GreaterOrEqual", "LSTM",
    "MatMul", "Max", "Mul", "Range", "Relu", "Reshape", "Resize", "Shape", "Slice", "Softmax", "Split", "Squeeze",
    "Sub", "Transpose", "Unsqueeze", "Where",
))
# fmt: on
NEWEST_OPSET = 23


@dataclasses.dataclass(frozen=True)
class QuantizationPolicy:
    """What becomes INT8.

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
    """Return a copy of an FP32 graph with explicit Q/DQ around what the policy names.

    Symmetric throughout: one scale for an input, by the table; one per output channel for a weight, by its largest
    value. Biases stay as they are, since TensorRT refuses quantised ones. A tensor is quantised once, whoever reads it.

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
    from onnx import numpy_helper

    policy = policy or QuantizationPolicy()
    manifest = read_manifest(model)
    table.check(model)
    expected = {site.tensor for site in find_quantizable_ops(model, policy, kind)}
    lacking = sorted(name for name in expected if name is not None and name not in table.ranges)
    if lacking:
        raise CalibrationError(
            f"The table has no range for {', '.join(lacking)}; calibrate again with this policy.", code="missing_range"
        )
    source = hashlib.sha256(model.SerializeToString()).hexdigest()
    model, ranges = balanced(model, table, expected)
    chosen = {site.node: site for site in find_quantizable_ops(model, policy, kind)}
    if not chosen:
        raise CalibrationError("Nothing is left to quantise; keep fewer modules.", code="nothing_to_quantize")

    old = model.graph
    weights = {site.weight: site for site in chosen.values()}
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    del graph.node[:], graph.initializer[:], graph.value_info[:]
    # The exporter notes the types of weights too, which change.
    graph.value_info.extend(value for value in old.value_info if value.name not in weights)
    shapes = {value.name: value for value in (*old.input, *old.value_info)}
    writer = _Writer(graph, kind, {node.name for node in old.node})

    for tensor in old.initializer:
        if tensor.name in weights:
            site = weights[tensor.name]
            axis = site.axis if policy.per_channel else None
            values = numpy_helper.to_array(tensor)
            _check_finite(values, f"The weight {tensor.name}")
            numbers, scale = quantize_weight(values, kind, axis)
            _check_finite(scale, f"The scale of {tensor.name}")
            writer.constant(tensor.name, numbers)
            writer.constant(f"{tensor.name}_scale", scale)
            writer.constant(f"{tensor.name}_zero_point", np.zeros(scale.shape, numbers.dtype))
        else:
            graph.initializer.add().CopyFrom(tensor)

    replaced: dict[str, str] = {}
    for node in old.node:
        site = chosen.get(node.name)
        if site is None:
            graph.node.add().CopyFrom(node)
            continue
        if site.tensor is not None and site.tensor not in replaced:
            scale = half_precision_scale(
                np.maximum(ranges[site.tensor].magnitude, LARGEST[kind] * 2**-24) / LARGEST[kind]
            )
            _check_finite(scale, f"The scale for the range of {site.tensor}")
            name = f"{site.module}.input"
            writer.constant(f"{name}_scale", np.array(scale, np.float32))
            writer.constant(f"{name}_zero_point", np.zeros((), writer.dtype))
            narrowed = writer.node(site.module, "QuantizeLinear", site.tensor, name, None, shapes.get(site.tensor))
            replaced[site.tensor] = writer.node(
                site.module, "DequantizeLinear", narrowed, name, None, shapes.get(site.tensor)
            )
        if site.weight not in replaced:
            axis = site.axis if policy.per_channel else None
            replaced[site.weight] = writer.node(site.module, "DequantizeLinear", site.weight, site.weight, axis, None)
        copy = graph.node.add()
        copy.CopyFrom(node)
        narrow_inputs = {site.weight, site.tensor}
        copy.input[:] = [replaced[name] if name in narrow_inputs else name for name in node.input]

    expected = opset or max(result.opset_import[0].version, FP8_OPSET if kind == "fp8" else 0)
    if kind == "fp8" and expected < FP8_OPSET:
        raise CalibrationError(
            f"FP8 needs opset {FP8_OPSET} at least, and {expected} was asked for; leave --opset out.",
            code="unsupported_opset",
        )
    set_opset(result, expected)
    about = dataclasses.replace(
        manifest, precision=kind, sources={**manifest.sources, "fp32 graph": source, "calibration": table.digest}
    )
    for entry in result.metadata_props:
        if entry.key == METADATA_KEY:
            entry.value = about.to_json()
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
    if kind == "fp8":
        import ml_dtypes

        numbers = np.clip(scaled, -LARGEST[kind], LARGEST[kind]).astype(np.float32).astype(ml_dtypes.float8_e4m3fn)
    else:
        numbers = np.clip(np.rint(scaled), -LARGEST[kind], LARGEST[kind]).astype(np.int8)
    return numbers, scale.reshape(()) if axis is None else scale.reshape(-1)


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


def set_opset(model: onnx.ModelProto, opset: int) -> None:
    """Raise the opset of one of our graphs, up to 23.

    Nothing is converted: our operators read the same in all of these, but for `Split`, which must say into how many
    equal parts since 18. An operator that is not known to read the same is an error.
    """
    import onnx

    current = next(entry for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    if opset == current.version:
        return
    known = SAME_IN_ALL_OPSETS | {"QuantizeLinear", "DequantizeLinear"}
    strange = sorted({node.op_type for node in model.graph.node} - known)
    if strange or not current.version < opset <= NEWEST_OPSET:
        raise CalibrationError(
            f"A graph of opset {current.version} cannot be written as opset {opset}"
            + (f" (operators {', '.join(strange)})" if strange else f" (at most {NEWEST_OPSET}, never downwards)")
            + "; export it with `python -m export.to_onnx --opset`.",
            code="unsupported_opset",
        )
    for node in model.graph.node:
        if node.op_type == "Split" and len(node.input) < 2 and current.version < 18 <= opset:
            node.attribute.append(onnx.helper.make_attribute("num_outputs", len(node.output)))
    current.version = opset
    model.ir_version = max(model.ir_version, onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", opset)]))


def count_macs(model: onnx.ModelProto, query_length: int = 8) -> dict[str, tuple[int, bool]]:
    """Return for each operator that multiplies: multiply-adds of one query of so many words, and whether 8-bit.

    8-bit means that both factors come out of a DequantizeLinear.
    """
    import onnx

    inferred = onnx.shape_inference.infer_shapes(strip_weights(model))
    free = {"batch": 1, "query_length": query_length}
    shapes = {
        value.name: [free.get(size.dim_param, size.dim_value) for size in value.type.tensor_type.shape.dim]
        for value in (*inferred.graph.input, *inferred.graph.value_info, *inferred.graph.output)
    }
    shapes |= {tensor.name: list(tensor.dims) for tensor in model.graph.initializer}
    narrow_tensors = {node.output[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    counts = {}
    for node in model.graph.node:
        if node.op_type == "LSTM":
            gates, width = shapes[node.input[1]][1:]
            macs = query_length * gates * (width + shapes[node.input[2]][2])
        elif node.op_type == "Conv":
            macs = int(np.prod(shapes[node.output[0]]) * np.prod(shapes[node.input[1]][1:]))
        elif node.op_type in ("Gemm", "MatMul"):
            transposed = any(entry.name == "transA" and entry.i for entry in node.attribute)
            macs = int(np.prod(shapes[node.output[0]]) * shapes[node.input[0]][0 if transposed else -1])
        else:
            continue
        counts[node.name] = (macs, set(node.input[:2]) <= narrow_tensors)
    return counts


def quantized_mac_share(model: onnx.ModelProto) -> float:
    """Return the share of the multiply-adds whose factors are both 8-bit."""
    counts = count_macs(model).values()
    return sum(macs for macs, is_narrow in counts if is_narrow) / sum(macs for macs, _ in counts)


def attainable_share(model: onnx.ModelProto, kind: QuantDtype = "int8") -> float:
    """Return the share of the multiply-adds of an FP32 graph that becomes 8-bit when no module is kept out, 0 to 1."""
    computed = {
        site.node for site in find_quantizable_ops(model, QuantizationPolicy(), kind) if site.tensor is not None
    }
    counts = count_macs(model)
    return sum(counts[name][0] for name in computed) / sum(macs for macs, _ in counts.values())


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
    """Adds constants and Q/DQ nodes under free names of the house's kind."""

    def __init__(self, graph: onnx.GraphProto, kind: QuantDtype, taken: Collection[str]) -> None:
        self.graph = graph
        self.taken = set(taken)
        if kind == "fp8":
            import ml_dtypes

            self.dtype: Any = ml_dtypes.float8_e4m3fn
        else:
            self.dtype = np.int8

    def constant(self, name: str, values: np.ndarray) -> None:
        from onnx import numpy_helper

        self.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(values).reshape(values.shape), name))

    def node(
        self,
        module: str,
        op_type: str,
        tensor: str,
        constants: str,
        axis: int | None,
        like: onnx.ValueInfoProto | None,
    ) -> str:
        """Add a node that reads `constants`_scale and _zero_point; return its name, which is its output's too."""
        import onnx

        name, number = f"{module}/{op_type}", 1
        while name in self.taken:
            number += 1
            name = f"{module}/{op_type}_{number}"
        self.taken.add(name)
        inputs = [tensor, f"{constants}_scale", f"{constants}_zero_point"]
        options = {} if axis is None else {"axis": axis}
        self.graph.node.append(onnx.helper.make_node(op_type, inputs, [name], name=name, **options))
        if like is not None:
            value = self.graph.value_info.add()
            value.CopyFrom(like)
            value.name = name
            if op_type == "QuantizeLinear":
                value.type.tensor_type.elem_type = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(self.dtype))
        return name
