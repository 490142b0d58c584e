"""Quantize the graph of a clip feature extractor to INT8, with ranges measured on clips of videos."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np

from calib.errors import CalibrationError
from calib.graph.onnx_session import open_session
from calib.qdq_quantizer import QuantizationPolicy, channel_energies, write_qdq
from calib.range_estimation import METHODS, Method, MethodOption, collect_statistics

if TYPE_CHECKING:
    import onnx

log = logging.getLogger("drn")

# Minimum number of clips to calibrate on; fewer give the ranges of one scene.
MIN_CLIPS = 2
# Number of calibration clips on which methods are compared. A clip of a full network takes a second or more.
COMPARED_CLIPS = 3


def extractor_policy(graph: onnx.ModelProto, keep: Sequence[str] = (), *, unsigned: bool = False) -> QuantizationPolicy:
    """Return the policy that quantizes all convolutions and linear layers of an extractor.

    Args:
        graph: FP32 graph of the extractor.
        keep: modules that stay in higher precision.
        unsigned: whether inputs without negative values use all 256 steps; see `QuantizationPolicy`.
    """
    weights = {tensor.name for tensor in graph.graph.initializer}
    layers = (node.input[1] for node in graph.graph.node if node.op_type in ("Conv", "Gemm", "MatMul"))
    modules = dict.fromkeys(name.rpartition(".")[0] for name in layers if name in weights)
    return QuantizationPolicy(computed=tuple(modules), stored=(), keep=tuple(keep), unsigned=unsigned)


def quantize_extractor(
    graph: onnx.ModelProto,
    clips: Sequence[np.ndarray],
    method: MethodOption,
    policy: QuantizationPolicy,
    opset: int,
    threads: int | None = None,
) -> tuple[onnx.ModelProto, Method]:
    """Calibrate an extractor on clips, and return it with Q/DQ, and the method that selected the ranges.

    Args:
        graph: FP32 graph of `export.to_onnx`.
        clips: calibration clips, each (1, window, height, width, 3) uint8.
        method: how to select ranges; auto takes the method with the smallest error of the features on some of the
            clips.
        policy: policy that `extractor_policy` returned.

    Raises:
        CalibrationError: there are too few clips, a value is not finite, or no module remains to quantize.
    """
    if len(clips) < MIN_CLIPS:
        raise CalibrationError(
            f"Expected at least {MIN_CLIPS} calibration clips, got {len(clips)}. Give longer or more --calib-videos.",
            code="too_few_samples",
        )
    batches = (SimpleNamespace(clips=clip) for clip in clips)
    statistics = collect_statistics(graph, channel_energies(graph, policy), batches, threads)

    def quantized(name: Method) -> onnx.ModelProto:
        return write_qdq(graph, statistics.ranges(name, unsigned=policy.unsigned), policy, "int8", opset)

    if method != "auto":
        return quantized(method), method
    compared = clips[:: max(1, len(clips) // COMPARED_CLIPS)][:COMPARED_CLIPS]
    expected = _features(graph, compared, threads)
    errors = {}
    for name in METHODS:
        errors[name] = float(((_features(quantized(name), compared, threads) - expected) ** 2).sum())
        log.info("Ranges by %s: error of the features %.2e.", name, errors[name] / float((expected**2).sum()))
    best = min(METHODS, key=errors.__getitem__)
    return quantized(best), best


def _features(graph: onnx.ModelProto, clips: Sequence[np.ndarray], threads: int | None) -> np.ndarray:
    session = open_session(graph, threads, optimized=True)
    return np.concatenate([session.run(["features"], {"clips": clip})[0] for clip in clips]).astype(np.float64)
