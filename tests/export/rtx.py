"""Parse and build graphs with TensorRT-RTX, whose parser and ahead-of-time builder need no GPU.

It has the API of TensorRT 11 and is strongly typed, so a graph that builds has only operators and types of TensorRT.
"""

from __future__ import annotations

from typing import Any

import onnx
import pytest

Range = tuple[int, int, int]

SIZES: dict[str, Range] = {"batch": (1, 4, 8), "query_length": (1, 8, 16), "video": (1, 2, 4)}
"""Smallest, best and largest of the free sizes of our graphs."""


def build_with_rtx(model: onnx.ModelProto, *, capability: str = "8.6", **sizes: Range) -> bytes:
    """Return the plan that TensorRT-RTX builds from `model`; skip the test if TensorRT-RTX is not installed.

    Args:
        model: an exported graph.
        capability: compute capability to build for; FP8 needs 8.9.
        sizes: min, opt and max of dynamic sizes that differ from `SIZES`.

    Raises:
        AssertionError: the graph cannot be parsed or built; the message contains the log.
    """
    trt = pytest.importorskip(
        "tensorrt_rtx", reason="TensorRT-RTX is not installed (pip install tensorrt-rtx-cu13)", exc_type=ImportError
    )

    class Complaints(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.lines: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.lines.append(message)

    logger = Complaints()
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    parsed = parser.parse(model.SerializeToString())
    errors = [parser.get_error(index).desc() for index in range(parser.num_errors)]
    assert parsed, "does not parse: " + "; ".join(errors or logger.lines)

    settings = builder.create_builder_config()
    # Without a GPU the library needs a compute capability.
    settings.num_compute_capabilities = 1
    settings.set_compute_capability(getattr(trt.ComputeCapability, f"SM{capability.replace('.', '')}"), 0)
    profile = builder.create_optimization_profile()
    free = SIZES | sizes
    for value in model.graph.input:
        trios = [
            free[size.dim_param] if size.dim_param else (size.dim_value,) * 3
            for size in value.type.tensor_type.shape.dim
        ]
        profile.set_shape(value.name, *zip(*trios, strict=True))
    settings.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, settings)
    assert plan is not None, "parses but does not build: " + "; ".join(logger.lines)
    return bytes(plan)
