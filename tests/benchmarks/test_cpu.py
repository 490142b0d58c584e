"""Test `benchmarks.cpu`: the matrix product and its rates."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from benchmarks.cpu import benchmark
from benchmarks.machine_rates import Gemm, packed_product
from tests import tolerances
from tests.train.training.narrow import narrow_backbone

__all__ = ["narrow_backbone"]


def test_packed_product_equals_matrix_product() -> None:
    rng = np.random.default_rng(0)
    left, right = rng.random((5, 24), np.float32), rng.random((24, 7), np.float32)
    session = packed_product(right, 1)
    (actual,) = session.run(None, {"left": left})
    np.testing.assert_allclose(actual, left @ right, rtol=tolerances.HEADS)
    assert session.get_session_options().intra_op_num_threads == 1


def test_rates_are_multiply_adds_per_second(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Gemm, "SIZES", (4, 6, 5))
    monkeypatch.setattr(Gemm, "READ", 1 << 12)
    gemm = Gemm(1)
    for run in (*gemm.runs.values(), *gemm.reading.values()):
        run(0)
    assert gemm.rate({"GEMM": 0.5, "GEMM, packed": 0.25}) == math.prod((4, 6, 5)) / 0.5
    assert gemm.rate({"GEMM": 0.5, "GEMM, packed": 0.25}, "GEMM, packed") == 4 * 6 * 5 / 0.25


def test_report_has_every_ratio(split_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Gemm, "SIZES", (128, 1152, 128))
    monkeypatch.setattr(Gemm, "READ", 1 << 22)
    model, output = split_models / "drn.onnx", tmp_path / "cpu.json"
    benchmark(split_models / "drn.pt", model, samples=4, batch=4, pairs=20, videos=10, training=False, output=output)
    report = json.loads(output.read_text())
    assert report["speed-up over eager, batch 1"] > 0
    assert len(report["times eager"]) == 5
    shares = [share for name, share in report["the limit"].items() if name.endswith("of the limit")]
    assert len(shares) == 5
    assert min(shares) > 0
