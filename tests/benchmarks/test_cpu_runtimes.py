"""Test `benchmarks.cpu --compare`: model files, eager PyTorch and torch.compile in one table."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

from benchmarks.cpu import benchmark
from benchmarks.cpu_runtimes import COMPILED, EAGER, case_names
from calib.graph.split_model import split_graph, write_split_model
from tests.train.training.narrow import narrow_backbone

__all__ = ["narrow_backbone"]


def test_comparison_times_every_model_and_both_forms_of_pytorch(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[Any] = []

    def compile_nothing(model: Any, dynamic: bool) -> Any:
        compiled.append((model, dynamic))
        return model

    monkeypatch.setattr(torch, "compile", compile_nothing)
    threads = torch.get_num_threads()
    file = Path(shutil.copy(models / "drn.onnx", tmp_path))
    write_split_model(*split_graph(onnx.load(file)), file)
    report = benchmark(
        models / "drn.pt", file, compare=(file,), samples=2, batch=3, pairs=0, output=tmp_path / "report.json"
    )
    torch.set_num_threads(threads)
    assert [dynamic for _, dynamic in compiled] == [True]
    assert tuple(report["times eager"]) == case_names(3)
    for case, row in report["times eager"].items():
        assert list(row) == [EAGER, COMPILED, file.name]
        assert row[EAGER] == 1
        milliseconds = report["ms per query"][case]
        assert row[file.name] == pytest.approx(milliseconds[EAGER] / milliseconds[file.name])
    assert json.loads((tmp_path / "report.json").read_text())["times eager"] == report["times eager"]
