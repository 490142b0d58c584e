"""Define a benchmark report with known values."""

from __future__ import annotations

from typing import Any

import pytest

from runtime.benchmarking.report import (
    BATCH_SIZE,
    ONE_QUERY,
    Agreement,
    BenchmarkCase,
    Memory,
    ModelInfo,
    Phases,
    Report,
    Timing,
)
from runtime.benchmarking.system_info import Gpu, SystemState
from runtime.benchmarking.timing import Latency, Ratio, WarmUp

FAST, SLOW = "f" * 64, "5" * 64


def model_info(label: str, sha256: str, device: str = "cpu") -> ModelInfo:
    return ModelInfo(label, sha256, {label: sha256}, "fp32", "whole", device, 0.5, 0.6, 1.5, Memory(2**20))


def timing(model: str, ms: float, size: int = 1, **others: Any) -> Timing:
    case = BenchmarkCase(ONE_QUERY if size == 1 else BATCH_SIZE, "network", "host", size, size)
    return Timing(case, model, Latency.from_samples([ms / 1e3] * 20), **others)


@pytest.fixture
def report() -> Report:
    graphics = Gpu("H100", "575", 1200.0, 1980.0, 60.0, 300.0, 10.0, 100.0, ("heat (software)",))
    return Report(
        "2026-11-23",
        "python -m runtime.benchmark",
        {"cpu": "EPYC", "cores": 2, "gpu": "H100", "gpu_driver": "575"},
        {"numpy": "2.4"},
        {"samples": 20, "batch": 2, "device": "auto", "threads": 1},
        {"told": "Inputs are made up.", "made_up": True},
        [model_info("slow.onnx", SLOW), model_info("fast.onnx", FAST)],
        [Agreement("fast.onnx", 10, 0.9, 0.2, 3.5, 4, 0.05)],
        [
            timing("slow.onnx", 10, warm_up=WarmUp(9, (1.0, 2.0, 3.0), settled=False)),
            timing("fast.onnx", 4, speedup=Ratio(2.5, 2.4, 2.6, 20)),
            timing("slow.onnx", 12, size=2),
            Timing(BenchmarkCase(BATCH_SIZE, "network", "host", 2, 2), "fast.onnx", None, failed="It takes 1."),
        ],
        [Phases("slow.onnx", 1, 1, 20, {"tokenise": 1.0, "segment": 5.0, "encode": 10.0, "network": 9.0})],
        2**30,
        [SystemState("before", 0.1, 2600.0, "performance", None), SystemState("after", 1.1, 2600.0, None, graphics)],
        ["A note."],
        interrupted=False,
    )
