"""Equalize the channels of tensors that share one INT8 scale, by powers of two, which are exact in FP32.

All channels of a tensor have one scale. The median channel of clip features, or of the output of a gate, reaches a
seventh of the largest one, so most channels have 4 to 5 bits. Equalization multiplies each channel by a power of two,
and divides the weights that read it. The weights of a gate absorb the factor; before `prop_fc` it is one multiplication
of the features.

Source: SmoothQuant (Xiao et al., 2023), which divides the unevenness between a tensor and the weights that read it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from calib.graph.onnx_session import observe
from runtime.core.batch import Batch

if TYPE_CHECKING:
    import onnx

ChannelScales = Mapping[str, Sequence[int]]
"""Tensor name to the exponent of two of each channel."""

# Share of the unevenness of a tensor that moves into the weights that read it.
MIGRATION_STRENGTH = 0.75
LARGEST_EXPONENT = 8


def equalizable_tensors(model: onnx.ModelProto) -> dict[str, tuple[str, str | None]]:
    """Return the tensors whose channels can be equalized.

    The gate of a tensor is the Gemm whose output multiplies its channels.

    Returns:
        Tensor name to the name of the convolution that alone reads it, and the name of its gate; None for the features.
    """
    producers = {output: node for node in model.graph.node for output in node.output}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    results: dict[str, tuple[str, str | None]] = {}
    for conv in model.graph.node:
        if conv.op_type != "Conv" or len(readers[conv.input[0]]) != 1 or conv.input[0] not in producers:
            continue
        tensor, producer = conv.input[0], producers[conv.input[0]]
        if producer.op_type == "Div":
            # `calib.graph.gate_normalization`: the gated features divided by a scalar per query.
            producer = producers.get(producer.input[0], producer)
        if conv.name.startswith("prop_fc") and producer.op_type == "Unsqueeze":
            results[tensor] = (conv.name, None)
        elif producer.op_type == "Mul" and conv.name.startswith("backbone_net.layers"):
            gate = producers.get(producer.input[1])
            while gate is not None and gate.op_type == "Unsqueeze":
                gate = producers.get(gate.input[0])
            if gate is not None and gate.op_type == "Gemm" and len(gate.input) == 3:
                results[tensor] = (conv.name, gate.name)
    return results


def measure_channel_scales(
    model: onnx.ModelProto, batches: Iterable[Batch], threads: int | None = None, share: float = MIGRATION_STRENGTH
) -> dict[str, list[int]]:
    """Return the exponents for each equalizable tensor from the largest magnitudes of its channels over the batches.

    Args:
        model: FP32 graph.
        batches: inputs of the calibration set.
        share: share of the unevenness to move into the weights, 0 to 1.
    """
    from onnx import numpy_helper

    where = equalizable_tensors(model)
    if not where:
        return {}
    reach: dict[str, Any] = dict.fromkeys(where, 0.0)
    for values in observe(model, list(where), batches, threads):
        for name, computed in values.items():
            reach[name] = np.maximum(reach[name], np.abs(computed).max(axis=(0, 2, 3)))
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    weights = {node.name: node.input[1] for node in model.graph.node if node.op_type == "Conv"}
    gains = {}
    for name, (conv, _) in where.items():
        weight = np.abs(numpy_helper.to_array(constants[weights[conv]])).max(axis=(0, 2, 3))
        gains[name] = exponents(reach[name], weight, share).tolist()
    return gains


def exponents(reach: np.ndarray, weight: np.ndarray, share: float = MIGRATION_STRENGTH) -> np.ndarray:
    """Return the exponents of two of C channels, (C,) integers; 0 for channels of zeros.

    Args:
        reach: (C,) largest magnitude of the values.
        weight: (C,) largest magnitude of the weights that read them.
        share: share of the unevenness to move into the weights, 0 to 1.
    """
    used = (reach > 0) & (weight > 0) & np.isfinite(reach)
    value_level = np.log2(np.where(used, reach, 1)) - np.log2(reach[used].max() if used.any() else 1)
    weight_level = np.log2(np.where(used, weight, 1)) - np.log2(weight[used].max() if used.any() else 1)
    exact = np.rint(-share * value_level + (1 - share) * weight_level)
    return np.where(used, np.clip(exact, -LARGEST_EXPONENT, LARGEST_EXPONENT), 0).astype(int)


def scale_factors(shifts: Sequence[int]) -> np.ndarray:
    """Return the factors of C exponents of two, (C, 1, 1) float32, to multiply a tensor (B, C, 1, T)."""
    return np.exp2(np.array(shifts, np.float32))[:, None, None]


def apply_channel_scales(model: onnx.ModelProto, gains: ChannelScales) -> None:
    """Multiply channels by their powers of two and divide the weights that read them, in place.

    The outputs of the graph stay bit-identical unless a value overflows.
    """
    import onnx
    from onnx import numpy_helper

    where = equalizable_tensors(model)
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    by_name = {node.name: node for node in model.graph.node}

    def scale(name: str, factors: np.ndarray) -> None:
        values = numpy_helper.to_array(constants[name])
        constants[name].CopyFrom(numpy_helper.from_array(np.ascontiguousarray(values * factors), name))

    for tensor, shifts in gains.items():
        conv, gate = where[tensor]
        factors = scale_factors(shifts)
        reader = by_name[conv]
        scale(reader.input[1], 1 / factors)
        if gate is not None:
            _, weight, bias = by_name[gate].input
            transposed = any(entry.name == "transB" and entry.i for entry in by_name[gate].attribute)
            scale(weight, factors[:, 0] if transposed else factors[:, 0, 0])
            scale(bias, factors[:, 0, 0])
            continue
        module = conv.rpartition("/")[0]
        constant, product = f"{module}.gain", f"{module}/Mul"
        assert product not in by_name, product
        model.graph.initializer.append(numpy_helper.from_array(factors, constant))
        multiply = onnx.helper.make_node("Mul", [tensor, constant], [product], name=product)
        position = list(model.graph.node).index(reader)
        model.graph.node.insert(position, multiply)
        model.graph.node[position + 1].input[0] = product
        for value in list(model.graph.value_info):
            if value.name == tensor:
                copy = model.graph.value_info.add()
                copy.CopyFrom(value)
                copy.name = product


def equalized_name(model: onnx.ModelProto, tensor: str) -> str:
    """Return the name of a tensor after equalization: its own, or that of the product that is inserted after it."""
    conv, gate = equalizable_tensors(model)[tensor]
    return tensor if gate is not None else f"{conv.rpartition('/')[0]}/Mul"
