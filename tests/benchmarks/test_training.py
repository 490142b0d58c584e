"""Test `benchmarks.training`: only steps with equal losses are timed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import training
from runtime.core.errors import GroundingError
from tests.raising import raises
from tests.train.training.narrow import narrow_backbone

__all__ = ["narrow_backbone"]


@pytest.fixture(autouse=True)
def threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "PRODUCT", (64, 64, 64))
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_training_report_has_all_fields(planted: Path, models: Path, tmp_path: Path) -> None:
    report = training.benchmark(
        data=planted, checkpoint=models / "drn.pt", queries=64, steps=2, batch_size=8, output=tmp_path / "speed.json"
    )
    assert json.loads((tmp_path / "speed.json").read_text()) == report
    assert report["queries"] == 64
    for number in (1, 2, 3):
        stage = report[f"stage {number}"]
        assert stage["times eager"] > 0
        assert stage["ms per step"] > 0
        assert ("ms per query, once" in stage) == (number == 2)
    # What is computed once is not computed in the steps of stage 2, which go forwards only through the rest.
    assert report["stage 2"]["multiply-adds per step, 1e9"] < 0.7 * report["stage 1"]["multiply-adds per step, 1e9"]
    assert len(report["queries delivered a second"]) == 3


def test_baseline_with_other_losses_is_not_timed(planted: Path, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.training_baseline.FOCAL_ALPHA", 0.3)
    with raises(GroundingError, "models_differ", 1):
        training.benchmark(data=planted, checkpoint=models / "drn.pt", queries=32, steps=1, batch_size=8)


def test_too_few_queries_are_rejected(planted: Path, models: Path) -> None:
    with raises(GroundingError, "too_few_queries", 4, "--batch-size"):
        training.benchmark(data=planted, checkpoint=models / "drn.pt", queries=4, batch_size=8)
