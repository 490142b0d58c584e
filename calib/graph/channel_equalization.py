"""Channels made alike before they share a scale: exact in FP32, and worth two bits in INT8.

One INT8 scale serves all channels of a tensor, and where their reach differs (the clip features, and everything a gate
multiplied: the median channel reaches a seventh of the loudest) most channels get 4 bits. So a channel is multiplied by
a power of two on its way in, and the weights that read it are divided by it. Before a gated convolution that costs
nothing, since the gate's own weights take the factor; before `prop_fc` it is one multiplication of the features.
Powers of two change no bit of what FP32 computes.

Source: SmoothQuant (Xiao et al., 2023), which also says where to stop: quiet channels made loud make their weights
quiet, so weights get a say in it.
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
"""Tensor to the exponent of two of each channel."""

MIGRATION_STRENGTH = 0.75
"""How much of the unevenness of a tensor is moved into the weights that read it; the rest stays."""
LARGEST_EXPONENT = 8


def equalizable_tensors(model: onnx.ModelProto) -> dict[str, tuple[str, str | None]]:
    """Return the tensors whose channels can be balanced: to the convolution that alone reads each, and its gate.

    The gate is the Gemm whose output multiplies the channels; None for the features, before which nothing can take the
    factor.
    """
    makers = {output: node for node in model.graph.node for output in node.output}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    results: dict[str, tuple[str, str | None]] = {}
    for conv in model.graph.node:
        if conv.op_type != "Conv" or len(readers[conv.input[0]]) != 1 or conv.input[0] not in makers:
            continue
        tensor, maker = conv.input[0], makers[conv.input[0]]
        if conv.name.startswith("prop_fc") and maker.op_type == "Unsqueeze":
            results[tensor] = (conv.name, None)
        elif maker.op_type == "Mul" and conv.name.startswith("backbone_net.layers"):
            gate = makers.get(maker.input[1])
            while gate is not None and gate.op_type == "Unsqueeze":
                gate = makers.get(gate.input[0])
            if gate is not None and gate.op_type == "Gemm" and len(gate.input) == 3:
                results[tensor] = (conv.name, gate.name)
    return results


def measure_channel_scales(
    model: onnx.ModelProto, batches: Iterable[Batch], threads: int | None = None, share: float = MIGRATION_STRENGTH
) -> dict[str, list[int]]:
    """Return the exponents for each balanced tensor from how far its channels reach over the batches."""
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
    """Return the exponent of two for each of C channels, (C,) integers, from the reach of values and of weights.

    Channels that never carry anything, or that nothing reads, are left alone.
    """
    alive = (reach > 0) & (weight > 0) & np.isfinite(reach)
    quiet = np.log2(np.where(alive, reach, 1)) - np.log2(reach[alive].max() if alive.any() else 1)
    heavy = np.log2(np.where(alive, weight, 1)) - np.log2(weight[alive].max() if alive.any() else 1)
    expected = np.rint(-share * quiet + (1 - share) * heavy)
    return np.where(alive, np.clip(expected, -LARGEST_EXPONENT, LARGEST_EXPONENT), 0).astype(int)


def apply_channel_scales(model: onnx.ModelProto, gains: ChannelScales) -> None:
    """Multiply channels by their powers of two and divide the weights that read them, in place.

    What the graph computes stays the same to the bit, short of overflow.
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
        factors = np.exp2(np.array(shifts, np.float32))
        reader = by_name[conv]
        scale(reader.input[1], 1 / factors[None, :, None, None])
        if gate is not None:
            columns = by_name[gate].input
            transposed = any(entry.name == "transB" and entry.i for entry in by_name[gate].attribute)
            scale(columns[1], factors[:, None] if transposed else factors)
            scale(columns[2], factors)
            continue
        module = conv.rpartition("/")[0]
        constant, product = f"{module}.gain", f"{module}/Mul"
        assert product not in by_name, product
        model.graph.initializer.append(numpy_helper.from_array(factors[:, None, None], constant))
        multiply = onnx.helper.make_node("Mul", [tensor, constant], [product], name=product)
        position = list(model.graph.node).index(reader)
        model.graph.node.insert(position, multiply)
        model.graph.node[position + 1].input[0] = product
        for value in list(model.graph.value_info):
            if value.name == tensor:
                copy = model.graph.value_info.add()
                copy.CopyFrom(value)
                copy.name = product


def balanced_name(model: onnx.ModelProto, tensor: str) -> str:
    """Return what a tensor is called once it is balanced: itself, or the product that was put behind it."""
    conv, gate = equalizable_tensors(model)[tensor]
    return tensor if gate is not None else f"{conv.rpartition('/')[0]}/Mul"
