"""Test `benchmarks.serving`: wrong replies are detected, and the report is complete."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import serving
from runtime.core.errors import CheckFailed, GroundingError
from tests.raising import raises

pytest.importorskip("fastapi", reason="the service needs the extra [serve]")


@pytest.fixture
def load(planted: Path, models: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """A second of load on a small network, for which HTTP takes longer than the model."""
    monkeypatch.setattr(serving, "MIN_RATIO", 0.0)
    monkeypatch.setattr(serving, "WARM_UP_S", 0.1)
    options = {"seconds": 0.8, "turn": 0.4, "threads": 1, "questions": 12}
    return lambda **more: serving.serving(models / "drn.onnx", planted, **{**options, **more})


def test_load_report_has_all_fields_and_no_errors(load: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    report = load(concurrent=(1, 3), output=tmp_path / "load.json")
    assert json.loads((tmp_path / "load.json").read_text()) == report
    assert [level["concurrent"] for level in report["levels"]] == [1, 3]
    assert report["exit code"] == 0
    for level in report["levels"]:
        assert level["requests"] > 0
        assert (level["errors"], level["wrong"], level["rejected"]) == (0, 0, 0)
        assert level["of ground_batch"] > 0
        assert level["ms"]["p50"] <= level["ms"]["p95"] <= level["ms"]["p99"] <= level["ms"]["largest"]
        assert min(level["rss MiB"]) > 10


def test_other_answers_are_counted_wrong(load: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    right = serving._questions

    def mixed(*arguments: Any) -> Any:
        questions, expected = right(*arguments)
        return questions, [*expected[1:], expected[0]]

    monkeypatch.setattr(serving, "_questions", mixed)
    with raises(CheckFailed, "check_failed", [2]):
        load(concurrent=(2,), seconds=0.4)


def test_turn_longer_than_total_is_rejected(load: Callable[..., dict[str, Any]]) -> None:
    with raises(GroundingError, "invalid_option", "--turn"):
        load(turn=5)
