"""Measure what a CPU can do at most: multiply-adds a second in FP32 and in INT8, and bytes a second from memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from onnx import TensorProto, helper, numpy_helper, parser

from calib.graph.opset import MIN_OPSET
from runtime.backends.openvino_session import OpenVinoSession

Runs = dict[str, Callable[[int], Any]]


class Gemm:
    """A matrix product of the size of the network's layers, and a pass over memory: the limits of the machine.

    In torch, because NumPy ignores the number of threads; and in ONNX Runtime, which packs weights in advance.
    """

    SIZES = (512, 4608, 512)
    READ = 1 << 27
    PACKED = "GEMM, packed"

    def __init__(self, threads: int) -> None:
        rows, inner, columns = self.SIZES
        rng = np.random.default_rng(0)
        left, right = (rng.random(shape, np.float32) for shape in ((rows, inner), (inner, columns)))
        a, b = torch.from_numpy(left), torch.from_numpy(right)
        packed = packed_product(right, threads)
        self.runs: Runs = {"GEMM": lambda i: a @ b, self.PACKED: lambda i: packed.run(None, {"left": left})}
        # Larger than any cache.
        long = torch.ones(self.READ // 4)
        self.reading: Runs = {"reading memory": lambda i: long @ long}

    def rate(self, seconds: Mapping[str, float], name: str = "GEMM") -> float:
        """Return multiply-adds per second."""
        return math.prod(self.SIZES) / seconds[name]


class Int8Convolution:
    """A convolution of the size of the network's layers that OpenVINO computes in INT8."""

    SIZES = (32, 512, 1024, 64)
    NAME = "INT8 convolution"

    def __init__(self, threads: int) -> None:
        batch, inputs, outputs, length = self.SIZES
        model = parser.parse_model(f"""
            <ir_version: 8, opset_import: ["": {MIN_OPSET}]>
            convolution (float[{batch}, {inputs}, 1, {length}] data) => (float[{batch}, {outputs}, 1, {length}] result)
            <float scale = {{0.01}}, int8 data_zero = {{-128}}, int8 weight_zero = {{0}}>
            {{
                quantized = QuantizeLinear(data, scale, data_zero)
                dequantized = DequantizeLinear(quantized, scale, data_zero)
                kernel = DequantizeLinear(weight, scale, weight_zero)
                result = Conv <pads = [0, 1, 0, 1]> (dequantized, kernel)
            }}
        """)
        rng = np.random.default_rng(0)
        weight = rng.integers(-64, 65, (outputs, inputs, 1, 3), np.int8)
        model.graph.initializer.append(numpy_helper.from_array(weight, "weight"))
        session = OpenVinoSession(model.SerializeToString(), threads)
        data = rng.random((batch, inputs, 1, length), np.float32)
        self.runs: Runs = {self.NAME: lambda i: session.run(None, {"data": data})}

    def rate(self, seconds: Mapping[str, float]) -> float:
        """Return multiply-adds per second."""
        return 3 * math.prod(self.SIZES) / seconds[self.NAME]


def packed_product(right: np.ndarray, threads: int) -> ort.InferenceSession:
    """Return a session of ONNX Runtime that multiplies `left` by a constant."""
    inner, columns = right.shape
    left, product = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", width])
        for name, width in (("left", inner), ("product", columns))
    )
    node = helper.make_node("MatMul", ["left", "right"], ["product"])
    graph = helper.make_graph([node], "product", [left], [product], [numpy_helper.from_array(right, "right")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", MIN_OPSET)], ir_version=8)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
