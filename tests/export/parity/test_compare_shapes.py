"""Test the comparison of outputs at the limits of a model's shapes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export.parity import compare_shapes
from export.parity.compare_shapes import TOLERANCE, ShapeCheck, check_shapes, shapes_of
from export.verify import verify
from runtime import Grounder
from runtime.core.batch import Heads
from runtime.core.errors import CheckFailed
from runtime.datasets.dataset import DataSet
from tests.raising import raises


def test_verify_reports_three_shapes_of_an_onnx_file(models: Path, planted: Path, tmp_path: Path) -> None:
    model, output = models / "drn.onnx", tmp_path / "report.json"
    verify(model, model, planted, limit=9, threads=1, output=output)
    shapes = json.loads(output.read_text())["shapes"]
    longest = Grounder.load(model, "cpu", 1).manifest.max_query_length
    assert [(row["batch"], row["tokens"]) for row in shapes] == [(1, 1), (8, longest // 2), (32, longest)]
    assert all(0 <= row["deviation"] < row["tolerance"] == 1e-3 for row in shapes)


def _wrong_above(batch: int, error: float, model: Grounder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let batches of more than `batch` queries have wrong outputs, as a wrong kernel of an engine would."""
    run = model.network.run

    def wrong(tokens: np.ndarray, lengths: np.ndarray, encodings: Sequence[Any], index: np.ndarray) -> Heads:
        heads = run(tokens, lengths, encodings, index)
        if len(tokens) > batch:
            values = heads.boundary_distances.copy()
            values[-1, 0] += error * np.abs(values).max()
            heads = Heads(heads.matching_logits, values, heads.iou_logits)
        return heads

    monkeypatch.setattr(model.network, "run", wrong)


@pytest.mark.parametrize("error", [2 * TOLERANCE, np.nan])
def test_outputs_that_depend_on_the_batch_size_are_violations(
    models: Path, planted: Path, monkeypatch: pytest.MonkeyPatch, error: float
) -> None:
    model, data_set = Grounder.load(models / "drn.onnx", "cpu", 1), DataSet(planted)
    _wrong_above(8, error, model, monkeypatch)
    small, usual, large = check_shapes(models / "drn.onnx", model, data_set, data_set.annotations("test"))
    assert not small.violation()
    assert not usual.violation()
    assert large.deviation == (np.inf if np.isnan(error) else pytest.approx(error, rel=0.01))
    assert "32" in large.violation()


def test_verify_fails_for_a_shape(models: Path, planted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("export.verify.check_shapes", lambda *_: (ShapeCheck(32, 9, 0.2, 0.05),))
    output = tmp_path / "report.json"
    with raises(CheckFailed, "parity_failed", 32, 9, "20 %", "5 %"):
        verify(models / "drn.onnx", models / "drn.onnx", planted, limit=9, threads=1, output=output)
    assert json.loads(output.read_text())["shapes"][0]["deviation"] == 0.2


def test_shapes_of_an_engine_are_those_of_its_profiles(monkeypatch: pytest.MonkeyPatch) -> None:
    profiles = [
        {"name": "one", "batch": [1, 1, 1], "query_length": [1, 8, 32]},
        {"name": "several", "batch": [2, 32, 256], "query_length": [1, 8, 32]},
    ]
    monkeypatch.setattr(compare_shapes, "read_verified", lambda path: {"profiles": profiles})
    model: Any = None
    expected = [(1, 1), (1, 8), (1, 32), (2, 1), (32, 8), (256, 32)]
    assert list(shapes_of(Path("drn.fp16.engine"), model)) == expected
