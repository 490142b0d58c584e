"""Test `benchmarks.cpu --compare`: model files, eager PyTorch and torch.compile in one table."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import cpu_runtimes
from benchmarks.cpu import benchmark
from benchmarks.cpu_runtimes import COMPILED, EAGER, case_names
from benchmarks.machine_rates import Gemm, Int8Convolution
from tests.train.training.narrow import narrow_backbone

__all__ = ["narrow_backbone"]


def test_comparison_times_every_model_and_both_forms_of_pytorch(
    split_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Gemm, "SIZES", (128, 1152, 128))
    monkeypatch.setattr(Gemm, "READ", 1 << 22)
    monkeypatch.setattr(Int8Convolution, "SIZES", (1, 32, 64, 16))
    compiled: list[Any] = []

    def compile_nothing(model: Any, dynamic: bool) -> Any:
        compiled.append((model, dynamic))
        return model

    monkeypatch.setattr(torch, "compile", compile_nothing)
    threads = torch.get_num_threads()
    file = split_models / "drn.onnx"
    report = benchmark(
        split_models / "drn.pt", file, compare=(file,), samples=2, batch=3, pairs=0, output=tmp_path / "report.json"
    )
    torch.set_num_threads(threads)
    assert [dynamic for _, dynamic in compiled] == [True]
    assert tuple(report["times eager"]) == case_names(3)
    for case, row in report["times eager"].items():
        assert list(row) == [EAGER, COMPILED, file.name]
        assert row[EAGER] == 1
        milliseconds = report["ms per query"][case]
        assert row[file.name] == pytest.approx(milliseconds[EAGER] / milliseconds[file.name])
        assert list(report["share of the limit"][case]) == [file.name]
    assert json.loads((tmp_path / "report.json").read_text())["times eager"] == report["times eager"]


def test_limit_adds_arithmetic_and_one_pass_over_weights(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Gemm, "SIZES", (10, 10, 10))
    monkeypatch.setattr(Gemm, "READ", 1 << 12)
    monkeypatch.setattr(Int8Convolution, "SIZES", (1, 8, 8, 4))
    gemm, int8 = Gemm(1), Int8Convolution(1)
    for run in (*gemm.runs.values(), *gemm.reading.values(), *int8.runs.values()):
        run(0)
    counts = {"fp32": 2000, "int8": 3 * 8 * 8 * 4}
    monkeypatch.setattr(cpu_runtimes, "audit_graph", lambda model, words: SimpleNamespace(total=lambda: counts))
    seconds = {"GEMM": 1.0, "GEMM, packed": 0.5, "INT8 convolution": 0.25, "reading memory": 2.0}
    file = models / "drn.onnx"
    limit = cpu_runtimes._limit(file, 7, 4, seconds, gemm, int8)
    assert limit == pytest.approx(2 * 0.5 + 0.25 + file.stat().st_size / (1 << 12) * 2.0 / 4)
